"""Contamination: leaves out rows that repeat an item of an evaluation set, word for word or rephrased.

  n-gram:      |grams(row) & grams(item)| / min(|grams(row)|, |grams(item)|) >= share                (Brown et al., 2020, app. C)
  similarity:  s >= similarity  and  s - (r_row + r_item) / 2 >= margin,   s = cos(row, item)        (Yang et al., 2023)
               r_row: mean s of the row and its nearest items of rank 11 to 60; r_item likewise      (Conneau et al., 2018, CSLS)

Papers: "Language Models are Few-Shot Learners", arXiv 2005.14165; "Rethinking Benchmark and Contamination for Language Models
with Rephrased Samples", arXiv 2311.04850; "Word Translation Without Parallel Data", arXiv 1710.04087.

Differences from Brown et al.: 1. 8 words instead of 13, and half of the shorter text instead of any one n-gram: questions are
short, and templates share n-grams; 2. an item of fewer than 8 words must be a whole line of the row, or all of it.
Differences from Yang et al.: 3. no language model judges the nearest items, so near must mean nearer than neighbours are: among
texts of one subject every two are similar, and a threshold alone would drop most of GSM8K for any part of it; 4. what an item
asks for after a long text, its last line, is compared too, since rephrases leave the text out.
Differences from CSLS: 5. the mean of both sides instead of their sum, so that it is a cosine; 6. the ten nearest are not
counted, since they may all be copies.

Measured by `benchmarks/contamination.py`, on 389 rephrases of MMLU questions among questions of GSM8K: n-grams find none.
MiniLM at 0.6 finds 96 % and drops none of 7,473 clean rows; of GSM8K against other questions of GSM8K it drops 0.3 %, by the
cosine alone 79 %. Hidden states of SmolLM2-135M at 0.35 find 95 % and drop 0.2 % of 2,500 clean rows, but 60 % of GSM8K against
GSM8K: where the evaluation sets ask what the data ask, name an embedder. The thresholds were chosen on these very data.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import regex
from pydantic import Field, model_validator

from posttrain.curate.embed import EmbeddingStep, embed
from posttrain.curate.rows import answers_of, prompt_of
from posttrain.curate.step import Bench, Candidate, Drop, Outcome
from posttrain.data.rows import Row
from posttrain.parallel import map_chunks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from posttrain.curate.embed import Vectors

    Matrix = npt.NDArray[np.float32]

SHORT_LINE_WORDS = 4
"""A last line of fewer words is no question by itself."""
NEIGHBOURS = (10, 60)
"""Ranks, from 0, of the neighbours that say how near others are."""
ROWS_AT_ONCE = 1000
CELLS_AT_ONCE = 1 << 24
"""Similarities that are in memory at once."""
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts without spaces between words: each character counts as one."""
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[\w--[_{UNSPACED}]]+", regex.VERSION1)


