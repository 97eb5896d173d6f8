"""Tasks of lm-evaluation-harness: what it says of our policies, against its own command line and plain transformers."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import ModelSource, identity, validate
from posttrain.disk import read_json
from posttrain.error import UserError
from posttrain.stage import Input, StageContext
from stages import eval as evaluation
from stages.eval import EvalConfig
from tests.conftest import REPOSITORY, Ended, read_lines

Cli = Callable[..., Ended]
DATA = REPOSITORY / "posttrain" / "quickstart" / "data"
BASE = REPOSITORY / "posttrain" / "quickstart" / "base"
NUM_ROWS = 60
NUM_ASKED = 20
needs_library = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")

WHICH = """
task: which
dataset_path: json
dataset_kwargs: {data_files: {train: HERE/train.jsonl, test: HERE/which.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: mcc}]
"""
SAY = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {train: HERE/train.jsonl, test: HERE/say.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
"""
TEXT = """
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: HERE/say.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of task files and their data, which are those of the quickstart."""
    here = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, row in enumerate(read_lines(DATA / "heldout_pairs.jsonl")[:NUM_ROWS]):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        label = number % 2
        rows.append(
            {
                "question": row["prompt"][0]["content"],
                "choices": [rejected, chosen] if label else [chosen, rejected],
                "label": label,
                "answer": chosen,
            }
        )
    for name, part in (("which", rows), ("say", rows[:NUM_ASKED]), ("train", rows[-NUM_ASKED:])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    begun = SAY.replace("task: say", "task: begun") + 'gen_prefix: "It is"\n'
    plain = WHICH.replace("task: which", "task: plain").replace(", {metric: mcc}", "")  # whose error the command line is slow to draw
    for name, text in (("which", WHICH), ("plain", plain), ("say", SAY), ("text", TEXT), ("begun", begun)):
        (here / f"{name}.yaml").write_text(text.replace("HERE", str(here)))
    return here


@pytest.fixture(scope="module")
def done() -> dict[str, Path]:
    """Filled by the first test that needs it: the directory of a run."""
    return {}


@pytest.fixture
def run(done: dict[str, Path], posttrain: Cli, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains a policy, has it and its base do two tasks, and judges what they did."""
    if "run" not in done:
        here = tmp_path_factory.mktemp("run")
        (here / "pipeline.yaml").write_text(
            f"""
run: tasks
sources:
  base: {{model: {BASE}}}
  chat: {{data: {DATA / "sft.jsonl"}}}
stages:
  sft: {{inputs: {{policy: base, data: chat}}, learning_rate: 1e-3, global_batch_size: 32, max_length: 128, max_steps: 60}}
  eval: {{inputs: {{policies: [base, sft]}}, tasks: [{tasks}/which.yaml, {tasks}/say.yaml]}}
  quality:
    kind: gate
    inputs: {{reports: eval}}
    on_fail: warn
    gates:
      - {{metric: tasks.which.acc, vs: base, max_drop: 1.0, confidence: 0.95}}
      - {{metric: tasks.say.exact_match, vs: base, min_rise: 1.0}}
"""
        )
        ended = posttrain("run", here / "pipeline.yaml", "--root", here / "runs")
        assert ended.code == 0, ended.err
        done["run"] = here / "runs" / "tasks"
    return done["run"]


def context_of(directory: Path, policies: dict[str, Path], tasks: list[Path], **fields: Any) -> StageContext[EvalConfig]:
    """A stage in `directory` that measures nothing but tasks."""
    config = validate(EvalConfig, {"tasks": [str(task) for task in tasks], **fields}, "stages.eval")
    given = tuple(Input(name, "policy", "", ModelSource(model=str(path))) for name, path in policies.items())
    directory.mkdir(parents=True, exist_ok=True)
    return StageContext("eval", config, {"policies": given}, directory, directory.parent / "root")


def samples(output: Path, policy: str, task: str) -> list[dict[str, Any]]:
    return read_lines(output / "tasks" / policy / f"samples_{task}.jsonl")


def metrics(stage: Path) -> dict[str, float]:
    return dict(read_json(stage / "artifact.json")["payload"]["metrics"])


def ask(question: str) -> str:
    """A question in ChatML, written out by hand."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def logp(model: Any, before: list[int], after: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([before + after])).logits[0, :-1].log_softmax(-1)
    return float(logps[len(before) - 1 :].gather(1, torch.tensor(after)[:, None]).sum())


# --- what is measured --------------------------------------------------------------------------------------------------


@needs_library
def test_a_choice_is_right_where_plain_transformers_finds_it_the_likeliest(run: Path, tasks: Path) -> None:
    rows = read_lines(tasks / "which.jsonl")
    for policy, path, prompt in (("sft", run / "sft" / "output", ask), ("base", BASE, lambda question: question + " ")):
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        scores = []
        for row in rows:
            before, *whole = (
                tokenizer(text, add_special_tokens=False).input_ids
                for text in (prompt(row["question"]).rstrip(), *(prompt(row["question"]) + choice for choice in row["choices"]))
            )
            likely = [logp(model, before, ids[len(before) :]) for ids in whole]
            scores.append(float(np.argmax(likely) == row["label"]))
        assert [sample["acc"] for sample in samples(run / "eval" / "output", policy, "which")] == scores
        assert metrics(run / "eval")[f"{policy}.tasks.which.acc"] == sum(scores) / len(scores)
        assert 0 < sum(scores) < len(scores)


@needs_library
def test_an_answer_ends_where_the_contract_says_and_is_that_of_greedy_decoding(run: Path, tasks: Path) -> None:
    tokenizer, model = (kind.from_pretrained(run / "sft" / "output") for kind in (AutoTokenizer, AutoModelForCausalLM))
    found = []
    for row, sample in zip(read_lines(tasks / "say.jsonl"), samples(run / "eval" / "output", "sft", "say"), strict=True):
        ids = tokenizer(ask(row["question"]), add_special_tokens=False).input_ids
        generated = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
        answer = tokenizer.decode(generated, skip_special_tokens=True).split(".")[0]
        assert sample["arguments"][0][0] == ask(row["question"])
        assert sample["resps"] == [[answer]]
        found.append(answer == row["answer"])
    assert metrics(run / "eval")["sft.tasks.say.exact_match"] == sum(found) / len(found)
    assert sum(found) > 0, "the policy has learned something"


@needs_library
def test_a_base_without_a_template_is_given_plain_text_unless_the_config_says_otherwise(run: Path, tasks: Path, tmp_path: Path) -> None:
    (row, *_), (sample, *_) = read_lines(tasks / "say.jsonl"), samples(run / "eval" / "output", "base", "say")
    assert sample["arguments"][0][0] == row["question"]
    for applies, prompt in ((True, ask(row["question"])), (False, row["question"])):
        policies = {"sft": run / "sft" / "output", "base": BASE}
        context = context_of(tmp_path / str(applies), policies, [tasks / "say.yaml"], limit=1, apply_chat_template=applies)
        evaluation.run(context)
        for policy in ("sft", "base"):
            assert samples(context.output, policy, "say")[0]["arguments"][0][0] == prompt


@needs_library
def test_figures_are_those_of_its_own_command_line_on_the_same_directory(run: Path, tasks: Path, tmp_path: Path) -> None:
    names = ("plain", "say", "begun", "text")
    sft, files = run / "sft" / "output", [tasks / f"{name}.yaml" for name in names]
    context = context_of(tmp_path / "eval", {"sft": sft}, files, num_fewshot=2, batch_size=8)
    found = evaluation.run(context)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={sft},dtype=float32"]
    command += ["--tasks", ",".join(map(str, files)), "--apply_chat_template", "--num_fewshot", "2", "--batch_size", "8", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "theirs"), "--log_samples"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert ended.returncode == 0, ended.stderr
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    assert found == pytest.approx(
        {
            "sft.tasks.plain.acc": theirs["plain"]["acc,none"],
            "sft.tasks.plain.acc_norm": theirs["plain"]["acc_norm,none"],
            "sft.tasks.say.exact_match": theirs["say"]["exact_match,none"],
            "sft.tasks.begun.exact_match": theirs["begun"]["exact_match,none"],
            "sft.tasks.text.bits_per_byte": theirs["text"]["bits_per_byte,none"],
        },
        rel=1e-5,
    )
    for name in names:
        (path,) = (tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl")
        ours = {sample["doc_id"]: sample for sample in samples(context.output, "sft", name)}
        for sample in read_lines(path):
            mine = ours[sample["doc_id"]]
            arguments = [list(given.values()) for given in sample["arguments"].values()]
            assert mine["arguments"] == arguments
            if name in ("say", "begun"):
                assert mine["filtered_resps"] == sample["filtered_resps"]
            else:
                assert _numbers(mine["filtered_resps"]) == pytest.approx(_numbers(sample["filtered_resps"]), rel=1e-4)


def _numbers(answers: list[Any]) -> list[float]:
    """Log-probabilities, and whether they are greedy, all of which the command line writes as text."""
    return [float({"True": 1, "False": 0}.get(str(each), each)) for each in np.ravel(answers)]


@needs_library
def test_policies_are_compared_by_row_and_gates_judge_it(run: Path) -> None:
    table = read_json(run / "eval" / "output" / "table.json")
    right = {name: [sample["acc"] for sample in samples(run / "eval" / "output", name, "which")] for name in ("base", "sft")}
    (found,) = (each for each in table["results"] if (each["policy"], each["metric"]) == ("sft", "tasks.which.acc"))
    gained, lost = (
        sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((right["sft"], right["base"]), (right["base"], right["sft"]))
    )
    assert (found["num_rows"], found["difference"]["num_rows"]) == (NUM_ROWS, NUM_ROWS)
    assert found["difference"]["value"] == pytest.approx((gained - lost) / NUM_ROWS)
    assert found["difference"]["low"] < found["difference"]["value"] < found["difference"]["high"]
    assert "tasks.which.mcc is no mean over rows, so it stands in tasks/*/results.json alone" in table["notes"]
    first, second = read_json(run / "quality" / "output" / "verdict.json")["gates"]
    assert (first["value"], first["passed"], first["num_rows"]) == (pytest.approx((lost - gained) / NUM_ROWS), True, NUM_ROWS)
    assert (second["metric"], second["passed"], second["num_rows"]) == ("tasks.say.exact_match", False, NUM_ASKED)


@needs_library
def test_a_group_is_the_mean_of_all_its_rows(run: Path, tasks: Path, tmp_path: Path) -> None:
    rows = read_lines(tasks / "which.jsonl")
    parts = {"few": rows[:15], "many": rows[15:]}
    listed = []
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        task = (
            WHICH.replace("HERE/which.jsonl", str(tmp_path / f"{name}.jsonl"))
            .replace("HERE", str(tasks))
            .replace("task: which", f"task: {name}")
        )
        listed.append("  - " + task.strip().replace("\n", "\n    "))
    figures = "\naggregate_metric_list: [{metric: acc, weight_by_size: SIZED}]\n"
    for sized in ("true", "false"):
        name = f"both_{sized}"
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask:\n" + "\n".join(listed) + figures.replace("SIZED", sized))
    sft = {"sft": run / "sft" / "output"}
    for name in ("both_true", "both_false"):
        context = context_of(tmp_path / name, sft, [tmp_path / f"{name}.yaml"])
        found = evaluation.run(context)
        shares = [np.mean([sample["acc"] for sample in samples(context.output, "sft", f"{name}::{part}")]) for part in parts]
        wanted = np.average(shares, weights=[15, NUM_ROWS - 15]) if name == "both_true" else np.mean(shares)
        assert found == {f"sft.tasks.{name}.acc": pytest.approx(wanted)}
        assert shares[0] != shares[1]


# --- what is kept ------------------------------------------------------------------------------------------------------


@needs_library
def test_answers_are_kept_by_batch_and_for_other_runs(run: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = importlib.import_module("posttrain.harness")
    monkeypatch.setattr(harness, "REQUESTS_AT_ONCE", 50)
    computed: list[int] = []
    compute = harness.HFLM.loglikelihood

    def counted(self: Any, requests: list[Any], **options: Any) -> Any:
        computed.append(len(requests))
        if len(computed) == 2:
            raise KeyboardInterrupt
        return compute(self, requests, **options)

    monkeypatch.setattr(harness.HFLM, "loglikelihood", counted)
    sft, file = {"sft": run / "sft" / "output"}, tasks / "which.yaml"
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(context_of(tmp_path / "eval", sft, [file]))
    found = evaluation.run(context_of(tmp_path / "eval", sft, [file]))
    assert computed == [50, 50, 50, 20], "the first batch was not computed again"
    assert found["sft.tasks.which.acc"] == metrics(run / "eval")["sft.tasks.which.acc"]
    assert evaluation.run(context_of(tmp_path / "other", sft, [file])) == found
    assert len(computed) == 4
    changed = tmp_path / "which.yaml"
    changed.write_text(file.read_text().replace('"{{question}}"', '"{{question}} Say it."'))
    evaluation.run(context_of(tmp_path / "changed", sft, [changed]))
    assert computed[4:] == [50, 50, 20], "another prompt is another question"


@needs_library
def test_two_ranks_find_what_one_does(run: Path, posttrain: Cli, tmp_path: Path) -> None:
    config = run.parent.parent / "pipeline.yaml"
    ended = posttrain(
        "run", config, "--root", run.parent, "run=two", "--until", "eval", "stages.eval.num_processes=2", "stages.eval.seed=1"
    )
    assert ended.code == 0, ended.err
    assert metrics(run.parent / "two" / "eval") == metrics(run / "eval")
    for name in ("which", "say"):
        first, second = (samples(each / "eval" / "output", "sft", name) for each in (run, run.parent / "two"))
        for one, other in zip(first, second, strict=True):
            assert one["arguments"] == other["arguments"]
            if name == "say":
                assert one["resps"] == other["resps"]
            else:
                assert np.ravel(one["filtered_resps"]) == pytest.approx(np.ravel(other["filtered_resps"]), rel=1e-5)


# --- what is asked wrongly -----------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, or where it is not installed, a directory of tasks like its own."""
    if find_spec("lm_eval") is None:
        (tmp_path / "site" / "lm_eval" / "tasks" / "arc").mkdir(parents=True)
        (tmp_path / "site" / "lm_eval" / "__init__.py").write_text("")
        (tmp_path / "site" / "lm_eval" / "tasks" / "arc" / "arc_easy.yaml").write_text("tag:\n  - ai2_arc\ntask: arc_easy\n")
        monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["arc_esy"]}, "tasks.0: lm-evaluation-harness has no task 'arc_esy'; did you mean 'arc_easy'?"),
        ({"tasks": ["arc_easy", "zzqx"]}, "tasks.1: lm-evaluation-harness has no task 'zzqx'; see: lm_eval ls tasks"),
        ({"tasks": ["arc_easy", "ai2_arc", "arc_easy"]}, "tasks.2: 'arc_easy' stands twice; name it once"),
        (
            {"tasks": ["no.yaml"]},
            "tasks.0: no.yaml cannot be read (No such file or directory); give the name of a task, or the path of its file",
        ),
        ({"tasks": ["BAD"]}, "tasks.0: BAD, line 2: not valid YAML: "),
        ({"tasks": ["NONE"]}, "tasks.0: NONE defines neither a task nor a group; name it there, as `task: my_task`"),
        ({"num_fewshot": 3}, "num_fewshot: has no effect without tasks; name some, or leave it out"),
    ],
    ids=str,
)
def test_what_names_no_task_is_refused_by_the_plan(library: None, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, text in (("BAD", "task: a\n  metric: [\n"), ("NONE", "metric_list: []\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
        fields = json.loads(json.dumps(fields).replace(name, str(tmp_path / f"{name}.yaml")))
        message = message.replace(name, str(tmp_path / f"{name}.yaml"))
    with pytest.raises(UserError) as raised:
        validate(EvalConfig, fields, "stages.eval").check(1, "stages.eval")
    assert str(raised.value).startswith(f"stages.eval.{message}")


def test_without_the_library_the_plan_says_how_to_install_it(
    posttrain: Cli, pipeline_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ended = posttrain("plan", pipeline_file, "--root", tmp_path, "stages.eval.tasks=[arc_easy]")
    assert ended.code == 2
    assert ended.err == ('error: stages.eval.tasks: lm-evaluation-harness is not installed; run: pip install "posttrain[lm-eval]"\n')


def test_an_evaluation_measures_something(posttrain: Cli, pipeline_file: Path, tmp_path: Path) -> None:
    ended = posttrain("plan", pipeline_file, "--root", tmp_path, "stages.eval.inputs={policies: base}")
    assert ended.code == 2
    assert ended.err == "error: stages.eval.inputs.data: missing; name a dataset, or tasks under stages.eval.tasks\n"


def test_what_a_task_file_holds_bears_identity_and_not_where_it_lies(tmp_path: Path) -> None:
    found = []
    for name, text in (("a", "task: a\n"), ("b", "task: a\n"), ("c", "task: c\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
        config = validate(EvalConfig, {"tasks": ["arc_easy", str(tmp_path / f"{name}.yaml")]}, "stages.eval")
        found.append(identity(config, "stages.eval")["tasks"])
    assert found[0] == found[1] != found[2]
    assert found[0][0] == "arc_easy" and found[0][1].startswith("sha256 ")


@needs_library
@pytest.mark.parametrize(
    ("name", "before", "after", "fields", "message"),
    [
        ("say", "say.jsonl", "gone.jsonl", {}, "tasks.0: FILE cannot be loaded: "),
        ("say", "{{question}}", "{{query}}", {}, "tasks.0: FILE cannot be loaded: 'query' is undefined"),
        (
            "say",
            "metric: exact_match",
            "metric: exactly, aggregation: mean, higher_is_better: true",
            {},
            "tasks.0: say: no metric is called 'exactly'",
        ),
        ("say", "task: say", "task: say\nunsafe_code: true", {}, "tasks.0: say runs code that the model writes"),
        (
            "say",
            "max_gen_toks: 16",
            "max_gen_toks: 512",
            {},
            "tasks: say asks for answers of up to 512 tokens, and base reads and writes 512 in all; ",
        ),
        ("which", "", "", {"num_fewshot": 30}, "tasks: which cannot be asked: "),
    ],
    ids=["data", "column", "metric", "unsafe", "length", "examples"],
)
def test_a_task_that_cannot_be_done_is_refused_before_anything_is_computed(
    tasks: Path, name: str, before: str, after: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text((tasks / f"{name}.yaml").read_text().replace(before, after))
    shutil.copy(tasks / "train.jsonl", tmp_path)
    context = context_of(tmp_path / "eval", {"base": BASE}, [file], **fields)
    with pytest.raises(UserError) as raised:
        evaluation.prepare(context)
    (line,) = str(raised.value).splitlines()
    assert line.startswith("stages.eval." + message.replace("FILE", str(file)))
