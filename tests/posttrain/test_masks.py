"""The loss masks: exactly what the assistant says is trained, and the token that ends it, under the templates people use.

The references are what transformers renders and tokenizes, the masks that TRL's own training templates give, and for the
fuzz the conversation itself. Templates come from the trl package; those of well-known formats that it lacks are written
here. Tokenizers are real ones, with the control tokens of each template added. All of them put a BOS before plain text,
so a second one would show in any test.
"""

import copy
import functools
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import trl
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template

from posttrain.chat import CHATML, ChatContract, Encoded, encode, encode_prompt, establish
from posttrain.data.rows import Conversation
from posttrain.data.samples import IGNORED, conversation_encoder
from posttrain.error import UserError

pytestmark = pytest.mark.real

Message = dict[str, Any]
Tok = PreTrainedTokenizerFast
Kind = Literal["smollm2", "llama3-split", "stories"]
KINDS: tuple[Kind, ...] = ("smollm2", "llama3-split", "stories")

OF_TRL = {path.stem: path.read_text(encoding="utf-8") for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
CONTROL = re.compile(
    r"<\|[^|<>{}'\s]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|<sop>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\]"
)
ORIGIN = "rows.jsonl:3"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "now",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "where"}}, "required": ["at"]},
    },
}

# --- formats that trl has no template of ------------------------------------------------------------------------------

