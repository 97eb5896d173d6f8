"""Inspection: rows as a stage's model will see them, token by token, with what is trained and what is cut.

Needs the tokenizer and the chat contract of the stage's policy, and no weights, but to sort rows by loss.
"""

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.chat import ChatContract, Encoded
from posttrain.data.rows import Row
from posttrain.data.samples import Encoder, LeftOut
from posttrain.data.source import OpenSource
from posttrain.error import UserError
from posttrain.parallel import map_chunks
from posttrain.sandbox import OverLimit
from posttrain.stage import Input

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

TEMPLATE = Path(__file__).parent / "inspection.html.j2"
LOOK = Path(__file__).parent / "report" / "look.css"
"""What all pages share."""
ROWS_AT_ONCE = 200
SCORED_AT_ONCE = 2048
"""Tokens of rows whose loss is computed at once."""
FOLDED_TOKENS = 12
"""Tokens shown of either end of a prompt that is folded."""
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Characters that steer a terminal, turn the direction of text, or hide text; those within words and emoji are not among them."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a row, as text."""

    id: int
    text: str
    """Its part of the decoded text; empty for all but the last of the tokens that make one character."""
    is_trained: bool
    is_special: bool
    is_cut: bool
    """Whether it lies beyond `max_length`, so that the model never sees it."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """A row, and what becomes of it."""

    index: int
    """Its number in the stage's data, from 0."""
    origin: str
    parts: dict[str, list[Token]]
    """One part for a conversation, named by its label; `chosen` and `rejected` for a pair. None where the row cannot be rendered."""
    fate: str
    """What becomes of it: how much is trained, how much is cut, or why it is left out."""
    loss: float | None = None
    """Mean loss of its trained tokens, where rows were sorted by it."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the two parts of a pair begin with alike; 0 for a conversation."""
        if len(self.parts) < 2:
            return 0
        alike = itertools.takewhile(
            lambda pair: pair[0].id == pair[1].id and not pair[0].is_trained, zip(*self.parts.values(), strict=False)
        )
        return sum(1 for _ in alike)


def choose(
    source: OpenSource,
    encoder: Encoder,
    *,
    rows: Sequence[int],
    worst: str | None,
    num_rows: int,
    losses: Callable[[list[Row]], list[float]],
) -> list[tuple[int, Row, float | None]]:
    """The rows to look at: those of the numbers `rows`, or the `num_rows` worst by `length` or `loss`, or the first ones.

    `losses` gives the mean loss of each row. Raises `UserError` where there is no row of a number.
    """

    def numbered() -> Iterator[tuple[int, Row]]:
        return enumerate(encoder.rows(source.rows()))

    if rows:
        wanted = set(rows)
        found = {index: row for index, row in itertools.takewhile(lambda r: r[0] <= max(wanted), numbered()) if index in wanted}
        if missing := sorted(wanted - found.keys()):
            raise UserError(f"--row {missing[0]}: {source.at} has no row of that number; they are counted from 0")
        return [(index, found[index], None) for index in rows]
    if worst is None:
        return [(index, row, None) for index, row in itertools.islice(numbered(), num_rows)]
    if worst == "length":
        measured: Iterable[float] = itertools.chain.from_iterable(
            map_chunks(lambda chunk: [_length(encoder, row) for _, row in chunk], numbered(), chunk_size=ROWS_AT_ONCE)
        )
    else:
        measured = losses([row for _, row in numbered()])
    highest = dict(heapq.nlargest(num_rows, enumerate(measured), key=lambda measure: (measure[1], -measure[0])))
    by_index = {index: row for index, row in numbered() if index in highest}
    return [(index, by_index[index], value if worst == "loss" else None) for index, value in highest.items()]


def inspect(encoder: Encoder, tokenizer: "PreTrainedTokenizerBase", index: int, row: Row, loss: float | None = None) -> Inspected:
    """What the model sees of a row, and what becomes of it."""
    try:
        sequences = encoder.sequences(row)
    except LeftOut as fault:
        return Inspected(index, row.origin, {}, f"left out: {fault}", loss)
    except OverLimit:
        raise
    except UserError as fault:
        return Inspected(index, row.origin, {}, f"refused: {fault}", loss)
    parts = {name: _tokens(tokenizer, encoded, encoder.max_length) for name, encoded in sequences.items()}
    try:
        sample = encoder.cut(row, sequences)
    except LeftOut as fault:
        return Inspected(index, row.origin, parts, f"left out: {fault}", loss)
    except UserError as fault:
        return Inspected(index, row.origin, parts, f"refused: {fault}", loss)
    num_tokens = sum(len(part) for part in parts.values())
    cut = sum(token.is_cut for part in parts.values() for token in part)
    fate = f"{num_tokens} tokens, {len(sample.targets)} trained"
    if sample.label is not None:
        fate += f", {'desirable' if sample.label else 'undesirable'}"
    if cut:
        fate += f", {cut} cut off" + (" with a stop token" if sample.is_unstopped else "")
    return Inspected(index, row.origin, parts, fate, loss)


