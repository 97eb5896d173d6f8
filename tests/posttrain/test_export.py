"""Export: what is passed on answers as the stage's own policy does, says where it comes from, and is never half there."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from posttrain import proof
from posttrain.artifact import Artifact, read_artifact
from posttrain.card import Check, make_card
from posttrain.chat import read_contract
from posttrain.config import ModelSource
from posttrain.disk import read_sealed, write_sealed
from posttrain.error import UserError
from posttrain.export import push_to_hub
from posttrain.report import read
from tests.conftest import REPOSITORY, Ended

Cli = Callable[..., Ended]
PLAIN = {
    "README.md", "chat_contract.json", "chat_template.jinja", "config.json", "export.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def done() -> dict[str, Any]:
    """Filled by the first test that needs it."""
    return {}


@pytest.fixture
def config(done: dict[str, Any], posttrain: Cli, tiny: Path, chat_file: Path, pairs_file: Path, tmp_path_factory: Any) -> Path:
    """A pipeline of which all but the last stage has run; its runs are in `runs` beside it."""
    if not done:
        here = tmp_path_factory.mktemp("export")
        training = "max_steps: 2, global_batch_size: 8, max_length: 128, preflight: {held_out: 1.0}"
        (here / "pipeline.yaml").write_text(f"""
run: r
sources:
  base: {{model: {tiny}, license: apache-2.0}}
  chat: {{data: {chat_file}, license: cc-by-4.0}}
  prefs: {{data: {pairs_file}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, learning_rate: 1e-3, {training}}}
  reward: {{inputs: {{policy: sft, data: prefs}}, {training}}}
  eval: {{inputs: {{policies: [base, sft], data: [chat, prefs]}}, max_new_tokens: 8}}
  kept:
    kind: gate
    inputs: {{reports: eval}}
    gates:
      - {{metric: nll, max: 100, confidence: 0.95}}
      - {{metric: preference accuracy, vs: base, min_rise: 2}}
      - {{metric: nll, policy: base, max: 100}}
    on_fail: warn
  later: {{kind: dpo, inputs: {{policy: sft, data: prefs}}, {training}}}
