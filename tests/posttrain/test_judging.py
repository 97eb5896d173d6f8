"""Judging against a real HTTP server with preferences and faults of its own, and from the command line on two tiny policies."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import validate
from posttrain.data.rows import Conversation
from posttrain.disk import read_json
from posttrain.endpoint import Replies, fill, read_replies
from posttrain.error import UserError
from posttrain.judging import hold_duels, read_verdict
from posttrain.metrics.measured import measure_results
from posttrain.progress import Progress
from posttrain.stage import StageContext
from stages.eval import EvalConfig
from tests.conftest import Ended
from tests.posttrain.judge_server import Server

Cli = Callable[..., Ended]
PROMPTS = [f"what is the colour of bird {number}?" for number in range(6)]
BETTER = {"base": [1, 1, 2, 0, 2, 1], "dpo": [2, 1, 1, 0, 3, 1]}
"""How good the answers of two policies are, by row; where both are as good, they say so in other words."""


def answers_of(policy: str) -> list[str]:
    return [f"{policy} says: good" + " and good" * how_good for how_good in BETTER[policy]]


def evaluate(
    root: Path,
    server: Server,
    run: str = "first",
    *,
    prompts: Iterable[str] = PROMPTS,
    answers: dict[str, list[str]] | None = None,
    rewards: dict[str, list[float]] | None = None,
    **judge: Any,
) -> list[dict[str, Any]]:
    """What becomes of the duels of the last policy, of a run under `root`."""
    from posttrain.evaluate import Evaluation, Policy, Rows

    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = [Conversation(messages, None, [], f"x.jsonl:{number}") for number, messages in enumerate(asked)]  # type: ignore[arg-type]
    settings = judge or {"kind": "endpoint", "base_url": server.url, "model": "some-judge"}
    config = validate(EvalConfig, {"judge": settings}, "stages.eval")
    directory = root / run / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    context = StageContext("eval", config, {}, directory, root)
    policies = []
    for name, said in (answers or {name: answers_of(name) for name in BETTER}).items():
        told: dict[str, Any] = {"measure": "answer", "turn": 1, "num_tokens": 3, "ended": True, "checks": []}
        results = [{"row": row, "answer": answer, **told} for row, answer in enumerate(said)]
        results += [{"row": row, "measure": "reward", "turn": 1, "score": score} for row, score in enumerate((rewards or {}).get(name, []))]
        policies.append(Policy(name, results))
    turns: Any = [[messages] for messages in asked]
    given = Rows(rows, turns, [[[]] for _ in rows], frozenset(range(len(rows))), [])  # type: ignore[arg-type]
    progress = Progress(directory, is_main=True)
    evaluation = Evaluation(context, given, [], None, None, progress, "cpu", policies)  # type: ignore[arg-type]
    hold_duels(evaluation)
    return [result for result in policies[-1].results if result["measure"] == "duel"]


def endpoint(server: Server, **settings: Any) -> dict[str, Any]:
    return {"kind": "endpoint", "base_url": server.url, "model": "some-judge", **settings}


def places(question: str) -> tuple[str, str]:
    """The answers in the first and in the second place."""
    found = re.search(r"<answer_a>\n(.*)\n</answer_a>\n\n<answer_b>\n(.*)\n</answer_b>", question, re.DOTALL)
    assert found
    return found[1], found[2]


def prefer_first_unless_worse(question: str, times: int) -> tuple[int, str]:
    """Knows what is good, and where both are equally good, prefers what it reads first."""
    first, second = (answer.count("good") for answer in places(question))
    return 200, f"So many are good.\nVerdict: {'A' if first >= second else 'B'}"


# --- what a duel comes to --------------------------------------------------------------------------------------------


def test_an_answer_wins_that_is_better_in_both_places(server: Server, tmp_path: Path):
    server.answer = prefer_first_unless_worse
    duels = evaluate(tmp_path, server)
    assert [duel["outcome"] for duel in duels] == [1.0, 0.5, 0.0, 0.5, 1.0, 0.5]
    found = measure_results(duels)
    assert found["win_rate"].value == pytest.approx(3.5 / 6)
    assert found["inconsistent_verdicts"].value == 3 / 6, "where both are as good it said that the first is better, twice"
    in_one_place = [duel["verdicts"][0] for duel in duels]
    assert sum(in_one_place) / 6 == pytest.approx(5 / 6), "asked but once, with the policy's answer first"


def test_a_judge_that_goes_by_the_place_alone_finds_no_policy_better(server: Server, tmp_path: Path):
    for verdict in ("A", "B"):
        server.answer = lambda question, times, verdict=verdict: (200, f"Verdict: {verdict}")  # type: ignore[misc]
        found = measure_results(evaluate(tmp_path / verdict, server))
        assert (found["win_rate"].value, found["inconsistent_verdicts"].value) == (0.5, 1.0)


def test_each_pair_is_shown_once_in_each_order_with_what_was_asked(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (200, "Verdict: tie")
    evaluate(tmp_path, server)
    shown = Counter(places(question) for question in server.questions)
    base, dpo = answers_of("base"), answers_of("dpo")
    assert shown == Counter([*zip(base, dpo, strict=True), *zip(dpo, base, strict=True)])
    assert all(server.times(f"<request>\n{prompt}\n</request>") == 2 for prompt in PROMPTS)
    assert {(request["model"], request["temperature"], request["max_tokens"]) for request in server.asked} == {("some-judge", 0, 512)}


def test_what_the_judge_said_is_kept_word_for_word_with_both_answers(server: Server, tmp_path: Path):
    server.answer = prefer_first_unless_worse
    first = evaluate(tmp_path, server)[0]
    assert (first["answer"], first["baseline"]) == ("dpo says: good and good and good", "base says: good and good")
    assert first["replies"] == ["So many are good.\nVerdict: A", "So many are good.\nVerdict: B"]
    assert first["verdicts"] == [1.0, 1.0]


def test_answers_that_are_the_same_are_a_tie_and_nobody_is_asked(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (200, "Verdict: A")
    same = ["as the sky", "red", "blue"]
    duels = evaluate(tmp_path, server, prompts=PROMPTS[:3], answers={"base": same, "dpo": ["as the sky", "green", "blue"]})
    assert [duel["outcome"] for duel in duels] == [0.5, 0.5, 0.5]
    assert [sorted(places(question)) for question in server.questions] == [["green", "red"]] * 2


def test_a_row_of_which_a_verdict_cannot_be_read_is_left_out_and_counted(server: Server, tmp_path: Path):
    def mumble(question: str, times: int) -> tuple[int, str]:
        return (200, "I like A.") if "bird 0" in question and places(question)[0].startswith("dpo") else (200, "Verdict: tie")

    server.answer = mumble
    duels = evaluate(tmp_path, server)
    assert [duel["outcome"] for duel in duels] == [None] + [0.5] * 5
    found = measure_results(duels)
    assert found["unread_verdicts"].value == 1 / 6 and len(found["win_rate"].scores) == 5
    assert duels[0]["replies"][0] == "I like A."


def test_a_judge_of_which_nothing_can_be_read_ends_the_stage(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (200, "I like\nboth.")
    with pytest.raises(UserError, match=r"stages.eval.judge: no verdict of some-judge on 6 pairs.* ends with 'I like both.'.*max_tokens"):
        evaluate(tmp_path, server)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", 1.0),
        ("Both are fine.\n\n**Verdict:** B.\n\n", 0.0),
        ("verdict: TIE", 0.5),
        ("It is close.\n[[A]]", 1.0),
        ("b", 0.0),
        ("Verdict: A\nBut B is shorter.", None),
        ("Verdict: A or B", None),
        ("Verdict: C", None),
        ("A tie, I would say", None),
        ("The better answer is A", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_only_a_last_line_that_is_a_verdict_is_one(reply: str, verdict: float | None):
    assert read_verdict(reply) == verdict


def test_an_answer_cannot_fill_the_place_of_the_other(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (200, "Verdict: tie")
    evaluate(tmp_path, server, prompts=["{answer_a}?"], answers={"base": ["{answer_b}"], "dpo": ["{prompt}"]})
    assert {places(question) for question in server.questions} == {("{prompt}", "{answer_b}"), ("{answer_b}", "{prompt}")}
    assert server.times("<request>\n{answer_a}?\n</request>") == 2
    assert fill("{a}-{b}", {"{a}": "{b}", "{b}": "x"}) == "{b}-x"


def test_so_many_rows_as_the_config_says_are_judged_evenly_spread(server: Server, tmp_path: Path):
    server.answer = prefer_first_unless_worse
    assert [duel["row"] for duel in evaluate(tmp_path, server, **endpoint(server, num_rows=3))] == [0, 2, 4]
    assert len(server.asked) == 6


def test_of_several_turns_all_that_was_said_after_the_first_prompt_is_compared(server: Server, tmp_path: Path):
    from posttrain.evaluate import Evaluation, Policy, Rows

    server.answer = lambda question, times: (200, "Verdict: tie")
    turns: Any = [[[{"role": "user", "content": "who?"}], [{"role": "user", "content": "and why?"}]]]
    told: dict[str, Any] = {"row": 0, "measure": "answer", "num_tokens": 3, "ended": True, "checks": []}
    said = {"base": ["me", "so"], "dpo": ["you", "because"]}
    policies = [Policy(name, [{**told, "turn": n, "answer": text} for n, text in enumerate(texts, 1)]) for name, texts in said.items()]
    config = validate(EvalConfig, {"judge": endpoint(server)}, "stages.eval")
    context = StageContext("eval", config, {}, tmp_path / "run" / "eval", tmp_path)
    context.directory.mkdir(parents=True)
    rows = Rows([Conversation(turns[0][0], None, [], "x:1")], turns, [[[], []]], frozenset([0]), [])
    hold_duels(Evaluation(context, rows, [], None, None, Progress(context.directory, is_main=True), "cpu", policies))  # type: ignore[arg-type]
    assert places(server.questions[0]) in {(whole(*said["dpo"]), whole(*said["base"])), (whole(*said["base"]), whole(*said["dpo"]))}
    assert len(server.asked) == 2


def whole(first: str, second: str) -> str:
    return f"assistant: {first}\n\nuser: and why?\n\nassistant: {second}"


def test_a_reward_model_prefers_the_higher_reward(server: Server, tmp_path: Path):
    rewards = {"base": [0.1, 0.2, -3.0, 1.0, 1.0], "dpo": [0.2, 0.2, -4.0, 1.0000001]}
    answers = {name: [*answers_of(name)[:3], "as the sky", name] for name in BETTER}
    duels = evaluate(tmp_path, server, prompts=PROMPTS[:5], answers=answers, rewards=rewards, kind="reward")
    assert [duel["outcome"] for duel in duels] == [1.0, 0.5, 0.0, 0.5, None], "the same answer ties, and of the last row it read but one"
    assert duels[2]["rewards"] == [-4.0, -3.0]
    assert set(measure_results(duels)) == {"win_rate", "length_controlled_win_rate"}
    assert not server.asked


# --- faults, and what is asked again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_fails_for_a_while_is_asked_again(status: int, server: Server, tmp_path: Path):
    server.answer = lambda question, times: (status, "not now") if times < 2 else prefer_first_unless_worse(question, times)
    assert [duel["outcome"] for duel in evaluate(tmp_path, server)] == [1.0, 0.5, 0.0, 0.5, 1.0, 0.5]
    assert len(server.asked) == 3 * 12


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (401, "who are you?", r"who are you\?.*; mend that and run again, no reply is lost"),
        (500, "down", r"down.*; mend that and run again, no reply is lost"),
        (200, b"<html>Welcome!</html>", "answers, but not as an OpenAI-compatible interface; give the address of one"),
        (200, b'{"detail": "no such path"}', "answers, but not as an OpenAI-compatible interface; give the address of one"),
    ],
)
def test_a_server_that_cannot_be_asked_ends_the_stage_with_one_line(
    status: int, text: str | bytes, said: str, server: Server, tmp_path: Path
):
    server.answer = lambda question, times: (status, text)
    with pytest.raises(UserError, match=rf"^stages.eval.judge.base_url: http://127.0.0.1:\d+/v1: .*{said}$") as ended:
        evaluate(tmp_path, server, **endpoint(server, max_retries=1))
    assert "\n" not in str(ended.value)


def test_a_question_that_the_server_refuses_has_no_verdict_and_may_be_asked_by_another_run(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (400, "too long") if "bird 2" in question else prefer_first_unless_worse(question, times)
    assert [duel["outcome"] for duel in evaluate(tmp_path, server)] == [1.0, 0.5, None, 0.5, 1.0, 0.5]
    server.answer = prefer_first_unless_worse
    assert [duel["outcome"] for duel in evaluate(tmp_path, server, "second")] == [1.0, 0.5, 0.0, 0.5, 1.0, 0.5]
    assert server.times("bird 2") == 4 and len(server.asked) == 14


def test_a_stage_that_was_cut_off_asks_nothing_twice(server: Server, tmp_path: Path):
    server.answer = lambda question, times: (401, "who?") if "bird 5" in question else prefer_first_unless_worse(question, times)
    with pytest.raises(UserError, match=r"who\?"):
        evaluate(tmp_path, server, **endpoint(server, num_requests=2))
    server.answer = prefer_first_unless_worse
    assert len(evaluate(tmp_path, server, **endpoint(server, num_requests=2))) == 6
    assert {count for question, count in Counter(server.questions).items() if "bird 5" not in question} == {1}


def test_another_run_asks_only_what_no_run_has_asked(server: Server, tmp_path: Path):
    server.answer = prefer_first_unless_worse
    first = evaluate(tmp_path, server)
    assert evaluate(tmp_path, server, "second") == first
    assert len(server.asked) == 12
    answers = {"base": [*answers_of("base"), "red"], "dpo": [*answers_of("dpo"), "good"]}
    longer = evaluate(tmp_path, server, "third", prompts=[*PROMPTS, "and why?"], answers=answers)
    assert longer[:6] == first and longer[6]["outcome"] == 1.0
    assert len(server.asked) == 14
    evaluate(tmp_path, server, "fourth", **endpoint(server, max_tokens=100))
    assert len(server.asked) == 26, "a judge that may say less is another judge"


def test_replies_that_were_damaged_are_asked_for_again(server: Server, tmp_path: Path):
    server.answer = prefer_first_unless_worse
    first = evaluate(tmp_path, server)
    (entry,) = (Path(path) for path in read_json(tmp_path / "first" / "eval" / "replies.json")["paths"])
    replies = entry / "replies.jsonl"
    replies.write_text(replies.read_text().replace("Verdict: A", "Verdict: B"))
    assert evaluate(tmp_path, server, "second") == first
    assert len(server.asked) == 24
    assert len(dict(read_replies(replies))) == 12


def test_a_reply_that_was_cut_off_takes_no_other_with_it(tmp_path: Path):
    odd = "one\u2028line"
    Replies(tmp_path, 0).add("a", odd)
    with (tmp_path / "replies-0.jsonl").open("a") as file:
        file.write('["b", "cut')
    again = Replies(tmp_path, 0)
    assert (again.get("a"), again.get("b")) == (odd, None)
    again.add("b", "whole")
    assert Replies(tmp_path, 1).get("b") == "whole"


def test_so_many_requests_are_under_way_as_the_config_says_and_progress_is_told(server: Server, tmp_path: Path):
    def slowly(question: str, times: int) -> tuple[int, str]:
        time.sleep(0.02)
        return prefer_first_unless_worse(question, times)

    server.answer = slowly
    evaluate(tmp_path, server, **endpoint(server, num_requests=3))
    assert 1 < server.most_at_once <= 3
    progress = read_json(tmp_path / "first" / "eval" / "progress.json")
    assert (progress["phase"], progress["step"], progress["num_steps"]) == ("ask some-judge", 12, 12)


def test_the_key_is_sent_and_written_nowhere_even_if_the_server_repeats_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    key = "a very secret key"
    with pytest.raises(UserError, match=r"stages.eval.judge.api_key_env: the environment has no variable 'JUDGE_KEY_OF_THIS_TEST'"):
        evaluate(tmp_path, server, **endpoint(server, api_key_env="JUDGE_KEY_OF_THIS_TEST"))
    monkeypatch.setenv("JUDGE_KEY_OF_THIS_TEST", key)
    server.answer = lambda question, times: (400, f"refused for {key}") if "bird 0" in question else (200, f"{key} was sent.\nVerdict: A")
    evaluate(tmp_path, server, **endpoint(server, api_key_env="JUDGE_KEY_OF_THIS_TEST"))
    assert set(server.keys) == {f"Bearer {key}"}
    server.answer = lambda question, times: (401, f"{key} is no key")
    with pytest.raises(UserError, match=r"\*\*\* is no key") as ended:
        evaluate(tmp_path / "other", server, **endpoint(server, api_key_env="JUDGE_KEY_OF_THIS_TEST"))
    said = capfd.readouterr()
    assert "refused for ***" in said.out
    assert key not in str(ended.value) + said.out + said.err
    assert not any(key.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "endpoint", "model": "m"}, "stages.eval.judge.base_url: missing"),
        ({"kind": "endpoint", "base_url": "http://x", "modle": "m"}, "stages.eval.judge.modle: unknown key; did you mean 'model'"),
        ({"kind": "reward", "model": "m"}, "stages.eval.judge.model: unknown key; known: kind, num_rows"),
        ({"kind": "rewards"}, "stages.eval.judge.kind: there is no 'rewards'; did you mean 'reward'"),
        ({"num_rows": 5}, "stages.eval.judge.kind: missing"),
        (
            {"kind": "endpoint", "base_url": "http://x", "model": "m", "prompt": "{prompt}"},
            "stages.eval.judge.prompt: must hold {answer_a}",
        ),
    ],
)
def test_a_judge_that_is_set_wrongly_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        validate(EvalConfig, {"judge": settings}, "stages.eval")


def test_how_fast_a_judge_is_asked_changes_nothing_that_is_built():
    from posttrain.config import identity

    plain = {"kind": "endpoint", "base_url": "http://x", "model": "m"}
    fast = {**plain, "num_requests": 64, "timeout_s": 5.0, "max_retries": 0, "api_key_env": "KEY"}
    of = [identity(validate(EvalConfig, {"judge": each}, "x"), "x") for each in (plain, fast, {**plain, "max_tokens": 64})]
    assert of[0] == of[1] == {"judge": plain} and of[2] != of[0]


# --- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def judged_file(tmp_path: Path, tiny: Path, server: Server) -> Path:
    """A pipeline that has two policies judged and holds a gate against the win rate; the judge likes what comes first by the alphabet."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    for file in tiny.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    save_file({name: -weight if name == "lm_head.weight" else weight for name, weight in weights.items()}, other / "model.safetensors")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    path = tmp_path / "judged.yaml"
    path.write_text(
        f"""
run: judged
sources:
  base: {{model: {tiny}}}
  other: {{model: {other}}}
  prompts: {{data: {data}}}
stages:
  eval:
    inputs: {{policies: [base, other], data: [prompts]}}
    max_new_tokens: 4
    num_shown: 0
    judge: {{kind: endpoint, base_url: "{server.url}", model: some-judge, max_retries: 0}}
  quality:
    kind: gate
    inputs: {{reports: eval}}
    gates: [{{metric: win_rate, min: 0.0}}, {{metric: inconsistent_verdicts, max: 0.0}}]
"""
    )
    server.answer = lambda question, times: (200, f"By the alphabet.\nVerdict: {'A' if places(question)[0] < places(question)[1] else 'B'}")
    return path