def losses_of(
    encoder: Encoder, given: Input, tokenizer: "PreTrainedTokenizerBase", contract: ChatContract, rows: Sequence[Row], at: str
) -> Iterator[tuple[int, float]]:
    """The number of each row and the mean loss of its trained tokens under a policy, as they are computed; of a pair the chosen answer's.

    A row that is not trained on has none, and is not given. Raises `UserError` where the policy's weights are not there.
    """
    import torch

    from posttrain.forward import Scorer
    from posttrain.layout import conversation_group
    from posttrain.models import check_weights, load_policy

    check_weights(given, at)
    model = load_policy(given.model, tokenizer, contract, f"{at}: {given.name}", dtype=torch.float32).eval()
    groups, numbers = [], []
    for number, row in enumerate(rows):
        try:
            sequences = encoder.sequences(row)
            encoder.cut(row, sequences)
        except OverLimit:
            raise
        except UserError:
            continue
        encoded = next(iter(sequences.values()))
        if not any(encoded.trained):
            continue
        groups.append(conversation_group(encoded.ids[: encoder.max_length], encoded.trained[: encoder.max_length]))
        numbers.append(number)
    if not groups:
        return
    scorer = Scorer(model, longest=max(group.longest for group in groups), pad=0)
    for positions in scorer.batches(groups, SCORED_AT_ONCE):
        for position, (log_probs,) in zip(positions, scorer.score([groups[position] for position in positions]), strict=True):
            yield numbers[position], -float(log_probs.mean())


def as_json(inspected: Inspected) -> dict[str, Any]:
    """The row as the model sees it: `row`, `tokens`, `ids` and `trained`; under what its parts are named, if they are."""
    parts = {name: {"row": inspected.index, **_kept(tokens)} for name, tokens in (inspected.parts or {"": []}).items()}
    return parts[""] if set(parts) == {""} else {"row": inspected.index, **parts}


def show(inspected: Inspected, console: "Console") -> None:
    """Print a row: trained tokens in green, control tokens in magenta, what is cut struck through, what is unseen spelt."""
    from rich.table import Table

    loss = "" if inspected.loss is None else f", loss {inspected.loss:.3f}"
    console.print(f"\nrow {inspected.index}  {visible(inspected.origin)}", style="cyan", highlight=False, soft_wrap=True)
    console.print(f"{visible(inspected.fate)}{loss}", style="bold", highlight=False, soft_wrap=True)
    plain = not console.is_terminal
    if len(inspected.parts) == 1:
        (tokens,) = inspected.parts.values()
        console.print(_text(tokens, plain=plain), soft_wrap=True)
    elif inspected.parts:
        shared = inspected.num_prompt_tokens
        console.print(_folded(next(iter(inspected.parts.values()))[:shared], plain=plain), soft_wrap=True)
        sides: list[RenderableType] = [_text(tokens[shared:], plain=plain) for tokens in inspected.parts.values()]
        if plain:
            for name, side in zip(inspected.parts, sides, strict=True):
                console.print(f"{name}:", side, soft_wrap=True)
            return
        table = Table(*inspected.parts, expand=True, show_lines=True)
        table.add_row(*sides)
        console.print(table)


def write_html(inspected: Sequence[Inspected], path: Path, *, title: str, summary: Sequence[str]) -> None:
    """Write the rows as one page that needs nothing else, and in which nothing that data say can run or be fetched."""
    from jinja2 import Environment
    from markupsafe import Markup

    from posttrain import disk

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    look = Markup(LOOK.read_text(encoding="utf-8"))  # noqa: S704 - it is ours
    disk.write_text(path, template.render(look=look, title=title, summary=summary, rows=inspected))


def visible(text: str) -> str:
    """The text with what cannot be seen in it spelt, as `\\u202e`: it could play tricks on the page, the terminal, and whoever reads."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _length(encoder: Encoder, row: Row) -> float:
    try:
        return max(len(encoded.ids) for encoded in encoder.sequences(row).values())
    except OverLimit:
        raise
    except UserError:
        return 0


def _tokens(tokenizer: "PreTrainedTokenizerBase", encoded: Encoded, max_length: int) -> list[Token]:
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = zip(encoded.ids, _pieces(tokenizer, encoded.ids), encoded.trained, strict=True)
    return [Token(id_, text, trained, id_ in special, place >= max_length) for place, (id_, text, trained) in enumerate(pieces)]


def _pieces(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> Iterator[str]:
    """The text of each token, such that all of them together are the decoded text."""
    if not tokenizer.is_fast:
        yield from (str(tokenizer.decode([id_])) for id_ in ids)
        return
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    for id_ in ids:
        yield stream.step(tokenizer.backend_tokenizer, id_) or ""


def _kept(tokens: list[Token]) -> dict[str, list[Any]]:
    kept = [token for token in tokens if not token.is_cut]
    return {
        "tokens": [token.text for token in kept],
        "ids": [token.id for token in kept],
        # The first token is predicted from nothing, so it is never trained.
        "trained": [token.is_trained and place > 0 for place, token in enumerate(kept)],
    }


def _text(tokens: Sequence[Token], *, plain: bool) -> "Text":
    """Tokens as one text; without colours, what is trained stands in brackets that no data is likely to hold."""
    from rich.text import Text

    text = Text(overflow="fold")
    for key, group in itertools.groupby(tokens, key=lambda token: (token.is_cut, token.is_trained and not (plain and token.is_cut))):
        is_cut, is_trained = key
        if plain:
            opening, closing = ("⟪", "⟫") if is_trained else ("", "")
            content = visible("".join(token.text for token in group))
            text.append(f"✂{content}✂" if is_cut else f"{opening}{content}{closing}")
            continue
        for token in group:
            colour = "strike red" if is_cut else "bold green" if is_trained else "default"
            style = f"{colour} on grey23" if token.is_special and not is_cut else colour
            text.append(visible(token.text).replace("\n", "⏎\n"), style=style)
    return text


def _folded(tokens: Sequence[Token], *, plain: bool) -> "Text":
    from rich.text import Text

    if len(tokens) <= 2 * FOLDED_TOKENS:
        return _text(tokens, plain=plain)
    left_out = Text(f" … {len(tokens) - 2 * FOLDED_TOKENS} tokens … ", style="dim italic")
    return Text.assemble(_text(tokens[:FOLDED_TOKENS], plain=plain), left_out, _text(tokens[-FOLDED_TOKENS:], plain=plain))
