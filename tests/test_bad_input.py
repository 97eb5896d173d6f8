"""A zoo of wrong input: each ends with exit code 2 and one line that says where, which value, and what to do, before any work."""

import contextlib
import io
import json
import os
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ByteSize
from pydantic.fields import FieldInfo

import pipeline
from posttrain.config import Config, apply_override
from posttrain.error import UserError
from posttrain.stage import load_stage
from tests.security.preparing import Refuse, refuse, run_prepare, write_pipeline

__all__ = ["refuse"]

PIPELINE = """\
run: zoo
sources:
  base: {model: HERE/base}
  chat: {data: HERE/chat.jsonl}
  prefs: {data: HERE/prefs.jsonl}
stages:
  sft: {inputs: {policy: base, data: chat}}
  dpo: {inputs: {policy: sft, data: prefs}}
  eval: {inputs: {policies: [base, sft, dpo], data: [chat, prefs]}}
"""
PINNED = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sources that are right, some that are wrong, and a pipeline file that is right."""
    here = tmp_path_factory.mktemp("zoo")
    (here / "base").mkdir()
    (here / "base" / "config.json").write_text("{}")
    (here / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (here / "prefs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (here / "notes.txt").write_text("text\n")
    (here / "empty.jsonl").touch()
    (here / "folder").mkdir()
    (here / "pipeline.yaml").write_text(PIPELINE.replace("HERE", str(here)))
    return here


def refusal(posttrain: Callable[..., Any], config: Path, root: Path, *overrides: str, command: str = "plan") -> str:
    """The one line with which the command refuses its input; nothing was made below `root`."""
    ended = posttrain(command, config, "--root", root, *overrides)
    assert ended.code == 2, (ended.code, ended.out, ended.err)
    assert "Traceback" not in ended.err
    assert {path.name for path in root.glob("*")} <= {".hashes.json"}
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    return str(line.removeprefix("error: "))


OVERRIDES = [
    # an input that is wired wrongly
    ("eval.inputs.policies=[prefs]", "stages.eval.inputs.policies: 'prefs' is a dataset, not a policy; base, sft, dpo would fit"),
    ("sft.inputs.data=base", "stages.sft.inputs.data: 'base' is a policy, not a dataset; chat, prefs would fit"),
    ("sft.inputs.polcy=base", "stages.sft.inputs.polcy: sft reads no such input; did you mean 'policy'?"),
    ("dpo.inputs={policy: sft}", "stages.dpo.inputs.data: missing; name a dataset: chat, prefs"),
    ("dpo.inputs={}", "stages.dpo.inputs.policy: missing; name a policy: base, sft"),
    ("dpo.inputs=sft", "stages.dpo.inputs: must map each of policy, data to a source or an earlier stage; heldout may be left out"),
    ("dpo.inputs=[sft]", "stages.dpo.inputs: must map each of policy, data"),
    ("sft.inputs.policy=dpo", "stages.sft.inputs.policy: 'dpo' does not stand above"),
    ("sft.inputs.policy=sft", "stages.sft.inputs.policy: 'sft' does not stand above"),
    ("sft.inputs.data=chta", "stages.sft.inputs.data: 'chta' is neither a source nor an earlier stage; did you mean 'chat'?"),
    ("sft.inputs.data=1", "stages.sft.inputs.data: 1 is neither a source nor an earlier stage"),
    ("sft.inputs.data=null", "stages.sft.inputs.data: None is neither"),
    ("sft.inputs.data={data: x.jsonl}", "stages.sft.inputs.data: {'data': 'x.jsonl'} is neither a source nor an earlier stage"),
    ("sft.inputs.data=[[chat]]", "stages.sft.inputs.data: ['chat'] is neither"),
    ("sft.inputs.data=[chat, prefs]", "stages.sft.inputs.data: takes exactly one name, got ['chat', 'prefs']"),
    ("eval.inputs.policies=[]", "stages.eval.inputs.policies: takes at least one name, got []"),
    ("eval.inputs.policies=[sft, sft]", "stages.eval.inputs.policies: ['sft', 'sft'] names an input twice; name it once"),
    # a stage that is none, or is set wrongly
    ("sft.kind=sfft", "stages.sft.kind: 'sfft' is no kind of stage; did you mean 'sft'?"),
    ("sft.kind=[sft]", "stages.sft.kind: ['sft'] is no kind of stage; did you mean 'sft'?"),
    ("distil={inputs: {policy: base}}", "stages.distil: 'distil' is no kind of stage"),
    ("sft=null", "stages.sft: input should be a valid dictionary, got None"),
    ("sft.learning_rat=1e-5", "stages.sft.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("sft.learning_rate='2e-5'", "stages.sft.learning_rate: input should be a valid number, got '2e-5'"),
    ("sft.learning_rate=-1", "stages.sft.learning_rate: input should be greater than 0, got -1"),
    ("sft.learning_rate=.inf", "stages.sft.learning_rate: '.inf': inf is not finite; give a number"),
    ("sft.learning_rate=null", "stages.sft.learning_rate: input should be a valid number, got None"),
    ("sft.max_length=12.5", "stages.sft.max_length: input should be a valid integer, got 12.5"),
    ("sft.layout=packd", "stages.sft.layout: input should be 'auto', 'shared', 'packed' or 'padded', got 'packd'"),
    ("sft.micro_batch_tokens=0", "stages.sft.micro_batch_tokens: input should be greater than or equal to 1, got 0"),
    ("sft.gradient_checkpointing=yes", "stages.sft.gradient_checkpointing: input should be a valid boolean, got 'yes'"),
    ("sft.on_overflow=cut", "stages.sft.on_overflow: input should be 'error', 'drop' or 'truncate', got 'cut'"),
    ("sft.lora.rank=8", "stages.sft.lora.rank: unknown key; known: load_in_4bit, lora_alpha, lora_dropout, r, target_modules, use_dora"),
    ("sft.lora.r=0", "stages.sft.lora.r: input should be greater than or equal to 1, got 0"),
    ("sft.lora.target_modules=5", "stages.sft.lora.target_modules: input should be a valid string, got 5"),
    ("sft.lora.target_modules=[q_proj, 5]", "stages.sft.lora.target_modules"),
    ("sft.lora=8", "stages.sft.lora: input should be a valid dictionary or instance of LoraRecipe, got 8"),
    ("dpo.loss_type=[sigmoid, nll]", "stages.dpo.loss_type.1: input should be 'sigmoid', 'hinge'"),
    ("dpo.loss_weights=[1.0, 2.0]", "stages.dpo.loss_weights: 2 given for 1 losses; give one for each"),
    ("dpo.trainer={1: 2}", "stages.dpo.trainer: '{1: 2}': the key 1 is no text; put it in quotes"),
    ("sft.num_processes=3", "stages.sft.global_batch_size: 64 samples cannot be divided among 3 processes; 63 or 66 can"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_wrong_stage_is_one_line_with_its_dotted_path(
    here: Path, tmp_path: Path, posttrain: Callable[..., Any], override: str, message: str
) -> None:
    assert refusal(posttrain, here / "pipeline.yaml", tmp_path / "runs", f"stages.{override}").startswith(message)


OTHER_OVERRIDES = [
    # names
    ("run=..", "run: '..' is no usable name; use up to 100 letters, digits"),
    ("run=a/b", "run: 'a/b' is no usable name"),
    ("run=/tmp/x", "run: '/tmp/x' is no usable name"),
    ("run=''", "run: '' is no usable name"),
    ("run=", "run: input should be a valid string, got None"),
    ("run=5", "run: input should be a valid string, got 5"),
    ("run=" + "x" * 101, "run: 'xxxx"),
    ("run='a\nb'", "run: 'a"),
    ("run=\"a\\nb\"", "run: 'a\\nb' is no usable name"),
    ("stages.chat={inputs: {policy: base, data: chat}, kind: sft}", "stages.chat: a source has that name too; rename one of them"),
    # sources
    ("sources.base.model=HERE/none", "sources.base.model: 'HERE/none' does not exist here; give a path on this disk, or a Hub id"),
    ("sources.base.model=HERE/folder", "sources.base.model: 'HERE/folder' holds no config.json, so it is no model directory"),
    ("sources.base.model=HERE/chat.jsonl", "sources.base.model: 'HERE/chat.jsonl' holds no config.json"),
    ("sources.base.model=''", "sources.base.model: "),
    ("sources.base.model=~nobody-of-that-name/x", "sources.base.model: '~nobody-of-that-name/x' does not exist here"),
    ("sources.base.model=some-org/some-base", "sources.base.model: 'some-org/some-base' is not on this disk, and as a Hub id it needs a"),
    ("sources.base={model: o/m, revision: main}", "sources.base.revision: 'main' is no commit hash; a branch or tag moves"),
    ("sources.base={model: o/m, revision: 0123456}", "sources.base.revision: input should be a valid string, got 123456"),
    ("sources.base={model: o/m, revision: abcdef0}", "sources.base.revision: 'abcdef0' is no commit hash"),
    (f"sources.base.revision={PINNED[:-1]}a", "sources.base.revision: 'HERE/base' is a local path and has no revision; leave it out"),
    ("sources.base.modle=x", "sources.base.modle: unknown key; did you mean 'model'?"),
    ("sources.base={modle: x}", "sources.base: must have either `model: ...` or `data: ...`"),
    ("sources.base={model: x, data: y}", "sources.base: must have either `model: ...` or `data: ...`"),
    ("sources.base=x", "sources.base: must have either"),
    ("sources=x", "sources: must be a mapping of names to"),
    ("sources.chat.data=HERE/none.jsonl", "sources.chat.data: 'HERE/none.jsonl' does not exist here"),
    ("sources.chat.data=none/none.jsonl", "sources.chat.data: 'none/none.jsonl' does not exist here"),
    ("sources.chat.data=HERE/empty.jsonl", "sources.chat.data: 'HERE/empty.jsonl' is empty; it must hold at least one row"),
    ("sources.chat.data=HERE/folder", "sources.chat.data: 'HERE/folder' is a directory; name the data files in it"),
    ("sources.chat.data=HERE/notes.txt", "sources.chat.data: 'HERE/notes.txt' is of no known kind; give a .json, .jsonl, .csv or .parquet"),
    ("sources.chat.data=/dev/null", "sources.chat.data: '/dev/null' is no regular file"),
    ("sources.chat.data=[]", "sources.chat.data: the list is empty; name at least one"),
    ("sources.chat.data=5", "sources.chat.data: input should be a valid string, got 5"),
    ("sources.chat.data=[HERE/chat.jsonl, 5]", "sources.chat.data"),
    ("sources.chat.data=''", "sources.chat.data: "),
    ("sources.chat.data=o/d@main", "sources.chat.data: 'main' is no commit hash"),
    ("sources.chat.data=o/d", "sources.chat.data: 'o/d' is not on this disk, and as a Hub id it needs a pinned commit"),
    ("sources.chat.data=" + "x" * 300 + ".jsonl", "sources.chat.data: "),
    ("sources.chat.data=o/" + "x" * 300, "sources.chat.data: "),
    ("sources.chat.weights=[1.0, 2.0]", "sources.chat.weights: 2 given for 1 entries of data; give one for each"),
    ("sources.chat.weights=[0.0]", "sources.chat.weights: [0.0] must all be above 0"),
    ("sources.chat.part=held_out", "sources.chat.part: held_out needs held_out, the share of the prompts to hold out"),
    ("sources.chat.held_out=1", "sources.chat.held_out: input should be less than 1, got 1"),
    ("sources.chat.format=sharegtp", "sources.chat.format: input should be 'messages'"),
    ("sources.chat.columns={prompt: 5}", "sources.chat.columns.prompt: input should be a valid string, got 5"),
    # the rest
    ("stagse={}", "stagse: unknown key; did you mean 'stages'?"),
    ("stages={}", "stages: none listed; add at least one"),
    ("stages=[]", "stages: input should be a valid dictionary, got []"),
    ("launcher.kind=slurmm", "launcher.kind: input should be 'local'"),
    ("launcher.num_processes=0", "launcher.num_processes: input should be greater than or equal to 1, got 0"),
    ("launcher.num_processes=5", "stages.sft.global_batch_size: 64 samples cannot be divided among 5 processes; 60 or 65 can"),
    # overrides that are none
    ("stages.sft.beta", "'stages.sft.beta': an override is written key.key=value, such as stages.dpo.beta=0.05"),
    ("=5", "'=5': an override is written"),
    ("stages..beta=5", "'stages..beta=5': an override is written"),
    ("run.x=5", "run: is no mapping, so 'run.x=5' cannot be set in it"),
    ("stages.eval.inputs.policies.0=sft", "stages.eval.inputs.policies: is no mapping, so"),
    ("stages.sft.seed={", "stages.sft.seed: '{': not valid YAML: "),
    ("stages.sft.seed=!!python/object:os.system x", "stages.sft.seed: "),
    ("stages.sft.seed=!!timestamp x", "stages.sft.seed: input should be a valid integer, got 'x'"),
    ("stages.sft.seed=" + "[" * 1000, "stages.sft.seed: "),
    ("stages.sft.seed=" + "9" * 30, "stages.sft.seed: "),
    ("stages.sft.system_prompt=\"\\uD800\"", "stages.sft.system_prompt: "),
    ("stages.sft.chat_template=&a [*a]", "stages.sft.chat_template: '&a [*a]': not valid YAML: "),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), OTHER_OVERRIDES, ids=[override[:60] for override, _ in OTHER_OVERRIDES])
def test_a_wrong_name_source_or_override_is_one_line(
    here: Path, tmp_path: Path, posttrain: Callable[..., Any], override: str, message: str
) -> None:
    line = refusal(posttrain, here / "pipeline.yaml", tmp_path / "runs", override.replace("HERE", str(here)))
    assert line.startswith(message.replace("HERE", str(here)))


FILES: list[tuple[str, str | bytes, str]] = [
    ("an empty file", "", "FILE: must hold a mapping with the keys run, sources and stages"),
    ("a list", "- run", "FILE: must hold a mapping"),
    ("text", "run", "FILE: must hold a mapping"),
    ("one key of three", "run: x", "sources: missing; it is required"),
    ("a misspelt key", PIPELINE.replace("stages:", "stagse:"), "stagse: unknown key; did you mean 'stages'?"),
    ("an open brace", PIPELINE.replace("data: chat}}", "data: chat}"), "FILE:8: not valid YAML: "),
    ("a tab", "run: x\n\tsources: {}", "FILE:2: not valid YAML: "),
    ("a bad indent", PIPELINE.replace("  chat:", " chat:"), "FILE:4: not valid YAML: "),
    ("a key twice", PIPELINE.replace("  prefs:", "  chat:"), "FILE:5: not valid YAML: found duplicate key"),
    ("a stage twice", PIPELINE.replace("  eval:", "  sft:"), "FILE:9: not valid YAML: found duplicate key"),
    ("an unknown alias", "run: *x", "FILE:1: not valid YAML: found undefined alias"),
    ("two documents", "run: x\n---\nrun: y\n", "FILE:2: not valid YAML: but found another document"),
    ("an unknown tag", "run: !!python/name:os.system x", "FILE:1: not valid YAML: could not determine a constructor"),
    ("a key that is no text", "1: x\nrun: y\n", "FILE: the key 1 is no text; put it in quotes"),
    ("a mapping of itself", "run: x\nstages: &a {b: *a}", "FILE: not valid YAML: "),
    ("a byte that is not UTF-8", b"run: \xff", "FILE: cannot be read (not UTF-8 text); give the path of a pipeline file"),
    ("a control character", b"run: \x07", "FILE: not valid YAML: "),
    ("binary data", bytes(range(256)), "FILE: cannot be read (not UTF-8 text)"),
    ("JSON cut off", '{"run": "x"', "FILE:1: not valid YAML: "),
    (
        "aliases of aliases",
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)),
        "FILE: its aliases",
    ),
    (
        "merges of merges",
        "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 60)),
        "FILE: its aliases",
    ),
    ("a chain of aliases", "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)), "FILE: "),
    ("lists in lists", "run: " + "[" * 100_000, "FILE:1: not valid YAML: nested over 100 deep"),
    ("mappings in mappings", "".join(" " * depth + "a:\n" for depth in range(500)), "FILE:101: not valid YAML: nested over 100 deep"),
    ("a huge integer", "run: " + "9" * 100_000, "FILE: not valid YAML: "),
    ("a huge hexadecimal integer", "run: 0x" + "f" * 100_000, "FILE: run: a number of more than 64 bits is too large"),
    ("a file of five megabytes", "run: x" + " " * (5 << 20), "FILE: cannot be read (over 4 MiB)"),
    ("half a character", 'run: "\\ud800"', "FILE:1: not valid YAML: found invalid Unicode"),
    ("UTF-16", PIPELINE.encode("utf-16"), "FILE: cannot be read (not UTF-8 text)"),
    ("CRLF and a tab", b"run: x\r\n\tsources: {}\r\n", "FILE:2: not valid YAML: "),
    ("NUL bytes", b"run: \0", "FILE: not valid YAML: "),
    ("an object of Python", "run: !!python/object/apply:os.system [true]", "FILE:1: not valid YAML: could not determine a constructor"),
    ("a set", "run: !!set {x}", "FILE: "),
    ("bytes", "run: !!binary aGVsbG8=", "FILE: run: b'hello' is neither text, number, list nor mapping"),
    ("Infinity", "run: .inf", "FILE: run: inf is not finite"),
]


@pytest.mark.parametrize(("what", "content", "message"), FILES, ids=[what for what, _, _ in FILES])
def test_a_wrong_pipeline_file_is_one_line_with_file_and_line(
    here: Path, tmp_path: Path, posttrain: Callable[..., Any], what: str, content: str | bytes, message: str
) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.replace("HERE", str(here)).encode())
    assert refusal(posttrain, config, tmp_path / "runs").startswith(message.replace("FILE", str(config)))


def test_a_pipeline_file_that_cannot_be_read_is_named(tmp_path: Path, posttrain: Callable[..., Any]) -> None:
    missing, folder, too_long = tmp_path / "none.yaml", tmp_path, Path("x" * 300)
    for path, reason in [(missing, "No such file or directory"), (folder, "Is a directory"), (too_long, "File name too long")]:
        assert refusal(posttrain, path, tmp_path / "runs").startswith(f"{path}: cannot be read ({reason}); give the path of a")


@pytest.mark.parametrize("command", ["plan", "run", "status", "inspect", "chat"])
def test_what_is_no_file_is_not_waited_for(here: Path, tmp_path: Path, posttrain: Callable[..., Any], command: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        ended = posttrain(command, path, *(["sft"] if command == "inspect" else []), "--root", tmp_path / "runs")
        assert (ended.code, ended.err) == (2, f"error: {path}: cannot be read (not a regular file); give the path of a pipeline file\n")
    line = refusal(posttrain, here / "pipeline.yaml", tmp_path / "runs", f"stages.sft.chat_template={tmp_path / 'fifo'}")
    assert line == f"stages.sft.chat_template: {tmp_path / 'fifo'} is no regular file; give the path of one"


def test_a_root_that_is_a_file_is_named(here: Path, tmp_path: Path, posttrain: Callable[..., Any]) -> None:
    (tmp_path / "runs").touch()
    for command in ("plan", "run"):
        ended = posttrain(command, here / "pipeline.yaml", "--root", tmp_path / "runs")
        assert (ended.code, ended.err) == (2, f"error: --root {tmp_path / 'runs'}: is a file; give the directory of all runs\n")


def test_what_a_user_wrote_cannot_break_the_line_or_play_tricks_on_the_terminal(
    here: Path, tmp_path: Path, posttrain: Callable[..., Any]
) -> None:
    line = refusal(posttrain, here / "pipeline.yaml", tmp_path / "runs", "stages.a\nb\x1b[31m\u2028\udcff.c=1")
    assert line.startswith("stages: 'a\\nb\\x1b[31m\\u2028\\udcff' is no usable name; ")


def test_run_refuses_wrong_input_before_it_starts_anything(here: Path, tmp_path: Path, posttrain: Callable[..., Any]) -> None:
    for override in ("stages.eval.confidence=2", "sources.prefs.data=HERE/none.jsonl", "stages.eval.inputs.data=[dpo]"):
        refusal(posttrain, here / "pipeline.yaml", tmp_path / "runs", override.replace("HERE", str(here)), command="run")


def test_the_pipeline_that_the_zoo_starts_from_is_right(here: Path, tmp_path: Path, posttrain: Callable[..., Any]) -> None:
    for overrides in ([], ["run=2026-10-01"], ["stages.sft.lora=null", "stages.sft.lora.r=4"], ["stages.sft.num_processes=2"]):
        ended = posttrain("plan", here / "pipeline.yaml", "--root", tmp_path / "runs", *overrides)
        assert (ended.code, ended.err) == (0, "")


# --- what only the data or the model can show ------------------------------------------------------------------------

GOOD_ROW = '{"prompt": "Who?", "completion": "Me."}'
BAD_ROWS = [
    ("a row cut off", '{"prompt": "Who?", "comp', "chat.jsonl:2: malformed JSON"),
    ("a row that is no object", '["Who?", "Me."]', "chat.jsonl:2: must be an object"),
    ("a row without an answer", '{"prompt": "Who?"}', "chat.jsonl:2: "),
    ("an empty answer", '{"prompt": "Who?", "completion": ""}', "chat.jsonl:2: "),
    ("an answer that is no text", '{"prompt": "Who?", "completion": 5}', "chat.jsonl:2: "),
    ("no assistant turn", '{"messages": [{"role": "user", "content": "Who?"}]}', "chat.jsonl:2: "),
]


def run_refusal(posttrain: Callable[..., Any], place: Path, base: Path, rows: list[str], *overrides: str) -> str:
    """The one line with which `run` refuses the data; nothing was published."""
    (place / "chat.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    (place / "pipeline.yaml").write_text(f"""
