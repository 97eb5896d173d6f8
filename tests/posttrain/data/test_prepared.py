"""Prepared data holds the tokens and masks that were meant, is made once for what decides it, and is never half there.

The tokenizer here gives one token a byte, so that every number below can be counted by hand.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from posttrain import disk
from posttrain.chat import ChatContract, encode_prompt, establish
from posttrain.config import DataSource
from posttrain.data import prepared
from posttrain.data.prepared import (
    IGNORED,
    Encoder,
    Prepared,
    PreparedRow,
    conversation_encoder,
    encode_pair,
    pair_encoder,
    prepare,
    read_prepared,
)
from posttrain.data.rows import Conversation, Pair, Row
from posttrain.data.source import open_source
from posttrain.error import UserError
from posttrain.stage import Input, StageConfig, StageContext

AT = "stages.sft"
# <|im_start|>user\n + question + <|im_end|>\n<|im_start|>assistant\n, one token for each control token and each byte
FRAME = (1 + 5) + (1 + 1 + 1 + 10)


def bytewise(*, backwards: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def contracted(template: str | None = None, **fields: bool) -> tuple[PreTrainedTokenizerFast, ChatContract]:
    tokenizer = bytewise(**fields)
    if template is not None:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    return tokenizer, establish(tokenizer, GenerationConfig(), template=template, system_prompt=None, at=AT)


def conversation(question: str, answer: str, **fields: Any) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}], None, [], "d.jsonl:7")


def pair(chosen: str, rejected: str, question: str = "q?") -> Pair:
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Pair([{"role": "user", "content": question}], *answers, None, "d.jsonl:7")


def encoder_of(kind: Callable[..., Encoder], max_length: int = 1000, on_overflow: str = "error") -> Encoder:
    return kind(*contracted(), max_length=max_length, on_overflow=on_overflow, at=AT)


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- conversations -----------------------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_its_stop_token_and_nothing_else():
    tokenizer, contract = contracted()
    row = conversation_encoder(tokenizer, contract, max_length=1000, on_overflow="error", at=AT).encode(conversation("Hi", "Yo!"))
    assert row is not None
    assert set(row.columns) == {"input_ids", "labels"}
    start = FRAME + 2
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = tokenizer.convert_tokens_to_ids(list("Yo!"))
    assert row.columns["input_ids"][start:] == [*answer, stop, tokenizer.convert_tokens_to_ids("Ċ")]
    assert row.columns["labels"] == [IGNORED] * start + [*answer, stop, IGNORED]
    assert (row.length, row.num_trained, row.truncated) == (start + 5, 4, False)


def test_the_first_token_is_never_a_label():
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer, contract = contracted(template)
    opening = Conversation([{"role": "assistant", "content": "abc"}], None, [], "d.jsonl:7")
    row = conversation_encoder(tokenizer, contract, max_length=9, on_overflow="error", at=AT).encode(opening)
    assert row is not None
    assert row.columns["labels"] == [IGNORED, *row.columns["input_ids"][1:]] and row.num_trained == 3


def test_a_conversation_with_nothing_to_train_is_an_error_that_names_its_place():
    encode = encoder_of(conversation_encoder).encode
    prompt_only = Conversation([{"role": "user", "content": "x"}], None, [], "d.jsonl:7")
    assert refusal(encode, prompt_only).startswith("d.jsonl:7: has no assistant turn")
    assert refusal(encode, conversation("x", "y", train=False)).startswith("d.jsonl:7: no token of it is trained")


def test_pairs_and_conversations_are_not_taken_for_each_other():
    assert refusal(encoder_of(conversation_encoder).encode, pair("a", "b")) == (
        "d.jsonl:7: is a preference pair, and stages.sft trains on conversations"
    )
    assert refusal(encoder_of(pair_encoder).encode, conversation("a", "b")) == (
        "d.jsonl:7: is a conversation, and stages.sft learns from preference pairs"
    )


def test_a_row_of_just_max_length_is_not_too_long():
    length = FRAME + 2 + 5
    for on_overflow in ("error", "drop", "truncate"):
        row = encoder_of(conversation_encoder, length, on_overflow).encode(conversation("Hi", "Yo!"))
        assert row is not None and row.length == length and not row.truncated


def test_an_over_long_row_is_an_error_that_names_place_length_and_fields():
    message = refusal(encoder_of(conversation_encoder, FRAME + 6).encode, conversation("Hi", "Yo!"))
    assert message.startswith(
        f"d.jsonl:7: {FRAME + 7} tokens, over stages.sft.max_length: {FRAME + 6}; raise it, or set stages.sft.on_overflow"
    )


def test_an_over_long_row_is_left_out_where_the_config_says_drop():
    assert encoder_of(conversation_encoder, FRAME + 6, "drop").encode(conversation("Hi", "Yo!")) is None


def test_a_truncated_answer_leaves_no_stop_token_to_train():
    tokenizer, contract = contracted()
    for room, answer in ((1, "Y"), (3, "Yo!")):
        encoder = conversation_encoder(tokenizer, contract, max_length=FRAME + 2 + room, on_overflow="truncate", at=AT)
        row = encoder.encode(conversation("Hi", "Yo!"))
        assert row is not None
        assert row.columns["labels"][-room:] == row.columns["input_ids"][-room:] == tokenizer.convert_tokens_to_ids(list(answer))
        assert (row.length, row.num_trained, row.truncated) == (FRAME + 2 + room, room, True)


def test_a_row_cut_off_before_its_answer_is_left_out():
    assert encoder_of(conversation_encoder, FRAME + 2, "truncate").encode(conversation("Hi", "Yo!")) is None


# --- pairs -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_prompt_and_two_answers_each_with_its_stop_token():
    tokenizer, contract = contracted()
    row = pair_encoder(tokenizer, contract, max_length=1000, on_overflow="error", at=AT).encode(pair("good", "no"))
    assert row is not None
    columns = {name: tokenizer.decode(ids) for name, ids in row.columns.items()}
    assert columns == {
        "prompt_ids": "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n",
        "chosen_ids": "good<|im_end|>",
        "rejected_ids": "no<|im_end|>",
    }
    assert (row.length, row.num_trained, row.truncated) == (2 * (FRAME + 2) + 5 + 3, 5 + 3, False)


def test_answers_in_the_prompt_are_context_only():
    tokenizer, contract = contracted()
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "\n\n2"}, {"role": "user", "content": "3"}]
    row = Pair(asked, [{"role": "assistant", "content": "\n4", "train": False}], [{"role": "assistant", "content": "5"}], None, "d.jsonl:7")
    prompt, chosen, rejected = encode_pair(tokenizer, contract, row)
    assert prompt == encode_prompt(tokenizer, asked, None, "d.jsonl:7")
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == ["\n4<|im_end|>", "5<|im_end|>"]


def test_identical_answers_are_an_error_that_names_the_place():
    assert refusal(encoder_of(pair_encoder).encode, pair("same", "same")).startswith("d.jsonl:7: chosen and rejected are the same answer")


def test_answers_of_several_messages_are_refused_since_all_between_them_would_be_learned():
    tool = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]
    row = Pair([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "x"}], tool, None, "d.jsonl:7")
    assert refusal(encoder_of(pair_encoder).encode, row).startswith("d.jsonl:7: rejected holds 3 messages")


def test_a_pair_is_as_long_as_its_longer_answer():
    longest = FRAME + 2 + 5
    assert encoder_of(pair_encoder, longest).encode(pair("good", "no")) is not None
    assert refusal(encoder_of(pair_encoder, longest - 1).encode, pair("no", "good")).startswith(f"d.jsonl:7: {longest} tokens, over")
    assert encoder_of(pair_encoder, longest - 1, "drop").encode(pair("good", "no")) is None


def test_a_truncated_pair_keeps_its_prompt_and_what_tells_its_answers_apart():
    tokenizer, contract = contracted()
    row = pair_encoder(tokenizer, contract, max_length=FRAME + 2 + 4, on_overflow="truncate", at=AT).encode(pair("good", "no"))
    assert row is not None
    assert [tokenizer.decode(row.columns[name]) for name in ("chosen_ids", "rejected_ids")] == ["good", "no<|im_end|>"]
    assert (row.length, row.num_trained, row.truncated) == (2 * (FRAME + 2) + 4 + 3, 4 + 3, True)


@pytest.mark.parametrize("room", [2, 0, -5])
def test_a_pair_that_is_identical_after_truncation_is_left_out(room):
    assert encoder_of(pair_encoder, FRAME + 2 + room, "truncate").encode(pair("good", "gone")) is None


# --- the files ---------------------------------------------------------------------------------------------------------


class Counting:
    """An encoder that knows how often it was asked."""

    def __init__(self, encoder: Encoder) -> None:
        self.num_calls = 0
        self._encode = encoder.encode
        self.encoder = Encoder(self.encode, encoder.tokenizer)

    def encode(self, row: Row) -> PreparedRow | None:
        self.num_calls += 1
        return self._encode(row)


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def context_in(root: Path, name: str = "sft") -> StageContext[StageConfig]:
    directory = root / "run" / name
    directory.mkdir(parents=True, exist_ok=True)
    return StageContext(name, StageConfig(), {}, directory, root)


def given(data: str, fingerprint: str = "f", **fields: Any) -> Input:
    return Input("chat", "dataset", fingerprint, DataSource(data=data, **fields))


@pytest.fixture
def chat(tmp_path: Path) -> Input:
    rows = [{"prompt": "Hi", "completion": answer} for answer in ("Yo!", "a longer answer", "ab")]
    return given(write(tmp_path / "chat.jsonl", *rows))


def test_what_is_prepared_is_found_in_order_with_its_numbers(tmp_path, chat):
    encoder = encoder_of(conversation_encoder, FRAME + 2 + 6, "truncate")
    made = prepare(context_in(tmp_path), chat, encoder, {"kind": "x"})
    assert made == read_prepared(context_in(tmp_path))
    lengths = [FRAME + 2 + 5, FRAME + 2 + 6, FRAME + 2 + 4]
    said = f"{tmp_path / 'chat.jsonl'} is prompt_completion, as its columns tell"
    assert made == Prepared(made.path, 3, sum(lengths), 4 + 6 + 3, 0, 1, 0, [said], None)
    assert made.describe("chat") == [
        f"chat: {said}",
        f"chat: 3 rows, {sum(lengths)} tokens, 13 of them trained",
        "chat: over max_length: 1 rows cut, 0 left out",
    ]
    rows = made.load()
    expected = [encoder.encode(row) for row in open_source(chat.data, "chat").rows()]
    assert rows["length"] == lengths
    assert [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows] == [row.columns for row in expected if row]


def test_rows_left_out_are_counted(tmp_path):
    rows = [("good", "no"), ("good", "gone"), ("a", "b")]
    data = given(write(tmp_path / "p.jsonl", *({"prompt": "q?", "chosen": a, "rejected": b} for a, b in rows)))
    made = prepare(context_in(tmp_path), data, encoder_of(pair_encoder, FRAME + 2 + 2, "truncate"), {})
    assert (made.num_rows, made.num_dropped, made.num_truncated) == (2, 1, 1)


def test_data_of_which_nothing_is_left_is_an_error(tmp_path, chat):
    message = refusal(prepare, context_in(tmp_path), chat, encoder_of(conversation_encoder, 5, "drop"), {})
    assert message.startswith("stages.sft: no row of chat is left to train on: 3 are over max_length")
    assert not (tmp_path / "run" / "sft" / "prepared.json").exists()


def test_the_same_is_prepared_once_for_all_stages_and_runs(tmp_path, chat):
    counting = Counting(encoder_of(conversation_encoder))
    first = prepare(context_in(tmp_path), chat, counting.encoder, {"kind": "x"})
    assert counting.num_calls == 3
    assert prepare(context_in(tmp_path, "other"), chat, counting.encoder, {"kind": "x"}) == first
    assert counting.num_calls == 3
    assert read_prepared(context_in(tmp_path, "other")) == first


def test_whatever_decides_the_tokens_gives_another_directory(tmp_path, chat):
    key = {"kind": "conversation", "contract": "c", "max_length": 9, "on_overflow": "error"}
    encoder = encoder_of(conversation_encoder)
    paths = [prepare(context_in(tmp_path), chat, encoder, key).path]
    for changed in ({"kind": "pair"}, {"contract": "d"}, {"max_length": 10}, {"on_overflow": "drop"}):
        paths.append(prepare(context_in(tmp_path), chat, encoder, key | changed).path)
    write(tmp_path / "chat.jsonl", {"prompt": "Hi", "completion": "new"})
    changed_data = prepare(context_in(tmp_path), given(chat.data.paths[0], "another"), encoder, key)
    assert changed_data.num_rows == 1
    paths.append(changed_data.path)
    assert len(set(paths)) == len(paths)


def test_two_vocabularies_under_one_contract_do_not_share_tokens(tmp_path, chat):
    made = []
    for backwards in (False, True):
        tokenizer, contract = contracted(backwards=backwards)
        encoder = conversation_encoder(tokenizer, contract, max_length=99, on_overflow="error", at=AT)
        made.append((tokenizer, contract, prepare(context_in(tmp_path), chat, encoder, {"contract": contract.digest})))
    (one, contract, of_one), (other, same_contract, of_other) = made
    assert contract.digest == same_contract.digest
    assert one.decode(of_one.load()[0]["input_ids"]) == other.decode(of_other.load()[0]["input_ids"])


def test_loading_a_tokenizer_again_does_not_prepare_again(tmp_path):
    tokenizer, contract = contracted()
    tokenizer.save_pretrained(tmp_path)
    encoders = [
        conversation_encoder(t, contract, max_length=9, on_overflow="error", at=AT)
        for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path))
    ]
    assert len({encoder.tokenizer for encoder in encoders}) == 1


def test_two_that_prepare_the_same_at_once_both_succeed(tmp_path, chat):
    both_started = threading.Barrier(2, timeout=60)
    encoder = encoder_of(conversation_encoder)
    results: list[Any] = []

    def run(name: str) -> None:
        started = []

        def encode(row: Row) -> PreparedRow | None:
            if not started:
                started.append(both_started.wait())
            return encoder.encode(row)

        try:
            results.append(prepare(context_in(tmp_path, name), chat, Encoder(encode, encoder.tokenizer), {}))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results[0], Prepared) and results[0] == results[1]
    assert results[0].load().num_rows == 3
    assert [path.name for path in (tmp_path / ".prepared").iterdir()] == [results[0].path.name]


def die_while(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, prepare_it: Callable[[], object]) -> None:
    """Run `prepare_it` in a process of its own that is killed when it calls `module.name`."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=prepare_it)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("module", "name"), [(disk, "write_json"), (disk, "publish_directory")], ids=["rows only", "all but its place"])