MISTRAL = """\
{%- set system = messages[0].content + '\\n\\n' if messages and messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}
{{- bos_token }}
{%- for turn in turns %}
{%- if turn.role == 'user' %}
{%- if tools and turn == last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + (system if loop.first else '') + turn.content + '[/INST]' }}
{%- elif turn.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + {'content': turn.content} | tojson + '[/TOOL_RESULTS]' }}
{%- elif turn.tool_calls %}
{{- '[TOOL_CALLS] ' + turn.tool_calls | map(attribute='function') | list | tojson + eos_token }}
{%- else %}
{{- ' ' + turn.content + eos_token }}
{%- endif %}
{%- endfor %}"""
LLAMA2 = """\
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if messages and messages[0].role == 'system' else '' %}
{%- for turn in (messages[1:] if system else messages) %}
{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
{%- if turn.role == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + turn.content | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + turn.content | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
ZEPHYR = """\
{% for turn in messages %}
{% if turn.role in ('user', 'system') %}
{{ '<|' + turn.role + '|>\\n' + turn.content + eos_token }}
{% elif turn.role == 'assistant' %}
{{ '<|assistant|>\\n' + turn.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
VICUNA = """\
{{- bos_token }}
{%- for turn in messages %}
{%- if turn.role == 'system' %}{{- turn.content + ' ' }}
{%- elif turn.role == 'user' %}{{- 'USER: ' + turn.content }}
{%- elif turn.role == 'assistant' %}{{- ' ASSISTANT: ' + turn.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' ASSISTANT:' }}{%- endif %}"""
OPENCHAT = """\
{{- bos_token }}
{%- for turn in messages %}
{{- ('GPT4 Correct ' + turn.role | title + ': ' if turn.role != 'system' else '') + turn.content + '<|end_of_turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'GPT4 Correct Assistant:' }}{%- endif %}"""
ALPACA = """\
{%- for turn in messages %}
{%- if turn.role == 'system' %}{{- turn.content + '\\n\\n' }}
{%- elif turn.role == 'user' %}{{- '### Instruction:\\n' + turn.content + '\\n\\n' }}
{%- else %}{{- '### Response:\\n' + turn.content + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"""
OURS = {"mistral": MISTRAL, "llama2": LLAMA2, "zephyr": ZEPHYR, "vicuna": VICUNA, "openchat": OPENCHAT, "alpaca": ALPACA, "chatml": CHATML}
TEMPLATES = {**OF_TRL, **OURS}

# --- tokenizers -------------------------------------------------------------------------------------------------------

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen split text: other than GPT-2, they make the same words of a prompt alone and of one before its answer."""


@functools.cache
def base(models: Path, kind: Kind) -> Tok:
    """A real tokenizer, by the kind of its text splitting, that begins plain text with one BOS, and that is padded with its end."""
    tokenizer = AutoTokenizer.from_pretrained(models / ("stories260K" if kind == "stories" else "smollm2"))
    if kind == "llama3-split":
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), bytes_only]
        )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]}, replace_extra_special_tokens=False)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", "</s>", "</s>"
    tokenizer.model_max_length = 100_000
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def control_tokens(template: str) -> list[str]:
    return list(dict.fromkeys(CONTROL.findall(template)))


def build(models: Path, kind: Kind, template: str) -> Tok:
    """A tokenizer that has the template and the control tokens that it uses."""
    tokenizer = copy.deepcopy(base(models, kind))
    tokenizer.add_special_tokens({"additional_special_tokens": control_tokens(template)}, replace_extra_special_tokens=False)
    tokenizer.add_tokens([token for token in ("<think>", "</think>", "<tool_call>", "</tool_call>") if token in template])
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Policy:
    """A tokenizer under the chat contract that it gets."""

    tokenizer: Tok
    contract: ChatContract

    @property
    def stop(self) -> str:
        return self.contract.stop_tokens[0]

    def encode(self, messages: Sequence[Message], tools: list[Any] | None = None, train_on: Literal["all", "last"] = "all") -> Encoded:
        return encode(self.tokenizer, messages, tools, self.stop, ORIGIN, train_on=train_on)


def contracted(tokenizer: Tok) -> Policy:
    return Policy(tokenizer, establish(tokenizer, GenerationConfig(), template=None, system_prompt=None, at="stages.sft"))


@functools.cache
def policy(models: Path, kind: Kind, name: str) -> Policy:
    return contracted(build(models, kind, TEMPLATES[name]))


@pytest.fixture(scope="session")
def models(shared: Path) -> Path:
    return shared / "models"


# --- conversations ----------------------------------------------------------------------------------------------------


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: object) -> Message:
    return {"role": "assistant", "content": content, **fields}


def calls(*places: str, content: str = "") -> Message:
    functions = [{"name": "weather", "arguments": {"at": place}} for place in places]
    return assistant(content, tool_calls=[{"type": "function", "function": function} for function in functions])


def result(content: str) -> Message:
    return {"role": "tool", "content": content, "name": "weather"}


ONE = [user("Hi?"), assistant("The  answer\nis 42.")]
TWO = [*ONE, user("And now?\n"), assistant("Nothing more.")]
PLAIN = {
    "single": ONE,
    "multi": TWO,
    "system": [system("Be brief."), *TWO],
    "empty system": [system(""), *TWO],
    "three": [*TWO, user("Sure?"), assistant("Yes.")],
    "unicode": [user("Schö\u0308n 漢字?"), assistant("שלום, e\u0301té 👩\u200d💻 ①"), user("مرحبا"), assistant("नमस्ते 🙂")],
    "code": [user("1 + 1?"), assistant('```py\nif x < 2:\n\treturn {"a": [1.5e3]}  # {{ x }}\n```')],
    "white space": [user(" Hi? "), assistant("\n\n  The answer. \n"), user("\n"), assistant(" x ")],
    "empty answer": [user("Hi?"), assistant(""), user("And?"), assistant("No.")],
    "less-than sign": [user("Hi?"), assistant("<table>"), user("And?"), assistant("<")],
}
TOOLS = {
    "tools": [user("Bonn?"), calls("Bonn"), result("Rain."), assistant("Wet."), user("Thanks"), assistant("Any time.")],
    "tools and system": [system("Be brief."), user("Bonn?"), calls("Bonn"), result("Rain."), assistant("Wet.")],
}


def spans(trained: Sequence[bool]) -> list[tuple[int, int]]:
    """Where runs of trained tokens begin and end."""
    edges = [False, *trained, False]
    turns = [index for index, (a, b) in enumerate(itertools.pairwise(edges)) if a != b]
    return list(zip(turns[::2], turns[1::2], strict=True))


def read(tokenizer: Tok, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def learned(tokenizer: Tok, ids: Sequence[int], trained: Sequence[bool]) -> list[str]:
    """The text of each run of trained tokens, read in its place: SentencePiece drops the space that a text begins with."""
    texts = [[read(tokenizer, ids[:at]) for at in span] for span in spans(trained)]
    assert all(after.startswith(before) for before, after in texts)
    return [after[len(before) :] for before, after in texts]


def says(of: Policy, messages: Sequence[Message], tools: list[Any] | None = None, train_on: Literal["all", "last"] = "all") -> list[str]:
    encoded = of.encode(messages, tools, train_on)
    return learned(of.tokenizer, encoded.ids, encoded.trained)


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rendered(of: Policy, messages: Sequence[Message], tools: list[Any] | None, template: str, *, asked: bool = False) -> str:
    """The text as transformers renders it under the template as it was before the contract, where `</s>` is the end token."""
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    return str(
        of.tokenizer.apply_chat_template(
            plain, tools=tools, chat_template=template, eos_token="</s>", tokenize=False, add_generation_prompt=asked
        )
    )


def tokenized(tokenizer: Tok, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# --- the masks are TRL's, less what no sampler produces ---------------------------------------------------------------

IMAGES = {"idefics3", "llava_next", "smolvlm"}
"""Their templates read a content as a list of images and texts, which no row has: the contract refuses them at once."""
MARK = re.compile(r"{%-?\s*generation\s*-?%}")
PAIRS = sorted(name for name in OF_TRL if f"{name}_training" in OF_TRL and name not in IMAGES)
UNUSED_PROMPT = {
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), "<think>\n"),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"), "\n"),
}
"""Templates that ask for reasoning and render answers without any: how the prompt ends, and the answer does not begin."""
REWRITES = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "gptoss")
"""Templates that render an answer otherwise once another question follows."""
BEGINS_REASONING = ("qwen3_5_think", "qwen3_6", "qwen3_8")
"""Templates whose prompt ends with a line break, and whose answers begin with one: the two are one token in the whole text."""
SHOWS_CALLS = {
    *("deepseekv3", "lfm2_v2", "muse_glimmer", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
    *("qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl"),
}
"""Training templates of which an assistant's call ends with the stop token; others leave calls out, or close them otherwise."""
WITHOUT_MARKS = sorted({*PAIRS} - {*UNUSED_PROMPT} - {*REWRITES} - {"glm4moe"})
"""Templates that render what the training one does, so that there is a mask to compare with."""


def headers(of: Policy, name: str, messages: Sequence[Message], tools: list[Any] | None, template: str) -> list[str]:
    """The text before each answer, as far as the prompt supplies it."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [rendered(of, messages[:index], tools, template, asked=True) for index in turns]
    text = rendered(of, messages, tools, template)
    return [prompt if text.startswith(prompt) else prompt.removesuffix(UNUSED_PROMPT[name]) for prompt in prompts]


def masked_by_trl(of: Policy, name: str, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
    """Ids, and the mask of TRL's marks, less what each prompt supplies and what follows each stop token."""
    template = TEMPLATES[f"{name}_training"]
    marked = of.tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, eos_token="</s>", return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(marked["input_ids"]), [False] * len(marked["input_ids"])
    stop, end = of.tokenizer.convert_tokens_to_ids([of.stop, "</s>"])
    runs = [(a, b) for a, b in spans(marked["assistant_masks"]) if ids[a:b] != [end]]  # Phi-3 marks the end of all text too
    for header, (a, b) in zip(headers(of, name, messages, tools, template), runs, strict=True):
        a = max(a, common(ids, tokenized(of.tokenizer, header)))
        b = ids.index(stop, a, b) + 1
        mask[a:b] = [True] * (b - a)
    return ids, mask


def check_agreement(of: Policy, name: str, messages: Sequence[Message], tools: list[Any] | None, *, edges: bool) -> None:
    """Ids and mask are the very same as TRL's; with `edges`, where tokens reach over the edge of an answer, the texts are."""
    encoded, theirs = of.encode(messages, tools), masked_by_trl(of, name, messages, tools)
    if edges and encoded.ids != theirs[0]:
        assert read(of.tokenizer, encoded.ids) == read(of.tokenizer, theirs[0])
        mine, others = learned(of.tokenizer, encoded.ids, encoded.trained), learned(of.tokenizer, *theirs)
        for one, other, header in zip(mine, others, headers(of, name, messages, tools, TEMPLATES[f"{name}_training"]), strict=True):
            assert other.endswith(one) and header.endswith(other.removesuffix(one))
    else:
        assert (encoded.ids, encoded.trained) == theirs
    num_answers = sum(message["role"] == "assistant" for message in messages)
    assert len(spans(encoded.trained)) == num_answers


def conversations(name: str) -> list[tuple[str, list[Message]]]:
    # Where DiffusionGemma's mark ends in a character of several tokens, transformers marks the first of them alone.
    return [pair for pair in {**PLAIN, **TOOLS}.items() if (name, pair[0]) != ("diffusion_gemma", "unicode")]


def is_refused_for_good_reason(name: str, title: str) -> bool:
    """Whether a training template of TRL cannot show the conversation, or closes one of its turns with another token."""
    if title in TOOLS:
        return name not in SHOWS_CALLS
    return (name == "gemma" and "system" in title) or (name == "gptoss" and title not in ("single", "code"))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["llama3-split", "stories"])
def test_under_its_training_templates_the_masks_are_trl_s(models, kind, name):
    of = policy(models, kind, f"{name}_training")
    for title, messages in conversations(name):
        tools = [WEATHER] if title in TOOLS else None
        if is_refused_for_good_reason(name, title):
            assert refusal(of.encode, messages, tools).startswith(f"{ORIGIN}: ")
        else:
            check_agreement(of, name, messages, tools, edges=title == "white space" or name in BEGINS_REASONING)
            assert of.encode(messages, tools).asked_otherwise == (name in UNUSED_PROMPT)


@pytest.mark.parametrize("name", WITHOUT_MARKS)
@pytest.mark.parametrize("kind", ["llama3-split", "stories"])
def test_without_marks_the_masks_are_those_of_trl_s_marks(models, kind, name):
    of = policy(models, kind, name)
    assert not MARK.search(of.contract.template)
    for title, messages in conversations(name):
        tools = [WEATHER] if title in TOOLS else None
        if is_refused_for_good_reason(name, title):
            assert refusal(of.encode, messages, tools).startswith(f"{ORIGIN}: ")
        else:
            assert rendered(of, messages, tools, TEMPLATES[name]) == rendered(of, messages, tools, TEMPLATES[f"{name}_training"])
            check_agreement(of, name, messages, tools, edges=title == "white space" or name in BEGINS_REASONING)


def test_more_than_ten_templates_are_compared_with_trl_s():
    marked = [name for name in PAIRS if MARK.search(TEMPLATES[f"{name}_training"])]
    unmarked = [name for name in WITHOUT_MARKS if not MARK.search(TEMPLATES[name])]
    assert len(marked) >= 25 and len(unmarked) >= 15


def test_an_answer_that_ends_in_a_character_of_several_tokens_is_trained_whole_where_trl_trains_a_part(models):
    of = policy(models, "smollm2", "diffusion_gemma_training")
    marked = of.tokenizer.apply_chat_template(PLAIN["unicode"], eos_token="</s>", return_dict=True, return_assistant_tokens_mask=True)
    assert len(spans(marked["assistant_masks"])) > 2
    assert says(of, PLAIN["unicode"]) == [PLAIN["unicode"][index]["content"] + "<turn|>" for index in (1, 3)]


# --- where the original template renders otherwise than the training one ----------------------------------------------


@pytest.mark.parametrize("name", UNUSED_PROMPT)
def test_reasoning_that_is_asked_for_and_not_there_is_refused_and_accepted_under_the_marked_template(models, name):
    message = refusal(policy(models, "smollm2", name).encode, TWO)
    assert message.startswith(f"{ORIGIN}: messages[1]: ") and repr(UNUSED_PROMPT[name])[1:-1] in message and "The  answer" in message
    marked = policy(models, "smollm2", f"{name}_training")
    assert marked.encode(TWO).asked_otherwise and marked.encode(TWO, None, "last").asked_otherwise
    assert [text.removeprefix("</think>") for text in says(marked, TWO)] == [
        message["content"] + marked.stop for message in TWO if message["role"] == "assistant"
    ]


@pytest.mark.parametrize("name", REWRITES)
def test_a_turn_that_is_rewritten_later_is_refused_at_the_point_of_divergence_and_trained_as_the_last(models, name):
    of = policy(models, "llama3-split", name)
    divergence = {"qwen3": "'<think>\\n\\n</think>", "qwen3_5_nothink": "'<think>\\n\\n</think>", "gptoss": "'return|>'"}.get(
        name, "'<think>\\n'"
    )
    message = refusal(of.encode, TWO)
    assert message.startswith(f"{ORIGIN}: messages[1]: the chat template renders {divergence}") and "train_on: last" in message
    check_agreement(of, name, ONE, None, edges=name in BEGINS_REASONING)
    [last] = says(of, TWO, None, "last")
    [alone] = says(of, TWO[2:])
    assert last == alone and last.endswith("Nothing more." + of.stop) and last.count(of.stop) == 1
    assert says(of, [TWO[0], {**TWO[1], "train": False}, *TWO[2:]]) == [last]
    if name != "gptoss":
        training = policy(models, "llama3-split", f"{name}_training")
        assert says(training, TWO) == [last.replace("Nothing more.", "The  answer\nis 42."), last]


def test_gpt_oss_closes_earlier_turns_with_another_token_so_only_the_last_is_trained(models):
    of = policy(models, "smollm2", "gptoss_training")
    assert "closes it with '<|return|>' elsewhere than where it ends" in refusal(of.encode, TWO)
    assert says(of, TWO, None, "last") == ["<|channel|>final<|message|>Nothing more.<|return|>"]


def test_a_template_that_closes_no_turn_is_refused_before_any_row(models):
    message = refusal(policy, models, "stories", "glm4moe")
    assert message.startswith("stages.sft.chat_template: closes an assistant turn with ''")


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_a_template_for_images_is_refused_before_any_row(models, name):
    assert refusal(policy, models, "stories", name).startswith("stages.sft.chat_template: ")


# --- formats of which TRL has no masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted({*OURS} - {"chatml"}), "llama3_1", "llama3_2", "gemma4", "gemma4_v5"])
@pytest.mark.parametrize("kind", ["smollm2", "stories"])
def test_where_trl_has_no_masks_ours_are_exact(models, kind, name):
    of = policy(models, kind, name)
    untouched = build(models, "stories", TEMPLATES[name])
    with pytest.raises(ValueError, match="not training-compatible"):
        get_training_chat_template(untouched)
    for messages in PLAIN.values():
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        texts = says(of, messages)
        for text, answer in zip(texts, answers, strict=True):
            assert text.endswith(of.stop) and text.count(of.stop) == 1 and text.removesuffix(of.stop).strip() == answer.strip()
        assert says(of, messages, None, "last") == texts[-1:]


@pytest.mark.parametrize(
    ("name", "begins"),
    [("llama3", True), ("gemma", True), ("cohere", True), ("mistral", True), ("llama2", True), ("vicuna", True), ("qwen2_5", False)],
)
@pytest.mark.parametrize("kind", ["llama3-split", "stories"])
def test_no_bos_is_doubled_where_the_template_has_one_and_none_is_added_where_it_has_none(models, kind, name, begins):
    of = policy(models, kind, name)
    bos = of.tokenizer.bos_token_id
    assert of.tokenizer(rendered(of, ONE, None, TEMPLATES[name])).input_ids[: 2 if begins else 1] == [bos] * (2 if begins else 1)
    encoded = of.encode(ONE)
    [(start, _)] = spans(encoded.trained)
    assert encoded.ids[:start] == encode_prompt(of.tokenizer, ONE[:1], None, ORIGIN)
    assert encoded.ids.count(bos) == begins and (encoded.ids[0] == bos) == begins


def test_tools_that_stand_before_the_last_question_move_and_so_only_the_last_turn_can_be_trained(models):
    of = policy(models, "llama3-split", "mistral")
    message = refusal(of.encode, TWO, [WEATHER])
    assert message.startswith(f"{ORIGIN}: messages[1]: the chat template renders 'AVAILABLE_TOOLS]")
    assert "'INST] Hi?" in message
    assert says(of, TWO, [WEATHER], "last") == [" Nothing more.</s>"]
    assert says(of, [user("Bonn?"), calls("Bonn"), result("Rain."), assistant("Wet.")], [WEATHER]) == [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"at": "Bonn"}}]</s>',
        " Wet.</s>",
    ]


