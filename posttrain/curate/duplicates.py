"""Duplicates: rows that repeat an earlier one, to the letter or nearly, are dropped, and each names the row it repeats."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from posttrain.curate.rows import answers_of, messages_of, prompt_of, texts_of
from posttrain.curate.step import Bench, Candidate, Drop, Outcome, Step
from posttrain.curate.text import words
from posttrain.data.rows import Conversation, Pair, Row
from posttrain.parallel import map_chunks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Shingles = npt.NDArray[np.uint64]

ROWS_AT_ONCE = 500
MIN_RECALL = 0.999
"""Share of pairs at the very threshold that become candidates; above it, more."""
MAX_HASHES = 256
HASH_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that multiplying by it loses nothing modulo 2**64."""


class ExactDuplicates(Step):
    """Drop rows that repeat an earlier one, but for case and white space, and pairs whose two answers are the same."""

    name = "exact_duplicates"
    by: Literal["row", "prompt"] = "row"
    """What is compared: all messages, tools and checks, or only what is asked."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Keep the first of all that are the same."""
        first: dict[bytes, Candidate] = {}
        kept, dropped = [], []
        for candidate in candidates:
            row = candidate.row
            if isinstance(row, Pair) and _key(row.chosen) == _key(row.rejected):
                dropped.append(Drop(candidate.index, "same answers", "chosen and rejected do not differ"))
                continue
            key = _key(prompt_of(row) if self.by == "prompt" else [getattr(row, name) for name in _COMPARED[type(row)]])
            before = first.setdefault(key, candidate)
            if before is candidate:
                kept.append(candidate)
            else:
                dropped.append(Drop(candidate.index, "exact duplicate", f"the same {self.by}", before.row.origin))
        return Outcome(kept, dropped)


_COMPARED: dict[type[Row], tuple[str, ...]] = {
    Conversation: ("messages", "tools", "checks", "label"),
    Pair: ("prompt", "chosen", "rejected", "tools"),
}


def _said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _key(value: Any) -> bytes:
    return hashlib.sha256(_said(_folded(value)).encode()).digest()


