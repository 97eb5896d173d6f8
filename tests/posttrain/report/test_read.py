"""What a report says is what is on disk; what is damaged, cut off or gone is left out, and nothing else with it."""

import json

import numpy as np
import pytest

import pipeline
from posttrain.disk import write_sealed
from posttrain.report import chain, curves, read
from posttrain.report.read import Cell, RunReport, read_cell
from tests.posttrain.report.conftest import POLICIES, Made, answer_results


def read_made(made: Made) -> RunReport:
    directory, list_rows = pipeline._open_run(str(made.config), (), made.root)
    return read.read_run(directory, list_rows())


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("6.544 (6.094 to 7.048)", Cell("", 6.544, None, 6.094, 7.048)),
        ("2.275 (-4.269, -4.604 to -3.973)", Cell("", 2.275, -4.269, -4.604, -3.973)),
        ("-0.100 (-0.200 to -0.050)", Cell("", -0.1, None, -0.2, -0.05)),
        ("0.500 (+0.250)", Cell("", 0.5, 0.25)),
        ("0.500", Cell("", 0.5)),
        ("1.000 (other tokens than the baseline's: not comparable)", Cell("", 1.0)),
        ("-", Cell("")),
        ("<b>0.5</b>", Cell("")),
    ],
)
def test_a_cell_is_read_as_the_numbers_that_it_shows(text, cell):
    found = read_cell(text)
    assert (found.text, found.value, found.difference, found.low, found.high) == (text, cell.value, cell.difference, cell.low, cell.high)


def test_a_check_is_shown_by_what_it_asks_for(make_run):
    asked = [
        {"kind": "instruction", "id": "punctuation:no_comma"},
        {"kind": "instruction", "id": "length_constraints:number_words", "relation": "less than", "num_words": 40},
        {"kind": "exact_answer", "answer": "x"},
    ]
    (result,) = answer_results("base", ["x"], ["x"])
    results = [{**result, "checks": list(map(json.dumps, asked)), "verdicts": [1.0, 0.0, 1.0], "loose_verdicts": [1.0, 0.0, 1.0]}]
    (evaluation,) = [stage.evaluation for stage in read_made(make_run(results=results)).stages if stage.evaluation]
    assert evaluation.samples[0].checks == [
        "punctuation:no_comma",
        "length_constraints:number_words: relation less than, num_words 40",
        "exact_answer: answer x",
    ]


