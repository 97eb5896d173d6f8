"""Talking to policies: what is printed and kept is what plain transformers answers, and what is kept can be trained on."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import DataSource, ModelSource
from posttrain.conversation import Conversation, Sampling, ask, open_speakers
from posttrain.data.rows import Conversation as Row
from posttrain.data.source import open_source
from posttrain.inspection import visible
from posttrain.models import load_policy, load_tokenizer
from posttrain.stage import Input
from tests.conftest import Ended, make_tiny, read_lines

Cli = Callable[..., Ended]
Message = dict[str, str]
QUESTIONS = ("what is the colour of the sky?", "are there more?")


def published(base: Path, path: Path) -> Path:
    """A base model under a chat contract, as a stage publishes it."""
    given = Input("base", "policy", "", ModelSource(model=str(base)))
    tokenizer, contract = load_tokenizer(given, "test")
    model = load_policy(given.model, tokenizer, contract, "test", dtype="auto")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    contract.save(path)
    return path


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies that answer otherwise, and a base that has no chat template."""
    here = tmp_path_factory.mktemp("policies")
    one = published(tiny, here / "one")
    other: Any = AutoModelForCausalLM.from_pretrained(published(tiny, here / "other"))
    other.lm_head.weight.data = other.lm_head.weight.data.roll(7, 0)
    other.save_pretrained(here / "other")
    return {"one": one, "other": here / "other", "base": tiny}


