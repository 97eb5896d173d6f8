"""Generation under a chat contract: greedy answers for evaluation, sampled ones to learn from.

Answers are decoded with a key-value cache, whose rows are the answers under way. What prompts begin with alike is read
once; a row leaves the cache when its answer ends, and the next prompt takes its place. `model.generate` can do neither,
so the loop is here; it is used for the models that only attend to keys and values, and to their positions.
"""

import copy
import inspect
import itertools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from posttrain.batch import token_batches
from posttrain.chat import ChatContract

CACHE_BYTES = 2 * 2**30
"""Size of the key-value cache: so many answers are under way at a time."""
ROWS_AT_ONCE = 256
"""Most answers under way at a time, where the model is so small that more would fit: logits take memory too."""
PREFILL_TOKENS = 4096
"""Tokens of one forward pass over prompts, padding counted."""
WORTH_SHARING_TOKENS = 512
"""Tokens that must be saved by reading what prompts share in a forward pass of its own."""
GENERATE_TOKENS = 16_384
"""Tokens of one batch of `model.generate`, prompts, answers and padding."""

GREEDY_IGNORES = re.compile(
    "(pad|bos|eos)_token_id|max_length|max_new_tokens|do_sample|temperature|top_[kph]|min_p|typical_p|use_cache|"
    "output_.*|return_dict_in_generate|transformers_version|_from_model_config"
)
"""Settings of a generation config that do not change a greedy answer, or that `answer_all` sets itself."""
GREEDY_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Settings that change nothing at these values; any other setting takes the way of `model.generate`."""

Choose = Callable[[Sequence["_Answer"], torch.Tensor], torch.Tensor]
"""Of R answers under way and the logits `(R, V)` of what comes next in each, the next token of each, `(R,)`."""


@dataclass(frozen=True)
class Completion:
    """A generated answer."""

    ids: list[int]
    """Its tokens, the stop token at its end among them."""
    ended: bool
    """Whether it came to a stop token; else it was cut off."""
    log_probs: list[float]
    """Of each token, under the distribution it was drawn from before `top_k` and `top_p` cut that; 0 at temperature 0."""


def stop_ids(tokenizer: PreTrainedTokenizerBase, contract: ChatContract) -> list[int]:
    """Ids of the tokens that end an answer."""
    ids: Any = tokenizer.convert_tokens_to_ids(list(contract.stop_tokens))
    return list(ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer's tokens, without special ones."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str), "one row of ids decodes to one text"
    return text


def bending_settings(generation: GenerationConfig) -> dict[str, Any]:
    """Of a generation config what changes which token is the likeliest, such as `repetition_penalty`."""
    given = generation.to_diff_dict().items()
    return {name: value for name, value in given if not GREEDY_IGNORES.fullmatch(name) and value != GREEDY_NEUTRAL.get(name)}


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """The greedy answer to each prompt of token ids; `tick` is told how many are done.

    The answers are those of `model.generate` for one prompt at a time, but for rounding.
    """
    if not prompts:
        return []
    stops = set(stop_ids(tokenizer, contract))
    decoded = _answers(model, tokenizer, prompts, _likeliest, stops=stops, max_new_tokens=max_new_tokens, num_each=1)
    answers: dict[int, Completion] = {}
    for index, tokens in decoded:
        answers[index] = Completion(tokens, tokens[-1] in stops, [0.0] * len(tokens))
        tick(len(answers))
    return [answers[index] for index in range(len(prompts))]


def sample_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    prompts: Sequence[list[int]],
    *,
    num_return_sequences: int,
    temperature: float,
    max_new_tokens: int,
    seeds: Sequence[Sequence[int]],
    top_p: float = 1.0,
    top_k: int = 0,
    tick: Callable[[int], None] = lambda done: None,
) -> list[list[Completion]]:
    """So many answers to each prompt of token ids, drawn at random; `tick` is told how many are done.

    A token is drawn from softmax(logits / temperature); if asked, from the `top_k` likeliest alone, and of these from the
    fewest that hold `top_p` of the probability. What is drawn for answer k to prompt i depends on `seeds[i]`, k and the position
    alone, so answers are the same whatever else is in the batch, but for rounding. At temperature 0 each is the greedy answer.
    """
    if not prompts:
        return []
    stops = set(stop_ids(tokenizer, contract))
    keys = [[*seed, number] for seed in seeds for number in range(num_return_sequences)]
    uniform = np.stack([np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(max_new_tokens) for key in keys])
    log_probs = np.zeros(uniform.shape, dtype=np.float32)

    def choose(answers: Sequence[_Answer], logits: torch.Tensor) -> torch.Tensor:
        places = [answer.index for answer in answers], [len(answer.tokens) for answer in answers]
        numbers = torch.from_numpy(uniform[places]).to(logits.device)
        tokens, drawn = draw(logits, numbers, temperature=temperature, top_p=top_p, top_k=top_k)
        log_probs[places] = drawn.cpu().numpy()
        return tokens

    found: list[list[Completion | None]] = [[None] * num_return_sequences for _ in prompts]
    decoded = _answers(
        model,
        tokenizer,
        prompts,
        choose if temperature else _likeliest,
        stops=stops,
        max_new_tokens=max_new_tokens,
        num_each=num_return_sequences,
    )
    for done, (index, tokens) in enumerate(decoded, 1):
        completion = Completion(tokens, tokens[-1] in stops, log_probs[index, : len(tokens)].tolist())
        found[index // num_return_sequences][index % num_return_sequences] = completion
        tick(done)
    return [[completion for completion in completions if completion is not None] for completions in found]


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits `(R, V)`: where a number `(R,)`, even over [0, 1), falls in the sum of probabilities.

    Returns the tokens, and the log of their probability before `top_k` and `top_p`, both `(R,)`.
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    probs = log_probs.exp()
    if not top_k and top_p == 1:
        tokens = _invert(probs, uniform)
    else:
        kept, ranked = probs.topk(min(top_k, probs.shape[1])) if top_k else probs.sort(descending=True, stable=True)
        before = kept.cumsum(-1) - kept
        kept = kept.masked_fill(before >= top_p * kept.sum(-1, keepdim=True), 0)
        tokens = ranked.gather(1, _invert(kept, uniform)[:, None])[:, 0]
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Per row `(R, n)` of weights, the first place up to which their sum exceeds so large a share of all, which has a weight then."""
    sums = weights.double().cumsum(-1)
    total = sums[:, -1:]
    share = torch.minimum(uniform.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, share, right=True)[:, 0]