# --- which turns ------------------------------------------------------------------------------------------------------

TALK = [system("S"), user("A?"), assistant("one"), user("B?"), assistant("two"), user("C?"), assistant("three")]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3_training", "zephyr"])
def test_all_turns_or_the_last_are_trained_but_for_those_that_are_not_to_be(models, name):
    of = policy(models, "stories", name)

    def trained(train_on: Literal["all", "last"], *excluded: int) -> list[str]:
        messages = [{**message, "train": False} if index in excluded else message for index, message in enumerate(TALK)]
        assert of.encode(messages, None, train_on).ids == of.encode(TALK).ids
        return [text.removesuffix(of.stop) for text in says(of, messages, None, train_on)]

    assert trained("all") == ["one", "two", "three"]
    assert trained("last") == ["three"]
    assert trained("all", 4) == ["one", "three"]
    assert trained("all", 2, 6) == ["two"]
    assert trained("last", 6) == trained("all", 2, 4, 6) == []


def test_train_true_trains_no_turn_but_the_assistant_s(models):
    messages = [{**message, "train": True} for message in TALK]
    assert says(policy(models, "stories", "chatml"), messages) == [f"{text}<|im_end|>" for text in ("one", "two", "three")]


@pytest.mark.parametrize("name", ["smollm2", "phi3", "mistral"])
def test_the_stop_token_is_a_label_even_where_texts_are_padded_with_it(models, name):
    if name == "smollm2":
        of = contracted(AutoTokenizer.from_pretrained(models / "smollm2"))
        assert of.tokenizer.pad_token == of.stop == "<|im_end|>"
    else:
        of = policy(models, "smollm2", name)
        assert of.tokenizer.pad_token == "</s>"
    stop = of.tokenizer.convert_tokens_to_ids(of.stop)
    encoder = conversation_encoder(of.tokenizer, of.contract, max_length=512, on_overflow="error", at="stages.sft")
    for messages in (ONE, TWO, PLAIN["empty answer"]):
        sample = encoder.encode(Conversation(messages=messages, tools=None, checks=[], origin=ORIGIN))
        labels = sample.columns["labels"]
        num_answers = sum(message["role"] == "assistant" for message in messages)
        assert labels.count(stop) == num_answers
        assert [labels[end - 1] for _, end in spans([label != IGNORED for label in labels])] == [stop] * num_answers