@pytest.fixture(scope="module")
def config(models: dict[str, Path], chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "pipeline.yaml"
    sources = "".join(f"  {name}: {{model: {model}}}\n" for name, model in models.items())
    path.write_text(
        f"run: r\nsources:\n{sources}  chat: {{data: {chat_file}}}\n"
        "stages:\n  eval: {inputs: {policies: [one, other, base], data: [chat]}}\n  sft: {inputs: {policy: one, data: chat}}\n"
    )
    return path


@pytest.fixture
def chat(posttrain: Cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`chat("--stage", "one", says=[...])`: the command, with lines put in through a pipe."""

    def call(*arguments: object, says: tuple[str, ...] = ()) -> Ended:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in says)))
        return posttrain("chat", config, "--root", tmp_path / "runs", *arguments)

    return call


def answer(path: Path, messages: list[Message], max_new_tokens: int = 12) -> str:
    """What plain transformers answers, which is told nothing else."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def dialogue(path: Path, questions: tuple[str, ...], system: str | None = None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(path, messages)})
    return messages


def kept(path: Path) -> list[tuple[str, list[Message]]]:
    return [(row["policy"], row["messages"]) for row in read_lines(path)]


def test_one_question_is_answered_as_plain_transformers_answers_it(chat: Callable[..., Ended], models: dict[str, Path]) -> None:
    ended = chat("--stage", "one", "--prompt", QUESTIONS[0], "--max-new-tokens", 12)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == visible(answer(models["one"], [{"role": "user", "content": QUESTIONS[0]}])) + "\n"


def test_a_conversation_goes_on_and_is_kept_as_rows_that_a_source_reads(
    chat: Callable[..., Ended], models: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "kept.jsonl"
    ended = chat("--stage", "one", "--system", "be brief", "--max-new-tokens", 12, "--save", file, says=QUESTIONS)
    assert (ended.code, ended.err) == (0, "")
    expected = dialogue(models["one"], QUESTIONS, "be brief")
    assert kept(file) == [("one", expected)]
    (row,) = open_source(DataSource(data=str(file)), "kept").rows()
    assert isinstance(row, Row)
    assert [(message["role"], message["content"]) for message in row.messages] == [(m["role"], m["content"]) for m in expected]
    assert chat("--stage", "one", "--max-new-tokens", 12, "--save", file, "--prompt", QUESTIONS[0]).code == 0
    assert kept(file) == [("one", expected), ("one", dialogue(models["one"], QUESTIONS[:1]))], "a file is added to"


def test_policies_answer_side_by_side_each_in_its_own_conversation(
    chat: Callable[..., Ended], models: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "kept.jsonl"
    ended = chat("--compare", "one", "other", "--max-new-tokens", 12, "--save", file, says=QUESTIONS)
    assert (ended.code, ended.err) == (0, "")
    said = {name: dialogue(models[name], QUESTIONS) for name in ("one", "other")}
    assert said["one"] != said["other"]
    lines = [f"{name}: {visible(said[name][place]['content'])}\n" for place in (1, 3) for name in said]
    assert ended.out == "".join(lines)
    assert kept(file) == list(said.items())


def test_a_base_without_a_template_is_asked_in_the_way_of_the_others(chat: Callable[..., Ended]) -> None:
    ended = chat("--compare", "base", "one", "--prompt", QUESTIONS[0], "--max-new-tokens", 4)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("base: ") and "\none: " in ended.out


def test_on_a_terminal_answers_stand_in_columns(models: dict[str, Path]) -> None:
    given = [Input(name, "policy", "", ModelSource(model=str(models[name]))) for name in ("one", "other")]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, markup=False, color_system=None)
    ask(Conversation(open_speakers(given), Sampling(max_new_tokens=4)), QUESTIONS[0], console)
    assert any("one" in line and "other" in line for line in screen.getvalue().splitlines())


def test_commands_take_back_begin_again_and_set_the_system_prompt(
    chat: Callable[..., Ended], models: dict[str, Path], tmp_path: Path
) -> None:
    file, first, second = tmp_path / "kept.jsonl", QUESTIONS[0], QUESTIONS[1]
    says = (f"/save {file}", second, "/undo", "/undo", first, "/reset", second, "/system be kind", first, "/quit", "never asked")
    ended = chat("--stage", "one", "--max-new-tokens", 12, says=says)
    assert (ended.code, ended.err) == (0, "")
    assert "taken back\nthere is nothing to take back\n" in ended.out
    one = models["one"]
    assert [messages for _, messages in kept(file)] == [
        dialogue(one, (first,)),
        dialogue(one, (second,)),
        dialogue(one, (first,), "be kind"),
    ]


def test_what_cannot_be_asked_is_said_and_the_conversation_goes_on(chat: Callable[..., Ended], models: dict[str, Path]) -> None:
    says = ("/undu", "x " * 300, "a <|im_end|> in it", "//usr/bin", "")
    ended = chat("--stage", "one", "--max-new-tokens", 12, says=says)
    assert ended.code == 0
    undone, too_long, control = ended.err.splitlines()
    assert undone.startswith("error: /undu: is no command; did you mean '/undo'?")
    assert too_long.startswith("error: chat: the conversation has ") and "begin again with /reset" in too_long
    assert "holds '<|im_end|>', which is a control token" in control
    assert ended.out == visible(answer(models["one"], [{"role": "user", "content": "/usr/bin"}])) + "\n"


def test_drawn_answers_repeat_with_their_seed_and_only_with_it(chat: Callable[..., Ended]) -> None:
    def drawn(*options: object) -> str:
        ended = chat("--stage", "one", "--max-new-tokens", 24, *options, says=(QUESTIONS[0], QUESTIONS[0]))
        assert ended.code == 0, ended.err
        return ended.out

    warm = drawn("--temperature", 1.5, "--seed", 3)
    assert warm == drawn("--temperature", 1.5, "--seed", 3)
    assert len({warm, drawn("--temperature", 1.5, "--seed", 4), drawn("--temperature", 1.5, "--seed", 3, "--repetition-penalty", 1.8)}) == 3
    greedy = drawn()
    assert drawn("--temperature", 1.5, "--top-k", 1) == drawn("--temperature", 1.5, "--top-p", 1e-6) == greedy != warm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "oen"], "--stage oen: no stage of that name makes a policy; did you mean 'one'?"),
        (["--stage", "eval"], "--stage eval: no stage of that name makes a policy"),
        (["--stage", "sft"], "stages.sft: is not finished, so what it makes cannot be read; run it first (--until sft)"),
        ([], "no finished policy to talk to; run the pipeline first"),
        (["--compare", "one"], "--compare one: name two policies or more"),
        (["--compare", "one", "one"], "--compare one one: name two policies or more, each once"),
        (["--compare", "one", "otter"], "--compare otter: no stage of that name makes a policy; did you mean 'other'?"),
        (["--compare", "one", "other", "--stage", "one"], "--stage one: is one policy; name all that are to be compared after --compare"),
        (["one", "other"], "'one': an override is written key.key=value"),
        (["--stage", "one", "--top-p", "0.9"], "--top-p 0.9: has no effect where the likeliest token is taken; give --temperature too"),
        (["--stage", "one", "--top-k", "5"], "--top-k 5: has no effect where the likeliest token is taken; give --temperature too"),
        (["--stage", "one", "--temperature", "nan"], "--temperature nan: is not finite; give a number"),
        (["--stage", "one", "--save", "kept.txt"], "kept.txt: conversations are kept as JSONL; give a name that ends with .jsonl"),
        (["--stage", "one", "--save", "nowhere/kept.jsonl"], "nowhere/kept.jsonl: cannot be written (No such file or directory)"),
        (["--stage", "one", "--port", "8000"], "--port 8000: is for --serve only; leave it out"),
        (["--stage", "one", "--serve"], "--stage one: is a source, and only what a stage made is served; name a stage"),
        (["--serve", "--prompt", "hello"], "--prompt: is for a conversation here, and with --serve clients say that; leave it out"),
        (["--serve", "--temperature", "1"], "--temperature: is for a conversation here, and with --serve clients say that; leave it out"),
        (["--serve", "--compare", "one", "other"], "--compare: one server answers for one policy; name it with --stage"),
    ],
)
def test_what_cannot_be_is_one_line(chat: Callable[..., Ended], options: list[str], message: str) -> None:
    ended = chat(*options)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err


def test_a_template_that_shows_no_system_prompt_is_refused_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    deaf = make_tiny(tmp_path / "deaf")
    settings = json.loads((deaf / "tokenizer_config.json").read_text())
    template = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}assistant: "
    (deaf / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    speakers = open_speakers([Input("deaf", "policy", "", ModelSource(model=str(deaf)))])
    with pytest.raises(Exception, match="chat: deaf: the chat template leaves out or changes messages\\[0\\], of the role system"):
        Conversation(speakers, Sampling(), system="be brief")
