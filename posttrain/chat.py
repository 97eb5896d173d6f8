"""The chat contract: how a conversation becomes tokens, and where an answer ends. One object that travels with every policy.

A base model has none: it gets ChatML, or the template that the config names. A model with a template keeps it. Stop
tokens are found by rendering an answered turn and looking at what closes it, never guessed from `eos`: a model whose
stop token is not the one it was trained to emit does not stop.

The rendered template is the only source of BOS: text is tokenized without adding special tokens, so none is doubled.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import disk
from posttrain.error import UserError

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
PAD_TOKEN = "<|pad|>"
PROBE_ANSWER = "posttrain-probe-answer"


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
    try:
        record = disk.read_json(path)
        if record is None:
            return None
        digest = record.pop("digest")
        contract = ChatContract(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})
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
        tokenizer.add_special_tokens({"additional_special_tokens": [t for t in CHATML_TOKENS if t not in before]})
    template = template if template is not None else tokenizer.chat_template
    if not isinstance(template, str):
        raise UserError(f"{at}.chat_template: the tokenizer has several named templates; name a file that holds the one to use")
    tokenizer.chat_template = _with_system_prompt(template, system_prompt)
    stop = _closing_token(tokenizer, at)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    stops = [stop]
    for token_id in _as_list(generation.eos_token_id) + _as_list(tokenizer.eos_token_id):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is not None and token not in stops:
            stops.append(token)
    tokenizer.eos_token = stop
    added = sorted(set(tokenizer.get_vocab()) - before, key=tokenizer.convert_tokens_to_ids)
    return ChatContract(tokenizer.chat_template, tokenizer.bos_token, tuple(stops), tokenizer.pad_token, tuple(added))


def adopt(tokenizer: "PreTrainedTokenizerBase", contract: ChatContract) -> None:
    """Make a tokenizer follow an existing contract, in place, adding the tokens that it brings."""
    missing = [token for token in contract.added_tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": missing})
    tokenizer.chat_template = contract.template
    tokenizer.eos_token = contract.stop_tokens[0]
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
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise UserError(f"{at}: stop token {token!r} is not in its vocabulary; build the stage that made it again")


def apply_to_generation(contract: ChatContract, tokenizer: "PreTrainedTokenizerBase", model: Any) -> None:
    """Set stop and pad tokens on a model's config and generation config, so that what is published stops by itself."""
    stops = tokenizer.convert_tokens_to_ids(list(contract.stop_tokens))
    for config in (model.generation_config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.config.get_text_config().eos_token_id = stops[0]


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it: token ids `(T,)`, and which of them are trained `(T,)`."""

    ids: list[int]
    trained: list[bool]


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, stop: str, origin: str) -> Encoded:
    """Tokens of a conversation, with every assistant turn and its stop token marked as trained.

    The template's own generation marks say what the assistant says; without them, each turn is what rendering it adds
    to the rendered conversation before it, and a row where that is not exact is refused. A turn with `train: false` is
    not trained. Raises `UserError` naming `origin`.
    """
    text = render(tokenizer, messages, tools, origin)
    spans = _marked_spans(tokenizer, messages, tools, text, origin) or _prefix_spans(tokenizer, messages, tools, text, stop, origin)
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(turns):
        raise UserError(f"{origin}: the chat template renders {len(spans)} of {len(turns)} assistant turns; drop the row or use another template")
    wanted = [_with_stop(text, span, stop, origin) for span, turn in zip(spans, turns, strict=True) if turn.get("train", True)]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [False] * len(encoding.input_ids)
    inside = iter(sorted(wanted))
    start, end = next(inside, (len(text), len(text)))
    for position, (first, last) in enumerate(encoding.offset_mapping):
        while first >= end and end < len(text):
            start, end = next(inside, (len(text), len(text)))
        if first < start < last or first < end < last:
            piece = tokenizer.decode([encoding.input_ids[position]])
            raise UserError(f"{origin}: token {position} ({piece!r}) straddles where an assistant turn begins or ends; strip white space there")
        trained[position] = first < last and start <= first and last <= end
    return Encoded(list(encoding.input_ids), trained)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, origin: str) -> list[int]:
    """Token ids `(T,)` of a conversation that the assistant is to answer."""
    text = render(tokenizer, messages, tools, origin, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, origin: str, *, add_generation_prompt: bool = False
) -> str:
    """The conversation as text. Raises `UserError` where the template refuses it."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            _plain(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{origin}: the chat template cannot render it: {' '.join(str(error).split())[:200]}") from None
    assert isinstance(text, str), "tokenize=False renders one conversation to one text"
    return text


def _plain(messages: Sequence[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _marked_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, text: str, origin: str
) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.chat_template
    if not _has_marks(template):
        return []
    rendered, spans = render_jinja_template(
        [_plain(messages)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if rendered[0] != text:
        raise UserError(f"{origin}: the chat template renders differently with its generation marks; use another template")
    return [(start, end) for start, end in spans[0]]


@functools.cache
def _has_marks(template: str) -> bool:
    from trl.chat_template_utils import has_generation_markers

    return bool(has_generation_markers(template))


def _prefix_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], tools: list[Any] | None, text: str, stop: str, origin: str
) -> list[tuple[int, int]]:
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], tools, origin, add_generation_prompt=True)
        after = render(tokenizer, messages[: index + 1], tools, origin)
        end = after.rfind(stop, len(before))
        if end < 0 or not after.startswith(before) or text[: end + len(stop)] != after[: end + len(stop)]:
            at = _divergence(text, before if not text.startswith(before) else after)
            raise UserError(
                f"{origin}: messages[{index}] is rendered differently inside the conversation, from {text[at : at + 30]!r} on; "
                "use a template with generation marks"
            )
        spans.append((len(before), end + len(stop)))
    return spans


def _with_stop(text: str, span: tuple[int, int], stop: str, origin: str) -> tuple[int, int]:
    start, end = span
    if text[:end].rstrip().endswith(stop):
        return start, len(text[:end].rstrip())
    rest = text[end:]
    closing = len(rest) - len(rest.lstrip())
    if not rest[closing:].startswith(stop):
        raise UserError(f"{origin}: an assistant turn is closed by {rest[:20]!r} and not by the stop token {stop!r}; use another template")
    return start, end + closing + len(stop)


def _divergence(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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
            f"{at}.chat_template: closes an assistant turn with {closing[:20]!r}, which is no special token, so the model could not learn to stop; "
            "use another template"
        )
    return max(found, key=len)


def _with_system_prompt(template: str, system_prompt: str | None) -> str:
    if system_prompt is None:
        return template
    message = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
    return f"{{%- if messages[0].role != 'system' %}}{{%- set messages = [{message}] + messages %}}{{%- endif %}}{template}"


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