def test_what_a_curation_dropped_stands_step_by_step_and_says_nothing_twice(tmp_path):
    def dropped(origin: str, step: str, reason: str, detail: str = "") -> dict[str, object]:
        return {"origin": origin, "step": step, "reason": reason, "detail": detail, "row": {"text": origin}}

    steps = [("read", {"does not fit": 1}), ("length", {"answer too long": 5}), ("diversity", {"diversity: over the budget": 2})]
    told = [
        {"step": step, "rows_out": 9, "dropped": sum(reasons.values()), "changed": 0, "reasons": reasons, "settings": {}}
        for step, reasons in steps
    ]
    (tmp_path / "report.json").write_text(json.dumps({"num_rows_in": 17, "num_rows_out": 9, "steps": told}))
    rows = [
        dropped("a:1", "diversity", "diversity: over the budget"),
        *(dropped(f"a:{row}", "length", "answer too long", f"{row}00 words") for row in range(2, 7)),
        dropped("a:7", "read", "does not fit", "a:7: prompt: is empty"),
        dropped("a:8", "diversity", "diversity: over the budget"),
    ]
    (tmp_path / "dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read._read_curation(tmp_path)
    assert found is not None and [step["reasons"] for step in found.steps] == [
        {"does not fit": 1},
        {"answer too long": 5},
        {"over the budget": 2},
    ]
    assert [(row.origin, row.step, row.reason, row.detail) for row in found.dropped] == [
        ("a:7", "read", "does not fit", "prompt: is empty"),
        *((f"a:{row}", "length", "answer too long", f"{row}00 words") for row in range(2, 5)),
        ("a:1", "diversity", "over the budget", ""),
        ("a:8", "diversity", "over the budget", ""),
    ], "of each reason three"


def test_prompts_stand_beside_what_each_policy_answered_and_whether_it_passes(make_run):
    results = [result for policy in POLICIES for result in answer_results(policy, ["1", policy], ["1", "dpo"])]
    (evaluation,) = [stage.evaluation for stage in read_made(make_run(results=results)).stages if stage.evaluation]
    first, second = evaluation.samples
    assert first.prompt == [{"role": "user", "content": "one?"}] and second.prompt == [{"role": "user", "content": "two?"}]
    assert [(answer.policy, answer.text, answer.passed) for answer in first.answers] == [(policy, "1", True) for policy in POLICIES]
    assert [(answer.text, answer.passed) for answer in second.answers] == [("base", False), ("sft", False), ("dpo", True)]


def test_several_answers_to_a_row_stand_one_below_the_other(make_run):
    first, second = (answer_results("base", [text], ["1"])[0] for text in ("1", "2"))
    (evaluation,) = [stage.evaluation for stage in read_made(make_run(results=[first, {**second, "turn": 2}])).stages if stage.evaluation]
    (sample,) = evaluation.samples
    assert [(answer.text, answer.passed) for answer in sample.answers] == [("[1]\n1\n\n[2]\n2", False)]


def test_answers_are_not_put_beside_prompts_of_data_that_changed(make_run, tmp_path):
    made = make_run(results=answer_results("base", ["1", "2"], ["1", "1"]))
    (tmp_path / "shown.heldout.jsonl").write_text(json.dumps({"prompt": "another?"}) + "\n" + json.dumps({"prompt": "two?"}) + "\n")
    directory, list_rows = pipeline._open_run("shown", (), made.root)
    (evaluation,) = [stage.evaluation for stage in read.read_run(directory, list_rows()).stages if stage.evaluation]
    assert [sample.prompt for sample in evaluation.samples] == [None, None]
    assert [sample.answers[0].text for sample in evaluation.samples] == ["1", "2"]


def test_of_many_rows_some_are_shown_from_the_first_to_the_last(make_run):
    answers = [str(row) for row in range(1000)]
    run = read_made(make_run(prompts=[f"row {row}" for row in range(1000)], results=answer_results("base", answers, answers)))
    (evaluation,) = [stage.evaluation for stage in run.stages if stage.evaluation]
    rows = [sample.row for sample in evaluation.samples]
    assert evaluation.num_samples == 1000 and len(rows) == read.MAX_SAMPLES and rows[0] == 0 and rows[-1] == 999
    assert set(np.diff(rows)) <= {5, 6}, "evenly spread"
    assert all(sample.prompt == [{"role": "user", "content": f"row {sample.row}"}] for sample in evaluation.samples)


def test_a_line_that_is_being_written_and_a_damaged_file_leave_the_rest(make_run):
    made = make_run()
    with (made.directory / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": NaN, "grad_norm": 0.5}\n[1]\n\n{"step": 4, "lo')
    for name in ("preflight.json", "progress.json", "layout.json"):
        (made.directory / "sft" / name).write_text('{"half": ')
    stage = read_made(made).stages[0]
    assert stage.steps == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "grad_norm": 0.5}]
    assert stage.preflight is None and stage.layout is None and stage.is_finished


def test_a_stage_is_told_by_what_a_run_would_do_about_it(make_run):
    made = make_run(until="sft")
    run = read_made(made)
    assert [(stage.name, stage.action, stage.is_finished) for stage in run.stages] == [
        ("sft", "skip", True),
        ("dpo", "run", False),
        ("eval", "run", False),
    ]
    assert run.seconds == 60 and run.process_hours == pytest.approx(1 / 60)
    directory, list_rows = pipeline._open_run("shown", (), made.root)
    assert [stage.name for stage in read.read_run(directory, list_rows()).stages] == ["sft"], "of a run alone, what it holds"


def test_what_another_run_built_costs_nothing_here(make_run):
    made = make_run()
    artifact = made.directory / "sft" / "artifact.json"
    told = json.loads(artifact.read_text())["payload"]
    told["provenance"] |= {"started": "2020-01-01T00:00:00+00:00", "finished": "2020-01-01T01:00:00+00:00"}
    write_sealed(artifact, told)
    stage = read_made(made).stages[0]
    assert stage.is_reused and stage.seconds == 3600 and stage.process_hours == 0


def test_the_time_of_a_resumed_stage_is_that_of_all_its_attempts(make_run):
    made = make_run()
    before = read_made(made).stages[0]
    file = made.directory / "sft" / "stage.json"
    told = json.loads(file.read_text())
    told["earlier"] = [{"started": told["started"], "seconds": 600.0, "num_processes": 4}]
    file.write_text(json.dumps(told))
    after = read_made(made).stages[0]
    assert after.seconds == before.seconds + 600
    assert after.process_hours == pytest.approx(before.process_hours + 600 * 4 / 3600)
    assert after.ended == before.ended


