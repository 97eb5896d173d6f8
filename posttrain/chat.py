"""The chat contract: how a conversation becomes tokens, and where an answer ends. One object that travels with every policy.

A base model has none: it gets ChatML, or the template that the config names. A model with a template keeps it. Stop
tokens are found by rendering an answered turn and looking at what closes it, never guessed from `eos`: a model whose
stop token is not the one it was trained to emit does not stop.

The rendered template is the only source of BOS: text is tokenized without adding special tokens, so none is doubled.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain import disk
from posttrain.data.json_text import surrogate_in
from posttrain.error import Preempted, UserError
from posttrain.sandbox import MAX_RENDERED_CHARS, Limits, OverLimit, problem_with

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

FILE = "chat_contract.json"

CHATML = """\
{%- if tools %}
{%- set listing %}You can call these tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}To call one, answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endset %}
{%- if messages[0].role == 'system' %}
{%- set messages = [{'role': 'system', 'content': messages[0].content + '\\n\\n' + listing}] + messages[1:] %}
{%- else %}
{%- set messages = [{'role': 'system', 'content': listing}] + messages %}
{%- endif %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PAD_TOKEN = "<|pad|>"  # noqa: S105  a token of a vocabulary
PROBE_ANSWER = "posttrain-probe-answer"
MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
"""Where a template marks what the assistant says, as transformers finds it."""


@dataclass(frozen=True)
class ChatContract:
    """What all who render for, train, sample from or serve a policy must agree on."""

    template: str
    bos_token: str | None
    stop_tokens: tuple[str, ...]
    """Tokens that end an answer; the first is the one that the template closes a turn with, and that is trained."""
    pad_token: str
    added_tokens: tuple[str, ...]
    """Tokens that the contract brought and the base vocabulary lacked, in the order in which they were added."""

    @property
    def digest(self) -> str:
        """Hash that is equal if and only if two contracts are."""
        return disk.hash_json(asdict(self))

    def save(self, directory: Path) -> None:
        """Write the contract into a policy's directory."""
        disk.write_json(directory / FILE, {**asdict(self), "digest": self.digest})


def read_contract(directory: Path) -> ChatContract | None:
    """The contract in a policy's directory; None where there is none. Raises `UserError` where it was changed by hand."""
    path = directory / FILE
    if not path.exists():
        return None
    try:
        record = disk.read_json(path)
        digest = record.pop("digest")
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
        contract = ChatContract(**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a chat contract; delete it, and one is derived from the tokenizer") from None
    if contract.digest != digest:
        raise UserError(f"{path}: was changed after it was written; build the stage again that made this policy")
    return contract


def establish(
    tokenizer: "PreTrainedTokenizerBase", generation: "GenerationConfig", *, template: str | None, system_prompt: str | None, at: str
) -> ChatContract:
    """Give a tokenizer a contract, in place: template, stop and pad tokens, and the tokens they need.

    `template` is a Jinja template to use instead of the tokenizer's own; a tokenizer that has none gets ChatML. `at` is
    the config path named in errors.
    """
    before = set(tokenizer.get_vocab())
    adds_bos = bool(tokenizer.bos_token) and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    if template is None and tokenizer.chat_template is None:
        template = ("{{- bos_token }}" if adds_bos else "") + CHATML
        _add_tokens(tokenizer, CHATML_TOKENS)
    template = template if template is not None else tokenizer.chat_template
    if not isinstance(template, str):
        raise UserError(f"{at}.chat_template: the tokenizer has several named templates; name a file that holds the one to use")
    tokenizer.chat_template = _with_system_prompt(template, system_prompt)
    stop = _closing_token(tokenizer, at)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    stops = [stop]
    for token_id in _as_list(generation.eos_token_id) + _as_list(tokenizer.eos_token_id):
        token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
        if isinstance(token, str) and token not in stops:
            stops.append(token)
    tokenizer.chat_template = _with_eos_token(tokenizer.chat_template, tokenizer.eos_token, stop)
    _set_stops(tokenizer, stops)
    added = sorted(set(tokenizer.get_vocab()) - before, key=tokenizer.convert_tokens_to_ids)
    return ChatContract(tokenizer.chat_template, tokenizer.bos_token, tuple(stops), tokenizer.pad_token, tuple(added))


def adopt(tokenizer: "PreTrainedTokenizerBase", contract: ChatContract) -> None:
    """Make a tokenizer follow an existing contract, in place, adding the tokens that it brings."""
    _add_tokens(tokenizer, contract.added_tokens)
    tokenizer.chat_template = contract.template
    _set_stops(tokenizer, contract.stop_tokens)
    tokenizer.pad_token = contract.pad_token


def check_contract(contract: ChatContract, tokenizer: "PreTrainedTokenizerBase", at: str) -> None:
    """Raise `UserError` unless the tokenizer renders and ends answers as the contract says."""
    actual = {
        "chat template": (tokenizer.chat_template, contract.template),
        "eos token": (tokenizer.eos_token, contract.stop_tokens[0]),
        "pad token": (tokenizer.pad_token, contract.pad_token),
        "bos token": (tokenizer.bos_token, contract.bos_token),
    }
    for what, (found, promised) in actual.items():
        if found != promised:
            raise UserError(f"{at}: its {what} is {found!r}, but its chat contract says {promised!r}; build the stage that made it again")
    for token in contract.stop_tokens:
        # Not by the id alone: in GPT-2 and its kin the token that ends a document is the unknown token too.
        if token not in tokenizer.get_vocab():
            raise UserError(f"{at}: stop token {token!r} is not in its vocabulary; build the stage that made it again")


def apply_to_generation(contract: ChatContract, tokenizer: "PreTrainedTokenizerBase", model: Any) -> None:
    """Set stop and pad tokens on a model's config and generation config, so that what is published stops by itself."""
    stops: Any = tokenizer.convert_tokens_to_ids(list(contract.stop_tokens))
    for config in (model.generation_config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.config.get_text_config().eos_token_id = stops[0]


TrainOn = Literal["all", "last"]
"""Which assistant turns of a conversation are trained."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as the model sees it: token ids `(T,)`, and which of them are trained `(T,)`."""

    ids: list[int]
    trained: list[bool]
    asked_otherwise: bool = False
    """Whether a trained answer begins otherwise than it is asked for: the template's marks say so, and generation will differ."""


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Any],
    tools: list[Any] | None,
    stop: str,
    origin: str,
    *,
    train_on: TrainOn = "all",
) -> Encoded:
    """Tokens of a conversation, with every assistant turn, or the last one, and its stop token marked as trained.

    A turn begins where the prompt ends that asks for it, and ends with the first stop token: what a sampler would feed,
    and what it would take. A row where the template renders anything else is refused. A turn with `train: false` is not
    trained. Raises `UserError` naming `origin`.
    """
    _refuse_control_text(tokenizer, messages, tools, origin)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [index for index in (turns if train_on == "all" else turns[-1:]) if messages[index].get("train", True)]
    with Limits(origin):
        text, spans, asked_otherwise = _answers(tokenizer, messages, tools, turns, stop, origin)
    _refuse_losses(messages, tools, text, origin)
    encoded = _tokenize(tokenizer, text, spans, stop, origin)
    return replace(encoded, asked_otherwise=True) if asked_otherwise else encoded


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, origin: str) -> list[int]:
    """Token ids `(T,)` of a conversation that the assistant is to answer. Raises `UserError` naming `origin`."""
    _refuse_control_text(tokenizer, messages, tools, origin)
    text = render(tokenizer, messages, tools, origin, add_generation_prompt=True)
    _refuse_losses(messages, tools, text, origin)
    return _ids(tokenizer, [text])[0]


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Any],
    tools: list[Any] | None,
    origin: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text. Raises `UserError` where the template refuses it, `OverLimit` where it takes more than it may."""
    return _render(tokenizer, messages, tools, origin, add_generation_prompt=add_generation_prompt)[0]


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Any],
    tools: list[Any] | None,
    origin: str,
    *,
    add_generation_prompt: bool = False,
    mark: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and with `mark` where the template's own generation marks, if any, say that the assistant speaks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.chat_template
    assert isinstance(template, str), "a tokenizer with a chat contract has one template"
    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    try:
        with Limits(origin):
            if problem := problem_with(template):
                raise OverLimit(f"{origin}: the chat template {problem}; use another one")
            # What `apply_chat_template` calls; that one gives no marks without tokens, and renders nothing without a message.
            rendered: Any = render_jinja_template(
                [[{key: value for key, value in message.items() if key != "train"} for message in messages]],
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=mark and MARKS.search(template) is not None,
                **special_tokens,
            )
    except (OverLimit, Preempted, MemoryError):
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(f"{origin}: the chat template cannot render it: {' '.join(str(error).split())[:200]}") from None
    texts, marks = rendered
    if len(texts[0]) > MAX_RENDERED_CHARS:
        raise OverLimit(
            f"{origin}: the chat template makes {len(texts[0]):,} characters of it, over {MAX_RENDERED_CHARS:,}; use another one"
        )
    if problem := surrogate_in(texts[0]):
        raise UserError(f"{origin}: the chat template cannot render it: what it makes {problem}")
    return texts[0], marks[0] if marks else []


def _answers(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, turns: Sequence[int], stop: str, origin: str
) -> tuple[str, list[tuple[int, int]], bool]:
    """The conversation as text, where the answers of the messages `turns` lie, and whether one is asked for otherwise.

    An answer lies from the end of its prompt to the end of its stop token. Where the template marks what the assistant says,
    the marks hold; without them the conversation must begin with the prompt that asks for the answer, and as it would were
    the answer its last message, which closes it.
    """
    text, marks = _render(tokenizer, messages, tools, origin, mark=True)
    all_turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marked = dict(zip(all_turns, marks, strict=True)) if len(marks) == len(all_turns) else {}
    spans, asked_otherwise = [], False
    for index in turns:
        at = f"{origin}: messages[{index}]"
        prompt = render(tokenizer, messages[:index], tools, origin, add_generation_prompt=True)
        start = len(prompt)
        if index not in marked:
            _refuse_difference(at, text, prompt)
        elif not text.startswith(prompt):
            # Of the prompt as much as stands before any answer: what this one has in common with it by chance is not asked for.
            probe = render(tokenizer, [*messages[:index], {"role": "assistant", "content": PROBE_ANSWER}], tools, origin)
            start, asked_otherwise = max(marked[index][0], min(_common(text, prompt), _common(text, probe))), True
        elif text[start : marked[index][0]].strip():
            start, asked_otherwise = marked[index][0], True
        last = text if index in marked or index == len(messages) - 1 else render(tokenizer, messages[: index + 1], tools, origin)
        end = last.find(stop, start) + len(stop)
        if end < len(stop):
            raise UserError(
                f"{at}: the chat template does not close it with the stop token {stop!r}; use another template, or set train_on: last"
            )
        if index in marked:
            beyond = text[end : marked[index][1]] or text[marked[index][1] : end]
        else:
            _refuse_difference(at, text, last[:end])
            beyond = last[end:]
        if lost := _control_tokens(tokenizer).sub("", beyond).strip():
            raise UserError(
                f"{at}: the chat template closes it with {stop!r} elsewhere than where it ends, at {lost[:30]!r}; use another template, "
                "or set train_on: last"
            )
        opened = start
        if _squeeze(messages[index]["content"]) not in _squeeze(text[start:end]):
            # The prompt may begin the answer, as it does where it asks for reasoning with `<think>`.
            opened = min(start, _common(text, render(tokenizer, messages[:index], tools, origin)))
        _refuse_lost_answer(messages[index], text[opened:start], text[start:end], at)
        spans.append((start, end))
    return text, spans, asked_otherwise


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _refuse_difference(at: str, text: str, beginning: str) -> None:
    """Refuse a conversation that is not rendered as its `beginning` is: an answer would be trained otherwise than it is asked for."""
    if not text.startswith(beginning):
        here = _common(text, beginning)
        raise UserError(
            f"{at}: the chat template renders {beginning[here : here + 30]!r} where the answer is asked for, and "
            f"{text[here : here + 30]!r} in its place later; set train_on: last where earlier turns differ, or chat_template to one "
            "that renders every turn alike"
        )


def _refuse_control_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, origin: str) -> None:
    """Refuse text that would become a control token: it would end a turn, or begin one, where the data has none."""
    control = _control_tokens(tokenizer)
    written = {f"messages[{index}]": [message[key] for key in message if key != "role"] for index, message in enumerate(messages)}
    for at, value in {"tools": tools, **written}.items():
        for text in _texts(value):
            if found := control.search(text):
                raise UserError(
                    f"{origin}: {at} holds {found[0]!r}, which is a control token of this model; write it otherwise, or drop the row"
                )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a plain value, keys too, as it stands: quotes are escaped in JSON, and `<|"|>` is a token of Gemma 4."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (str(key), *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    return _find_control_tokens(tokenizer, tokenizer.chat_template, tuple(tokenizer.all_special_tokens))


@functools.lru_cache(maxsize=8)
def _find_control_tokens(tokenizer: "PreTrainedTokenizerBase", template: str, special: tuple[str, ...]) -> re.Pattern[str]:
    """What structures a conversation. Special tokens of pretraining alone, such as `<filename>` in SmolLM2, may be written about."""
    used = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content in template}
    return re.compile("|".join(re.escape(token) for token in sorted({*special, *used}, key=len, reverse=True)))


def _refuse_losses(messages: Sequence[Any], tools: list[Any] | None, text: str, origin: str) -> None:
    """Refuse a conversation of which the template leaves something out, as many do with tools and some with system messages.

    Earlier answers are not looked at: a template may well take the reasoning out of them.
    """
    squeezed = _squeeze(text)
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "assistant" and not (
            _squeeze(content) in squeezed or _squeeze(json.dumps(content, ensure_ascii=False)) in squeezed
        ):
            raise UserError(
                f"{origin}: the chat template leaves out or changes messages[{index}], of the role {message['role']}; use another template"
            )
    for tool in tools or []:
        if tool["function"]["name"] not in text:
            raise UserError(f"{origin}: the chat template leaves out the tool {tool['function']['name']!r}; use one that lists tools")


def _refuse_lost_answer(message: Any, opening: str, rendered: str, at: str) -> None:
    content, opening = _squeeze(message["content"]), _squeeze(opening)
    found = (opening + _squeeze(rendered)).rfind(content)
    if found < 0 or found + len(content) <= len(opening):
        raise UserError(f"{at}: the chat template leaves out or changes what the assistant says; use another template")
    for call in message.get("tool_calls") or []:
        if call["function"]["name"] not in rendered:
            raise UserError(f"{at}: the chat template leaves out the call of {call['function']['name']!r}; use one that renders tool calls")


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, spans: list[tuple[int, int]], stop: str, origin: str) -> Encoded:
    """Tokens of a text with those of `spans` trained, cut where inference cuts: a prompt is tokenized before its answer exists.

    Where a prompt has other tokens alone than before its answer, as where two line breaks are one token, the two are
    tokenized apart. Elsewhere that would give the tokens of the whole text, which are taken, since a SentencePiece
    tokenizer puts a space before each text that it is given. What follows an answer is tokenized from the stop token on,
    over which no token reaches.
    """
    anchors = [0, *(end - len(stop) for _, end in spans)]
    pieces = [piece for anchor, (start, end) in zip(anchors, spans, strict=False) for piece in (text[anchor:start], text[anchor:end])]
    *tokenized, rest = _ids(tokenizer, [*pieces, text[anchors[-1] :]])
    ids: list[int] = []
    trained: list[bool] = []
    for (start, end), prompt, both in zip(spans, tokenized[::2], tokenized[1::2], strict=True):
        if both[: len(prompt)] != prompt:
            apart = prompt + _ids(tokenizer, [text[start:end]])[0]
            if _decode(tokenizer, apart) != _decode(tokenizer, both):
                raise UserError(
                    f"{origin}: a token reaches over where the answer {text[start : start + 20]!r} begins; strip white space there"
                )
            both = apart
        assert both[-1] == tokenizer.convert_tokens_to_ids(stop), "a stop token is never part of another token"
        known = 1 if ids else 0  # the stop token of the answer before
        ids += both[known:]
        trained += [False] * (len(prompt) - known) + [True] * (len(both) - len(prompt))
    rest = rest[1 if ids else 0 :]
    return Encoded(ids + rest, trained + [False] * len(rest))


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return ids


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _closing_token(tokenizer: "PreTrainedTokenizerBase", at: str) -> str:
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_ANSWER}]
    text = render(tokenizer, asked, None, f"{at}.chat_template")
    if PROBE_ANSWER not in text:
        raise UserError(f"{at}.chat_template: renders no assistant turn; use another template")
    closing = text.rpartition(PROBE_ANSWER)[2].lstrip()
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    found = [token for token in known if closing.startswith(token)]
    if not found:
        raise UserError(
            f"{at}.chat_template: closes an assistant turn with {closing[:20]!r}, which is no special token, "
            "so the model could not learn to stop; use another template"
        )
    closing_token: str = max(found, key=len)
    return closing_token


def _with_system_prompt(template: str, system_prompt: str | None) -> str:
    if system_prompt is None:
        return template
    message = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
    return _first(
        f"{{%- if not messages or messages[0].role != 'system' %}}{{%- set messages = [{message}] + messages %}}{{%- endif %}}", template
    )


def _with_eos_token(template: str, eos_token: str | None, stop: str) -> str:
    """The template, rendering what it does now once the stop token has become the tokenizer's `eos_token`."""
    if eos_token == stop or "eos_token" not in template:
        return template
    return _first(f"{{%- set eos_token = {json.dumps(eos_token or '', ensure_ascii=False)} %}}", template)


def _first(statement: str, template: str) -> str:
    # On a line of its own, whose end is trimmed after a block: so what begins a line of the template still does.
    return f"{statement}\n{template}"


def _add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Make `tokens` special, giving new ids in order to those that are unknown; other special tokens remain so."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)


def _set_stops(tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> None:
    """Make the first of `stops` the tokenizer's `eos_token`; the one that was, and all others that are special, remain so."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    _add_tokens(tokenizer, [token for token in stops if token in special])
    tokenizer.eos_token = stops[0]


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