class Contamination(EmbeddingStep):
    """Drops rows that repeat an item of the evaluation sets in `decontaminate`."""

    name: ClassVar[str] = "contamination"
    always_reads: ClassVar[tuple[str, ...]] = ("decontaminate",)

    ngram: int = Field(8, ge=2)
    """Words of an n-gram. An item of fewer words is found where it is a whole line of the row."""
    share: float = Field(0.5, ge=0, le=1)
    """Least share of the shorter text's n-grams that the other has too; 0: any one n-gram."""
    similarity: float | None = Field(None, gt=0, lt=1)
    """Least cosine of a rephrase and its item, about 0.6 for MiniLM and 0.35 for a policy; by default n-grams alone are compared."""
    margin: float | None = Field(None, ge=0, lt=2)
    """By how much a rephrase is nearer to its item than other texts are to both; by default half of `similarity`. 0: no matter."""
    answers: bool = False
    """Compare prompts together with their answers, instead of prompts alone."""

    @model_validator(mode="after")
    def _settings_have_effect(self) -> "Contamination":
        for field in ("embedder", "margin"):
            if getattr(self, field) is not None and self.similarity is None:
                raise ValueError(f"{field}: has no effect without similarity; set that too, such as to 0.6")
        return self

    @property
    def reads_policy(self) -> bool:
        """Whether these settings take vectors from the policy."""
        return self.similarity is not None and self.embedder is None

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Drop what repeats an item; word for word is looked for first."""
        items = read_items(bench, answers=self.answers)
        texts = [self._text(candidate.row) for candidate in candidates]
        found = [(overlap, "n-gram") if overlap else None for overlap in self.overlaps(texts, items, bench)]
        if self.similarity is not None:
            rest = [position for position, match in enumerate(found) if match is None]
            for position, near in zip(rest, self.similar([texts[position] for position in rest], items, bench), strict=True):
                found[position] = (near, "similarity") if near else None
        kept, dropped = [], []
        for candidate, match in zip(candidates, found, strict=True):
            if match is None:
                kept.append(candidate)
                continue
            (score, number), how = match
            item = items[number]
            dropped.append(Drop(candidate.index, f"{self.name}: {how}", f"{score:.2f}, {item.source}", item.origin))
        hit = {match[0][1] for match in found if match}
        by_set = {name: sum(items[number].source == name for number in hit) for name in dict.fromkeys(item.source for item in items)}
        return Outcome(kept, dropped, facts={"items": len(items), "items found": by_set})

    def overlaps(self, texts: Sequence[str], items: "Sequence[Item]", bench: Bench) -> "list[Match | None]":
        """Of each text the item with the largest share of n-grams, where that is enough."""
        bench.progress.phase(f"{self.name}: n-grams", len(texts))
        index = NgramIndex([item.text for item in items], self.ngram)
        matches: list[Match | None] = []
        for chunk in map_chunks(lambda chunk: [index.best(text) for text in chunk], texts, chunk_size=ROWS_AT_ONCE):
            matches += [match if match and match[0] >= self.share else None for match in chunk]
            bench.progress.step(len(matches))
        return matches

    def similar(self, texts: Sequence[str], items: "Sequence[Item]", bench: Bench) -> "list[Match | None]":
        """Of each text the nearest item, where it is near enough, and nearer than others are."""
        import numpy as np

        if not texts:
            return []
        at_least = self.similarity
        assert at_least is not None, "it is what asks for this comparison"
        views = [(number, view) for number, item in enumerate(items) for view in views_of(item.text)]
        vectors = embed([*texts, *(view for _, view in views)], self, bench)
        owners = np.array([number for number, _ in views])
        nearness = Nearness(vectors[: len(texts)], vectors[len(texts) :], owners)
        bench.progress.phase(f"{self.name}: nearest items", len(texts))
        # Measured, so that one rank decides for all: two machines may round differently.
        around_items = bench.measure("around_items", [None], lambda _: nearness.around_items()[None], chunk_size=1)[0]
        best = bench.measure(
            "nearest_items", range(len(texts)), lambda rows: nearness.best(rows, around_items, at_least), chunk_size=ROWS_AT_ONCE
        )
        least_margin = at_least / 2 if self.margin is None else self.margin
        near = [s >= at_least and (least_margin == 0 or margin >= least_margin) for s, margin, _ in best]
        return [(float(s), int(item)) if is_near else None for is_near, (s, _, item) in zip(near, best, strict=True)]

    def _text(self, row: Row) -> str:
        return "\n".join([prompt_of(row), *answers_of(row)]) if self.answers else prompt_of(row)


Match = tuple[float, int]
"""A score, and the number of the item."""


@dataclass(frozen=True, slots=True)
class Item:
    """An item of an evaluation set: what is compared of it, the set's name in the pipeline file, and where it stands."""

    text: str
    source: str
    origin: str


def read_items(bench: Bench, *, answers: bool) -> list[Item]:
    """The items of all evaluation sets, in order; with `answers` each with its answers."""
    from posttrain.data.source import open_source

    items = []
    for given in bench.context.inputs["decontaminate"]:
        for row in open_source(given.data, f"{bench.context.at}: {given.name}").rows():
            text = "\n".join([prompt_of(row), *answers_of(row)]) if answers else prompt_of(row)
            items.append(Item(text, given.name, row.origin))
    return items


def words_of(text: str) -> list[str]:
    """The words of a text, without case, punctuation and differences of Unicode form."""
    words: list[str] = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return words


def views_of(text: str) -> list[str]:
    """The whole text, and its last line where that can be a question by itself."""
    whole = text.strip()
    last = whole.rpartition("\n")[2].strip()
    return [whole, last] if last != whole and len(words_of(last)) >= SHORT_LINE_WORDS else [whole]


