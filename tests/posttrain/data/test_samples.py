"""A sample holds the tokens and masks that were meant, cut where the config says, or is left out for a reason.

The tokenizer here gives one token a byte, so that every number below can be counted by hand.
"""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from posttrain.chat import ChatContract, encode_prompt, establish
from posttrain.data.rows import Conversation, Pair
from posttrain.data.samples import IGNORED, Encoder, LeftOut, conversation_encoder, encode_pair, pair_encoder, unpaired_encoder
from posttrain.error import UserError

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


def fault(encoder: Encoder, row: Any) -> str:
    """Why a row is left out."""
    with pytest.raises(LeftOut) as caught:
        encoder.encode(row)
    assert str(caught.value).startswith("d.jsonl:7: ")
    return caught.value.fault


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- conversations -----------------------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_its_stop_token_and_nothing_else():
    tokenizer, contract = contracted()
    row = conversation_encoder(tokenizer, contract, max_length=1000, on_overflow="error", at=AT).encode(conversation("Hi", "Yo!"))
    assert set(row.columns) == {"input_ids", "labels"}
    start = FRAME + 2
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = tokenizer.convert_tokens_to_ids(list("Yo!"))
    assert row.columns["input_ids"][start:] == [*answer, stop, tokenizer.convert_tokens_to_ids("Ċ")]
    assert row.columns["labels"] == [IGNORED] * start + [*answer, stop, IGNORED]
    assert (row.length, len(row.targets), row.is_cut) == (start + 5, 4, False)


def test_the_first_token_is_never_a_label():
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer, contract = contracted(template)
    opening = Conversation([{"role": "assistant", "content": "abc"}], None, [], "d.jsonl:7")
    row = conversation_encoder(tokenizer, contract, max_length=9, on_overflow="error", at=AT).encode(opening)
    assert row.columns["labels"] == [IGNORED, *row.columns["input_ids"][1:]] and len(row.targets) == 3


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
        assert row.length == length and not row.is_cut


def test_an_over_long_row_is_an_error_that_names_place_length_and_fields():
    message = refusal(encoder_of(conversation_encoder, FRAME + 6).encode, conversation("Hi", "Yo!"))
    assert message.startswith(
        f"d.jsonl:7: {FRAME + 7} tokens, over stages.sft.max_length: {FRAME + 6}; raise it, or set stages.sft.on_overflow"
    )


def test_an_over_long_row_is_left_out_where_the_config_says_drop():
    assert fault(encoder_of(conversation_encoder, FRAME + 6, "drop"), conversation("Hi", "Yo!")) == "over_max_length"


def test_a_truncated_answer_leaves_no_stop_token_to_train():
    tokenizer, contract = contracted()
    for room, answer in ((1, "Y"), (3, "Yo!")):
        encoder = conversation_encoder(tokenizer, contract, max_length=FRAME + 2 + room, on_overflow="truncate", at=AT)
        row = encoder.encode(conversation("Hi", "Yo!"))
        assert row.columns["labels"][-room:] == row.columns["input_ids"][-room:] == tokenizer.convert_tokens_to_ids(list(answer))
        assert (row.length, len(row.targets), row.is_cut) == (FRAME + 2 + room, room, True)


def test_a_row_cut_off_before_its_answer_is_left_out():
    assert fault(encoder_of(conversation_encoder, FRAME + 2, "truncate"), conversation("Hi", "Yo!")) == "over_max_length"


# --- pairs -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_prompt_and_two_answers_each_with_its_stop_token():
    tokenizer, contract = contracted()
    row = pair_encoder(tokenizer, contract, max_length=1000, on_overflow="error", at=AT).encode(pair("good", "no"))
    columns = {name: tokenizer.decode(ids) for name, ids in row.columns.items()}
    assert columns == {
        "prompt_ids": "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n",
        "chosen_ids": "good<|im_end|>",
        "rejected_ids": "no<|im_end|>",
    }
    assert (row.length, len(row.targets), row.is_cut) == (2 * (FRAME + 2) + 5 + 3, 5 + 3, False)


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


def test_a_labelled_answer_is_trained_alone_and_cut_as_far_as_there_is_room():
    tokenizer, contract = contracted()
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "train": False}, {"role": "user", "content": "3"}]
    for label in (True, False):
        row = Conversation([*asked, {"role": "assistant", "content": "four"}], None, [], "d.jsonl:7", label)
        sample = unpaired_encoder(tokenizer, contract, max_length=1000, on_overflow="error", at=AT).encode(row)
        prompt = encode_prompt(tokenizer, asked, None, "d.jsonl:7")
        assert sample.columns["prompt_ids"] == prompt and sample.label is label
        assert tokenizer.decode(sample.columns["completion_ids"]) == "four<|im_end|>"
        assert (sample.length, sample.targets) == (len(prompt) + 5, sample.columns["completion_ids"])
        cut = unpaired_encoder(tokenizer, contract, max_length=len(prompt) + 2, on_overflow="truncate", at=AT).encode(row)
        assert (tokenizer.decode(cut.columns["completion_ids"]), cut.is_cut, cut.is_unstopped) == ("fo", True, True)
        assert fault(unpaired_encoder(tokenizer, contract, max_length=len(prompt), on_overflow="truncate", at=AT), row) == "over_max_length"