# --- tools ------------------------------------------------------------------------------------------------------------

CALLING = [
    *("chatml", "qwen2_5", "qwen2_5_training", "qwen3_training", "qwen3_8", "llama3_1", "llama3_2", "deepseekv3_training", "lfm2_2_5"),
    *("muse_glimmer", "nemotron_3_nano_training", "gemma4_v2", "qwen3_5_nothink_training", "qwen3_vl"),
]


@pytest.mark.parametrize("name", CALLING)
@pytest.mark.parametrize("messages", TOOLS.values(), ids=TOOLS)
def test_calls_are_trained_with_their_stop_tokens_and_what_tools_answer_is_not(models, name, messages):
    of = policy(models, "llama3-split", name)
    first, *others = says(of, messages, [WEATHER])
    assert "weather" in first and "Bonn" in first and first.endswith(of.stop)
    assert [text.removesuffix(of.stop).rpartition("\n")[2].rpartition(">")[2] for text in others] == [
        message["content"] for message in messages[4 if messages[0]["role"] == "system" else 3 :] if message["role"] == "assistant"
    ]
    assert not any("Rain" in text for text in [first, *others])


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma", "diffusion_gemma_training", "gptoss"])
def test_a_call_that_another_token_closes_is_refused_and_not_trained_up_to_the_next_stop_token(models, name):
    of = policy(models, "stories", name)
    message = refusal(of.encode, TOOLS["tools and system"], [WEATHER])
    assert message.startswith(f"{ORIGIN}: messages[2]: the chat template does not close it with the stop token {of.stop!r}")
    [text] = says(of, TOOLS["tools and system"], [WEATHER], "last")
    assert text.endswith("Wet." + of.stop) and "Rain" not in text