def judged_rows(run: Path) -> tuple[list[float], list[str]]:
    """Outcomes by what both policies answered, and what they answered, as the report has it."""
    from posttrain.results import read_results

    results = list(read_results(run / "eval" / "output"))
    said = {name: [r["answer"] for r in results if r["policy"] == name and r["measure"] == "answer"] for name in ("base", "other")}
    pairs = list(zip(said["base"], said["other"], strict=True))
    return [0.5 if base == other else float(other < base) for base, other in pairs], said["other"]


def test_an_evaluation_has_a_win_rate_that_a_gate_can_hold_and_its_report_shows(
    posttrain: Cli, judged_file: Path, server: Server, tmp_path: Path
):
    root = tmp_path / "runs"
    ended = posttrain("run", judged_file, "--root", root)
    assert ended.code == 0, ended.err
    outcomes, answers = judged_rows(root / "judged")
    assert len(outcomes) == 6 and any(answers)
    metrics = read_json(root / "judged" / "eval" / "artifact.json")["payload"]["metrics"]
    assert metrics["other.win_rate"] == pytest.approx(sum(outcomes) / 6)
    assert metrics["other.inconsistent_verdicts"] == metrics["other.unread_verdicts"] == 0
    assert "other.length_controlled_win_rate" in metrics and "base.win_rate" not in metrics
    assert "win_rate" in ended.out and "against base" in ended.out
    page = tmp_path / "page.html"
    assert posttrain("report", "judged", "--root", root, "--html", page).code == 0
    assert "By the alphabet." in page.read_text()
    asked = len(server.asked)
    failed = posttrain("run", judged_file, "--root", root, "run=again", "stages.quality.gates=[{metric: win_rate, max: 0.0}]")
    assert failed.code == (3 if any(outcomes) else 0) and ("win_rate of other" in failed.err) == any(outcomes)
    assert len(server.asked) == asked, "another run knows what was replied"
    spared = posttrain("clean", "judged", "--root", root, "--dry-run", "--json")
    assert ".replies" not in spared.out, "runs point to them"
    assert posttrain("verify", "judged", "--root", root).code == 0


