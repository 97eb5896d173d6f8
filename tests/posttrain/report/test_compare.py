"""Runs are compared on the very rows that both have, settings by name, and nothing is claimed of what cannot be compared."""

import json

import numpy as np
import pytest

import pipeline
from posttrain import artifact
from posttrain.config import read_pipeline
from posttrain.report import compare, read
from tests.posttrain.report.conftest import Made, answer_results, nll_results

NUM_ROWS = 60


def compared(*runs):
    found = []
    for made in runs:
        directory, list_rows = pipeline._open_run(str(made.config), (), made.root)
        found.append(read.read_run(directory, list_rows()))
    return compare.compare_runs(found)


@pytest.fixture
def two(make_run):
    """Two runs that answered the same 60 prompts: a row's difficulty is shared, and the second is a little better on each."""
    random = np.random.default_rng(0)
    hard, num_tokens = random.normal(5, 3, NUM_ROWS), random.integers(1, 9, NUM_ROWS)
    gained = random.normal(-0.3, 0.1, NUM_ROWS)
    prompts = [f"row {row}" for row in range(NUM_ROWS)]
    wanted = ["yes"] * NUM_ROWS
    right = {"a": random.random(NUM_ROWS) < 0.4, "b": random.random(NUM_ROWS) < 0.8}
    made = []
    for name, nll in (("a", hard), ("b", hard + gained)):
        results = nll_results("dpo", [float(value) for value in nll * num_tokens], [int(count) for count in num_tokens])
        results += answer_results("dpo", ["yes" if passed else "no" for passed in right[name]], wanted)
        made.append(make_run(name, prompts=prompts, results=results, learning_rate=1e-3 if name == "a" else 2e-3))
    (made[1].root.parent / "b.heldout.jsonl").write_bytes((made[0].root.parent / "a.heldout.jsonl").read_bytes())
    return made, hard, gained, num_tokens, right


def test_a_difference_is_paired_by_row_and_weighed_by_tokens(two):
    made, hard, gained, num_tokens, right = two
    rows = {row.metric: row for row in compared(*made).rows}
    nll = rows["nll"].results
    assert nll[0].value == pytest.approx(np.average(hard, weights=num_tokens)) and nll[0].difference is None
    assert nll[1].value == pytest.approx(np.average(hard + gained, weights=num_tokens))
    assert nll[1].difference == pytest.approx(np.average(gained, weights=num_tokens))
    random = np.random.default_rng(7)
    drawn = random.integers(0, NUM_ROWS, (20_000, NUM_ROWS))
    means = (gained * num_tokens)[drawn].sum(1) / num_tokens[drawn].sum(1)
    assert [nll[1].low, nll[1].high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=3e-3)
    assert nll[1].high < 0, "found, though the rows differ ten times as much as the runs"
    passed = rows["answers passed"].results
    assert [passed[0].value, passed[1].value] == pytest.approx([right["a"].mean(), right["b"].mean()])
    assert passed[1].difference == pytest.approx(right["b"].mean() - right["a"].mean()) and passed[1].low > 0


def test_no_difference_is_claimed_on_other_data(two):
    made, *_ = two
    (made[1].root.parent / "b.heldout.jsonl").write_text('{"prompt": "another"}\n')
    directory = made[1].directory / "eval" / "stage.json"
    told = json.loads(directory.read_text())
    told["inputs"]["data"][0]["fingerprint"] = told["inputs"]["data"][0]["id"] = "0" * 64
    directory.write_text(json.dumps(told))
    artifact = made[1].directory / "eval" / "artifact.json"
    artifact.unlink()
    runs = []
    for name in ("a", "b"):
        where, list_rows = pipeline._open_run(name, (), made[0].root)
        runs.append(read.read_run(where, list_rows()))
    for row in compare.compare_runs(runs).rows:
        assert row.results[1].value is not None and row.results[1].difference is None and row.results[1].why == compare.NO_DATA


def test_no_difference_is_claimed_where_a_row_has_other_tokens(make_run):
    one = make_run("a", prompts=["x", "y"], results=nll_results("dpo", [4.0, 2.0], [2, 2]))
    other = make_run("b", prompts=["x", "y"], results=nll_results("dpo", [4.0, 2.0], [2, 1]))
    (row,) = compared(one, other).rows
    assert row.results[1] == compare.Result(2.0, why=compare.OTHER_TOKENS)


def test_no_difference_is_claimed_where_no_row_is_common(make_run):
    one = make_run("a", prompts=["x", "y"], results=nll_results("dpo", [4.0], [2]))
    other = make_run("b", prompts=["x", "y"], results=[{**result, "row": 1} for result in nll_results("dpo", [4.0], [2])])
    (row,) = compared(one, other).rows
    assert row.results[1] == compare.Result(2.0, why=compare.NO_ROWS)


