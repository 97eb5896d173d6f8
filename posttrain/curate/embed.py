"""Vectors of texts, `(N, D)` and of unit length: what is near in meaning is near in angle.

By default they come from the policy that will be trained, so nothing else is needed: the mean of its hidden states over the
tokens of a text. These all point nearly the same way (Ethayarajh, 2019, arXiv 1909.00512), so they are whitened over the
texts at hand, and the components that vary least are left out:

  v -> (v - mean) U_k / sqrt(lambda_k),   U, lambda: eigenvectors and eigenvalues of the covariance

Paper: Su et al., 2021, "Whitening Sentence Representations", arXiv 2103.15316. Differences: 1. the mean of a layer a quarter
of the way up, instead of the first and last layer of BERT: of SmolLM2-135M, rephrases are told from other questions about
equally well by the layers from a tenth to a half of the way up, and worse by the last ones; 2. k is a third of the components
(there 256 of 768), and no more than a fifth of the texts, since few whitened texts are all equally far apart.

A sentence-transformers model that is named instead is taken as it is.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain.config import ModelSource
from posttrain.curate.step import Bench, Step
from posttrain.curate.threads import each_batch
from posttrain.error import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

DEPTH = 0.25
"""Which hidden states, as a share of the layers."""
KEPT_COMPONENTS = 1 / 3
"""Share of the components that whitening keeps."""
TEXTS_FOR_COMPONENT = 5
"""Texts that there must be for each component that is kept."""
TEXTS_AT_ONCE = 1024
"""Texts of a chunk that is measured, and saved, at once."""
TOKENS_AT_ONCE = 4096
"""Tokens of one batch, padding counted."""


class _Reads:
    """The inputs of a step with vectors: of the class all that it may read, of a step what its settings make it read."""

    def __get__(self, step: "EmbeddingStep | None", owner: "type[EmbeddingStep]") -> tuple[str, ...]:
        return owner.always_reads + (("policy",) if step is None or step.reads_policy else ())


class EmbeddingStep(Step):
    """A step that compares texts by their vectors."""

    always_reads: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Any] = _Reads()

    embedder: ModelSource | None = None
    """Sentence-transformers model that gives the vectors, `{model: ..., revision: ...}`; by default the policy's hidden states."""
    embedded_tokens: int = Field(512, ge=8)
    """Tokens of a text that are read, from its beginning; a model that can read fewer reads those."""

    @property
    def reads_policy(self) -> bool:
        """Whether these settings take vectors from the policy."""
        return self.embedder is None

    def check(self, at: str) -> None:
        """Raise `UserError` where the library of the named embedder is missing."""
        from importlib.util import find_spec

        if self.embedder is not None and find_spec("sentence_transformers") is None:
            raise UserError(f'{at}.embedder: needs the library sentence-transformers; run: pip install "posttrain[embeddings]"')


def embed(texts: Sequence[str], step: EmbeddingStep, bench: Bench) -> "Vectors":
    """The vectors of `texts`, `(N, D)`. The corrected ones of a policy depend on all texts, so compare those of one call only.

    Every different text is measured once, in the order of length, so that hardly anything is padded.
    """
    import numpy as np

    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    compute = _by_policy(step, bench) if step.embedder is None else _by_sentence_model(step.embedder, step, bench)
    bench.progress.phase(f"{step.name}: vectors", len(distinct))
    vectors = bench.measure("vectors", distinct, compute, chunk_size=TEXTS_AT_ONCE)
    if step.embedder is None:
        vectors = whiten(vectors)
    place = {text: number for number, text in enumerate(distinct)}
    unit: Vectors = normalize(vectors)[np.array([place[text] for text in texts])]
    return unit