def _likeliest(_: Sequence["_Answer"], logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    choose: Choose,
    *,
    stops: set[int],
    max_new_tokens: int,
    num_each: int,
) -> Iterator[tuple[int, list[int]]]:
    """Number and tokens of each answer, as answers end, with the stop token of those that come to one.

    Answer k to prompt i has the number `i * num_each + k`.
    """
    pad_id: int = tokenizer.pad_token_id
    obstacle = _obstacle(model, max(map(len, prompts)) + max_new_tokens)
    if obstacle is None:
        return _decode(model, prompts, choose, stops=stops, pad_id=pad_id, max_new_tokens=max_new_tokens, num_each=num_each)
    print(f"generate: {obstacle.reason}: answers come from plain model.generate, which is slower", flush=True)
    each = [prompt for prompt in prompts for _ in range(num_each)]
    return _generate(model, each, choose, stops=stops, pad_id=pad_id, max_new_tokens=max_new_tokens, may_pad=obstacle.may_pad)


# --- batches that shrink and refill ----------------------------------------------------------------------------------


@dataclass
class _Answer:
    """An answer under way: its number, the columns that it may come to need, and its tokens so far."""

    index: int
    reach: int
    tokens: list[int] = field(default_factory=list)


@dataclass
class _Rows:
    """Answers under way, each a row (R) of a key-value cache of W columns; every row ends at the last column."""

    answers: list[_Answer]
    cache: Any
    """A `DynamicCache` of `DynamicLayer`s: in each, keys and values `(R, heads, W, size)`."""
    seen: torch.Tensor
    """Which columns a row attends to, `(R, W)`: its prompt and answer; the rest is padding."""
    tokens: torch.Tensor
    """The last token of each row, which is not in the cache yet, `(R, 1)`."""
    positions: torch.Tensor
    """Its position, `(R, 1)`."""
    choose: Choose
    """How the next token of each is chosen."""


