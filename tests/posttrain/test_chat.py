"""A conversation becomes tokens as inference makes them, exactly the answers are trained, and an answer ends where it was trained to.

The references are text written out by hand, and transformers' own `apply_chat_template`. Tokenizers are built here, small
and of both families: byte-level BPE, and SentencePiece, which begins every text with a space.
"""

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from posttrain import disk
from posttrain.chat import (
    CHATML_TOKENS,
    FILE,
    PAD_TOKEN,
    ChatContract,
    Encoded,
    adopt,
    apply_to_generation,
    check_contract,
    encode,
    encode_prompt,
    establish,
    read_contract,
    render,
)
from posttrain.config import DataSource
from posttrain.data.rows import Conversation
from posttrain.data.source import open_source
from posttrain.error import UserError

Message = dict[str, Any]
Tok = PreTrainedTokenizerFast

TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
CONTROL = re.compile(
    r"<\|[A-Za-z_]+\|>|<｜[^｜<>]+｜>|<(?:start_of_turn|end_of_turn)>|<\|turn>|<turn\|>|<\|(?:START|END)_[A-Z_]+\|>|\[gMASK\]|<sop>|<end_of_utterance>"
)
QWEN_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = ["user system assistant tool", "Hello there, the answer is 42.\n\n\n  indented\n\n", "    deeper    still\n\n\n\n"] * 4
ORIGIN = "rows.jsonl:3"
WEATHER = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"at": "Bonn"}}}],
}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: object) -> Message:
    return {"role": "assistant", "content": content, **fields}


ONE = [user("Hi?"), assistant("The answer is 42.")]
TWO = [*ONE, user("And  now?\n"), assistant("Nothing\nmore.")]


@functools.cache
def byte_level(split: str | None) -> str:
    """A trained byte-level BPE as JSON, split as GPT-2 splits, or by a pattern."""
    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    pieces = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    return str(tokenizer.to_str())