def test_completions_are_the_best_and_the_worst_to_one_prompt_of_some_steps(make_run):
    made = make_run()
    lines = [
        {
            "step": step,
            "origin": f"p{place}",
            "prompt": [{"role": "user", "content": f"prompt {place}"}],
            "completion": f"{step} {place} {n}",
        }
        | {"reward": float(reward), "rewards": {"judge": reward}, "kl": 0.5, "num_tokens": 3, "ended": True}
        for step in range(1, 31)
        for place in range(2)
        for n, reward in enumerate([0, 2, 1])
    ]
    path = made.directory / "dpo" / "completions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "rew')
    found = read_made(made).stages[1].completions
    assert [each.step for each in found][:1] == [1] and found[-1].step == 30 and len(found) == read.MAX_SAMPLED_STEPS
    assert all((each.best.text, each.worst.text) == (f"{each.step} 0 1", f"{each.step} 0 0") for each in found)
    assert {each.num_completions for each in found} == {3} and found[0].prompt == [{"role": "user", "content": "prompt 0"}]


# --- the chain -------------------------------------------------------------------------------------------------------


def test_lanes_lead_from_what_is_made_to_all_that_read_it(make_run):
    lines = chain.lay_out(read_made(make_run())).lines
    assert [line.name for line in lines] == ["base", "chat", "sft", "prefs", "dpo", "heldout", "eval"], "sources above their first reader"
    reads = {"sft": {"base", "chat"}, "dpo": {"sft", "prefs"}, "eval": {"base", "sft", "dpo", "heldout"}}
    place = {line.name: number for number, line in enumerate(lines)}
    last = {name: max(place[reader] for reader, names in reads.items() if name in names) for name in place if name != "eval"}
    lane = {line.name: line.lane for line in lines}
    for number, line in enumerate(lines):
        assert {at for at, _ in line.joins} == {lane[name] for name in reads.get(line.name, ())}
        beside = {lane[name] for name in place if name != "eval" and place[name] < number < last[name]} | {
            lane[name] for name in reads.get(line.name, ()) if last[name] > number
        }
        assert {at for at, _ in line.passes} == beside
        assert line.goes_on == (line.name in last)
        assert line.lane not in beside, "nothing stands on a lane that is another's"


# --- curves ----------------------------------------------------------------------------------------------------------


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_its_peaks():
    random = np.random.default_rng(0)
    points = [(float(step), float(value)) for step, value in enumerate(random.normal(size=50_000))]
    points[31_234] = (31_234.0, 99.0)
    points[7] = (7.0, -99.0)
    found = curves.thin(points)
    assert len(found) <= curves.MAX_POINTS and set(found) <= set(points) and found == sorted(found)
    assert {points[0], points[-1], (31_234.0, 99.0), (7.0, -99.0)} <= set(found)
    assert curves.thin(points[:300]) == points[:300]


def test_the_running_mean_is_the_weighted_mean_of_all_before():
    random = np.random.default_rng(1)
    values = random.normal(size=90)
    (chart,) = curves.charts_of([{"step": float(step), "loss": float(value)} for step, value in enumerate(values)])
    for place, (step, mean) in enumerate(chart.curves[0].mean):
        weights = 0.5 ** ((place - np.arange(place + 1)) / 3)  # halved every thirtieth of 90 steps
        assert step == place and mean == pytest.approx(np.average(values[: place + 1], weights=weights))


def test_what_is_compared_shares_a_chart_and_what_matters_comes_first():
    steps = [{"step": 1.0, "logps/rejected": 1.0, "odd": 1.0, "rewards/rejected": 2.0, "rewards/chosen": 3.0, "loss": 4.0, "epoch": 0.1}]
    found = curves.charts_of(steps)
    assert [(chart.title, [curve.label for curve in chart.curves], chart.is_main) for chart in found] == [
        ("loss", ["loss"], True),
        ("rewards", ["rejected", "chosen"], True),
        ("log-probabilities", ["rejected"], False),
        ("odd", ["odd"], False),
    ]
    both = curves.overlaid({"a": steps, "b": [{"step": 1.0, "loss": 5.0}]})
    assert [curve.label for curve in both[0].curves] == ["a", "b"] and [curve.label for curve in both[1].curves] == [
        "a rejected",
        "a chosen",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.6931, "0.693"),
        (3e-05, "3e-5"),
        (-1234.4, "-1,234"),
        (43210, "43.2k"),
        (4.1e6, "4.1M"),
        (7e9, "7G"),
        (0.00123, "0.00123"),
    ],
)
def test_numbers_are_short(value, text):
    assert curves.show_number(value) == text


def test_the_order_of_recorded_stages_is_that_of_what_they_read():
    rows = [
        {"stage": "a", "inputs": {"policy": ["z"]}},
        {"stage": "m", "inputs": {"data": ["outside"]}},
        {"stage": "z", "inputs": {"data": ["m"]}},
    ]
    assert [row["stage"] for row in read.in_order(rows)] == ["m", "z", "a"]
