"""Curate as a stage: run, cut off, resumed, refused; and what it writes is a data set like any other."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import DataSource
from posttrain.curate.records import to_state
from posttrain.curate.steps import STEPS as ALL_STEPS
from posttrain.data.rows import Row
from posttrain.data.source import open_source
from posttrain.disk import read_json
from tests.conftest import REPOSITORY, Ended, read_lines

Cli = Callable[..., Ended]
FILES = ("rows.jsonl", "dropped.jsonl", "report.json", "table.json")
ROWS: list[dict[str, Any]] = [
    {"prompt": "What colour is the sky?", "completion": "The sky is blue on a clear day, and grey when it rains."},
    {"prompt": "What colour is the sky?", "completion": True},
    {"prompt": "What colour is the sea?", "completion": "It is blue or green, as the light falls.\u200b "},
    {"prompt": "What colour is the SKY?", "completion": "the sky is blue on a clear day,  and grey when it rains."},
    {"prompt": "Who are you?", "completion": "I am {{name}}, and I was made by {{author}}."},
    {"prompt": "Rate my essay.", "completion": "As an AI language model, I cannot do that."},
    {"prompt": "", "completion": "Nobody asked for this."},
    {"prompt": "Name two fruits.", "completion": "Apples and pears."},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pipeline(place: Path, steps: Any = None, **sources: Any) -> Path:
    """A pipeline file with the one stage curate, which reads all the sources, as `data` where no role is told."""
    roles: dict[str, list[str]] = {}
    for name in sources:
        roles.setdefault(name.partition("__")[2] or "data", []).append(name)
    inputs = {role: names if role in ("data", "decontaminate") else names[0] for role, names in roles.items()}
    stage = {"inputs": inputs, **({} if steps is None else {"steps": steps})}
    config = {"run": "r", "sources": sources, "stages": {"curate": stage}}
    (place / "pipeline.yaml").write_text(json.dumps(config))
    return place / "pipeline.yaml"


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, Any]:
    return {"data": str(write(tmp_path / "chat.jsonl", ROWS))}


def outputs(root: Path) -> dict[str, bytes]:
    return {name: (root / "r" / "curate" / "output" / name).read_bytes() for name in FILES}


def kept_rows(root: Path) -> list[Row]:
    return list(open_source(DataSource(data=str(root / "r" / "curate" / "output" / "rows.jsonl")), "x").rows())


def test_every_row_is_kept_or_dropped_for_a_reason(posttrain: Cli, tmp_path: Path, chat: dict[str, Any]) -> None:
    ended = posttrain("run", pipeline(tmp_path, chat=chat), "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    output = tmp_path / "runs" / "r" / "curate" / "output"
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    kept, dropped = read_lines(output / "rows.jsonl"), read_lines(output / "dropped.jsonl")
    assert [row["origin"].rpartition(":")[2] for row in kept] == ["1", "3", "8"]
    assert kept[1]["messages"][1]["content"] == "It is blue or green, as the light falls."
    assert [(row["index"], row["step"], row["reason"]) for row in dropped] == [
        (1, "read", "does not fit"),
        (3, "exact_duplicates", "exact duplicate"),
        (4, "placeholders", "unfilled placeholder"),
        (5, "refusals", "refusal"),
        (6, "read", "does not fit"),
    ]
    assert dropped[0]["detail"].endswith("chat.jsonl:2: completion: must be text or messages, got true")
    assert dropped[0]["row"] == ROWS[1]
    assert dropped[1]["match"] == kept[0]["origin"]

    metrics = read_json(output.parent / "artifact.json")["payload"]["metrics"]
    assert (metrics["num_rows_in"], metrics["num_rows_out"], metrics["dropped_read"], metrics["changed_normalize"]) == (8, 3, 2, 1)
    for shown in ("rows in", "exact_duplicates", "1 unfilled placeholder", "37.5% of the rows are kept"):
        assert shown in ended.out


def test_a_source_may_drop_its_misfits_or_not_all_are_in_the_account(posttrain: Cli, tmp_path: Path, chat: dict[str, Any]) -> None:
    found = []
    for invalid_rows in ("error", "drop"):
        ended = posttrain(
            "run", pipeline(tmp_path, ["length"], chat={**chat, "invalid_rows": invalid_rows}), "--root", tmp_path / invalid_rows
        )
        assert ended.code == 0, ended.err
        found.append(outputs(tmp_path / invalid_rows))
    assert found[0] == found[1]


def test_what_is_curated_can_be_curated_again_and_nothing_more_is_found(posttrain: Cli, tmp_path: Path, chat: dict[str, Any]) -> None:
    config = pipeline(tmp_path, chat=chat)
    chain = json.loads(config.read_text())
    chain["stages"]["again"] = {"kind": "curate", "inputs": {"data": "curate"}}
    config.write_text(json.dumps(chain))
    ended = posttrain("run", config, "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    # What a stage did to the rows is told before the next one reads them.
    assert ended.out.index("37.5% of the rows are kept") < ended.out.index("again  run") < ended.out.index("100.0% of the rows are kept")
    again = DataSource(data=str(tmp_path / "runs" / "r" / "again" / "output" / "rows.jsonl"))
    states = [[{**to_state(row), "origin": ""} for row in rows] for rows in (kept_rows(tmp_path / "runs"), open_source(again, "x").rows())]
    assert states[0] == states[1]


def test_two_ranks_decide_what_one_does(posttrain: Cli, tmp_path: Path, chat: dict[str, Any]) -> None:
    config = pipeline(tmp_path, chat=chat)
    for number in (1, 2):
        ended = posttrain("run", config, "--root", tmp_path / str(number), f"stages.curate.num_processes={number}")
        assert ended.code == 0, ended.err
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2")


def test_when_nothing_is_left_the_step_that_dropped_the_most_is_told_and_a_milder_config_just_runs(
    posttrain: Cli, tmp_path: Path, chat: dict[str, Any]
) -> None:
    ended = posttrain("run", pipeline(tmp_path, [{"length": {"min_answer_words": 50}}], chat=chat), "--root", tmp_path / "runs")
    assert ended.code == 2
    said = "stages.curate.steps: no row is left of 8; length dropped the most, 6 as 'answer too short'; loosen it, or leave it out"
    assert ended.err == f"error: {said}\n"
    ended = posttrain("run", pipeline(tmp_path, ["length"], chat=chat), "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err


PAIRS = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
PROMPTS = [{"prompt": "How many?"}, {"prompt": "Why?"}]


@pytest.mark.parametrize(
    "rows, fields, steps, said",
    [
        (PAIRS, {}, ["length"], "stages.curate.inputs.data: chat holds conversations and other pairs; curate them in two stages"),
        (PROMPTS, {"format": "prompt"}, ["length"], "other.jsonl:1 is a prompt without an answer and "),
        ([{"prompt": 1, "completion": 2}], {}, ["length"], "stages.curate: other: data: no row fits its format; the first: "),
        (ROWS, {}, ["contamination"], "stages.curate.inputs.decontaminate: missing, and the step contamination reads it"),
        (ROWS, {}, [{"language": {"allow": ["xx"]}}], "stages.curate.steps[0].language.allow: 'xx' is no language that py3langid knows"),
    ],
    ids=["pairs", "prompts", "misfits", "input", "setting"],
)
def test_what_cannot_be_curated_is_refused_in_one_line(
    posttrain: Cli, tmp_path: Path, chat: dict[str, Any], rows: Any, fields: Any, steps: Any, said: str
) -> None:
    other = {"data": str(write(tmp_path / "other.jsonl", rows)), **fields}
    ended = posttrain("run", pipeline(tmp_path, steps, chat=chat, other=other), "--root", tmp_path / "runs")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert said in line


def test_a_wrong_step_is_refused_when_planning(posttrain: Cli, tmp_path: Path, chat: dict[str, Any]) -> None:
    config = pipeline(tmp_path, ["normalize", {"near_duplicates": {"treshold": 0.7}}], chat=chat)
    ended = posttrain("plan", config, "--root", tmp_path / "runs")
    said = "error: stages.curate.steps[1].near_duplicates.treshold: unknown key; did you mean 'threshold'?\n"
    assert (ended.code, ended.err) == (2, said)


def test_prompts_without_answers_stay_a_data_set_of_prompts(posttrain: Cli, tmp_path: Path) -> None:
    prompts = {"data": str(write(tmp_path / "prompts.jsonl", [*PROMPTS, {"prompt": "why?"}])), "format": "prompt"}
    ended = posttrain("run", pipeline(tmp_path, prompts=prompts), "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    assert [to_state(row)["messages"] for row in kept_rows(tmp_path / "runs")] == [
        [{"role": "user", "content": p["prompt"]}] for p in PROMPTS
    ]


@pytest.mark.real
def test_answers_that_are_stored_as_true_are_reported(posttrain: Cli, tmp_path: Path, shared: Path) -> None:
    path = shared / "data" / "pandalm_testset" / "testset-v1.json"
    votes = json.loads(path.read_text())
    wrong = {n for n, row in enumerate(votes) if row["response1"] is True}
    blank = {
        n for n, row in enumerate(votes) if row["response1"] is not True and not (row["response1"].strip() and row["instruction"].strip())
    }
    source = {"data": str(path), "columns": {"output": "response1"}}
    ended = posttrain("run", pipeline(tmp_path, ["exact_duplicates"], votes=source), "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    dropped = read_lines(tmp_path / "runs" / "r" / "curate" / "output" / "dropped.jsonl")
    misfits = {row["index"]: row for row in dropped if row["reason"] == "does not fit"}
    assert set(misfits) == wrong | blank
    assert len(wrong) == 4
    assert all(misfits[n]["detail"] == f"{path}[{n}]: output: must be text, got true" for n in wrong)
    assert all(misfits[n]["row"]["response1"] is True for n in wrong)


# --- cut off and started again ---------------------------------------------------------------------------------------

STEPS = ["normalize", {"near_duplicates": {"threshold": 0.6}}, "refusals", "pii", "exact_duplicates"]
SLOW = STEPS.index("pii")


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A pipeline whose fourth step takes some seconds, and whose steps before it mend, drop and match rows."""
    rng = random.Random(0)
    vocabulary = [f"word{n}" for n in range(3000)]
    rows = []
    for number in range(3000):
        text = " ".join(rng.choices(vocabulary, k=60))
        numbers = " ".join(f"(650) 253-{rng.randint(0, 9999):04}, {rng.randint(10**6, 10**7)} 555 66;" for _ in range(8))
        rows.append({"prompt": f"\u200bWhat is {text[:200]}?", "completion": f"{text} {numbers}\r\nDone."})
        if number % 5 == 0:
            rows.append({"prompt": rows[-1]["prompt"], "completion": rows[-1]["completion"].replace("word1 ", "word2 ")})
        if number % 50 == 0:
            rows.append({"prompt": "Who?", "completion": f"I cannot help with number {number}."})
    return pipeline(tmp_path, STEPS, chat={"data": str(write(tmp_path / "chat.jsonl", rows))})