def test_calls_are_trained_with_what_is_said_before_them(models):
    messages = [user("Bonn?"), calls("Bonn", "Köln", content="Let me look.\n"), result("Rain."), result("Sun."), assistant("Both.")]
    of = policy(models, "llama3-split", "qwen2_5")
    first, second = says(of, messages, [WEATHER])
    assert first.startswith("Let me look.\n") and first.count("<tool_call>") == 2 and "Köln" in first
    assert second == "Both.<|im_end|>"


# --- marks, and answers that the prompt begins ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseekv3_training", "deepseek_r1_distill_training"])
@pytest.mark.parametrize("answer", ["", "<", "<t", "<table>", "<think", "<｜", "think", "posttrain"])
def test_what_an_answer_has_in_common_with_an_unused_prompt_by_chance_is_trained(models, name, answer):
    of = policy(models, "smollm2", name)
    encoded = of.encode([user("x"), assistant(answer), user("y"), assistant(answer)])
    assert learned(of.tokenizer, encoded.ids, encoded.trained) == [answer + of.stop] * 2 and encoded.asked_otherwise


def test_a_call_whose_token_begins_as_an_unused_prompt_does_is_trained_whole(models):
    of = policy(models, "smollm2", "deepseekv3_training")
    first, _ = says(of, TOOLS["tools and system"], [WEATHER])
    assert first.startswith("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather")


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_6_training", "nemotron_3_nano", "nemotron_3_ultra_training"])
def test_reasoning_that_the_prompt_begins_is_trained_from_where_the_prompt_ends(models, name):
    of = policy(models, "llama3-split", name)
    messages = [user("6 x 7?"), assistant("<think>\nbecause\n</think>\n\n42")]
    encoded = of.encode(messages)
    assert learned(of.tokenizer, encoded.ids, encoded.trained) == ["because\n</think>\n\n42<|im_end|>"] and not encoded.asked_otherwise
    prompt = encode_prompt(of.tokenizer, messages[:1], None, ORIGIN)
    assert read(of.tokenizer, prompt).endswith("<think>\n") and encoded.ids[: len(prompt)] == prompt


