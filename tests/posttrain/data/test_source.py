"""A source gives the same rows each time: all of them, one side of the held-out split, a mixture, or a draw."""

import json
import random
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from posttrain.config import DataSource, read_source
from posttrain.data.rows import Conversation, Pair, Row, prompt_text
from posttrain.data.source import Entry, OpenSource, draw, open_source, unit
from posttrain.error import UserError

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def qa(num_rows: int, num_prompts: int | None = None, tag: str = "") -> list[dict[str, object]]:
    """Rows over `num_prompts` prompts, by default one each."""
    return [{"prompt": f"q{tag}{i % (num_prompts or num_rows)}", "completion": f"a{tag}{i}"} for i in range(num_rows)]


def opened(data: str | list[str], **fields: object) -> OpenSource:
    return open_source(DataSource(data=data, **fields), "sources.x")


def answers(source: OpenSource) -> list[str]:
    return [row.messages[-1]["content"] for row in source.rows() if isinstance(row, Conversation)]


def fails(data: str | list[str], **fields: object) -> str:
    with pytest.raises(UserError) as caught:
        list(opened(data, **fields).rows())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_entries_are_concatenated_in_order_and_rows_can_be_read_again(tmp_path):
    a, b = write(tmp_path / "a.jsonl", qa(3, tag="a")), write(tmp_path / "b.jsonl", [{"instruction": "x", "output": "last"}])
    source = opened([a, b])
    assert source.entries == [Entry(a, "prompt_completion", True), Entry(b, "alpaca", True)]
    assert answers(source) == answers(source) == ["aa0", "aa1", "aa2", "last"]
    assert [row.origin for row in source.rows()] == [f"{a}:1", f"{a}:2", f"{a}:3", f"{b}:1"]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(qa(1)[0]) + "\nbroken\n")
    rows = opened(str(path)).rows()
    assert next(rows).origin == f"{path}:1"
    with pytest.raises(UserError, match=":2: malformed JSON"):
        next(rows)


def test_a_set_format_is_not_detected(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(2))
    source = opened(path, format="prompt")
    assert source.entries == [Entry(path, "prompt", False)]
    assert [row.messages[-1]["role"] for row in source.rows()] == ["user", "user"]


def test_columns_are_renamed_before_the_format_is_detected(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    assert answers(opened(path, columns={"prompt": "question", "completion": "answer"})) == ["a"]


def test_a_renamed_column_may_be_absent_from_the_first_rows(tmp_path):
    first, second = {"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "persona": "s"}
    rows = opened(write(tmp_path / "a.jsonl", [first, second]), columns={"system": "persona"}).rows()
    assert [row.messages[0]["role"] for row in rows] == ["user", "system"]


def test_renames_may_be_meant_for_one_entry_of_several(tmp_path):
    a, b = (
        write(tmp_path / "a.jsonl", [{"question": "q", "answer": "1"}]),
        write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "2"}]),
    )
    assert answers(opened([a, b], columns={"prompt": "question", "completion": "answer"})) == ["1", "2"]


# The held-out split.


@pytest.mark.parametrize("held_out", [0.1, 0.5])
def test_a_prompt_is_on_one_side_whole_and_the_sides_make_up_all(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", qa(2000, 500))
    train, held, everything = (list(opened(path, held_out=held_out, part=part).rows()) for part in ("train", "held_out", "all"))
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in held}
    assert sorted(row.origin for row in train + held) == sorted(row.origin for row in everything)
    assert len(everything) == 2000
    assert abs(len({prompt_text(row) for row in held}) / 500 - held_out) < 0.08


def test_the_split_does_not_depend_on_the_order_of_rows_or_on_the_file(tmp_path):
    rows = qa(300, 100)
    shuffled = random.Random(0).sample(rows, len(rows))
    parts = [write(tmp_path / "b.jsonl", shuffled[:120]), write(tmp_path / "c.jsonl", shuffled[120:])]
    sides = [sorted(answers(opened(data, held_out=0.3, part="held_out"))) for data in (write(tmp_path / "a.jsonl", rows), parts)]
    assert sides[0] == sides[1]


def test_the_split_depends_on_the_seed_and_grows_with_the_share(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(200))
    few, more, other = (
        set(answers(opened(path, part="held_out", held_out=share, seed=seed))) for share, seed in ((0.2, 0), (0.4, 0), (0.2, 1))
    )
    assert few < more and few != other