def test_a_pair_is_split_into_two_labelled_answers_of_the_same_tokens():
    encoder = encoder_of(unpaired_encoder)
    both = [encoder.encode(row) for row in encoder.rows([pair("good", "no")])]
    whole = encoder_of(pair_encoder).encode(pair("good", "no")).columns
    assert [sample.columns["prompt_ids"] for sample in both] == [whole["prompt_ids"]] * 2
    assert [sample.columns["completion_ids"] for sample in both] == [whole["chosen_ids"], whole["rejected_ids"]]
    assert [sample.label for sample in both] == [True, False]


def test_a_pair_is_as_long_as_its_longer_answer():
    longest = FRAME + 2 + 5
    assert not encoder_of(pair_encoder, longest).encode(pair("good", "no")).is_cut
    assert refusal(encoder_of(pair_encoder, longest - 1).encode, pair("no", "good")).startswith(f"d.jsonl:7: {longest} tokens, over")
    assert fault(encoder_of(pair_encoder, longest - 1, "drop"), pair("good", "no")) == "over_max_length"


def test_a_truncated_pair_keeps_its_prompt_and_what_tells_its_answers_apart():
    tokenizer, contract = contracted()
    row = pair_encoder(tokenizer, contract, max_length=FRAME + 2 + 4, on_overflow="truncate", at=AT).encode(pair("good", "no"))
    assert [tokenizer.decode(row.columns[name]) for name in ("chosen_ids", "rejected_ids")] == ["good", "no<|im_end|>"]
    assert (row.length, len(row.targets), row.is_cut) == (2 * (FRAME + 2) + 4 + 3, 4 + 3, True)


def test_a_pair_that_is_identical_after_truncation_is_left_out():
    assert fault(encoder_of(pair_encoder, FRAME + 2 + 2, "truncate"), pair("good", "gone")) == "identical"


@pytest.mark.parametrize("room", [0, -5])
def test_a_pair_whose_prompt_leaves_no_room_is_left_out(room):
    assert fault(encoder_of(pair_encoder, FRAME + 2 + room, "truncate"), pair("good", "gone")) == "over_max_length"


# --- what the preflight counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "unstopped"), [(3, True), (4, False), (5, False), (99, False)])
def test_an_answer_without_its_stop_token_is_told(room, unstopped):
    sample = encoder_of(conversation_encoder, FRAME + 2 + room, "truncate").encode(conversation("Hi", "Yo!"))
    assert sample.is_unstopped == unstopped and sample.is_cut == (room < 5)


def test_a_cut_between_two_answers_leaves_the_first_one_stopped():
    tokenizer, contract = contracted()
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yo!"), ("user", "So"), ("assistant", "Ho"))]
    encoder = conversation_encoder(tokenizer, contract, max_length=FRAME + 2 + 5 + 4, on_overflow="truncate", at=AT)
    sample = encoder.encode(Conversation(turns, None, [], "d.jsonl:7"))
    assert sample.is_cut and not sample.is_unstopped and tokenizer.decode(sample.targets) == "Yo!<|im_end|>"


def test_only_the_last_answer_is_trained_where_the_config_says_so():
    tokenizer, contract = contracted()
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yo!"), ("user", "So"), ("assistant", "Ho"))]
    texts = {}
    for train_on in ("all", "last"):
        encoder = conversation_encoder(tokenizer, contract, max_length=99, on_overflow="error", at=AT, train_on=train_on)
        texts[train_on] = tokenizer.decode(encoder.encode(Conversation(turns, None, [], "d.jsonl:7")).targets)
    assert texts == {"all": "Yo!<|im_end|>Ho<|im_end|>", "last": "Ho<|im_end|>"}


def test_samples_have_one_fingerprint_if_and_only_if_they_are_the_same():
    encode = encoder_of(conversation_encoder).encode
    rows = [("Hi", "Yo!"), ("Hi", "Yo?"), ("HiY", "o!")]
    assert len({encode(conversation(*row)).fingerprint for row in rows}) == 3
    assert encode(conversation("Hi", "Yo!")).fingerprint == encode(conversation("Hi", "Yo!")).fingerprint
    untrained = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    more = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    other = [untrained[0], {"role": "assistant", "content": "b"}, *more]
    one, two = (encode(Conversation(messages, None, [], "d.jsonl:7")) for messages in ([*untrained, *more], other))
    assert one.columns["input_ids"] == two.columns["input_ids"] and one.fingerprint != two.fingerprint


def test_loading_a_tokenizer_again_makes_the_same_encoder(tmp_path):
    tokenizer, contract = contracted()
    tokenizer.save_pretrained(tmp_path)
    encoders = [
        conversation_encoder(t, contract, max_length=9, on_overflow="error", at=AT)
        for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path))
    ]
    assert encoders[0].key == encoders[1].key == encoders[2].key
