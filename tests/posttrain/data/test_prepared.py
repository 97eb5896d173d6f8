"""Prepared data is made once for what decides it, is never half there, and holds every row or says why not."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

from posttrain import disk
from posttrain.chat import establish
from posttrain.config import DataSource
from posttrain.data import prepared
from posttrain.data.prepared import Prepared, prepare, read_prepared
from posttrain.data.rows import Pair, Row
from posttrain.data.samples import IGNORED, Encoder, LeftOut, conversation_encoder, pair_encoder
from posttrain.data.source import open_source
from posttrain.error import UserError
from posttrain.progress import Progress
from posttrain.stage import Input, StageConfig, StageContext
from tests.posttrain.data.test_samples import AT, FRAME, contracted, encoder_of


class Counting:
    """An encoder that leaves a file for each row it encodes, in whatever process that is."""

    def __init__(self, encoder: Encoder, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._sequences = encoder.sequences
        self.encoder = replace(encoder, sequences=self.sequences)

    def sequences(self, row: Row) -> Any:
        with (self.directory / str(os.getpid())).open("a") as file:
            file.write("x")
        return self._sequences(row)

    @property
    def num_calls(self) -> int:
        return sum(path.stat().st_size for path in self.directory.iterdir())


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def context_in(root: Path, name: str = "sft") -> StageContext[StageConfig]:
    directory = root / "run" / name
    directory.mkdir(parents=True, exist_ok=True)
    return StageContext(name, StageConfig(), {}, directory, root)


def given(data: str, **fields: Any) -> Input:
    return Input("chat", "dataset", "f", DataSource(data=data, **fields))


@pytest.fixture
def chat(tmp_path: Path) -> Input:
    rows = [{"prompt": "Hi", "completion": answer} for answer in ("Yo!", "a longer answer", "ab")]
    return given(write(tmp_path / "chat.jsonl", *rows))


def made_in(root: Path) -> list[str]:
    """Names in the folder of prepared data, but for locks, which stay."""
    return sorted(path.name for path in (root / ".prepared").iterdir() if path.suffix != ".lock")


def test_what_is_prepared_is_found_in_order_with_its_numbers(tmp_path, chat):
    encoder = encoder_of(conversation_encoder, FRAME + 2 + 6, "truncate")
    made = prepare(context_in(tmp_path), chat, encoder)
    assert made == read_prepared(context_in(tmp_path))
    lengths = [FRAME + 2 + 5, FRAME + 2 + 6, FRAME + 2 + 4]
    said = f"{tmp_path / 'chat.jsonl'} is prompt_completion, as its columns tell"
    assert made == Prepared(made.path, 3, 3, sum(lengths), 4 + 6 + 3, {}, {}, 0, None, [said], ["input_ids", "labels"])
    rows = made.load()
    expected = [encoder.encode(row) for row in open_source(chat.data, "chat").rows()]
    assert list(rows) == [sample.columns for sample in expected], "to train on, nothing but what the encoder gives"
    assert made.column("length").tolist() == lengths == made.num_listed("input_ids").tolist()
    assert made.column("num_trained").tolist() == [len(sample.targets) for sample in expected]
    assert [row["origin"] for row in made.samples] == [f"{tmp_path / 'chat.jsonl'}:{line}" for line in (1, 2, 3)]
    assert made.column("is_cut").tolist() == [False, True, False] == made.column("is_unstopped").tolist()
    counted = Counter(token for sample in expected for token in sample.targets)
    assert {token: int(count) for token, count in enumerate(made.num_trained_by_token()) if count} == counted


def test_what_a_sample_costs_is_counted_in_every_layout(tmp_path, chat):
    alone = prepare(context_in(tmp_path), chat, encoder_of(conversation_encoder))
    lengths = [len(row["input_ids"]) for row in alone.load()]
    for layout in ("padded", "packed", "shared"):
        sizes = alone.sizes(layout)
        assert sizes.longest.tolist() == sizes.computed.tolist() == lengths
        assert sizes.sequences.tolist() == [1, 1, 1] and sizes.is_padded == (layout == "padded")
    rows = [("hi", "good", "no"), ("hello there", "a", "longer answer")]
    data = given(write(tmp_path / "p.jsonl", *({"prompt": p, "chosen": a, "rejected": b} for p, a, b in rows)))
    pairs = prepare(context_in(tmp_path), data, encoder_of(pair_encoder))
    parts = [tuple(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in pairs.load()]
    assert pairs.num_listed("rejected_ids").tolist() == [rejected for _, _, rejected in parts]
    for layout in ("padded", "packed", "shared"):
        sizes = pairs.sizes(layout)
        assert sizes.longest.tolist() == [prompt + max(chosen, rejected) for prompt, chosen, rejected in parts]
        assert sizes.computed.tolist() == [prompt * (1 if layout == "shared" else 2) + a + b for prompt, a, b in parts]
        assert sizes.sequences.tolist() == [2, 2] and sizes.is_padded == (layout == "padded")


def test_rows_left_out_are_counted_by_fault_with_the_first_of_each(tmp_path):
    rows = [("good", "no"), ("good", "gone"), ("a", "b"), ("same", "same"), ("gold", "goal")]
    data = given(write(tmp_path / "p.jsonl", *({"prompt": "q?", "chosen": a, "rejected": b} for a, b in rows)))
    made = prepare(context_in(tmp_path), data, encoder_of(pair_encoder, FRAME + 2 + 2, "truncate"))
    assert (made.num_read, made.num_rows, made.left_out) == (5, 2, {"identical": 3})
    assert made.examples["identical"].startswith(f"{tmp_path / 'p.jsonl'}:2: cut to stages.sft.max_length")
    assert made.column("row").tolist() == [0, 2]


def test_a_fatal_fault_ends_it_at_the_first_row_with_it(tmp_path):
    rows = [("good", "no"), ("same", "same"), ("also", "also")]
    data = given(write(tmp_path / "p.jsonl", *({"prompt": "q?", "chosen": a, "rejected": b} for a, b in rows)))
    with pytest.raises(LeftOut, match=r"p\.jsonl:2: chosen and rejected are the same answer"):
        prepare(context_in(tmp_path), data, encoder_of(pair_encoder), fatal=["identical"])
    assert made_in(tmp_path) == []


def test_data_of_which_nothing_is_left_is_an_error(tmp_path, chat):
    with pytest.raises(UserError, match=r"stages\.sft: no row of chat is left to train on; the first: .*chat\.jsonl:1: .*over stages"):
        prepare(context_in(tmp_path), chat, encoder_of(conversation_encoder, 5, "drop"))
    assert not (tmp_path / "run" / "sft" / "prepared.json").exists()


def test_the_same_is_prepared_once_for_all_stages_and_runs(tmp_path, chat):
    counting = Counting(encoder_of(conversation_encoder), tmp_path / "calls")
    first = prepare(context_in(tmp_path), chat, counting.encoder)
    assert counting.num_calls == 3
    assert prepare(context_in(tmp_path, "other"), chat, counting.encoder) == first
    assert counting.num_calls == 3
    assert read_prepared(context_in(tmp_path, "other")) == first


def test_whatever_decides_the_samples_gives_another_directory(tmp_path, chat, monkeypatch):
    tokenizer, contract = contracted()
    path = tmp_path / "chat.jsonl"

    def key_of(**changed: Any) -> str:
        settings: dict[str, Any] = {"max_length": 90, "on_overflow": "error", "train_on": "all", **changed}
        encoder = conversation_encoder(tokenizer, contract, at=AT, **settings)
        return prepare(context_in(tmp_path), given(str(path)), encoder).path.name

    keys = [key_of(), key_of(max_length=91), key_of(on_overflow="drop"), key_of(train_on="last")]
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n", "model\\n")
    contract = establish(tokenizer, GenerationConfig(), template=None, system_prompt=None, at=AT)
    keys.append(key_of())
    text = path.read_text()
    write(path, {"prompt": "Hi", "completion": "new"})
    keys.append(key_of())
    monkeypatch.setattr(prepared, "_hash_code", lambda: "another version of the code")
    keys.append(key_of())
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    path.write_text(text)
    assert key_of() == keys[4], "data that are as they were are found again"


def test_a_copy_of_the_data_elsewhere_is_the_same_data(tmp_path, chat):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "chat.jsonl").read_bytes())
    encoder = encoder_of(conversation_encoder)
    assert prepare(context_in(tmp_path), chat, encoder).path == prepare(context_in(tmp_path), given(str(copy)), encoder).path


def test_two_vocabularies_under_one_contract_do_not_share_tokens(tmp_path, chat):
    made = []
    for backwards in (False, True):
        tokenizer, contract = contracted(backwards=backwards)
        encoder = conversation_encoder(tokenizer, contract, max_length=99, on_overflow="error", at=AT)
        made.append((tokenizer, contract, prepare(context_in(tmp_path), chat, encoder)))
    (one, contract, of_one), (other, same_contract, of_other) = made
    assert contract.digest == same_contract.digest
    assert one.decode(of_one.load()[0]["input_ids"]) == other.decode(of_other.load()[0]["input_ids"])


def in_process(call: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def test_of_two_that_prepare_the_same_at_once_one_makes_it_and_both_have_it(tmp_path, chat):
    counting = Counting(encoder_of(conversation_encoder), tmp_path / "calls")
    processes = [in_process(lambda name=name: prepare(context_in(tmp_path, name), chat, counting.encoder)) for name in ("a", "b", "c")]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert read_prepared(context_in(tmp_path, "a")) == read_prepared(context_in(tmp_path, "b")) == read_prepared(context_in(tmp_path, "c"))
    assert counting.num_calls == 3
    assert len(made_in(tmp_path)) == 1


def test_waiting_is_said_where_another_process_is_at_it_and_only_there(tmp_path, chat, monkeypatch):
    told: list[str] = []
    begin = Progress.phase
    monkeypatch.setattr(Progress, "phase", lambda progress, name: (told.append(name), begin(progress, name)))
    encoder = encoder_of(conversation_encoder)
    path = prepare(context_in(tmp_path), chat, encoder).path
    assert told == ["prepare data"]
    shutil.rmtree(path)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        prepare(context_in(tmp_path), chat, encoder)
    assert told[1:] == ["wait for another process that prepares the same data", "prepare data"]


@pytest.mark.parametrize(("module", "name"), [(np, "save"), (disk, "publish_directory")], ids=["rows only", "all but its place"])
def test_a_killed_preparation_is_made_again_and_its_remains_are_taken_away(tmp_path, chat, monkeypatch, module, name):
    counting = Counting(encoder_of(conversation_encoder), tmp_path / "calls")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = in_process(lambda: prepare(context_in(tmp_path), chat, counting.encoder))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (remains,) = made_in(tmp_path)
    assert "partial" in remains and counting.num_calls == 3
    made = prepare(context_in(tmp_path), chat, counting.encoder)
    assert counting.num_calls == 6 and made.load().num_rows == 3
    assert made_in(tmp_path) == [made.path.name]


def test_a_directory_without_its_manifest_is_replaced(tmp_path, chat):
    encoder = encoder_of(conversation_encoder)
    path = prepare(context_in(tmp_path), chat, encoder).path
    (path / "manifest.json").unlink()
    (path / "rows.arrow").write_text("{")
    made = prepare(context_in(tmp_path), chat, encoder)
    assert made.path == path and made.load().num_rows == 3


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, chat, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared.disk, "publish_directory", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(context_in(tmp_path), chat, encoder_of(conversation_encoder))
    assert made_in(tmp_path) == []


def test_many_rows_stay_in_order_over_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS_AT_ONCE", 7)
    rows = [{"prompt": f"{number}?", "completion": "x" * (number % 13 + 1)} for number in range(200)]
    data = given(write(tmp_path / "many.jsonl", *rows))
    counting = Counting(encoder_of(conversation_encoder), tmp_path / "calls")
    made = prepare(context_in(tmp_path), data, counting.encoder)
    assert made.column("row").tolist() == list(range(200))
    assert [len(row["input_ids"]) for row in made.load()] == made.column("length").tolist()
    assert sum(made.column("length")) == made.num_tokens
    assert len(list(counting.directory.iterdir())) == min(len(os.sched_getaffinity(0)), 200 // 7), "every core takes part"


# --- real data ---------------------------------------------------------------------------------------------------------


def real_encoder(stories: Path, kind: Callable[..., Encoder]) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    contract = establish(tokenizer, GenerationConfig.from_pretrained(stories), template=None, system_prompt=None, at=AT)
    return kind(tokenizer, contract, max_length=512, on_overflow="truncate", at=AT)


@pytest.mark.real
def test_real_conversations_are_prepared_with_right_numbers(tmp_path, shared, stories):
    data = given(str(shared / "data" / "llamafactory_demo" / "alpaca_en_demo.json"), max_samples=400)
    made = prepare(context_in(tmp_path), data, real_encoder(stories, conversation_encoder))
    columns = made.samples[:]
    rows = list(zip(columns["input_ids"], columns["labels"], strict=True))
    assert made.num_rows == len(rows) == 400 - sum(made.left_out.values())
    assert made.num_tokens == sum(len(ids) for ids, _ in rows) == sum(columns["length"])
    assert made.num_trained_tokens == sum(label != IGNORED for _, labels in rows for label in labels) == made.num_trained_by_token().sum()
    assert all(labels[0] == IGNORED and len(labels) == len(ids) <= 512 for ids, labels in rows)
    stop = 513
    unstopped = [len(ids) for ids, labels in rows if stop not in labels]
    assert 0 < len(unstopped) == made.column("is_unstopped").sum() <= made.column("is_cut").sum() and set(unstopped) == {512}


@pytest.mark.real
def test_real_pairs_are_prepared_with_right_numbers(tmp_path, shared, stories):
    data = given(str(shared / "data" / "llamafactory_demo" / "dpo_en_demo.json"), max_samples=100)
    made = prepare(context_in(tmp_path), data, real_encoder(stories, pair_encoder))
    rows = made.samples
    assert made.num_rows == len(rows) == 100 - sum(made.left_out.values()) > 0
    for row in rows:
        longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert row["chosen_ids"] != row["rejected_ids"] and longest <= 512
        assert row["length"] == 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert made.num_trained_tokens == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert isinstance(next(open_source(data.data, "x").rows()), Pair)
    assert np.array_equal(made.column("length"), np.asarray(rows["length"]))