def test_two_ranks_share_the_questions_and_find_the_same(posttrain: Cli, judged_file: Path, server: Server, tmp_path: Path):
    found = []
    for number in (1, 2):
        server.asked.clear()
        root = tmp_path / str(number)
        ended = posttrain("run", judged_file, "--root", root, "--only", "eval", f"stages.eval.num_processes={number}")
        assert ended.code == 0, ended.err
        outcomes, _ = judged_rows(root / "judged")
        assert len(server.asked) == len(set(server.questions)) == 2 * sum(outcome != 0.5 for outcome in outcomes)
        metrics = read_json(root / "judged" / "eval" / "artifact.json")["payload"]["metrics"]
        found.append({name: value for name, value in metrics.items() if "win_rate" in name or "verdicts" in name})
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_judge_that_cannot_be_reached_ends_with_one_line_and_code_2(posttrain: Cli, judged_file: Path, tmp_path: Path):
    nowhere = "stages.eval.judge.base_url=http://127.0.0.1:9/v1"
    ended = posttrain("run", judged_file, "--root", tmp_path / "runs", nowhere)
    assert ended.code == 2
    assert ended.err.count("stages.eval.judge.base_url: http://127.0.0.1:9/v1: Connection error") == 1
    assert "no reply is lost" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.eval.inputs.policies=[base]"], "stages.eval.judge: compares policies with the first one, and there is no other"),
        (["stages.eval.judge={kind: reward}"], "stages.eval.inputs.reward: missing"),
        (["stages.eval.judge.api_key_env=NO_SUCH_KEY"], "stages.eval.judge.api_key_env: the environment has no variable 'NO_SUCH_KEY'"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_a_model_is_loaded(
    overrides: list[str], said: str, posttrain: Cli, judged_file: Path, server: Server, tmp_path: Path
):
    ended = posttrain("run", judged_file, "--root", tmp_path / "runs", "--only", "eval", *overrides)
    assert ended.code == 2 and said in ended.err
    assert not server.asked