def test_an_answer_that_only_its_header_would_hold_is_lost(models):
    template = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% if turn.role == 'user' or turn.content == answer %}"
    template = (
        "{% set answer = 'posttrain-probe-answer' %}"
        + template
        + "{{ turn.content }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    of = contracted(build(models, "stories", template))
    assert "leaves out or changes what the assistant says" in refusal(of.encode, [user("x"), assistant("assistant")])


MARKED = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% if turn.role == 'assistant' %}BEFORE{% generation %}{{ turn.content }}"
    "INSIDE{% endgeneration %}AFTER{% else %}{{ turn.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked(before: str, inside: str, after: str) -> str:
    return MARKED.replace("BEFORE", before).replace("INSIDE", inside).replace("AFTER", after)


@pytest.mark.parametrize("kind", ["smollm2", "llama3-split"])
def test_what_a_template_leaves_unmarked_before_an_answer_is_not_trained(models, kind):
    of = contracted(build(models, kind, marked("Well: ", "<|im_end|>", "")))
    assert says(of, TWO) == ["The  answer\nis 42.<|im_end|>", "Nothing more.<|im_end|>"]
    assert of.encode(TWO).asked_otherwise


@pytest.mark.parametrize(("inside", "after"), [("<|im_end|>", ""), ("<|im_end|>\n", "\n"), ("", "<|im_end|>\n")])
@pytest.mark.parametrize("before", ["", " "])
def test_with_marks_or_around_them_the_stop_token_is_trained_and_so_is_white_space_that_a_sampler_must_write(models, before, inside, after):
    of = contracted(build(models, "smollm2", marked(before, inside, after)))
    assert says(of, TWO) == [f"{before}The  answer\nis 42.<|im_end|>", f"{before}Nothing more.<|im_end|>"]
    assert not of.encode(TWO).asked_otherwise


def test_a_marked_turn_that_is_closed_in_its_middle_is_refused(models):
    of = contracted(build(models, "stories", marked("", "<|im_end|> ps<|im_end|>", "")))
    assert "elsewhere than where it ends, at 'ps'" in refusal(of.encode, TWO)


# --- nothing is left out, and nothing is smuggled in ------------------------------------------------------------------


def test_what_the_template_leaves_out_is_refused_though_the_masks_were_right(models):
    of = policy(models, "stories", "zephyr")
    assert "leaves out the tool 'weather'" in refusal(of.encode, ONE, [WEATHER])
    assert "messages[1], of the role tool" in refusal(of.encode, [user("Bonn?"), result("Rain."), assistant("Wet.")])
    assert says(policy(models, "stories", "lfm2"), TOOLS["tools"], [WEATHER], "last") == ["Any time.<|im_end|>"]


def test_a_control_token_in_a_name_is_refused(models):
    of = policy(models, "stories", "qwen2_5")
    smuggled = {**result("Rain."), "name": "x<|im_end|>"}
    assert "messages[2] holds '<|im_end|>'" in refusal(of.encode, [user("Bonn?"), calls("Bonn"), smuggled, assistant("Wet.")], [WEATHER])


def test_a_control_token_with_a_quote_in_it_is_refused_in_a_call(models):
    of = policy(models, "stories", "gemma4_v2")
    row = [user("Bonn?"), calls('Bonn<|"|>}<tool_call|>'), result("Rain."), assistant("Wet.")]
    assert "messages[1] holds '<|\"|>'" in refusal(of.encode, row, [WEATHER])
    described = copy.deepcopy(WEATHER)
    described["function"]["description"] = '<|"|>'
    assert "tools holds '<|\"|>'" in refusal(of.encode, ONE, [described])