class NgramIndex:
    """Which items hold which n-gram, and which are too short to hold one."""

    def __init__(self, items: Iterable[str], num_words: int) -> None:
        self.num_words = num_words
        self.holders: dict[str, list[int]] = {}
        self.num_grams: dict[int, int] = {}
        self.short: dict[str, int] = {}
        for number, text in enumerate(items):
            words = words_of(text)
            if len(words) < num_words:
                if words:
                    self.short.setdefault(" ".join(words), number)
                continue
            grams = self._grams(words)
            self.num_grams[number] = len(grams)
            for gram in grams:
                self.holders.setdefault(gram, []).append(number)

    def best(self, text: str) -> Match | None:
        """The item that shares most with `text`, and its share; the first of equals, None where none shares anything."""
        words = words_of(text)
        for line in (words, *map(words_of, text.splitlines())):
            if (number := self.short.get(" ".join(line))) is not None:
                return 1.0, number
        grams = self._grams(words)
        shared = Counter(number for gram in grams for number in self.holders.get(gram, ()))
        shares = {number: count / min(len(grams), self.num_grams[number]) for number, count in shared.items()}
        best = min(shares, key=lambda number: (-shares[number], number), default=None)
        return None if best is None else (shares[best], best)

    def _grams(self, words: Sequence[str]) -> set[str]:
        return {" ".join(words[start : start + self.num_words]) for start in range(len(words) - self.num_words + 1)}


@dataclass(frozen=True, slots=True)
class Nearness:
    """Similarities of rows `(N, D)` and items, of which each owns one or several views `(V, D)`; the largest counts."""

    rows: "Vectors"
    views: "Vectors"
    owners: "npt.NDArray[np.int64]"
    """Number of the item that owns each view, ascending, `(V,)`."""

    @property
    def num_items(self) -> int:
        """Items that own views."""
        return int(self.owners[-1]) + 1

    def similarities(self, rows: Sequence[int]) -> "Matrix":
        """Cosines of the given rows and all items, `(R, num_items)`."""
        import numpy as np

        starts = np.flatnonzero(np.diff(self.owners, prepend=-1))
        largest: Matrix = np.maximum.reduceat(self.rows[rows[0] : rows[-1] + 1] @ self.views.T, starts, axis=1)
        return largest

    def around_items(self) -> "Matrix":
        """Mean similarity of each item and its neighbours among the rows, `(num_items,)`."""
        import numpy as np

        nearest = np.empty((self.num_items, 0), dtype=np.float32)
        size = max(1, CELLS_AT_ONCE // len(self.views))
        for start in range(0, len(self.rows), size):
            block = self.similarities(range(start, min(start + size, len(self.rows)))).T
            nearest = largest(np.concatenate([nearest, block], axis=1), NEIGHBOURS[1])
        return around(nearest, len(self.rows))

    def best(self, rows: Sequence[int], around_items: "Matrix", at_least: float) -> "Matrix":
        """Of each row the item with the largest margin among those at least so similar: similarity, margin, item, `(R, 3)`."""
        import numpy as np

        found = []
        size = max(1, CELLS_AT_ONCE // len(self.views))
        for start in range(0, len(rows), size):
            block = self.similarities(rows[start : start + size])
            here = around(largest(block, NEIGHBOURS[1]), block.shape[1])
            margins = block - (here[:, None] + around_items[None]) / 2
            item = np.where(block >= at_least, margins, -np.inf).argmax(axis=1)
            each = np.arange(len(block))
            found.append(np.stack([block[each, item], margins[each, item], item], axis=1))
        return np.concatenate(found).astype(np.float32)


def around(nearest: "Matrix", num_others: int) -> "Matrix":
    """Mean similarity of the neighbours of each, `(N,)`, from its largest similarities in falling order `(N, K)`.

    Among few others, a quarter of them may be copies instead of ten, but at least one; of a single one nothing is known: 0.
    """
    first = max(1, min(NEIGHBOURS[0], num_others // 4))
    return nearest[:, first : NEIGHBOURS[1]].mean(axis=1) if num_others > 1 else nearest[:, 0] * 0


def largest(similarities: "Matrix", number: int) -> "Matrix":
    """The `number` largest of each row, in falling order."""
    import numpy as np

    if similarities.shape[1] > number:
        similarities = -np.partition(-similarities, number - 1, axis=1)[:, :number]
    return -np.sort(-similarities, axis=1)