def test_settings_that_differ_are_named_and_no_others(make_run):
    found = dict(compared(make_run("a"), make_run("b", learning_rate=5e-4, prompts=["three?"])).settings)
    assert found["stages.sft.learning_rate"] == [1e-3, 5e-4]
    assert set(found) == {"stages.sft.learning_rate", "sources.heldout", "sources.heldout.data"}


def test_a_stage_that_only_one_run_has_stands_beside_nothing(make_run):
    made = make_run("a"), make_run("b", until="sft")
    comparison = compared(*made)
    assert ("dpo.loss", [1.0, None]) in comparison.metrics
    assert list(comparison.steps("dpo")) == ["a"] and list(comparison.steps("sft")) == ["a", "b"]
    opened = [pipeline._open_run(name, (), made[0].root) for name in ("a", "b")]
    found = compare.compare_runs([read.read_run(directory, list_rows()) for directory, list_rows in opened])
    assert ("stages.dpo", ["dpo", None]) in found.settings and not [name for name, _ in found.settings if name.startswith("stages.dpo.")]


def test_what_is_one_policy_in_both_is_named_and_not_held_against_itself(make_run, posttrain, tmp_path):
    results = nll_results("base", [6.0, 6.0], [2, 2]) + nll_results("dpo", [4.0, 2.0], [2, 2])
    one, other = make_run("a", results=results), make_run("b", results=results, learning_rate=2e-3)
    assert {row.policy for row in compared(one, other).rows} == {"dpo"}
    ended = posttrain("compare", "a", "b", "--root", one.root, "--html", tmp_path / "x.html")
    assert "eval: base: nll" not in ended.out and "eval: base   one policy" in ended.out, ended.out
    assert "one policy, measured" in (tmp_path / "x.html").read_text()
    elsewhere = make_run("c", results=results, learning_rate=2e-3, prompts=["another?", "still another?"])
    assert {row.policy for row in compared(one, elsewhere).rows} == {"base", "dpo"}, "on other data it may be otherwise"


def test_stages_that_another_run_built_are_named_and_their_curves_not_drawn_twice(make_run):
    made = make_run("a", results=nll_results("dpo", [4.0, 2.0], [2, 2]))
    config = made.config.with_name("b.yaml")
    config.write_text(made.config.read_text().replace("run: a", "run: b"))
    for node in pipeline.plan(read_pipeline(config), made.root)[:2]:
        found = artifact.read_artifact(made.directory / node.name)
        assert found is not None
        pipeline._reuse(node, found)
    comparison = compared(made, Made(config, made.root, "b"))
    assert [name for name, _ in comparison.same] == ["sft", "dpo"] and not comparison.stages


def test_a_pipeline_file_that_reads_otherwise_by_now_is_compared_by_what_was_read(make_run):
    results = nll_results("dpo", [4.0, 2.0], [2, 2])
    one, other = make_run("a", results=results), make_run("b", results=results, learning_rate=2e-3)
    one.config.write_text(one.config.read_text().replace("data: [heldout]", "data: [heldout, chat]"))
    (row,) = compared(one, other).rows
    assert row.results[1].difference == 0.0


def test_the_terminal_shows_it_all_and_so_do_json_and_the_page(two, posttrain, tmp_path):
    made, _, gained, num_tokens, _ = two
    root = ("--root", made[0].root)
    ended = posttrain("compare", "a", made[1].config, *root)
    difference = np.average(gained, weights=num_tokens)
    assert ended.code == 0, ended.err
    for words in ("settings that differ", "stages.sft.learning_rate", "eval: dpo: nll", f"({difference:+.3f}, ", "wall time", "3 min 00 s"):
        assert words in ended.out
    ended = posttrain("compare", "a", "b", *root, "--json", "--html", tmp_path / "x.html")
    told = json.loads(ended.out)
    by_metric = {row["metric"]: row["runs"] for row in told["measured"]}
    assert by_metric["nll"]["b"]["difference"] == pytest.approx(difference) and by_metric["nll"]["a"]["difference"] is None
    assert told["settings"]["stages.sft.learning_rate"] == {"a": 1e-3, "b": 2e-3} and told["confidence"] == 0.95
    page = (tmp_path / "x.html").read_text()
    assert f"{difference:+.3f}" in page and "stages.sft.learning_rate" in page and page.count("<figure") == 2


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["a"], "a: there is nothing to compare it with; name two runs or more"),
        (["a", "a"], "a: is given twice; name each run once"),
        (["a", "b"], "b: is neither a pipeline file that was run nor a run under"),
    ],
)
def test_a_wrong_question_is_one_line(make_run, posttrain, runs, words):
    made = make_run("a")
    ended = posttrain("compare", *runs, "--root", made.root)
    assert ended.code == 2 and words in ended.err and len(ended.err.splitlines()) == 1