def test_a_killed_preparation_is_made_again_from_the_start(tmp_path, chat, monkeypatch, module, name):
    counting = Counting(encoder_of(conversation_encoder))
    die_while(monkeypatch, module, name, lambda: prepare(context_in(tmp_path), chat, counting.encoder, {}))
    assert list((tmp_path / ".prepared").iterdir()), "it had begun to write"
    made = prepare(context_in(tmp_path), chat, counting.encoder, {})
    assert counting.num_calls == 3 and made.load().num_rows == 3


def test_a_directory_without_its_manifest_is_replaced(tmp_path, chat):
    counting = Counting(encoder_of(conversation_encoder))
    path = prepare(context_in(tmp_path), chat, counting.encoder, {}).path
    (path / "manifest.json").unlink()
    (path / "rows" / "dataset_info.json").write_text("{")
    made = prepare(context_in(tmp_path), chat, counting.encoder, {})
    assert counting.num_calls == 6 and made.path == path and made.load().num_rows == 3


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, chat, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared.disk, "publish_directory", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(context_in(tmp_path), chat, encoder_of(conversation_encoder), {})
    assert list((tmp_path / ".prepared").iterdir()) == []


# --- real data ---------------------------------------------------------------------------------------------------------


def real_encoder(stories: Path, kind: Callable[..., Encoder]) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    contract = establish(tokenizer, GenerationConfig.from_pretrained(stories), template=None, system_prompt=None, at=AT)
    return kind(tokenizer, contract, max_length=512, on_overflow="truncate", at=AT)