def test_a_prompt_is_on_the_same_side_as_a_conversation_in_another_format(tmp_path):
    plain = write(tmp_path / "a.jsonl", qa(100))
    chat = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(100)]
    messages = write(tmp_path / "b.jsonl", chat)
    assert answers(opened(plain, held_out=0.3, part="train")) == answers(opened(messages, held_out=0.3, part="train"))


def test_unit_is_even_and_pinned():
    values = [unit(0, str(i)) for i in range(4000)]
    counts = Counter(int(value * 10) for value in values)
    assert set(counts) == set(range(10)) and all(300 < count < 500 for count in counts.values())
    # blake2b with an 8-byte digest, as Python 3.11 gives it: another value would move prompts across the split of finished runs.
    assert unit(0, "user\nq\n") == 0.6583049694126768


# Draws and mixtures.


def test_max_samples_draws_without_repetition_in_file_order_and_by_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(500))
    lines = [int(row.origin.rpartition(":")[2]) for row in opened(path, max_samples=50).rows()]
    assert len(lines) == len(set(lines)) == 50 and lines == sorted(lines)
    assert answers(opened(path, max_samples=50)) == answers(opened(path, max_samples=50)) != answers(opened(path, max_samples=50, seed=1))
    assert max(lines) > 400 and min(lines) < 100


def test_max_samples_beyond_the_rows_is_all_of_them(tmp_path):
    assert len(answers(opened(write(tmp_path / "a.jsonl", qa(5)), max_samples=50))) == 5


def test_max_samples_draws_from_the_asked_side_only(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(300))
    side = answers(opened(path, held_out=0.5, part="held_out"))
    drawn = answers(opened(path, held_out=0.5, part="held_out", max_samples=40))
    assert len(drawn) == 40 and set(drawn) < set(side)


@pytest.mark.parametrize(
    "sizes, weights, takes",
    [
        ((100, 100), [0.8, 0.2], (100, 25)),
        ((100, 100), [8, 2], (100, 25)),
        ((1000, 10), [0.5, 0.5], (10, 10)),
        ((30, 30, 30), [1, 1, 1], (30, 30, 30)),
        ((7, 100), [0.7, 0.3], (7, 3)),
        ((10, 10, 10), [0.5, 0.3, 0.2], (10, 6, 4)),
    ],
)
def test_mixture_shares_match_and_the_scarcest_entry_sets_the_total(tmp_path, sizes, weights, takes):
    paths = [write(tmp_path / f"{i}.jsonl", qa(size, tag=f"{i}-")) for i, size in enumerate(sizes)]
    got = answers(opened(paths, weights=weights))
    assert len(got) == len(set(got))
    assert tuple(Counter(answer[1] for answer in got)[str(i)] for i in range(len(sizes))) == takes


@pytest.mark.parametrize("max_samples", [None, 7, 100, 333])
@pytest.mark.parametrize("weights", [[0.37, 0.63], [0.9, 0.1], [1 / 3, 2 / 3]])
def test_every_share_is_within_a_row_of_its_weight(tmp_path, weights, max_samples):
    paths = [write(tmp_path / f"{i}.jsonl", qa(size, tag=f"{i}-")) for i, size in enumerate((401, 297))]
    got = Counter(answer[1] for answer in answers(opened(paths, weights=weights, max_samples=max_samples)))
    total = sum(got.values())
    assert max_samples is None or total == max_samples
    for index, weight in enumerate(weights):
        assert abs(got[str(index)] - total * weight) < 1