def _decode(
    model: Any,
    prompts: Sequence[list[int]],
    choose: Choose = _likeliest,
    *,
    stops: set[int],
    pad_id: int,
    max_new_tokens: int,
    num_each: int = 1,
) -> Iterator[tuple[int, list[int]]]:
    """As `_answers`. A row leaves the batch when it ends, and others take its place."""
    cache_tokens = CACHE_BYTES // _bytes_per_token(model)
    rows: _Rows | None = None
    for num_shared, members in _families(prompts):
        prefix = _read_prefix(model, prompts[members[0]][:num_shared])
        waiting = deque(member * num_each + number for member in members for number in range(num_each))
        while waiting:
            reaches = [len(prompts[index // num_each]) + max_new_tokens for index in waiting]
            if num_joining := _num_joining(rows.answers if rows else [], reaches, cache_tokens):
                joining = [_Answer(waiting.popleft(), reaches[0]) for _ in range(num_joining)]
                rests = [prompts[answer.index // num_each][num_shared:] for answer in joining]
                new = _read(model, prefix, rests, joining, pad_id, choose)
                rows = _join(rows, new) if rows else new
            else:
                assert rows is not None, "an empty batch has room for one more"
                _step(model, rows)
            rows = yield from _take_ended(rows, stops, max_new_tokens)
    while rows:
        _step(model, rows)
        rows = yield from _take_ended(rows, stops, max_new_tokens)


def _families(prompts: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
    """Prompts that begin alike: the number of tokens shared, and their indices with the longest first; long families first.

    At least one token of each prompt is not shared: what it is followed by is asked of the prompt itself.
    """
    families = []
    unsplit = [sorted(range(len(prompts)), key=lambda index: prompts[index])]
    while unsplit:
        members = unsplit.pop()
        num_shared = _num_shared(prompts, members)
        rest = []
        for _, group in itertools.groupby(members, key=lambda index: prompts[index][num_shared]):
            part = list(group)
            if (len(part) - 1) * (_num_shared(prompts, part) - num_shared) >= WORTH_SHARING_TOKENS:
                unsplit.append(part)
            else:
                rest += part
        if rest:
            worth = (len(rest) - 1) * num_shared >= WORTH_SHARING_TOKENS
            families.append((num_shared if worth else 0, sorted(rest, key=lambda index: -len(prompts[index]))))
    return sorted(families, key=lambda family: -len(prompts[family[1][0]]))


def _num_shared(prompts: Sequence[list[int]], members: list[int]) -> int:
    """Tokens that sorted prompts begin with, all of them; fewer than the shortest has."""
    pairs = zip(prompts[members[0]], prompts[members[-1]], strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(alike, *(len(prompts[index]) - 1 for index in members))


def _num_joining(answers: list[_Answer], reaches: list[int], cache_tokens: int) -> int:
    """How many of the waiting prompts, the longest first, join the answers under way now.

    Rows of very unlike length do not mix: the short ones would pay for the columns of the long ones at every step.
    """
    under_way = [answer.reach for answer in answers]
    widest, narrowest = max([*under_way, reaches[0]]), min([*under_way, reaches[0]])
    if narrowest * 2 < widest:
        return 0
    at_most = min(ROWS_AT_ONCE, max(1, cache_tokens // widest))
    free = at_most - len(answers)
    if answers and free < min(len(reaches), at_most / 4):
        return 0  # reading few prompts costs as much time as reading many
    return sum(1 for reach in reaches[:free] if reach * 2 >= widest)


def _bytes_per_token(model: Any) -> int:
    """Bytes that one token of one row takes in the cache."""
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in _read_prefix(model, [0]).layers)


@torch.no_grad()
def _read_prefix(model: Any, ids: list[int]) -> Any:
    """The cache of one row after these tokens."""
    cache = DynamicCache()
    for start in range(0, len(ids), PREFILL_TOKENS):
        chunk = torch.tensor([ids[start : start + PREFILL_TOKENS]], device=model.device)
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def _read(model: Any, prefix: Any, prompts: list[list[int]], answers: list[_Answer], pad_id: int, choose: Choose) -> _Rows:
    """Rows for prompts that go on from `prefix`, the longest first, with the first token of each answer.

    Of prompts that are alike and follow one another only the first is read.
    """
    num_shared = prefix.get_seq_length()
    alike = [len(list(group)) for _, group in itertools.groupby(prompts)]
    prompts = [prompt for prompt, _ in itertools.groupby(prompts)]
    ids, seen = _pad_left(prompts, pad_id, model.device)
    width = ids.shape[1]
    seen = pad(seen, (num_shared, 0), value=True)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(len(prompts))
    step = max(1, PREFILL_TOKENS // len(prompts))
    for start in range(0, width, step):
        end = min(start + step, width)
        logits = model(
            input_ids=ids[:, start:end],
            attention_mask=seen[:, : num_shared + end],
            position_ids=positions[:, num_shared + start : num_shared + end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    if len(answers) > len(prompts):
        copies = torch.arange(len(prompts), device=ids.device).repeat_interleave(torch.tensor(alike, device=ids.device))
        cache.batch_select_indices(copies)
        ids, seen, positions, logits = ids[copies], seen[copies], positions[copies], logits[copies]
    rows = _Rows(answers, cache, seen, ids[:, -1:], positions[:, -1:], choose)
    _choose(rows, logits)
    return rows


def _join(rows: _Rows, new: _Rows) -> _Rows:
    """Both as one batch, the narrower padded on the left."""
    width = max(rows.seen.shape[1], new.seen.shape[1])
    pads = [width - part.seen.shape[1] for part in (rows, new)]
    for ours, theirs in zip(rows.cache.layers, new.cache.layers, strict=True):
        ours.keys = torch.cat([pad(part, (0, 0, num, 0)) for part, num in zip((ours.keys, theirs.keys), pads, strict=True)])
        ours.values = torch.cat([pad(part, (0, 0, num, 0)) for part, num in zip((ours.values, theirs.values), pads, strict=True)])
    return _Rows(
        rows.answers + new.answers,
        rows.cache,
        torch.cat([pad(part.seen, (num, 0)) for part, num in zip((rows, new), pads, strict=True)]),
        torch.cat([rows.tokens, new.tokens]),
        torch.cat([rows.positions, new.positions]),
        rows.choose,
    )


@torch.no_grad()
def _step(model: Any, rows: _Rows) -> None:
    """One more token for every row."""
    rows.seen = pad(rows.seen, (0, 1), value=True)
    logits = model(
        input_ids=rows.tokens,
        attention_mask=rows.seen,
        position_ids=rows.positions,
        past_key_values=rows.cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    _choose(rows, logits)


def _choose(rows: _Rows, logits: torch.Tensor) -> None:
    """Append the next token by `logits`, `(R, 1, V)`, to each answer."""
    rows.tokens = rows.choose(rows.answers, logits[:, -1])[:, None]
    rows.positions = rows.positions + 1
    for answer, token in zip(rows.answers, rows.tokens[:, 0].tolist(), strict=True):
        answer.tokens.append(token)


def _take_ended(rows: _Rows, stops: set[int], max_new_tokens: int) -> Generator[tuple[int, list[int]], None, _Rows | None]:
    """Yield number and tokens of answers that have ended; return the rows of the others, None if there are none."""
    going = []
    for row, answer in enumerate(rows.answers):
        if answer.tokens[-1] in stops or len(answer.tokens) == max_new_tokens:
            yield answer.index, answer.tokens
        else:
            going.append(row)
    if not going:
        return None
    if len(going) < len(rows.answers):
        kept = torch.tensor(going, device=rows.seen.device)
        rows.cache.batch_select_indices(kept)
        rows.seen, rows.tokens, rows.positions = rows.seen[kept], rows.tokens[kept], rows.positions[kept]
        rows.answers = [rows.answers[row] for row in going]
        unused = int(rows.seen.any(0).int().argmax())  # columns on the left that only rows used which are gone
        rows.seen = rows.seen[:, unused:]
        for layer in rows.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
    return rows


# --- models that this is not exact for -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Obstacle:
    """Why a model is not decoded here, and whether prompts of unlike length may share a batch of `model.generate`."""

    reason: str
    may_pad: bool


def _obstacle(model: Any, longest: int) -> _Obstacle | None:
    """What makes `_decode` inexact for this model and rows of up to `longest` tokens; None where it is exact.

    `_decode` moves rows between columns of the cache, so only positions may tell a model where a token stands.
    """
    config = model.config.get_text_config(decoder=True)
    if model.is_remote_code():
        return _Obstacle("the model brings its own code", may_pad=False)
    takes = inspect.signature(model.forward).parameters
    if lacking := {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}.difference(takes):
        return _Obstacle(f"{type(model).__name__} takes no {min(lacking)}", may_pad=False)
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return _Obstacle(f"{type(model).__name__} keeps more than keys and values ({type(layer).__name__})", may_pad=False)
        if isinstance(layer, DynamicSlidingWindowLayer) and longest > layer.sliding_window:
            return _Obstacle(f"{longest} tokens are more than the attention window of {layer.sliding_window}", may_pad=True)
    ropes = config.to_dict().get("rope_parameters") or {}  # one for all layers, or one for each type of layer
    for rope in [value for value in ropes.values() if isinstance(value, dict)] or [ropes]:
        if rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        if longest > original:
            return _Obstacle(f"{longest} tokens are over {original}, where positions are scaled by the longest row", may_pad=False)
    for name, value in bending_settings(model.generation_config).items():
        return _Obstacle(f"the generation config sets {name}: {value}", may_pad=True)
    return None


class _Chosen(LogitsProcessor):
    """Leaves `model.generate`, which takes the likeliest token, only the tokens that `choose` says."""

    def __init__(self, choose: Choose, batch: Sequence[int], num_prompt_tokens: int) -> None:
        self.choose, self.batch, self.num_prompt_tokens = choose, batch, num_prompt_tokens

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows = zip(self.batch, input_ids[:, self.num_prompt_tokens :].tolist(), strict=True)
        chosen = self.choose([_Answer(index, 0, tokens) for index, tokens in rows], scores)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def _generate(
    model: Any, prompts: Sequence[list[int]], choose: Choose, *, stops: set[int], pad_id: int, max_new_tokens: int, may_pad: bool
) -> Iterator[tuple[int, list[int]]]:
    """As `_answers`, by `model.generate`, in batches of like length, or of equal length unless `may_pad`; one answer a prompt."""
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    groups = [by_length] if may_pad else [list(group) for _, group in itertools.groupby(by_length, key=lambda index: len(prompts[index]))]
    for group in groups:
        for positions in token_batches([len(prompts[index]) + max_new_tokens for index in group], GENERATE_TOKENS):
            batch = [group[position] for position in positions]
            ids, seen = _pad_left([prompts[index] for index in batch], pad_id, model.device)
            generated = model.generate(
                input_ids=ids,
                attention_mask=seen,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                synced_gpus=False,  # ranks that share weights answer unlike numbers of prompts
                eos_token_id=sorted(stops),
                pad_token_id=pad_id,
                logits_processor=[] if choose is _likeliest else [_Chosen(choose, batch, ids.shape[1])],
            )
            for index, tokens in zip(batch, generated[:, ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
                yield index, tokens[: end + 1]


def _pad_left(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the rows, the longest first, and which of them are not padding, both `(R, T)`."""
    ids = torch.tensor([[pad_id] * (len(rows[0]) - len(row)) + row for row in rows], device=device)
    seen = torch.tensor([[False] * (len(rows[0]) - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, seen