@functools.cache
def sentencepiece() -> str:
    """A BPE like Llama 2's: a space before every text, bytes for what is unknown."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set("".join(CORPUS)) - set(" \n")), "▁▁"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", "▁")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return str(tokenizer.to_str())


def build(
    *, special: Sequence[str | AddedToken] = (), template: str | None = None, split: str | None = None, spaced: bool = False, **names: Any
) -> Tok:
    """A small tokenizer; `special` are tokens that its vocabulary has, `names` its bos_token, eos_token and so on."""
    tokenizer = Tokenizer.from_str(sentencepiece() if spaced else byte_level(split))
    known = [token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False) for token in special]
    tokenizer.add_special_tokens([*known, *(AddedToken(t, special=True, normalized=False) for t in names.values() if isinstance(t, str))])
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    built.chat_template = template
    return built


def contracted(tokenizer: Tok, generation: GenerationConfig | None = None, **fields: Any) -> tuple[Tok, ChatContract]:
    asked = {"template": None, "system_prompt": None, "at": "stages.sft", **fields}
    return tokenizer, establish(tokenizer, generation or GenerationConfig(), **asked)


def load(path: Path) -> tuple[Tok, ChatContract]:
    return contracted(AutoTokenizer.from_pretrained(path), GenerationConfig.from_pretrained(path))


def of_trl(name: str) -> tuple[Tok, ChatContract]:
    """A tokenizer that has the template and the control tokens it uses, under the contract that it gets."""
    special = sorted(set(CONTROL.findall(TEMPLATES[name])))
    return contracted(build(special=special, template=TEMPLATES[name], split=QWEN_SPLIT, bos_token="<B>", eos_token="<E>"))


def spans(encoded: Encoded) -> list[tuple[int, int]]:
    """Where runs of trained tokens begin and end."""
    edges = [False, *encoded.trained, False]
    turns = [i for i, (a, b) in enumerate(itertools.pairwise(edges)) if a != b]
    return list(zip(turns[::2], turns[1::2], strict=True))


def learned(tokenizer: Tok, encoded: Encoded) -> list[str]:
    """The text of each run of trained tokens, read in its place: SentencePiece drops the space that a text begins with."""
    texts = [[tokenizer.decode(encoded.ids[:at], clean_up_tokenization_spaces=False) for at in span] for span in spans(encoded)]
    assert all(after.startswith(before) for before, after in texts)
    return [after[len(before) :] for before, after in texts]


def encoded_by(pair: tuple[Tok, ChatContract], messages: Sequence[Message], tools: list[Any] | None = None) -> Encoded:
    tokenizer, contract = pair
    return encode(tokenizer, messages, tools, contract.stop_tokens[0], ORIGIN)


def attempt(call: Callable[..., Any], *arguments: object) -> tuple[Any, str]:
    """What the call gives, or None and what it was refused for."""
    try:
        return call(*arguments), ""
    except UserError as error:
        return None, str(error)


def refusal(call: Callable[..., object], *arguments: object, **named: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- a base model gets ChatML ----------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_base_model_gets_chatml_with_one_bos_a_stop_token_and_a_pad_token_of_its_own(stories):
    tokenizer, contract = load(stories)
    assert contract.added_tokens == (*CHATML_TOKENS, PAD_TOKEN)
    assert tokenizer.convert_tokens_to_ids(list(contract.added_tokens)) == [512, 513, 514]
    assert contract.stop_tokens == ("<|im_end|>", "<s>", "</s>")
    assert (tokenizer.eos_token, tokenizer.pad_token, contract.pad_token) == ("<|im_end|>", PAD_TOKEN, PAD_TOKEN)
    encoded = encoded_by((tokenizer, contract), TWO)
    assert encoded.ids.count(1) == 1 and encoded.ids[0] == 1
    assert encode_prompt(tokenizer, TWO[:1], None, ORIGIN).count(1) == 1
    assert learned(tokenizer, encoded) == ["The answer is 42.<|im_end|>", "Nothing\nmore.<|im_end|>"]


def test_chatml_reads_as_written_here():
    tokenizer, contract = contracted(build(eos_token="<eos>"))
    text = render(tokenizer, [{"role": "system", "content": "Be  brief."}, *TWO], None, ORIGIN, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe  brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nThe answer is 42.<|im_end|>\n"
        "<|im_start|>user\nAnd  now?\n<|im_end|>\n<|im_start|>assistant\nNothing\nmore.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert contract.stop_tokens == ("<|im_end|>", "<eos>")


def test_a_tokenizer_that_puts_a_bos_before_text_gets_one_from_the_template_and_others_get_none():
    tokenizer = build(bos_token="<B>", eos_token="<E>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<B> $A", special_tokens=[("<B>", bos)])
    ids = encoded_by(contracted(tokenizer), ONE).ids
    assert ids[0] == bos and ids.count(bos) == 1
    assert bos not in encoded_by(contracted(build(bos_token="<B>", eos_token="<E>")), ONE).ids


def test_tokens_are_added_in_one_order_and_those_at_hand_are_used():
    assert contracted(build(eos_token="<E>", special=["<|im_end|>"]))[1].added_tokens == ("<|im_start|>", PAD_TOKEN)
    plain = build(eos_token="<E>", pad_token="<P>")
    assert contracted(plain)[1].added_tokens == CHATML_TOKENS
    assert plain.pad_token == "<P>"


def test_special_tokens_of_the_base_stay_special():
    tokenizer = build(eos_token="<E>", special=["<keep>"], extra_special_tokens=["<keep>"])
    contracted(tokenizer)
    assert {"<keep>", "<E>", *CHATML_TOKENS} <= set(tokenizer.all_special_tokens)


def test_a_stop_id_that_no_token_has_is_passed_over():
    generation = GenerationConfig(eos_token_id=[10**6, -1])
    assert contracted(build(eos_token="<E>"), generation)[1].stop_tokens == ("<|im_end|>", "<E>")


# --- a model with a template keeps it ---------------------------------------------------------------------------------


@pytest.mark.real
def test_the_stop_token_is_trained_even_where_it_is_the_pad_token_too(shared):
    tokenizer, contract = load(shared / "models" / "smollm2")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert contract == ChatContract(
        template=(shared / "models" / "smollm2" / "chat_template.jinja").read_text(),
        bos_token="<|im_start|>",
        stop_tokens=("<|im_end|>",),
        pad_token="<|im_end|>",
        added_tokens=(),
    )
    assert learned(tokenizer, encoded_by((tokenizer, contract), TWO)) == ["The answer is 42.<|im_end|>", "Nothing\nmore.<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_s_own_template_renders_under_the_contract_as_it_did_before(name):
    before = build(special=sorted(set(CONTROL.findall(TEMPLATES[name]))), template=TEMPLATES[name], bos_token="<B>", eos_token="<E>")
    after = copy.deepcopy(before)
    try:
        contracted(after)
    except UserError:
        return
    for messages, prompt in ((ONE, False), (TWO, False), (TWO[:3], True)):
        reference = before.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert render(after, messages, None, ORIGIN, add_generation_prompt=prompt) == reference


def test_an_end_token_that_the_template_writes_is_not_replaced_by_the_stop_token():
    tokenizer, contract = of_trl("phi3")
    assert contract.stop_tokens == ("<|end|>", "<E>")
    assert render(tokenizer, ONE, None, ORIGIN).endswith("The answer is 42.<|end|>\n<E>")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0].content }}", "renders no assistant turn"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"),
        ("{{ raise_exception('not here') }}", "not here"),
        ("{% for m in messages %}", "cannot render it"),
        ("{{ messages[0].content.nope.nope }}", "cannot render it"),
    ],
)
def test_a_template_of_no_use_is_refused_at_once(template, problem):
    message = refusal(contracted, build(eos_token="<E>"), template=template)
    assert message.startswith("stages.sft.chat_template: ") and problem in message


def test_several_named_templates_are_refused():
    tokenizer = build(eos_token="<E>")
    tokenizer.chat_template = {"default": "x", "tool_use": "y"}
    assert "several named templates" in refusal(contracted, tokenizer)


# --- what is trained --------------------------------------------------------------------------------------------------

EXACT = [
    *("llama3", "llama3_1", "llama3_2", "llama3_training", "qwen2_5", "qwen2_5_training", "qwen3_vl", "qwen3_instruct_2507"),
    *("qwen3_5_nothink_training", "gemma", "gemma_training", "gemma3", "gemma4", "phi3", "phi3_training", "phi3_5"),
    *("cohere", "cohere_training", "lfm2", "lfm2_training"),
]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["single", "multi"])
def test_exactly_the_answers_and_their_stop_tokens_are_trained(name, messages):
    tokenizer, contract = of_trl(name)
    stop = contract.stop_tokens[0]
    expected = [message["content"] + stop for message in messages if message["role"] == "assistant"]
    assert learned(tokenizer, encoded_by((tokenizer, contract), messages)) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["single", "multi"])
def test_an_answer_is_trained_after_the_prompt_that_asks_for_it_or_the_row_is_refused(name, messages):
    pair, problem = attempt(of_trl, name)
    if pair is None:
        assert problem.startswith("stages.sft.chat_template: ") and "\n" not in problem
        return
    tokenizer, stop = pair[0], pair[1].stop_tokens[0]
    encoded, problem = attempt(encoded_by, pair, messages)
    if encoded is None:
        assert problem.startswith(f"{ORIGIN}: messages[") and "\n" not in problem
        return
    if encoded.asked_otherwise:
        assert name.endswith("_training"), "only where the template marks what is an answer"
        return
    texts = learned(tokenizer, encoded)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, text in zip(answers, texts, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        assert whole.startswith(prompt + text)
        assert text.endswith(messages[index]["content"] + stop) and text.count(stop) == 1


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training")])
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["single", "multi"])
def test_the_mask_is_that_of_transformers_but_for_the_prompt_s_header_and_what_follows_the_stop_token(name, messages):
    try:
        tokenizer, contract = of_trl(name)
        encoded = encoded_by((tokenizer, contract), messages)
    except UserError:
        return  # which of them are refused, and how, is claimed elsewhere
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    theirs = learned(tokenizer, Encoded(marked["input_ids"], list(map(bool, marked["assistant_masks"]))))
    for mine, other in zip(learned(tokenizer, encoded), theirs, strict=True):
        before, answer, after = other.partition(mine.removesuffix(contract.stop_tokens[0]))
        assert answer and re.sub(r"</?think>|<E>|assistant|\s", "", CONTROL.sub("", before + after)) == ""


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_template_that_asks_otherwise_than_it_renders_answers_is_refused_at_the_point_of_divergence(name):
    message = refusal(encoded_by, of_trl(name), ONE)
    assert message.startswith(f"{ORIGIN}: messages[1]: ")
    assert repr("<think>\n") in message and "'The answer is 42." in message


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_is_trained():
    pair = of_trl("qwen3")
    message = refusal(encoded_by, pair, TWO)
    assert message.startswith(f"{ORIGIN}: messages[1]: ") and "<think>" in message and "train_on: last" in message
    [text] = learned(pair[0], encoded_by(pair, [TWO[0], assistant("The answer is 42.", train=False), *TWO[2:]]))
    assert text == "<think>\n\n</think>\n\nNothing\nmore.<|im_end|>"


def test_turns_of_system_user_and_tool_are_never_trained_and_tool_calls_of_the_assistant_are():
    pair = contracted(build(eos_token="<E>"))
    messages = [{"role": "system", "content": "Sys"}, user("Bonn?"), CALL, {"role": "tool", "content": "Rain"}, assistant("It rains.")]
    assert learned(pair[0], encoded_by(pair, messages, [WEATHER])) == [
        '<tool_call>{"name": "weather", "arguments": {"at": "Bonn"}}</tool_call><|im_end|>',
        "It rains.<|im_end|>",
    ]
    text = render(pair[0], messages, [WEATHER], ORIGIN)
    assert text.startswith("<|im_start|>system\nSys\n\nYou can call these tools:\n" + json.dumps(WEATHER)) and text.count("system\n") == 1


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "qwen3_training", "llama3_1"])
def test_tool_calls_are_trained_under_templates_that_render_them(name):
    pair = of_trl(name)
    [first, second] = learned(
        pair[0], encoded_by(pair, [user("Bonn?"), CALL, {"role": "tool", "content": "Rain"}, assistant("Wet.")], [WEATHER])
    )
    assert '"weather"' in first and '{"at": "Bonn"}' in first and first.endswith(pair[1].stop_tokens[0])
    assert "Wet." in second and "Rain" not in first + second


def test_a_turn_that_is_not_to_be_trained_is_not_and_is_read_all_the_same():
    pair = contracted(build(eos_token="<E>"))
    messages = [TWO[0], assistant("The answer is 42.", train=False), *TWO[2:]]
    encoded = encoded_by(pair, messages)
    assert learned(pair[0], encoded) == ["Nothing\nmore.<|im_end|>"]
    assert encoded.ids == encoded_by(pair, TWO).ids
    assert not any(encoded_by(pair, [user("x"), assistant("y", train=False)]).trained)


def test_an_answer_may_come_first():
    pair = contracted(build(eos_token="<E>"), system_prompt="Be kind.")
    encoded = encoded_by(pair, [assistant("Welcome!"), *TWO])
    assert learned(pair[0], encoded)[0] == "Welcome!<|im_end|>"
    assert pair[0].decode(encoded.ids).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\nWelcome!")


# --- nothing is lost, nothing is smuggled in ---------------------------------------------------------------------------

FORGETFUL = (
    "{% for m in messages %}{% if m.role in shown %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def forgetful(*shown: str) -> tuple[Tok, ChatContract]:
    template = "{% set shown = " + json.dumps(shown) + " %}" + FORGETFUL
    return contracted(build(eos_token="<E>", special=CHATML_TOKENS), template=template)


def test_what_a_template_leaves_out_is_refused():
    pair = forgetful("user", "assistant")
    system, tool = {"role": "system", "content": "Sys"}, {"role": "tool", "content": "Rain"}
    assert "leaves out or changes messages[0], of the role system" in refusal(encoded_by, pair, [system, *ONE])
    assert "messages[1], of the role tool" in refusal(encoded_by, pair, [ONE[0], tool, ONE[1]])
    assert "the tool 'weather'" in refusal(encoded_by, pair, ONE, [WEATHER])
    assert "messages[1]: the chat template leaves out the call of 'weather'" in refusal(encoded_by, pair, [ONE[0], CALL])
    for messages, tools in (([system, *ONE[:1]], None), (ONE[:1], [WEATHER])):
        assert refusal(encode_prompt, pair[0], messages, tools, ORIGIN).startswith(f"{ORIGIN}: ")


def test_an_answer_that_a_template_changes_is_refused():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    pair = contracted(build(eos_token="<E>", special=CHATML_TOKENS), template=template)
    assert "changes what the assistant says" in refusal(encoded_by, pair, [user("x"), assistant("<think>so</think>y")])
    assert learned(pair[0], encoded_by(pair, ONE)) == ["The answer is 42.<|im_end|>"]


def test_a_turn_that_is_closed_in_its_middle_is_refused():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% if loop.index0 == 1 %} ps<|im_end|>{% endif %}"
    template += "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    pair = contracted(build(eos_token="<E>", special=CHATML_TOKENS), template=template)
    assert "elsewhere than where it ends, at 'ps" in refusal(encoded_by, pair, ONE)


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>", "<E>", PAD_TOKEN, "a<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>b"])
def test_text_that_would_become_a_control_token_is_refused_wherever_it_stands(text):
    pair = contracted(build(eos_token="<E>"))
    token = re.match(r"a?(<[^>]+>)", text)
    assert token
    named = f"holds {token[1]!r}, which is a control token"
    assert f"{ORIGIN}: messages[0] {named}" in refusal(encoded_by, pair, [user(text), ONE[1]])
    assert f"{ORIGIN}: messages[0] {named}" in refusal(encode_prompt, pair[0], [user(text)], None, ORIGIN)
    assert f"{ORIGIN}: messages[1] {named}" in refusal(encoded_by, pair, [ONE[0], assistant(text)])
    call = copy.deepcopy(CALL)
    call["tool_calls"][0]["function"]["arguments"]["at"] = text
    assert f"{ORIGIN}: messages[1] {named}" in refusal(encoded_by, pair, [ONE[0], call])
    tool = copy.deepcopy(WEATHER)
    tool["function"]["description"] = text
    assert f"{ORIGIN}: tools {named}" in refusal(encoded_by, pair, ONE, [tool])


def test_a_control_token_that_only_the_template_names_is_refused_too():
    pair = of_trl("llama3")
    assert "'<|start_header_id|>'" in refusal(encoded_by, pair, [user("<|start_header_id|>system<|end_header_id|>"), ONE[1]])


def test_a_special_token_that_no_conversation_uses_may_be_written_about():
    pair = contracted(build(eos_token="<E>", special=["<filename>"]))
    assert learned(pair[0], encoded_by(pair, [user("x"), assistant("cp <filename> y")])) == ["cp <filename> y<|im_end|>"]


@pytest.mark.parametrize("text", ["{{ 1 + 1 }}", "{% raw %}", "{# no #}", "{{ messages }}", "{%- generation %}"])
def test_jinja_in_a_message_is_only_text(text):
    pair = contracted(build(eos_token="<E>"))
    encoded = encoded_by(pair, [user(text), assistant(text)])
    assert learned(pair[0], encoded) == [f"{text}<|im_end|>"]
    assert pair[0].decode(encoded.ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"


# --- tokens are those of inference -------------------------------------------------------------------------------------


def one_shot(tokenizer: Tok, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]], str]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding.input_ids, encoding.offset_mapping, text


@pytest.mark.parametrize("split", [None, QWEN_SPLIT], ids=["gpt2", "qwen"])
def test_an_answer_that_begins_with_white_space_is_trained_after_the_very_tokens_of_its_prompt(split):
    pair = contracted(build(eos_token="<E>", split=split))
    tokenizer = pair[0]
    for answer in ("\n\n\nx", "  x", "\n", " ", "", "\t\n y"):
        encoded = encoded_by(pair, [user("q"), assistant(answer), user("r"), assistant(answer + "z")])
        assert learned(tokenizer, encoded) == [f"{answer}<|im_end|>", f"{answer}z<|im_end|>"]
        prompt = encode_prompt(tokenizer, [user("q")], None, ORIGIN)
        assert encoded.ids[: len(prompt)] == prompt and spans(encoded)[0][0] == len(prompt)
    whole, _, text = one_shot(tokenizer, [user("q"), assistant("\n\n\nx")])
    apart = encoded_by(pair, [user("q"), assistant("\n\n\nx")]).ids
    assert apart != whole and tokenizer.decode(apart) == tokenizer.decode(whole) == text


def test_a_prompt_has_its_own_tokens_even_where_it_reads_otherwise_before_an_answer():
    pair = contracted(build(special=CONTROL.findall(TEMPLATES["llama3"]), template=TEMPLATES["llama3"], bos_token="<B>", eos_token="<E>"))
    prompt = encode_prompt(pair[0], ONE[:1], None, ORIGIN)
    whole, _, _ = one_shot(pair[0], ONE)
    assert whole[: len(prompt)] != prompt  # GPT-2 reads two line breaks as one word at the end of a text, and as two before a word
    encoded = encoded_by(pair, ONE)
    assert encoded.ids[: len(prompt)] == prompt and learned(pair[0], encoded) == ["The answer is 42.<|eot_id|>"]


def test_control_tokens_that_swallow_white_space_change_nothing_but_that():
    special = [
        AddedToken(token, special=True, normalized=False, rstrip=True) for token in ("<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
    ]
    pair = contracted(build(special=special, template=TEMPLATES["phi3"], eos_token="<E>"))
    texts = learned(pair[0], encoded_by(pair, TWO))
    assert texts == ["The answer is 42.<|end|>", "Nothing\nmore.<|end|>"]


def test_offsets_without_leading_spaces_do_not_move_the_mask():
    tokenizer = build(eos_token="<E>", special=CHATML_TOKENS)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    pair = contracted(tokenizer, template=template + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    assert learned(tokenizer, encoded_by(pair, [user("q"), assistant("   x  ")])) == ["   x  <|im_end|>"]


def test_where_no_tokens_could_be_exact_the_row_is_refused():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = build(special=CHATML_TOKENS, eos_token="<E>", spaced=True)
    pair = contracted(tokenizer, template=template + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}")
    assert learned(tokenizer, encoded_by(pair, ONE)) == ["The answer is 42.<|im_end|>"]
    message = refusal(encoded_by, pair, [user("q"), assistant(" x")])  # the two spaces are one token
    assert message.startswith(f"{ORIGIN}: a token reaches over where the answer ' x<|im_end|>")


# SmolLM2 lacks the bytes of control characters and rare planes, and drops them; "▁" is how SentencePiece writes a space.
CHARACTERS = st.characters(max_codepoint=0x1FAFF, exclude_categories=["Cs", "Cc"], exclude_characters="▁<")
TEXTS = st.text(CHARACTERS, max_size=12) | st.text(st.sampled_from(" \n\tab.é漢🙂"), max_size=12)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def example(kind: str) -> tuple[Tok, ChatContract]:
    return contracted(build(eos_token="<E>", split=QWEN_SPLIT if kind == "qwen" else None, spaced=kind == "spaced"))


def check_conversation(pair: tuple[Tok, ChatContract], system: str | None, turns: list[tuple[str, str]]) -> None:
    tokenizer, contract = pair
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    encoded = encoded_by(pair, messages)
    assert learned(tokenizer, encoded) == [answer + contract.stop_tokens[0] for _, answer in turns]
    whole, offsets, _ = one_shot(tokenizer, messages)
    assert tokenizer.decode(encoded.ids) == tokenizer.decode(whole)
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    prompt = encode_prompt(tokenizer, messages[:first], None, ORIGIN)
    assert encoded.ids[: len(prompt)] == prompt and encoded.trained[: len(prompt) + 1] == [False] * len(prompt) + [True]
    starts = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            starts.append(len(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)))
    if not any(a < start < b for start in starts for a, b in offsets):
        assert encoded.ids == whole


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "spaced"])
@FEW
@given(system=st.none() | TEXTS, turns=TURNS)
def test_any_conversation_is_trained_on_its_answers_and_tokenized_as_inference_does(kind, system, turns):
    check_conversation(example(kind), system, turns)


@functools.cache
def real(path: Path) -> tuple[Tok, ChatContract]:
    return load(path)


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "smollm2"])
@FEW
@given(system=st.none() | TEXTS, turns=TURNS)
def test_any_conversation_is_trained_on_its_answers_by_real_tokenizers(shared, name, system, turns):
    check_conversation(real(shared / "models" / name), system, turns)


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "smollm2"])
@pytest.mark.parametrize(
    ("file", "columns", "num_rows"),
    [
        ("llamafactory_demo/alpaca_en_demo.json", {}, 999),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", {}, 300),
        ("gsm8k_train/train.jsonl", {"prompt": "question", "completion": "answer"}, 800),
    ],
)
def test_no_row_of_real_data_is_refused_but_where_the_template_cannot_show_its_tools(shared, name, file, columns, num_rows):
    pair = real(shared / "models" / name)
    source = open_source(DataSource(data=str(shared / "data" / file), columns=columns, max_samples=num_rows), "sources.x")
    rows = [row for row in source.rows() if isinstance(row, Conversation)]
    assert len(rows) == num_rows
    for row in rows:
        encoded, problem = attempt(encode, pair[0], row.messages, row.tools, pair[1].stop_tokens[0], row.origin)
        if encoded is None:
            assert row.tools and name == "smollm2" and "the chat template leaves out the " in problem
            continue
        stop = pair[0].convert_tokens_to_ids(pair[1].stop_tokens[0])
        num_turns = sum(message["role"] == "assistant" for message in row.messages)
        assert sum(token == stop and trained for token, trained in zip(encoded.ids, encoded.trained, strict=True)) == num_turns


# --- the default system prompt ------------------------------------------------------------------------------------------

AWKWARD = [
    'say "yes"',
    "two\nlines\r\nand\ttabs",
    "back\\slash \\n",
    "{{ x }} {% if %} {# #} -%}",
    "naïve 漢字 🙂 \u2028",
    "'single'",
    "",
    "\x00\x1f\x7f",
]


@pytest.mark.parametrize("prompt", AWKWARD)
@pytest.mark.parametrize("name", [None, "qwen2_5", "llama3"])
def test_the_system_prompt_comes_first_where_a_conversation_brings_none(prompt, name):
    special = sorted(set(CONTROL.findall(TEMPLATES[name]))) if name else []
    base = build(special=special, template=TEMPLATES.get(name or ""), bos_token="<B>", eos_token="<E>")
    given_none = contracted(copy.deepcopy(base))
    given_it = contracted(base, system_prompt=prompt)
    with_system = [{"role": "system", "content": prompt}, *TWO]
    for prompted in (False, True):
        expected = render(given_none[0], with_system, None, ORIGIN, add_generation_prompt=prompted)
        assert render(given_it[0], TWO, None, ORIGIN, add_generation_prompt=prompted) == expected
        assert render(given_it[0], with_system, None, ORIGIN, add_generation_prompt=prompted) == expected
    assert learned(given_it[0], encoded_by(given_it, TWO)) == learned(given_none[0], encoded_by(given_none, TWO))
    assert given_it[1].digest != given_none[1].digest


@FEW
@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_the_system_prompt(prompt):
    tokenizer = contracted(build(eos_token="<E>"), system_prompt=prompt)[0]
    assert render(tokenizer, ONE[:1], None, ORIGIN) == f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"


def test_the_system_prompt_stands_before_the_tools():
    tokenizer = contracted(build(eos_token="<E>"), system_prompt="Be kind.")[0]
    text = render(tokenizer, ONE[:1], [WEATHER], ORIGIN)
    assert text.startswith("<|im_start|>system\nBe kind.\n\nYou can call these tools:") and text.count("<|im_start|>system") == 1


def test_the_layout_of_a_template_survives_the_system_prompt():
    template = "\n  {% for m in messages %}\n  {{ m.role }}: {{ m.content }}<|im_end|>\n  {% endfor %}\n"
    plain = contracted(build(special=CHATML_TOKENS, eos_token="<E>"), template=template)[0]
    prompted = contracted(build(special=CHATML_TOKENS, eos_token="<E>"), template=template, system_prompt="Sys")[0]
    messages = [{"role": "system", "content": "Sys"}, *ONE]
    assert (
        render(prompted, ONE, None, ORIGIN) == render(plain, messages, None, ORIGIN) == plain.apply_chat_template(messages, tokenize=False)
    )


# --- the contract on disk and at the boundaries -------------------------------------------------------------------------

CONTRACT = ChatContract("{{ é }}", "<s>", ("<|im_end|>", "</s>"), "<|pad|>", ("<|im_start|>", "<|im_end|>"))


def test_a_contract_is_read_as_it_was_saved(tmp_path):
    assert read_contract(tmp_path) is None
    for contract in (CONTRACT, ChatContract("t", None, ("x",), "x", ())):
        contract.save(tmp_path)
        assert read_contract(tmp_path) == contract


@pytest.mark.parametrize(
    ("field", "value"), [("template", "{{ e }}"), ("stop_tokens", ["</s>", "<|im_end|>"]), ("pad_token", "</s>"), ("bos_token", None)]
)
def test_a_contract_changed_by_hand_is_refused(tmp_path, field, value):
    CONTRACT.save(tmp_path)
    disk.write_json(tmp_path / FILE, disk.read_json(tmp_path / FILE) | {field: value})
    assert refusal(read_contract, tmp_path) == (
        f"{tmp_path / FILE}: was changed after it was written; build the stage again that made this policy"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}", '{"digest": "x"}', '{"digest": "x", "template": "t", "other": 1}'])
def test_what_is_no_contract_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert "not a chat contract" in refusal(read_contract, tmp_path)


def test_a_tokenizer_that_left_its_contract_is_refused():
    tokenizer, contract = contracted(build(eos_token="<E>", bos_token="<B>"))
    check_contract(contract, tokenizer, "runs/a")
    for attribute, what in (
        ("chat_template", "chat template"),
        ("eos_token", "eos token"),
        ("pad_token", "pad token"),
        ("bos_token", "bos token"),
    ):
        changed = copy.deepcopy(tokenizer)
        setattr(changed, attribute, "<E>" if attribute != "bos_token" else "<|im_end|>")
        assert refusal(check_contract, contract, changed, "runs/a").startswith(f"runs/a: its {what} is '")
    foreign = ChatContract(**{**contract.__dict__, "stop_tokens": ("<|im_end|>", "<nowhere>")})
    assert "stop token '<nowhere>' is not in its vocabulary" in refusal(check_contract, foreign, tokenizer, "runs/a")


def test_a_stop_token_that_is_the_unknown_token_too_is_in_the_vocabulary():
    tokenizer, contract = contracted(build(eos_token="<|endoftext|>", unk_token="<|endoftext|>"))
    assert contract.stop_tokens == ("<|im_end|>", "<|endoftext|>")
    check_contract(contract, tokenizer, "runs/a")


def test_a_contract_outlives_saving_and_loading_the_tokenizer(tmp_path):
    tokenizer, contract = contracted(build(eos_token="<E>", special=["<keep>"], extra_special_tokens=["<keep>"]))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    check_contract(contract, loaded, "runs/a")
    assert encoded_by((loaded, contract), TWO) == encoded_by((tokenizer, contract), TWO)
    assert "control token" in refusal(encoded_by, (loaded, contract), [user("<E>"), ONE[1]])


def test_a_base_model_that_adopts_a_contract_renders_and_tokenizes_like_the_policy():
    policy, contract = contracted(build(eos_token="<E>"), system_prompt="Be kind.")
    base = build(eos_token="<E>")
    adopt(base, contract)
    check_contract(contract, base, "sources.base")
    assert encoded_by((base, contract), TWO) == encoded_by((policy, contract), TWO)
    assert base.convert_tokens_to_ids(list(contract.added_tokens)) == policy.convert_tokens_to_ids(list(contract.added_tokens))
    assert set(base.all_special_tokens) == set(policy.all_special_tokens)


def test_a_published_model_stops_by_itself_at_every_stop_token():
    tokenizer, contract = contracted(build(eos_token="<E>", bos_token="<B>"))
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=7), config=LlamaConfig(eos_token_id=7))
    apply_to_generation(contract, tokenizer, model)
    stop, end, pad, bos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<E>", PAD_TOKEN, "<B>"])
    assert model.generation_config.eos_token_id == [stop, end]
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (stop, pad, bos)
    assert (model.generation_config.pad_token_id, model.generation_config.bos_token_id) == (pad, bos)