# --- any conversation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What the fuzz expects of a template, beside that it renders a conversation as transformers does."""

    before: str = ""
    """What the template itself puts between the prompt and the content of an answer, outer white space aside."""
    has_system: bool = True
    most_calls: int = 0
    """How many calls one turn may make; 0 where the template shows none."""
    rewrites: bool = False
    """Whether a turn may be refused since it is rendered otherwise once others follow."""


CALLS = Form(most_calls=2)
FORMS = {
    **dict.fromkeys(("cohere", "cohere_training", "cohere2", "cohere2_training", "diffusion_gemma", "gemma3", "gemma3_training"), Form()),
    **dict.fromkeys(("gemma", "gemma_training"), Form(has_system=False)),
    **dict.fromkeys(("gemma4", "gemma4_v3", "gemma4_v5", "lfm2", "lfm2_training", "llama3", "llama3_training"), Form()),
    **dict.fromkeys(("phi3", "phi3_training", "phi3_5", "phi3_5_training", "qwen2_5_vl"), Form()),
    **dict.fromkeys(("mistral", "llama2", "zephyr", "vicuna", "openchat", "alpaca"), Form()),
    **dict.fromkeys(("llama3_1", "llama3_2"), Form(most_calls=1)),
    **dict.fromkeys(
        ("chatml", "qwen2_5", "qwen2_5_training", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2", "lfm2_2_5", "gemma4_v2"), CALLS
    ),
    "qwen3_5_nothink_training": CALLS,
    # DeepSeek's template opens a second call otherwise than the first, and lists no tools, so none are offered.
    **dict.fromkeys(("deepseekv3_training", "deepseek_r1_distill_training"), Form()),
    **dict.fromkeys(("nemotron_3_nano_training", "nemotron_3_ultra_training"), Form("</think>", most_calls=2)),
    **dict.fromkeys(("qwen3_5_think_training", "qwen3_6_training", "qwen3_8"), Form("</think>", most_calls=2)),
    "qwen3_training": Form("<think>\n\n</think>", most_calls=2),
    "glm4moe_training": Form("<think></think>"),
    **dict.fromkeys(("muse_glimmer", "muse_glimmer_training"), Form("to=user<|message|>", most_calls=1)),
    "qwen3": Form("<think>\n\n</think>", rewrites=True),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6"), Form("</think>", rewrites=True)),
    **dict.fromkeys(("gptoss", "gptoss_training"), Form("<|channel|>final<|message|>", rewrites=True)),
}
REWRITTEN = ("in its place later", "elsewhere than where it ends", "does not close it with the stop token")
NUM_DISTINCT = 38
"""Conversations for each template; hypothesis draws some more than once."""

# SmolLM2 lacks the bytes of control characters and rare planes, and drops them; "▁" is how SentencePiece writes a space.
CHARACTERS = st.characters(max_codepoint=0x1FAFF, exclude_categories=["Cs", "Cc"], exclude_characters="▁")
SNIPPETS = st.sampled_from(
    [
        *("e\u0301", "\u0308", "👩\u200d💻", "🙂", "🇩🇪", "①", "漢字", "नमस्ते", "שלום", "مرحبا\u200f", "\u00a0", "\u2028", "\ufeff"),
        *(
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "42",
            "3.14e-5",
            "1,000,000",
            "<",
            "<|",
            "|>",
            "</",
            "<｜",
            "[",
            "]",
            "{{ x }}",
            "{% if %}",
            "\\n",
            '"',
            "'",
        ),
        *(
            "if x < 3:\n\treturn [1]\n",
            "```py\nx = {}\n```",
            '{"a": [null]}',
            "<b>bold</b>",
            "user",
            "assistant",
            "\nassistant\n",
            "###",
            "http://a.b/?c=d&e",
        ),
    ]
)
TEXTS = st.lists(SNIPPETS | st.text(CHARACTERS, min_size=1, max_size=6), min_size=1, max_size=6).map("".join)
PLACES = st.text(st.characters(categories=["Ll", "Lu"], max_codepoint=0x24F), min_size=1, max_size=8)


@st.composite
def talks(draw: Callable[[Any], Any], of: Policy, form: Form) -> tuple[list[Message], bool, Literal["all", "last"]]:
    """A conversation, whether it offers tools, and which turns are trained."""

    def once_in(num: int) -> bool:
        # Not zero: hypothesis draws the ends of a range more often than what lies between.
        return bool(draw(st.integers(0, num - 1)) == num // 2)

    def text() -> str:
        return "" if once_in(12) else str(draw(TEXTS))

    messages = [system(text())] if once_in(3 if form.has_system else 8) else []
    with_tools = form.most_calls > 0 and draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(text()))
        if with_tools and draw(st.booleans()):
            places = draw(st.lists(PLACES, min_size=1, max_size=form.most_calls))
            messages += [calls(*places), *(result(f"RESULT {text()}") for _ in places)]
        messages.append(assistant(text()))
    for message in messages:
        if message["role"] == "assistant" and once_in(4):
            message["train"] = draw(st.booleans())
    if once_in(12):
        messages.append(user(text()))
    if once_in(16):
        message = draw(st.sampled_from(messages))
        message["content"] += draw(st.sampled_from([of.stop, *control_tokens(of.contract.template), "</s>"]))
    return messages, with_tools, draw(st.sampled_from(["all", "all", "last"] if not form.rewrites else ["last", "last", "all"]))


def must_be_refused(of: Policy, form: Form, messages: list[Message]) -> str:
    """Why the row must be refused, if it must."""
    known = {of.stop, "<s>", "</s>", *control_tokens(of.contract.template)}
    if any(token in message["content"] for token in known for message in messages):
        return "which is a control token"
    if messages[0]["role"] == "system" and not form.has_system:
        return "cannot render it: System role not supported"
    return ""


def check_talk(of: Policy, name: str, form: Form, messages: list[Message], with_tools: bool, train_on: Literal["all", "last"]) -> str:
    """Check one conversation against its rendering and itself; says why it is refused, if it is."""
    tools = [WEATHER] if with_tools else None
    must = must_be_refused(of, form, messages)
    try:
        encoded = of.encode(messages, tools, train_on)
    except UserError as error:
        problem = str(error)
        assert problem.startswith(f"{ORIGIN}: ") and "\n" not in problem
        reasons = [must] if must else list(REWRITTEN) if form.rewrites else []
        assert any(reason in problem for reason in reasons), problem
        return next(reason for reason in reasons if reason in problem)
    assert not must
    tokenizer, template = of.tokenizer, TEMPLATES[name]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [index for index in (turns if train_on == "all" else turns[-1:]) if messages[index].get("train", True)]
    text = rendered(of, messages, tools, template)
    ids = tokenized(tokenizer, text)
    assert read(tokenizer, encoded.ids) == read(tokenizer, ids)
    bos = tokenizer.bos_token_id
    assert encoded.ids.count(bos) == text.count("<s>") and (name == "llama2" or text.count("<s>") <= 1)
    runs = spans(encoded.trained)
    assert len(runs) == len(turns)
    unused = UNUSED_PROMPT.get(name.removesuffix("_training"), "")
    is_same, after = True, 0
    for index, (begin, end), learnt in zip(turns, runs, learned(tokenizer, encoded.ids, encoded.trained), strict=True):
        asked = rendered(of, messages[:index], tools, template, asked=True)
        header = asked if text.startswith(asked) else asked.removesuffix(unused)
        assert text.startswith(header) and len(header) >= after
        answer = text[len(header) : text.index(of.stop, len(header)) + len(of.stop)]
        after = len(header) + len(answer)
        assert learnt == read(tokenizer, tokenized(tokenizer, header + answer)).removeprefix(read(tokenizer, tokenized(tokenizer, header)))
        if index + 1 < len(messages):
            following = rendered(of, messages[: index + 1], tools, template)
            assert form.rewrites or following.startswith(header + answer)
        prompt = tokenized(tokenizer, header)
        is_same = is_same and ids[: len(prompt)] == prompt
        if index == turns[0] or is_same:
            assert encoded.ids[:begin] == prompt
            assert header != asked or prompt == encode_prompt(tokenizer, messages[:index], tools, ORIGIN)
        check_answer(form, messages[index], answer.removesuffix(of.stop))
        assert encoded.ids[end - 1] == tokenizer.convert_tokens_to_ids(of.stop)
    if is_same:
        assert encoded.ids == ids
    assert encoded.asked_otherwise == any(
        not text.startswith(rendered(of, messages[:index], tools, template, asked=True)) for index in turns
    )
    return ""


def check_answer(form: Form, message: Message, said: str) -> None:
    """What is trained is what the message says: its content but for outer white space, or its calls and nothing of a result."""
    if message.get("tool_calls"):
        assert all(call["function"]["arguments"]["at"] in said for call in message["tool_calls"])
        assert said.count("weather") >= len(message["tool_calls"]) and "RESULT" not in said
    else:
        bare = said.strip().removeprefix(form.before)
        assert form.rewrites or bare != said.strip() or not form.before
        assert bare.strip() == message["content"].strip()


@pytest.mark.parametrize("name", FORMS)
def test_any_conversation_is_trained_on_what_the_assistant_says_and_its_stop_tokens_or_refused(models, name):
    form = FORMS[name]
    fares: dict[str, str] = {}
    policies = [policy(models, "llama3-split", name), policy(models, "stories", name)]

    @seed(zlib.crc32(name.encode()))
    @settings(max_examples=NUM_DISTINCT + 12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        of = data.draw(st.sampled_from(policies))
        talk = data.draw(talks(of, form))
        fares[repr(talk)] = check_talk(of, name, form, *talk)

    check()
    assert len(fares) >= NUM_DISTINCT
    num_accepted = list(fares.values()).count("")
    assert num_accepted >= (0.3 if form.rewrites else 0.6) * len(fares), Counter(fares.values())


def test_the_fuzz_is_of_2000_conversations():
    assert len(FORMS) * NUM_DISTINCT >= 2000
