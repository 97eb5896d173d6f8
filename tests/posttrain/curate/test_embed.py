"""Vectors against plain passes of the models, a text at a time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.batch import token_batches
from posttrain.curate.contamination import Contamination
from posttrain.curate.diversity import Diversity
from posttrain.curate.embed import DEPTH, KEPT_COMPONENTS, embed, normalize, whiten
from posttrain.error import UserError
from tests.posttrain.curate.measured import make_bench, minilm, policy

TEXTS = [f"what is the colour of bird {number}" + ", and of the sky" * (number % 5) for number in range(60)] + ["are there birds?"] * 2


def test_planning_imports_no_numpy_and_no_torch():
    modules = ["embed", "contamination", "quality", "diversity", "mixture"]
    imports = "; ".join(f"import posttrain.curate.{module}" for module in modules)
    code = f"import sys; {imports}; print({{'numpy', 'torch', 'transformers', 'openai'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_vectors_of_a_policy_are_the_whitened_means_of_its_hidden_states(tiny: Path, tmp_path: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    distinct = list(dict.fromkeys(TEXTS))
    raw = []
    for text in distinct:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        with torch.no_grad():
            states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        raw.append(states[round(DEPTH * 2)][0, 1:].mean(dim=0).numpy())
    covariance = np.cov(np.array(raw).T, bias=True)
    variances, directions = np.linalg.eigh(covariance)
    number = int(KEPT_COMPONENTS * 32)
    white = (np.array(raw) - np.mean(raw, axis=0)) @ directions[:, -number:] / np.sqrt(variances[-number:])
    white /= np.linalg.norm(white, axis=1, keepdims=True)

    vectors = embed(TEXTS, Diversity(), make_bench(tmp_path, policy=policy(tiny)))
    assert vectors.shape == (len(TEXTS), number)
    assert vectors.dtype == np.float32
    expected = white[[distinct.index(text) for text in TEXTS]]
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-3)  # the signs of components are free


def test_the_same_texts_give_the_same_bytes(tiny: Path, tmp_path: Path):
    first, again = (embed(TEXTS, Diversity(), make_bench(tmp_path / name, policy=policy(tiny))) for name in "ab")
    assert first.tobytes() == again.tobytes()


def test_a_resumed_stage_reads_vectors_instead_of_the_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = make_bench(tmp_path, policy=policy(tiny))
    first = embed(TEXTS, Diversity(), bench)
    monkeypatch.setattr("posttrain.curate.embed.open_policy", lambda bench: pytest.fail("it loads the model again"))
    assert embed(TEXTS, Diversity(), bench).tobytes() == first.tobytes()


def test_a_long_text_is_read_up_to_the_limit(tiny: Path, tmp_path: Path):
    long = "are there birds in the sky? " * 200
    texts = [long, long + "and more", *TEXTS]
    vectors = embed(texts, Diversity(embedded_tokens=64), make_bench(tmp_path, policy=policy(tiny)))
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_vectors_of_a_sentence_model_are_its_own(tmp_path: Path):
    source = minilm()
    from sentence_transformers import SentenceTransformer

    texts = ["A man plays a guitar.", "Someone is playing an instrument.", "The stock market fell.", "short", "word " * 100]
    expected = np.concatenate([SentenceTransformer(source.model).encode([text]) for text in texts])
    vectors = embed(texts, Diversity(embedder=source), make_bench(tmp_path))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]


def test_what_is_no_sentence_model_is_refused_in_one_line(tmp_path: Path):
    minilm()
    (tmp_path / "empty").mkdir()
    step = Diversity.model_validate({"embedder": {"model": str(tmp_path / "empty")}})
    with pytest.raises(UserError, match=r"stages.curate: diversity.embedder: .*empty cannot be loaded") as caught:
        embed(["a"], step, make_bench(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Diversity().check("stages.curate.steps[0].diversity")
    with pytest.raises(UserError, match=r'diversity.embedder: .*pip install "posttrain\[embeddings\]"'):
        Diversity.model_validate({"embedder": {"model": "."}}).check("stages.curate.steps[0].diversity")


def test_the_policy_is_read_only_where_vectors_come_from_it():
    named = {"embedder": {"model": "."}}
    assert Diversity.reads == Diversity().reads == ("policy",)
    assert Diversity.model_validate(named).reads == ()
    assert Contamination.reads == ("decontaminate", "policy")
    assert Contamination().reads == ("decontaminate",)
    assert Contamination(similarity=0.35).reads == ("decontaminate", "policy")
    assert Contamination.model_validate({"similarity": 0.6, **named}).reads == ("decontaminate",)


def test_whitened_vectors_have_no_mean_and_equal_variances():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(500, 30)) * np.linspace(0.1, 5, 30) + 7).astype(np.float32)
    white = whiten(vectors)
    assert white.shape == (500, 10)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(10), atol=1e-3)
    assert whiten(vectors[:20]).shape == (20, 4)
    assert np.isfinite(whiten(np.ones((5, 30), dtype=np.float32))).all()


def test_a_vector_without_length_stays_there():
    np.testing.assert_array_equal(normalize(np.array([[3, 4], [0, 0]], dtype=np.float32)), np.array([[0.6, 0.8], [0, 0]], dtype=np.float32))


def test_batches_hold_every_text_once_and_no_more_tokens_than_allowed():
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 90, 300)] + [500]
    batches = list(token_batches(lengths, 200))
    assert sorted(position for batch in batches for position in batch) == list(range(301))
    assert batches[0] == [300]
    assert all(len(batch) * max(lengths[position] for position in batch) <= 200 for batch in batches[1:])
    padded = sum(len(batch) * max(lengths[position] for position in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)