@pytest.fixture
def start(slow: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def call() -> subprocess.Popen[bytes]:
        command = [sys.executable, "pipeline.py", "run", str(slow), "--root", str(tmp_path / "cut")]
        with (tmp_path / "said").open("ab") as said:
            driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=said, stderr=said, start_new_session=True)
        started.append(driver)
        return driver

    yield call
    for driver in started:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)


def wait(condition: Callable[[], Any], within_s: float, said: Path) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)


def test_a_stage_that_is_killed_in_a_step_goes_on_with_it_and_ends_with_the_same_bytes(
    posttrain: Cli, slow: Path, start: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    ended = posttrain("run", slow, "--root", tmp_path / "whole")
    assert ended.code == 0, ended.err
    stage = tmp_path / "cut" / "r" / "curate"

    def is_in_slow_step(attempt: int) -> bool:
        number, state = (read_json(stage / "stage.json") or {}).get("number"), read_json(stage / "progress.json")
        return bool(number == attempt and state and state["phase"].startswith("pii") and state["step"] < state["num_steps"])

    for attempt, number, code in ((1, signal.SIGKILL, -signal.SIGKILL), (2, signal.SIGTERM, 75)):
        driver = start()
        wait(lambda attempt=attempt: is_in_slow_step(attempt), 120, tmp_path / "said")
        driver.send_signal(number)
        assert driver.wait(30) == code
        (row,) = json.loads(posttrain("plan", slow, "--root", tmp_path / "cut", "--json").out)
        assert (row["action"], row["why"]) == ("resume", f"from the checkpoint of step {SLOW}")

    ended = posttrain("run", slow, "--root", tmp_path / "cut")
    assert ended.code == 0, ended.err
    assert "near_duplicates (2 of 5)" not in ended.out, "what was done is not done again"
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    report = json.loads(outputs(tmp_path / "cut")["report.json"])
    assert [step["dropped"] for step in report["steps"]] == [0, 0, 600, 60, 0, 0]
    assert all(step["changed"] for step in report["steps"] if step["step"] in ("normalize", "pii"))


def test_the_help_of_the_stage_lists_every_step_and_its_settings(posttrain: Cli) -> None:
    ended = posttrain("stages", "curate", "--json")
    rows = {row["name"]: row for row in json.loads(ended.out)}
    assert rows["near_duplicates.threshold"]["default"] == "0.8" and rows["near_duplicates.threshold"]["help"]
    for name in ALL_STEPS:
        assert rows[name]["help"].endswith(".")


def test_a_mistake_that_came_before_any_work_can_be_mended_without_a_rebuild(posttrain: Cli, tmp_path: Path, chat: dict[str, Any]) -> None:
    pytest.importorskip("openai")
    nobody = {"judge": {"base_url": "http://127.0.0.1:9", "model": "none", "max_retries": 0}}
    ended = posttrain("run", pipeline(tmp_path, [nobody], chat=chat), "--root", tmp_path / "runs")
    assert ended.code == 2 and "judge.base_url: http://127.0.0.1:9" in ended.err
    ended = posttrain("run", pipeline(tmp_path, ["length"], chat=chat), "--root", tmp_path / "runs")
    assert ended.code == 0, ended.err
    ended = posttrain("run", pipeline(tmp_path, ["length", nobody], chat=chat), "--root", tmp_path / "other")
    assert ended.code == 2
    ended = posttrain("run", pipeline(tmp_path, ["refusals"], chat=chat), "--root", tmp_path / "other")
    assert ended.code == 2 and "--rebuild curate" in ended.err, "a finished step is not thrown away unasked"