def whiten(vectors: "Vectors") -> "Vectors":
    """`vectors` `(N, D)` without their mean, along their first principal components, each of variance 1, `(N, K)`."""
    import numpy as np

    centred = vectors - vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    variances, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(vectors))  # in rising order
    number = max(1, min(int(KEPT_COMPONENTS * vectors.shape[1]), len(vectors) // TEXTS_FOR_COMPONENT))
    variances, directions = variances[-number:], directions[:, -number:]
    varies = variances > max(variances[-1] * 1e-9, 1e-30)
    white: Vectors = centred @ (directions[:, varies] / np.sqrt(variances[varies])).astype(np.float32)
    return white


def normalize(vectors: "Vectors") -> "Vectors":
    """`vectors` `(N, D)` at unit length; one without any length stays at 0."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    unit: Vectors = vectors / lengths
    return unit


def _by_policy(step: EmbeddingStep, bench: Bench) -> Callable[[Sequence[str]], "Vectors"]:
    """Mean hidden states over the tokens of each text; the model is loaded when the first chunk is missing."""
    loaded: list[Any] = []

    def compute(texts: Sequence[str]) -> "Vectors":
        import numpy as np
        import torch

        from posttrain.batch import token_batches

        if not loaded:
            loaded.extend(open_policy(bench))
        model, tokenizer = loaded
        # The first position of a text draws huge activations, whatever stands there (Xiao et al., 2023), so it holds no text.
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        room = min(step.embedded_tokens, model.config.get_text_config().max_position_embeddings) - 1
        ids = [row[:room] for row in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]
        means = np.empty((len(ids), model.config.get_text_config().hidden_size), dtype=np.float32)

        def mean_states(batch: list[int]) -> None:
            input_ids = torch.full((len(batch), 1 + len(ids[batch[0]])), tokenizer.pad_token_id)
            mask = torch.zeros_like(input_ids)
            for row, position in enumerate(batch):
                length = 1 + len(ids[position])
                input_ids[row, :length] = torch.tensor([first, *ids[position]])
                mask[row, :length] = 1
            input_ids, mask = input_ids.to(model.device), mask.to(model.device)
            output = model.base_model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            states = output.hidden_states[round(DEPTH * (len(output.hidden_states) - 1))].float()
            mask[:, 0] = 0
            weights = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(states)
            means[batch] = torch.einsum("bth,bt->bh", states, weights).cpu().numpy()

        each_batch(mean_states, token_batches([1 + len(row) for row in ids], TOKENS_AT_ONCE))
        return means

    return compute


def open_policy(bench: Bench) -> tuple[Any, Any]:
    """The stage's policy and its tokenizer, under its chat contract."""
    import torch

    from posttrain.models import load_policy, load_tokenizer

    context = bench.context
    given = context.input("policy")
    tokenizer, contract = load_tokenizer(given, context.at)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    model: Any = load_policy(given.model, tokenizer, contract, f"{context.at}: {given.name}", dtype=dtype)
    return model.to(device).eval(), tokenizer


def _by_sentence_model(source: ModelSource, step: EmbeddingStep, bench: Bench) -> Callable[[Sequence[str]], "Vectors"]:
    """What the model's own pipeline gives; it is loaded when the first chunk is missing."""
    loaded: list[Any] = []

    def compute(texts: Sequence[str]) -> "Vectors":
        import numpy as np

        from posttrain.batch import token_batches

        if not loaded:
            loaded.append(_load_sentence_model(source, step, f"{bench.context.at}: {step.name}.embedder"))
        (model,) = loaded
        lengths = [min(len(ids), model.max_seq_length) for ids in model.tokenizer(list(texts), verbose=False).input_ids]
        batches = list(token_batches(lengths, TOKENS_AT_ONCE))

        def encode(batch: list[int]) -> "Vectors":
            encoded = model.encode([texts[position] for position in batch], batch_size=len(batch), show_progress_bar=False)
            return np.asarray(encoded, dtype=np.float32)

        encoded = np.concatenate(each_batch(encode, batches))
        return encoded[np.argsort(np.concatenate(batches))]

    return compute


def _load_sentence_model(source: ModelSource, step: EmbeddingStep, at: str) -> Any:
    from threading import Lock

    from sentence_transformers import SentenceTransformer

    class Model(SentenceTransformer):
        """A sentence model whose tokenizer, which cannot serve two threads, serves one at a time."""

        lock = Lock()

        def preprocess(self, *arguments: Any, **options: Any) -> Any:
            with self.lock:
                return super().preprocess(*arguments, **options)

    try:
        model = Model(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{at}: {source.model} cannot be loaded as a sentence-transformers model: {reason}") from error
    model.max_seq_length = min(step.embedded_tokens, model.max_seq_length or step.embedded_tokens)
    return model