def test_a_mixture_is_even_throughout_and_deterministic_and_keeps_each_file_in_order(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", qa(size, tag=f"{i}-")) for i, size in enumerate((800, 200))]
    source = opened(paths, weights=[0.8, 0.2])
    got = answers(source)
    assert got == answers(source) != answers(opened(paths, weights=[0.8, 0.2], seed=1))
    assert all(15 <= sum(answer[1] == "1" for answer in got[start : start + 100]) <= 25 for start in range(0, 1000, 100))
    for index in "01":
        lines = [int(answer.partition("-")[2]) for answer in got if answer[1] == index]
        assert lines == sorted(lines)


def test_the_rows_of_a_mixture_are_drawn_from_the_whole_of_each_file(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", qa(size, tag=f"{i}-")) for i, size in enumerate((50, 1000))]
    lines = [int(answer.partition("-")[2]) for answer in answers(opened(paths, weights=[0.5, 0.5])) if answer[1] == "1"]
    assert len(lines) == 50 and min(lines) < 150 and max(lines) > 850


def test_a_mixture_draws_from_the_asked_side_only(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", qa(300, tag=f"{i}-")) for i in range(2)]
    fields = {"weights": [0.5, 0.5], "held_out": 0.2}
    train, held = (set(answers(opened(paths, part=part, **fields))) for part in ("train", "held_out"))
    assert train and held and not train & held


@pytest.mark.parametrize("take", [0, 1, 5, 10, 20])
def test_draw_gives_ascending_positions_without_repetition(take):
    positions = list(draw(10, take, 0, "x"))
    assert positions == sorted(set(positions)) and len(positions) == min(take, 10) and set(positions) <= set(range(10))


# What is refused.


def test_errors_about_an_entry_as_a_whole_begin_with_the_config_path(tmp_path):
    missing = str(tmp_path / "no.jsonl")
    assert fails(missing).startswith(f"sources.x: data: {missing} does not exist")
    assert fails(str(tmp_path)).startswith(f"sources.x: data: {tmp_path} is a directory")
    (tmp_path / "x.txt").write_text("x")
    assert fails(str(tmp_path / "x.txt")).startswith(f"sources.x: data: {tmp_path}/x.txt is of no known kind")
    (tmp_path / "x.json").write_text("[]")
    assert fails(str(tmp_path / "x.json")).startswith(f"sources.x: data: {tmp_path}/x.json holds no rows")


def test_errors_inside_a_file_begin_with_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": True}])
    assert fails(path) == f"{path}:2: chosen: must be text or messages, got true"
    (tmp_path / "b.jsonl").write_text("broken\n")
    assert fails(str(tmp_path / "b.jsonl")).startswith(f"{tmp_path}/b.jsonl:1: malformed JSON")


@pytest.mark.parametrize("fields", [{}, {"max_samples": 1}, {"held_out": 0.5, "part": "held_out"}])
def test_a_bad_row_is_refused_whether_or_not_it_would_be_drawn(tmp_path, fields):
    path = write(tmp_path / "a.jsonl", [*qa(9), {"prompt": "q", "completion": ""}])
    assert fails(path, **fields) == f"{path}:10: completion: is empty; fill it in, or remove it or the row"


def test_conversations_and_pairs_do_not_mix(tmp_path):
    a, b = write(tmp_path / "a.jsonl", qa(1)), write(tmp_path / "b.jsonl", [PAIR])
    assert fails([a, b]) == (
        f"sources.x: data: {a} holds conversations (prompt_completion) and {b} pairs (preference); make them two sources"
    )
    labelled = write(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    assert fails([labelled, b]) == (
        f"sources.x: data: {labelled} holds labelled answers (unpaired) and {b} pairs (preference); make them two sources"
    )


def test_plain_text_is_for_those_who_ask_for_it(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"text {number}", "url": "u"} for number in range(40)])
    assert opened(path).entries == [Entry(path, "text", True)]
    assert fails(path).startswith(f"{path}:1: is plain text, and only eval reads that")
    sides = [[row.text for row in opened(path, held_out=0.3, part=part).all_rows()] for part in ("train", "held_out")]
    assert sorted(sides[0] + sides[1]) == sorted(f"text {number}" for number in range(40)) and all(sides)
    chat = write(tmp_path / "b.jsonl", qa(3))
    assert f"{path} plain text (text); make them two sources" in fails([path, chat])


def test_a_source_without_rows_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(3, 1))
    side = "held_out" if unit(0, "user\nq0\n") >= 0.5 else "train"
    problem = f"no prompt falls on the {side} side of held_out: 0.5"
    assert fails(path, held_out=0.5, part=side).startswith(f"sources.x: {problem}")
    assert fails([path, path], held_out=0.5, part=side, weights=[1.0, 1.0]).startswith(f"sources.x: weights: {path} has no rows")
    assert problem in fails(path, held_out=0.5, part=side, max_samples=2)


def test_columns_that_fit_nothing_or_two_formats_name_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"body": "x"}])
    assert fails(path).startswith(f"sources.x: format: {path}: no format fits the columns body; name them with columns:")
    path = write(tmp_path / "a.jsonl", [{"messages": [], "conversations": []}])
    assert fails(path).endswith("fit messages and sharegpt; set format: to one of them")