run: r
sources: {{base: {{model: {base}}}, chat: {{data: {place}/chat.jsonl}}}}
stages: {{sft: {{inputs: {{policy: base, data: chat}}, max_steps: 1, global_batch_size: 2, max_length: 128}}}}
""")
    ended = posttrain("run", place / "pipeline.yaml", "--root", place / "runs", *overrides)
    assert ended.code == 2, ended
    assert not {path.name for path in (place / "runs" / "r" / "sft").iterdir()} & {"artifact.json", "output", "lease.json"}
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    return str(line.removeprefix("error: "))


@pytest.mark.real
@pytest.mark.parametrize(("what", "row", "message"), BAD_ROWS, ids=[what for what, _, _ in BAD_ROWS])
def test_a_wrong_row_is_one_line_with_file_and_line(
    tmp_path: Path, stories: Path, posttrain: Callable[..., Any], what: str, row: str, message: str
) -> None:
    first = (
        '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}' if "messages" in row else GOOD_ROW
    )
    assert message in run_refusal(posttrain, tmp_path, stories, [first, row])


@pytest.mark.real
def test_a_sample_that_is_too_long_is_refused_with_the_ways_out(tmp_path: Path, stories: Path, posttrain: Callable[..., Any]) -> None:
    line = run_refusal(posttrain, tmp_path, stories, [GOOD_ROW, json.dumps({"prompt": "Who?", "completion": "me " * 500})])
    assert "max_length" in line
    assert "drop" in line
    assert "truncate" in line


@pytest.mark.real
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }", "stages.sft.chat_template: "),
        ("{{ raise_exception('only even turns') }}", "only even turns"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "stages.sft.chat_template: "),
        (None, "stages.sft.chat_template: "),
    ],
    ids=["no Jinja", "that refuses", "without answers", "that is not there"],
)
def test_a_chat_template_that_cannot_render_the_rows_is_one_line(
    tmp_path: Path, stories: Path, posttrain: Callable[..., Any], template: str | None, message: str
) -> None:
    path = tmp_path / "template.jinja"
    if template is not None:
        path.write_text(template)
    (tmp_path / "runs" / "r" / "sft").mkdir(parents=True)
    assert message in run_refusal(posttrain, tmp_path, stories, [GOOD_ROW, GOOD_ROW], f"stages.sft.chat_template={path}")


@pytest.mark.real
def test_a_model_whose_files_are_no_model_is_one_line(tmp_path: Path, stories: Path, posttrain: Callable[..., Any]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(stories, broken)
    (broken / "config.json").write_text("{")
    assert "sources.base" in run_refusal(posttrain, tmp_path, broken, [GOOD_ROW]) or "stages.sft" in run_refusal(
        posttrain, tmp_path, broken, [GOOD_ROW]
    )


# --- whatever is written, `plan` answers or refuses ------------------------------------------------------------------

WORDS = [
    "run", "sources", "stages", "launcher", "base", "chat", "prefs", "sft", "dpo", "eval", "model", "data", "revision", "inputs", "policy",
    "policies", "kind", "learning_rate", "lora", "trainer", "loss_type", "seed", "system_prompt", "columns", "weights", "num_processes",
]  # fmt: skip
SYNTAX = "&*![]{}:-?|>%@`'\"#,~<=. \n\t0123456789abx_"
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*WORDS, "sigmoid", "local", "~", "o/m"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), min_size=1, max_size=4)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def planned(config: Path, root: Path, *overrides: str) -> int:
    """`plan` ends with 0, or with 2 and one line; any other exception of it is raised here. Returns the code."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ["pipeline.py", "plan", "--root", str(root), "--", str(config), *overrides]
    with mock.patch("sys.argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pipeline.main()
    assert code in (0, 2), (code, err.getvalue())
    assert len(err.getvalue().splitlines()) == (0 if code == 0 else 1), err.getvalue()
    return code


@FUZZ
@given(place=PLACES, value=VALUES)
@example(["stages", "sft", "inputs", "data"], {"a": 1})
@example(["stages", "sft", "trainer", "x"], float("nan"))
@example(["stages", "sft", "trainer", "x"], "\ud800")
@example(["stages", "sft", "kind"], ["sft"])
@example(["sources", "chat", "data"], "~0")
@example(["sources", "chat", "data"], "\0.jsonl")
def test_any_value_at_any_place_is_planned_or_refused(here: Path, tmp_path: Path, place: list[str], value: object) -> None:
    raw: Any = json.loads(json.dumps(pipeline.read_pipeline(here / "pipeline.yaml").model_dump(mode="json", exclude_unset=True)))
    at = raw
    for key in place[:-1]:
        at = at[key] if isinstance(at.get(key), dict) else at.setdefault(f"{key}_", {})
    at[place[-1]] = value
    (tmp_path / "fuzzed.yaml").write_text(json.dumps(raw))
    planned(tmp_path / "fuzzed.yaml", tmp_path / "runs")


@FUZZ
@given(key=PLACES.map(".".join), text=VALUES.map(str) | st.text() | st.text(alphabet=SYNTAX))
@example("stages.sft.seed", "!!int ''")
@example("stages.sft.seed", "<<: 3")
@example("stages.sft.optim", "2020-13-45")
def test_any_override_is_planned_or_refused(here: Path, tmp_path: Path, key: str, text: str) -> None:
    planned(here / "pipeline.yaml", tmp_path / "runs", f"{key}={text}")


@FUZZ
@given(text=st.text() | st.text(alphabet=string.printable) | st.text(alphabet=SYNTAX))
def test_any_text_as_a_pipeline_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "fuzzed.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    planned(tmp_path / "fuzzed.yaml", tmp_path / "runs")


# --- every field of every stage --------------------------------------------------------------------------------------


def wrong_values(info: FieldInfo) -> list[Any]:
    """Values of another type than a field's, and values just outside of its bounds."""
    kinds = {kind for kind in (bool, int, float, str, dict) if mentions(info.annotation, kind)}
    wrong: list[Any] = [[[1]]] if dict in kinds else [[[1]], {"nonsense": 1}]
    numbers = [] if info.annotation is ByteSize else ["1", 1]  # bytes may be written either way
    if str not in kinds:
        wrong += ["nonsense", "", *numbers[:1]]
    if not kinds & {int, float}:
        wrong += [0.5, *numbers[1:]]
    elif float not in kinds:
        wrong += [0.5, 1e30]
    if bool not in kinds:
        wrong += [True]
    steps = {"gt": 0, "ge": -1, "lt": 0, "le": 1}
    return wrong + [getattr(bound, name) + step for bound in info.metadata for name, step in steps.items() if hasattr(bound, name)]


def mentions(annotation: Any, kind: type) -> bool:
    """Whether a value of that kind may be what the annotation says, beside others."""
    origin = get_origin(annotation)
    if origin is None or origin in (list, dict):
        return (origin or annotation) is kind
    return any(mentions(part, kind) for part in get_args(annotation))


def fields_of(config: type[Config], at: str, around: tuple[str, ...] = ()) -> Iterator[tuple[str, FieldInfo, tuple[str, ...]]]:
    """Every field of a config class and of those nested in it, by its dotted path; and what has to stand around it, as overrides."""
    for name, info in config.model_fields.items():
        yield f"{at}.{name}", info, around
        for nested in (info.annotation, *get_args(info.annotation)):
            if isinstance(nested, type) and issubclass(nested, Config):
                chosen = (f"{at}.{name}={json.dumps(least(nested))}",) if info.discriminator else ()
                yield from fields_of(nested, f"{at}.{name}", (*around, *chosen))


def least(config: type[Config]) -> dict[str, str]:
    """A right value of each field that has to be given, which is a choice or the address of something."""
    needed = {name: info.annotation for name, info in config.model_fields.items() if info.is_required()}
    return {name: next(iter(get_args(annotation)), "http://127.0.0.1:1/v1") for name, annotation in needed.items()}


FIELDS = [field for kind in ("sft", "dpo", "eval", "curate") for field in fields_of(load_stage(kind, kind).config, f"stages.{kind}")]
WRONG = [(path, value, around) for path, info, around in FIELDS for value in wrong_values(info)]


@pytest.fixture(scope="module")
def every_kind(here: Path) -> Path:
    """A pipeline file with a stage of every kind."""
    path = here / "every_kind.yaml"
    path.write_text((here / "pipeline.yaml").read_text() + "  curate: {inputs: {data: [chat]}}\n")
    return path


@pytest.mark.parametrize(("path", "value", "around"), WRONG, ids=[f"{path}={value!r}" for path, value, _ in WRONG])
def test_a_wrong_value_of_any_field_names_the_field(
    every_kind: Path, tmp_path: Path, posttrain: Callable[..., Any], path: str, value: Any, around: tuple[str, ...]
) -> None:
    line = refusal(posttrain, every_kind, tmp_path / "runs", *around, f"{path}={json.dumps(value)}")
    assert line.startswith(path)


@FUZZ
@given(mistakes=st.lists(st.sampled_from(WRONG), min_size=1, max_size=4))
def test_of_several_mistakes_one_is_named(every_kind: Path, tmp_path: Path, mistakes: list[tuple[str, Any, tuple[str, ...]]]) -> None:
    raw: Any = pipeline.read_pipeline(every_kind).model_dump(mode="json", exclude_unset=True)
    for path, value, _ in mistakes:
        with contextlib.suppress(UserError):  # one may stand in the place of another
            apply_override(raw, f"{path}={json.dumps(value)}")
    (tmp_path / "fuzzed.yaml").write_text(json.dumps(raw))
    assert planned(tmp_path / "fuzzed.yaml", tmp_path / "runs") == 2


TRAINER = [
    ("{adam_beta2: 5.0}", "adam_beta2: 5.0 is refused: Invalid beta parameter at index 1"),
    ("{adam_beta1: -0.1}", "adam_beta1: -0.1 is refused: Invalid beta parameter at index 0"),
    ("{adam_epsilon: -1.0e-8}", "adam_epsilon: -1e-08 is refused: Invalid epsilon value"),
    ("{max_grad_norm: 1.0}", "max_grad_norm: is a field of the stage"),
    ("{dataloader_num_workers: -1}", "dataloader_num_workers: -1 is refused: "),
    ("{dataloader_prefetch_factor: 2}", "dataloader_prefetch_factor: 2 is refused: "),
    ("{lr_scheduler_kwargs: {nonsense: 1}}", "lr_scheduler_kwargs: {'nonsense': 1} is refused: "),
    ("{adam_beta2: 0.9, adam_beta1: 1.0}", "adam_beta1: 1.0 is refused: "),
    ("{adam_beta2: '0.9'}", "adam_beta2: '0.9' is no float"),
    ("{adam_beta2: true}", "adam_beta2: True is no float"),
    ("{adam_beta3: 0.9}", "adam_beta3: SFTConfig has no such field; did you mean"),
    ("{output_dir: /tmp/x}", "output_dir: is set by the pipeline"),
    ("{push_to_hub: true}", "push_to_hub: is set by the pipeline"),
    ("{fp16: true}", "fp16: is set by the pipeline; use bf16"),
]


@pytest.mark.parametrize(("trainer", "said"), TRAINER, ids=[trainer for trainer, _ in TRAINER])
def test_a_wrong_field_of_the_trainer_is_named_before_data_are_read(
    tmp_path: Path, tiny: Path, refuse: Refuse, trainer: str, said: str
) -> None:
    (tmp_path / "x.jsonl").write_text("no rows")
    assert refuse(tiny, tmp_path / "x.jsonl", f"stages.sft.trainer={trainer}").startswith(f"stages.sft.trainer.{said}")


def test_fields_of_the_trainer_that_are_right_together_are_taken(
    tmp_path: Path, tiny: Path, chat_file: Path, posttrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pipeline(tmp_path / "pipeline.yaml", tiny, chat_file)
    trainer = "stages.sft.trainer={adam_beta2: 0.95, dataloader_num_workers: 1, dataloader_prefetch_factor: 2}"
    ended = run_prepare(posttrain, monkeypatch, path, "--root", tmp_path / "runs", trainer)
    assert "prepared" in ended.err