""")
        ended = posttrain("run", here / "pipeline.yaml", "--root", here / "runs", "--until", "kept")
        assert ended.code == 0, ended.err
        done["config"] = here / "pipeline.yaml"
    found: Path = done["config"]
    return found


@pytest.fixture
def export(posttrain: Cli, config: Path) -> Callable[..., Ended]:
    """`export("--stage", "sft", ...)`: the command."""
    return lambda *arguments: posttrain("export", config, "--root", config.parent / "runs", *arguments)


@pytest.fixture
def exported(done: dict[str, Any], export: Callable[..., Ended], config: Path) -> Path:
    """What stage sft made, exported in several files into a directory that was empty; what was printed is in `done`."""
    if "exported" not in done:
        directory = config.parent / "exported" / "model"
        directory.mkdir(parents=True)
        done["exported"] = export("--stage", "sft", "--to", directory, "--max-shard-size", "60KB")
    return config.parent / "exported" / "model"


def artifact_of(config: Path, stage: str) -> Artifact:
    found = read_artifact(config.parent / "runs" / "r" / stage)
    assert found is not None
    return found


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def generated(path: Path) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    messages = [{"role": "user", "content": "what is the colour of bird 3?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return list(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist())


def test_what_is_exported_is_the_policy_of_the_stage(done: dict[str, Any], exported: Path, config: Path) -> None:
    ended = done["exported"]
    assert (ended.code, ended.err) == (0, "")
    output = artifact_of(config, "sft").output
    assert names(exported.parent) == {"model"}, "nothing is left beside"
    shards = sorted(exported.glob("model-0*-of-0*.safetensors"))
    assert len(shards) > 1
    assert names(exported) == {*PLAIN, "model.safetensors.index.json", *(shard.name for shard in shards)}
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    published = load_file(output / "model.safetensors")
    assert stored.keys() == published.keys()
    assert all(torch.equal(stored[name], published[name]) for name in published)
    assert generated(exported) == generated(output)
    assert read_contract(exported) == read_contract(output)
    assert [line.split("   ")[0].strip() for line in ended.out.splitlines()] == [
        "what",
        "tensors",
        "tokenizer and chat template",
        "generation config",
        "answers of transformers",
        "answers of vLLM",
        f"wrote {exported}, with its card in README.md and the checks in export.json",
    ]
    checks = {check["what"]: check for check in json.loads((exported / "export.json").read_text())["checks"]}
    assert [check["is_same"] for check in checks.values()] == [True, True, True, True, None]
    assert checks["answers of transformers"]["found"] == "7 of 7 greedy answers of up to 48 tokens"


def test_the_card_says_what_was_measured_and_where_it_comes_from(exported: Path, config: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["posttrain", "sft"]
    assert "base_model" not in data and "datasets" not in data, "they are on no Hub"
    measured = artifact_of(config, "eval").metrics
    told = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert told == {name.removeprefix("sft."): value for name, value in measured.items() if name.startswith("sft.")}
    assert {"nll", "preference accuracy"} <= told.keys()
    table = json.loads((artifact_of(config, "eval").output / "table.json").read_text())
    nll = next(row for row in table["rows"] if row[0] == "nll")
    line = next(line for line in card.text.splitlines() if "`nll`" in line)
    assert nll[3] in line and f"base: {nll[2]}" in line, "with the intervals"
    assert "| `chat` | `chat.jsonl` | `cc-by-4.0` |" in card.text
    assert "Licences are not known here" not in card.text, "none of its sources is without"
    assert "| `sft` | 24 | 24 |" in card.text
    assert str(json.loads((config.parent / "runs/r/sft/artifact.json").read_text())["payload"]["provenance"]["commit"]) in card.text
    for private in (str(config.parent), str(REPOSITORY)):
        assert private not in card.content
    assert socket.gethostname() not in card.text.split()


def test_the_card_says_what_the_gates_found(exported: Path, config: Path) -> None:
    judged = json.loads((artifact_of(config, "kept").output / "verdict.json").read_text())["gates"]
    bounds = [f"{gate['value']:.4g} ({gate['low']:.4g} to {gate['high']:.4g})" for gate in judged]
    text = ModelCard.load(exported / "README.md").text
    gates = text.partition("### Gates")[2].partition("## ")[0]
    rows = [[cell.strip("` ") for cell in line.split("|")[1:-1]] for line in gates.splitlines()]
    assert [row for row in rows if row[:1] == ["kept"]] == [
        ["kept", "nll of sft", bounds[0], "max 100 with 95% confidence", str(judged[0]["num_rows"]), "passed"],
        ["kept", "rise of preference accuracy from base to sft", bounds[1], "min_rise 2", str(judged[1]["num_rows"]), "FAILED"],
    ]
    assert "- A gate that it was held against failed, in `kept`: `rise of preference accuracy from base to sft is " in text


def test_what_gates_found_of_another_evaluation_is_not_on_the_card(config: Path, tmp_path: Path) -> None:
    shutil.copytree(config.parent / "runs" / "r", tmp_path / "r")
    reads = {"sft": {"policy": ["base"]}, "eval": {"policies": ["base", "sft"]}, "kept": {"reports": ["eval"]}}
    kinds = {"sft": "sft", "eval": "eval", "kept": "gate"}
    rows = [{"stage": name, "kind": kinds[name], "action": "skip", "why": "", "inputs": reads[name]} for name in reads]

    def has_gates() -> bool:
        return "### Gates" in make_card(read.read_run(tmp_path / "r", rows), "sft", {}, []).text

    assert has_gates()
    artifact_file = tmp_path / "r" / "kept" / "artifact.json"
    payload = read_sealed(artifact_file)
    assert payload is not None
    payload["inputs"]["eval"]["id"] = "0" * 32
    write_sealed(artifact_file, payload)
    assert not has_gates()


def test_a_reward_model_is_exported_with_what_it_measured(export: Callable[..., Ended], config: Path, tmp_path: Path) -> None:
    ended = export("--stage", "reward", "--to", tmp_path / "model")
    assert (ended.code, ended.err) == (0, "")
    assert "rewards of transformers" in ended.out
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it is blue"}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    rewards = [
        AutoModelForSequenceClassification.from_pretrained(path)(**inputs).logits
        for path in (tmp_path / "model", artifact_of(config, "reward").output)
    ]
    assert torch.equal(*rewards)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "text-classification"
    assert "Licences are not known here of: `prefs`" in card.text
    measured = artifact_of(config, "reward").metrics
    told = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert told == {name.removeprefix("heldout/"): value for name, value in measured.items() if name.startswith("heldout/")}


def test_what_is_exported_can_be_read_by_a_pipeline(exported: Path, posttrain: Cli, config: Path) -> None:
    ended = posttrain("inspect", config, "later", f"sources.base.model={exported}", "stages.later.inputs.policy=base", "--json")
    assert ended.code == 0, ended.err
    assert len(json.loads(ended.out)) == 3


def test_a_directory_that_is_there_is_left_alone(export: Callable[..., Ended], exported: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported.parent.rglob("*")}
    ended = export("--stage", "sft", "--to", exported)
    refused = f"error: --to {exported}: is there already, and not an empty directory; give another, or delete it\n"
    assert (ended.code, ended.out, ended.err) == (2, "", refused)
    assert {path: path.stat().st_mtime_ns for path in exported.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "stf"], "--stage stf: no stage of that name makes a model; did you mean 'sft'?"),
        (["--stage", "eval"], "--stage eval: no stage of that name makes a model"),
        (["--stage", "later"], "stages.later: run: not started; what is exported must be finished, so run it first"),
        (["--stage", "sft", "stages.sft.learning_rate=1"], "stages.sft: drift: stages.sft.learning_rate: 0.001 -> 1.0"),
        (["--stage", "sft", "--max-shard-size", "big"], "--max-shard-size big: is no size; give one such as 5GB or 500MB"),
        (["--stage", "sft", "--gguf", "q9"], "--gguf q9: is no type that llama.cpp's converter writes; known: auto, bf16, f16"),
        (["--stage", "sft", "--gguf", "q8_0"], "--gguf: convert_hf_to_gguf.py is not on PATH; clone llama.cpp, and set LLAMA_CPP"),
        (["--stage", "sft", "--push", "a/b/c"], "--push a/b/c: is no name of a repository; give one such as some-org/some-name"),
        (["--stage", "sft", "--push", "o/m"], "--push o/m: HF_HUB_OFFLINE is set; take it out of the environment, or leave --push out"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    export: Callable[..., Ended], tmp_path: Path, options: list[str], message: str
) -> None:
    ended = export("--to", tmp_path / "model", *options)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err
    assert not names(tmp_path)


def test_a_push_that_fails_leaves_the_directory_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"^--push o/m: .*; {tmp_path} is whole, and `hf upload o/m {tmp_path}` sends it later$"):
        push_to_hub(tmp_path, "o/m")  # there is no network in tests
    assert names(tmp_path) == {"config.json"}


# --- GGUF ------------------------------------------------------------------------------------------------------------

CONVERTERS = {
    "converts": "Path(options['--outfile']).write_bytes(b'GGUF' + json.dumps(options).encode())",
    "fails": "sys.exit('Model LlamaForCausalLM is not supported')",
    "writes something else": "Path(options['--outfile']).write_bytes(b'nonsense')",
    "is interrupted": "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)",
}
READS_OPTIONS = """
import json, os, signal, sys, time
from pathlib import Path
directory, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2]))
assert Path(directory, "config.json").is_file()
"""


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`converter("fails")`: a stand-in for llama.cpp's script is on PATH, which takes what that one takes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(kind: str) -> None:
        script = folder / "convert_hf_to_gguf.py"
        script.write_text(f"#!{sys.executable}\n{READS_OPTIONS}{CONVERTERS[kind]}\n")
        script.chmod(0o755)

    return put


def test_a_gguf_is_put_beside_the_weights(export: Callable[..., Ended], converter: Callable[[str], None], tmp_path: Path) -> None:
    converter("converts")
    ended = export("--stage", "sft", "--to", tmp_path / "model", "--gguf", "q8_0")
    assert (ended.code, ended.err) == (0, "")
    content = (tmp_path / "model" / "r-sft-q8_0.gguf").read_bytes()
    told = json.loads(content.removeprefix(b"GGUF"))
    assert (told["--outtype"], told["--model-name"]) == ("q8_0", "r-sft")
    assert "r-sft-q8_0.gguf" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("fails", 1, "convert_hf_to_gguf.py failed with 1: Model LlamaForCausalLM is not supported; nothing was written"),
        ("writes something else", 1, "convert_hf_to_gguf.py wrote is no GGUF; nothing was written"),
        ("is interrupted", 75, "stopped: by SIGTERM"),
    ],
)
def test_an_export_that_ends_early_leaves_nothing(
    export: Callable[..., Ended], converter: Callable[[str], None], tmp_path: Path, kind: str, code: int, message: str
) -> None:
    converter(kind)
    ended = export("--stage", "sft", "--to", tmp_path / "model", "--gguf", "q8_0")
    assert (ended.code, ended.err.count("\n")) == (code, 1)
    assert message in ended.err
    assert names(tmp_path) == {"bin"}


# --- the checks find what they look for ------------------------------------------------------------------------------


def change_weight(directory: Path) -> None:
    shard = max(directory.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})


def lose_weights(directory: Path) -> None:
    max(directory.glob("*.safetensors")).unlink()


def change_stop(directory: Path) -> None:
    generation = GenerationConfig.from_pretrained(directory)
    generation.eos_token_id = 0
    generation.save_pretrained(directory)


def change_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> "))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (change_weight, "tensors"),
        (lose_weights, "tensors"),
        (change_stop, "generation config"),
        (change_template, "tokenizer and chat template"),
    ],
)
def test_a_check_finds_what_is_not_the_same(
    exported: Path, config: Path, tmp_path: Path, change: Callable[[Path], None], found: str
) -> None:
    directory, finished = tmp_path / "model", artifact_of(config, "sft")
    shutil.copytree(exported, directory)

    def checks() -> Iterator[Check]:
        yield proof.compare_tensors(proof.read_tensors(finished.output), directory)
        yield from proof.compare_answers(finished, directory)

    assert next(check for check in checks() if check.what == found).is_same is True
    change(directory)
    assert next(check for check in checks() if check.what == found).is_same is False


# --- licences --------------------------------------------------------------------------------------------------------


def test_a_licence_is_no_part_of_what_is_built(posttrain: Cli, config: Path) -> None:
    root = config.parent / "runs"
    licences = ["sources.base.license=mit", "sources.chat.license=null", "sources.prefs.license=odc-by"]
    plans = [posttrain("plan", config, "--root", root, "--json", *overrides) for overrides in ([], licences)]
    rows = [[(row["stage"], row["fingerprint"], row["action"]) for row in json.loads(ended.out)] for ended in plans]
    assert rows[0] == rows[1]
    assert [action for _, _, action in rows[0]] == ["skip", "skip", "skip", "skip", "run"]


def test_the_licence_of_a_base_is_read_off_its_own_card(config: Path, tmp_path: Path) -> None:
    row = {"stage": "sft", "kind": "sft", "action": "skip", "why": "", "inputs": {"policy": ["base"]}}
    run = read.read_run(config.parent / "runs" / "r", [row])
    for text, license_ in [("---\nlicense: mit\n---\nA base.", "mit"), ("---\nlicense: [\n---\n", None), ("No card.", None)]:
        (tmp_path / "README.md").write_text(text)
        card = make_card(run, "sft", {"base": ModelSource(model=str(tmp_path))}, [])
        assert card.data.license == license_
