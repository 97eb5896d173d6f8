"""The quickstart's base model: what is shipped is a real base model in small, and can be made again."""

from pathlib import Path

import pytest

from posttrain.quickstart import make, tasks

SHIPPED = Path(make.__file__).parent / "base"


def test_the_shipped_model_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 4_000_000


def test_the_shipped_model_is_a_base_model_without_pad_token_and_template() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<s>", "</s>", None, None)
    assert len(tokenizer) <= model.config.vocab_size == make.VOCABULARY
    assert model.config.pad_token_id is None


def test_the_shipped_tokenizer_is_the_one_that_the_corpus_gives() -> None:
    made = make.train_tokenizer(list(tasks.corpus(make.NUM_TOKENIZER_DOCUMENTS)))
    assert made.backend_tokenizer.to_str() == tokenizer_text()


def tokenizer_text() -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).to_str())


@pytest.mark.parametrize("text", ['{"name": "Eva", "color": "pink"}\n7 + 15 = 22', "naïve — 你好 \t\n"])
def test_the_tokenizer_gives_back_any_text(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_base_model_can_be_made_again(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make.write_base(tmp_path, num_steps=2, num_documents=2000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in SHIPPED.iterdir())
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(SHIPPED).num_parameters()


def test_padding_is_not_trained_on_and_every_document_ends_with_the_end_token() -> None:
    tokenizer = make.train_tokenizer(list(tasks.corpus(500)))
    ids, labels = next(make.batches(tokenizer, ["a", "b c", "d e f"] * make.BATCH_DOCUMENTS))
    end = tokenizer.convert_tokens_to_ids(make.EOS)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        kept = [token for token in wanted if token != -100]
        assert kept == row[: len(kept)]
        assert kept[-1] == end