def test_a_rename_that_takes_no_effect_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "completion": "a"}])
    assert (
        fails(path, columns={"prompt": "qestion"})
        == f"sources.x: columns.prompt: 'qestion' is no column of {path}; did you mean 'question'?"
    )
    assert fails(path, columns={"promt": "question"}) == "sources.x: columns: 'promt' is no field of any format; did you mean 'prompt'?"
    renames = {"prompt": "question", "history": "completion"}
    assert fails(path, columns=renames, format="prompt").startswith("sources.x: columns: 'history' is no field of prompt; ")


def test_settings_of_hub_data_sets_are_refused_on_local_files(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(1))
    assert fails(path, subset="en") == "sources.x: subset: 'en' has no effect on local files; leave it out"
    assert fails(path, split="test") == "sources.x: split: 'test' has no effect on local files; leave it out"


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), 0.0, -1.0])
def test_weights_that_are_no_shares_are_refused(tmp_path, weight):
    path = str(write(tmp_path / "a.jsonl", qa(1)))
    with pytest.raises(UserError, match="weights"):
        read_source("sources.x", {"data": [path, path], "weights": [1.0, weight]})


# Hub data sets, and what is imported.


def test_a_hub_entry_is_read_at_its_pinned_revision(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return [{"prompt": "q", "completion": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = opened("some-org/some-set@" + "a" * 40, subset="en", split="test")
    assert [row.origin for row in source.rows()] == ["some-org/some-set[0]"]
    assert set(map(str, calls)) == {str(("some-org/some-set", {"name": "en", "split": "test", "revision": "a" * 40}))}


def test_a_hub_entry_that_cannot_be_fetched_names_source_and_id(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert fails("some-org/some-set@" + "a" * 40).startswith("sources.x: data: some-org/some-set at aaaaaaaaaaaa cannot be loaded")


def test_reading_json_imports_neither_torch_nor_datasets_nor_pyarrow(tmp_path):
    path = write(tmp_path / "a.jsonl", qa(2))
    code = f"""
import sys
from posttrain.config import DataSource
from posttrain.data.source import open_source
assert len(list(open_source(DataSource(data={path!r}), "x").rows())) == 2
print(sorted({{"torch", "datasets", "pyarrow"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Public data sets, where they are at hand.


def shared(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand; it belongs into a directory `shared/data` beside the repository")
    return str(path)


def count(path: str) -> int:
    """Rows of a data set, counted without the code under test."""
    text = Path(path).read_text(encoding="utf-8")
    return len(json.loads(text)) if path.endswith(".json") else sum(1 for line in text.split("\n") if line.strip())


GSM8K = {"prompt": "question", "completion": "answer"}
REAL = [
    ("llamafactory_demo/alpaca_en_demo.json", {}, "alpaca", Conversation, 999),
    ("llamafactory_demo/identity.json", {}, "alpaca", Conversation, 91),
    ("llamafactory_demo/glaive_toolcall_en_demo.json", {}, "sharegpt", Conversation, 300),
    ("llamafactory_demo/dpo_en_demo.json", {}, "preference", Pair, 300),
    ("llamafactory_demo/kto_en_demo.json", {}, "unpaired", Conversation, 300),
    ("t0_p3_subset/sft.jsonl", {}, "prompt_completion", Conversation, 4798),
    ("gsm8k_train/train.jsonl", GSM8K, "prompt_completion", Conversation, 7473),
]


@pytest.mark.real
@pytest.mark.parametrize("name, columns, form, kind, num_rows", REAL, ids=[name for name, *_ in REAL])
def test_a_public_data_set_is_detected_and_read_whole(name, columns, form, kind, num_rows):
    path = shared(name)
    source = opened(path, columns=columns)
    rows = list(source.rows())
    assert source.entries == [Entry(path, form, True)]
    assert len(rows) == count(path) == num_rows and {type(row) for row in rows} == {kind}


@pytest.mark.real
def test_public_tool_calls_are_all_there():
    path = shared("llamafactory_demo/glaive_toolcall_en_demo.json")
    turns = Counter(turn["from"] for record in json.loads(Path(path).read_text()) for turn in record["conversations"])
    messages = [message for row in opened(path).rows() for message in row.messages]
    assert sum(len(message.get("tool_calls", [])) for message in messages) == turns["function_call"]
    assert Counter(message["role"] for message in messages)["tool"] == turns["observation"]


@pytest.mark.real
def test_public_pairs_are_detected_and_their_first_empty_answer_is_named(tmp_path):
    path = shared("pandalm_testset/derived_pairs.jsonl")
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    usable = [record for record in records if record["chosen"].strip() and record["rejected"].strip()]
    assert (len(records), len(usable)) == (888, 836)
    source = opened(path)
    assert source.entries == [Entry(path, "preference", True)]
    assert fails(path) == f"{path}:19: rejected: is empty; fill it in, or remove it or the row"
    assert len(list(opened(write(tmp_path / "usable.jsonl", usable)).rows())) == 836


@pytest.mark.real
def test_the_split_keeps_the_prompts_of_public_pairs_together(tmp_path):
    path = shared("pandalm_testset/derived_pairs.jsonl")
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    usable = write(tmp_path / "usable.jsonl", [record for record in records if record["chosen"].strip() and record["rejected"].strip()])
    train, held = ([prompt_text(row) for row in opened(usable, held_out=0.2, part=part).rows()] for part in ("train", "held_out"))
    assert train and held and not set(train) & set(held)
    assert len(train) + len(held) == 836


@pytest.mark.real
def test_a_response_stored_as_true_is_an_error_that_names_its_record(tmp_path):
    raw = json.loads(Path(shared("pandalm_testset/testset-v1.json")).read_text(encoding="utf-8"))
    at = [(index, name) for index, record in enumerate(raw) for name in ("response1", "response2") if record[name] is True]
    assert len(at) == 6
    columns = {"prompt": "instruction", "chosen": "response1", "rejected": "response2"}
    ours = {theirs: field for field, theirs in columns.items()}
    for index, name in at:
        path = tmp_path / "one.json"
        path.write_text(json.dumps([raw[0], raw[index]]))
        assert fails(str(path), columns=columns) == f"{path}[1]: {ours[name]}: must be text or messages, got true"


UNFIT = ["self_instruct/seed_tasks.jsonl", "self_instruct/user_oriented_instructions.jsonl", "pandalm_testset/testset-v1.json",
         "decontam/sociology_test.csv"]  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("name", UNFIT)
def test_a_public_data_set_of_another_shape_is_refused_by_its_columns(name):
    path = shared(name)
    assert fails(path).startswith(f"sources.x: format: {path}: no format fits the columns ")


@pytest.mark.real
def test_public_plain_text_is_detected():
    path = shared("llamafactory_demo/c4_demo.jsonl")
    rows = list(opened(path).all_rows())
    assert [row.text for row in rows] == [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.real
def test_a_mixture_of_public_data_sets_has_the_shares_asked_for():
    paths = [shared("t0_p3_subset/sft.jsonl"), shared("llamafactory_demo/alpaca_en_demo.json")]
    rows: list[Row] = list(opened(paths, weights=[0.8, 0.2]).rows())
    assert Counter(row.origin.rpartition("/")[2].partition(".")[0] for row in rows) == {"sft": 3996, "alpaca_en_demo": 999}
    assert len({row.origin for row in rows}) == len(rows)


def test_column_names_are_for_csv_files_without_a_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q0,a0\nq1,a1\n")
    assert answers(opened(str(path), column_names=["prompt", "completion"])) == ["a0", "a1"]
    renamed = opened(str(path), column_names=["x", "y"], columns={"prompt": "x", "completion": "y"})
    assert answers(renamed) == ["a0", "a1"]
    assert [row.origin for row in renamed.rows()] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"data": "x.csv", "column_names": []}, "s.column_names: the list is empty; name every column, or leave it out"),
        ({"data": "x.csv", "column_names": ["a", "b", "a"]}, "s.column_names: 'a' stands twice; rename one"),
        ({"data": ["x.csv", "y.jsonl"], "column_names": ["a"]}, "s.column_names: has no effect on 'y.jsonl', which is no CSV file"),
        ({"data": f"o/d@{'a' * 40}", "column_names": ["a"]}, "s.column_names: has no effect on 'o/d@aaa"),
        ({"data": "x.csv", "column_names": "a"}, "s.column_names: input should be a valid list, got 'a'"),
    ],
)
def test_column_names_that_cannot_be_are_refused(fields, problem):
    with pytest.raises(UserError) as caught:
        read_source("s", fields)
    assert str(caught.value).startswith(problem)


@pytest.mark.real
def test_the_test_questions_of_mmlu_are_read(shared):
    path = shared / "data" / "decontam" / "sociology_test.csv"
    names = ["instruction", "A", "B", "C", "D", "output"]
    rows = list(opened(str(path), column_names=names).rows())
    assert len(rows) == 201
    assert rows[0].messages[0]["content"] == "Mass-society theory suggests that:"
    assert {row.messages[-1]["content"] for row in rows} == set("ABCD")