def _folded(value: Any) -> Any:
    """The value with all text in one case and with single spaces."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {name: _folded(inner) for name, inner in value.items()}
    return [_folded(inner) for inner in value] if isinstance(value, list) else value


class NearDuplicates(Step):
    """Drop rows that nearly repeat one that is kept: the Jaccard similarity of their shingles is at or above a threshold.

      J(a, b) = |S(a) & S(b)| / |S(a) | S(b)|          S: the set of sequences of `ngram` words, in lower case

    Candidates come from MinHash signatures (Broder, 1997) in bands (Leskovec et al., 2014, chapter 3), by `rensa`; each is then
    verified on the shingles themselves, so what is dropped is a duplicate by the formula. Rows are taken one by one: each is
    compared with those kept so far, so no two rows that are kept are alike (but for one such pair in a thousand at the very
    threshold), and every dropped row is alike to the kept row that it names. Lee et al. (2022) show what this is good for.
    """

    name = "near_duplicates"
    threshold: float = Field(0.8, ge=0.3, le=1)
    """Least similarity of duplicates, from 0 (nothing in common) to 1 (the same shingles)."""
    ngram: int = Field(5, ge=1)
    """Words of a shingle; a text of fewer words is one shingle."""
    by: Literal["row", "prompt", "answer"] = "row"
    """What is compared: all messages, or only what is asked, or only what is answered."""
    keep: Literal["first", "longest"] = "first"
    """Which of several duplicates is kept."""

    def run(self, candidates: Sequence[Candidate], bench: Bench) -> Outcome:
        """Keep the first, or the longest, of all that are nearly the same."""
        import rensa

        num_bands, band_size = choose_bands(self.threshold)
        num_hashes = num_bands * band_size
        index = rensa.RMinHashLSH(self.threshold, num_hashes, num_bands)
        shingles = self._shingle(candidates, bench)
        order = list(range(len(candidates)))
        if self.keep == "longest":
            order.sort(key=lambda position: (-len(shingles[position]), position))
        dropped, num_verified = {}, 0
        for start in range(0, len(order), ROWS_AT_ONCE):
            positions = order[start : start + ROWS_AT_ONCE]
            signatures = rensa.RMinHash.from_token_sets([_tokens(shingles[p]) for p in positions], num_hashes, bench.seed)
            for position, signature in zip(positions, signatures, strict=True):
                mine, best = shingles[position], (0.0, 0)
                for other in sorted(index.query(signature)) if len(mine) else ():
                    theirs = shingles[other]
                    if min(len(mine), len(theirs)) < self.threshold * max(len(mine), len(theirs)):
                        continue  # sets of such different sizes cannot be that similar
                    num_verified += 1
                    best = max(best, (jaccard(mine, theirs), -other))
                if best[0] >= self.threshold:
                    origin = candidates[-best[1]].row.origin
                    dropped[position] = Drop(candidates[position].index, "near duplicate", f"similarity {best[0]:.3f}", origin)
                elif len(mine):
                    index.insert(position, signature)
            bench.progress.step(min(len(order), start + ROWS_AT_ONCE))
        kept = [candidate for position, candidate in enumerate(candidates) if position not in dropped]
        facts = {"num_bands": num_bands, "band_size": band_size, "pairs_verified": num_verified}
        return Outcome(kept, [dropped[position] for position in sorted(dropped)], facts=facts)

    def _shingle(self, candidates: Sequence[Candidate], bench: Bench) -> "list[Shingles]":
        def work(chunk: Sequence[int]) -> "list[Shingles]":
            hashes = WordHashes()
            return [shingle(words(self._text(candidates[position].row)), self.ngram, hashes) for position in chunk]

        return [array for chunk in map_chunks(work, range(len(candidates)), chunk_size=ROWS_AT_ONCE) for array in chunk]

    def _text(self, row: Row) -> str:
        if self.by == "prompt":
            return prompt_of(row)
        if self.by == "answer":
            return "\n".join(answers_of(row))
        # What a tool is called with is part of what is said, and may be all in which two rows differ.
        calls = [_said(message.get("tool_calls", "")) for message in messages_of(row)]
        return "\n".join([*texts_of(row), *calls])


class WordHashes(dict[str, int]):
    """64 bits for each word, the same on every machine."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


def shingle(sequence: Sequence[str], ngram: int, hashes: WordHashes) -> "Shingles":
    """The set of the sequences of `ngram` words, as sorted 64-bit hashes `(S,)`; empty where there is no word."""
    import numpy as np

    ngram = min(ngram, len(sequence))
    if ngram == 0:
        return np.empty(0, np.uint64)
    of_words = np.fromiter(map(hashes.__getitem__, sequence), np.uint64, len(sequence))
    total = np.zeros(len(sequence) - ngram + 1, np.uint64)
    for start in range(ngram):
        total = total * np.uint64(HASH_FACTOR) + of_words[start : start + len(total)]
    return np.unique(total)


def jaccard(a: "Shingles", b: "Shingles") -> float:
    """The Jaccard similarity of two sorted sets `(A,)` and `(B,)`."""
    import numpy as np

    common = int(np.isin(a, b, assume_unique=True).sum())
    return common / (len(a) + len(b) - common)


def choose_bands(threshold: float) -> tuple[int, int]:
    """The number of bands and the hashes in each: the longest bands with which `MIN_RECALL` of pairs at the threshold collide in one.

    Two rows of similarity s collide with probability 1 - (1 - s^r)^b, for b bands of r hashes.
    """
    if threshold == 1:
        return 1, 16
    fitting = []
    for band_size in range(1, 17):
        num_bands = math.ceil(math.log(1 - MIN_RECALL) / math.log(1 - threshold**band_size))
        if num_bands * band_size <= MAX_HASHES:
            fitting.append((num_bands, band_size))
    return max(fitting, key=lambda bands: bands[1])


def _tokens(shingles: "Shingles") -> list[bytes]:
    raw = shingles.tobytes()
    return [raw[start : start + 8] for start in range(0, len(raw), 8)]