@pytest.mark.real
def test_real_conversations_are_prepared_with_right_numbers(tmp_path, shared, stories):
    data = given(str(shared / "data" / "llamafactory_demo" / "alpaca_en_demo.json"), max_samples=400)
    made = prepare(context_in(tmp_path), data, real_encoder(stories, conversation_encoder), {})
    columns = made.load()[:]
    rows = list(zip(columns["input_ids"], columns["labels"], strict=True))
    assert made.num_rows == len(rows) == 400 - made.num_dropped
    assert made.num_tokens == sum(len(ids) for ids, _ in rows) == sum(columns["length"])
    assert made.num_trained_tokens == sum(label != IGNORED for _, labels in rows for label in labels)
    assert all(labels[0] == IGNORED and len(labels) == len(ids) <= 512 for ids, labels in rows)
    stop = 513
    unstopped = [len(ids) for ids, labels in rows if stop not in labels]
    assert 0 < len(unstopped) <= made.num_truncated and set(unstopped) == {512}


@pytest.mark.real
def test_real_pairs_are_prepared_with_right_numbers(tmp_path, shared, stories):
    data = given(str(shared / "data" / "llamafactory_demo" / "dpo_en_demo.json"), max_samples=100)
    made = prepare(context_in(tmp_path), data, real_encoder(stories, pair_encoder), {})
    rows = made.load()
    assert made.num_rows == len(rows) == 100 - made.num_dropped > 0
    for row in rows:
        assert (
            row["chosen_ids"] != row["rejected_ids"]
            and len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 512
        )
        assert row["length"] == 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert made.num_trained_tokens == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert isinstance(next(open_source(data.data, "x").rows()), Pair)
