"""Log-probabilities and gradients in every layout against plain passes of the model, a sequence at a time; many architectures."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from posttrain.data.samples import IGNORED
from posttrain.forward import Scorer, attach, exact_layouts, score_batch, to_batch
from posttrain.layout import Group, conversation_group, pair_group, restore_attention

BOTH = ["shared", "packed"]
VOCABULARY = 101
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
WHOLE = {**BASE, "num_key_value_heads": 4}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.15, "bos_token_id": 1}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, GQA": ("Llama", BASE),
    "llama, biases": ("Llama", {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", BASE),
    "qwen2, a window that it does not use": ("Qwen2", {**BASE, "sliding_window": 8, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {**BASE, "head_dim": 8}),
    "qwen3 moe": ("Qwen3Moe", {**BASE, **EXPERTS, "head_dim": 8}),
    "mistral": ("Mistral", {**BASE, "sliding_window": None}),
    "mistral, a wide window": ("Mistral", {**BASE, "sliding_window": 4096}),
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 4}),
    "gemma": ("Gemma", {**BASE, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {**BASE, "head_dim": 8, "sliding_window": 4096}),
    "gpt2": ("GPT2", {**OLD, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoX", WHOLE),
    "phi": ("Phi", {**WHOLE, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", BASE),
    "olmo": ("Olmo", {**BASE, "clip_qkv": 1.0}),
    "olmo2": ("Olmo2", BASE),
    "granite": ("Granite", {**BASE, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3}),
    "cohere": ("Cohere", {**BASE, "logit_scale": 0.25}),
    "starcoder2": ("Starcoder2", {**BASE, "sliding_window": None}),
    "smollm3": ("SmolLM3", BASE),
}
"""Plain causal attention in some dress: both layouts must be there, or the stage is slower than it need be."""

PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, a narrow window": ("Mistral", {**BASE, "sliding_window": 16}),
    "gemma2": ("Gemma2", {**BASE, "head_dim": 8, "sliding_window": 4096, "attn_logit_softcapping": 5.0}),
    "gemma3, a narrow window": ("Gemma3Text", {**BASE, "head_dim": 8, "sliding_window": 8}),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}),
    "falcon, alibi": ("Falcon", {**OLD, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "initializer_range": 0.15}),
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.15}),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "lfm2, convolutions beside attention": ("Lfm2", {**BASE, "layer_types": ["conv", "full_attention"], "initializer_range": 0.5}),
    "falcon, whose attention is its own": (
        "Falcon",
        {**OLD, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    ),
    "stablelm": ("StableLm", BASE),
    "gpt-oss, sinks": ("GptOss", {**BASE, "num_local_experts": 4, "head_dim": 8, "sliding_window": 4096}),
}
"""More than that: only padded rows are right."""


@functools.cache
def built(architecture: str) -> Any:
    name, values = {**EXACT, **PADDED}[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, which start at 0 and 1: what is left out is then not seen
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def fresh(architecture: str = "llama, GQA") -> Any:
    return copy.deepcopy(built(architecture))


def tokens(draw: np.random.Generator, count: int) -> list[int]:
    return [int(token) for token in draw.integers(3, VOCABULARY, count)]


def many_groups() -> dict[str, list[Group]]:
    draw = np.random.default_rng(1)

    def group(prompt: int, *answers: int) -> Group:
        return pair_group(tokens(draw, prompt), [tokens(draw, answer) for answer in answers])

    counted = [draw.random(n) < 0.6 for n in (12, 1, 30, 9)]
    return {
        "pairs": [group(9, 6, 4), group(5, 3, 12)],
        "one token": [group(1, 1, 7), group(3, 1, 1), group(1, 1, 1)],
        "four branches": [group(8, 5, 3, 9, 1), group(4, 2, 2, 2, 2)],
        "unlike lengths": [group(2, 1, 40), group(30, 2, 9), group(1, 1, 2)],
        "unlike numbers": [group(3, 4), group(2, 3, 5, 2), conversation_group(tokens(draw, 6), [True] * 6)],
        "conversations": [conversation_group(tokens(draw, len(which)), which.tolist()) for which in counted],
        "nothing in common": [Group([], [tokens(draw, 5), tokens(draw, 8)], [[False] * 2 + [True] * 3, [False] * 3 + [True] * 5])],
    }


GROUPS = many_groups()


def plain(model: Any, groups: list[Group]) -> list[torch.Tensor]:
    """The reference: of every sequence by itself, the log-probabilities of its counted tokens; in TRL's order of pairs."""
    found = []
    for branch in range(max(len(group.branches) for group in groups)):
        for group in groups:
            if branch >= len(group.branches):
                continue
            ids = torch.tensor([[*group.prefix, *group.branches[branch]]])
            which = torch.tensor([False] * len(group.prefix) + list(group.counted[branch]))[1:]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0][which])
    return found


def ours(model: Any, groups: list[Group], layout: Any) -> list[torch.Tensor]:
    """The same by an attached model."""
    batch = to_batch(groups, layout, 0)
    output = model(**batch, fused_lm_head=True)
    wanted = batch["labels"][:, 1:] != IGNORED
    assert not output.log_probs[~wanted].any()
    return [row[which] for row, which in zip(output.log_probs, wanted, strict=True)]


def learned(score: Callable[[], list[torch.Tensor]], model: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradients of all parameters where every token counts by another weight."""
    model.zero_grad()
    log_probs = score()
    flat = torch.cat(log_probs)
    (flat * torch.linspace(-1, 1.5, len(flat))).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return [values.detach() for values in log_probs], gradients


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for ours_, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-4)
    assert {name for name, g in found[1].items() if g.any()} == {name for name, g in expected[1].items() if g.any()}
    for name, gradient in expected[1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[1].get(name, torch.zeros(())), gradient, rtol=0, atol=1e-4 * max(1.0, largest), msg=name)


def settled(architecture: str) -> tuple[Any, list[Any], str]:
    """The model attached, in what layouts it is exact for sequences of up to 48 tokens, and why in no more."""
    model = fresh(architecture)
    attach(model)
    return (model, *exact_layouts(model, model, BOTH, 48))


# --- which layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EXACT)
def test_in_every_layout_log_probs_and_gradients_are_those_of_each_sequence_alone(architecture: str) -> None:
    model, layouts, reason = settled(architecture)
    assert (layouts, reason) == (BOTH, "")
    alone = fresh(architecture)
    for groups in GROUPS.values():
        expected = learned(lambda groups=groups: plain(alone, groups), alone)
        for layout in (*BOTH, "padded"):
            assert_same(learned(lambda groups=groups, layout=layout: ours(model, groups, layout), model), expected)


@pytest.mark.parametrize("architecture", PADDED)
def test_a_model_of_which_sequences_are_more_than_causal_attention_is_computed_padded_and_says_why(architecture: str) -> None:
    model, layouts, reason = settled(architecture)
    assert layouts == ["padded"] and reason
    alone = fresh(architecture)
    for groups in GROUPS.values():
        with torch.no_grad():
            for found, expected in zip(ours(model, groups, "padded"), plain(alone, groups), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_window_is_a_limit_only_to_sequences_that_reach_beyond_it() -> None:
    model = fresh("mistral, a narrow window")
    attach(model)
    assert exact_layouts(model, model, BOTH, 17) == (["padded"], "its attention reaches 16 tokens back, and the longest sequence has 17")


def test_padded_rows_are_never_probed() -> None:
    assert exact_layouts(lambda **_: pytest.fail("it was called"), fresh(), ["padded"], 48) == (["padded"], "")


def test_probing_leaves_the_model_in_the_mode_it_was_in() -> None:
    for training in (True, False):
        model = fresh().train(training)
        attach(model)
        exact_layouts(model, model, BOTH, 48)
        assert all(module.training == training for module in model.modules())


# --- what sees what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*BOTH, "padded"])
@pytest.mark.parametrize("architecture", ["llama, GQA", "gpt2", "mixtral"])
def test_a_rejected_answer_is_blind_to_the_chosen_one_and_to_other_pairs(layout: Any, architecture: str) -> None:
    model, _, _ = settled(architecture)
    prompt, answers = [3, 4, 5], [[6, 7, 8, 9], [10, 11, 12]]
    before = score_batch(model, model, [pair_group(prompt, answers), pair_group([20, 21], [[22], [23]])], layout, pad=0)
    other = score_batch(
        model, model, [pair_group(prompt, [[50, 51, 52, 53], answers[1]]), pair_group([60, 61], [[62], [63]])], layout, pad=0
    )
    np.testing.assert_allclose(before[0][1], other[0][1], rtol=0, atol=1e-6)
    assert np.abs(before[0][0] - other[0][0]).max() > 1e-2


def test_the_gradient_of_a_rejected_answer_reaches_no_token_of_the_chosen_one() -> None:
    model, _, _ = settled("llama, GQA")
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    groups = [pair_group([3, 4, 5], [[6, 7, 8, 9], [10, 11, 12]])]
    ours(model, groups, "shared")[1].sum().backward()
    reached = seen[0].grad[0].abs().sum(dim=-1) > 0
    # The prompt, then the chosen answer, then the rejected one but for its last token, which predicts nothing.
    assert reached.tolist() == [True] * 3 + [False] * 4 + [True, True, False]


def test_the_first_token_of_every_answer_is_predicted_from_the_last_of_the_prompt() -> None:
    model, _, _ = settled("llama, GQA")
    prompt, firsts = [3, 4, 5], [6, 7, 8, 9]
    scored = score_batch(model, model, [pair_group(prompt, [[first, 10] for first in firsts])], "shared", pad=0)
    with torch.no_grad():
        expected = fresh()(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[firsts]
    np.testing.assert_allclose([answer[0] for answer in scored[0]], expected, rtol=0, atol=1e-5)


def test_scores_come_back_by_group_and_branch() -> None:
    model, _, _ = settled("llama, GQA")
    groups = GROUPS["unlike numbers"]
    for layout in (*BOTH, "padded"):
        scored = score_batch(model, model, groups, layout, pad=0)
        assert [[len(branch) for branch in group] for group in scored] == [[4], [3, 5, 2], [5]]
        for group, of_group in zip(groups, scored, strict=True):
            for branch, found in enumerate(of_group):
                one = Group(group.prefix, [group.branches[branch]], [group.counted[branch]])
                with torch.no_grad():
                    np.testing.assert_allclose(found, plain(fresh(), [one])[0], rtol=0, atol=1e-5)


# --- the model besides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama, GQA", "gpt2", "mixtral"])
@pytest.mark.parametrize("layout", BOTH)
def test_gradient_checkpointing_changes_no_gradient(architecture: str, layout: Any) -> None:
    model, _, _ = settled(architecture)
    alone = fresh(architecture)
    groups = GROUPS["pairs"]
    expected = learned(lambda: plain(alone, groups), alone)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    assert_same(learned(lambda: ours(model, groups, layout), model), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_plain_calls_and_generation_are_as_before(implementation: str) -> None:
    alone, model = fresh(), fresh()
    for each in (alone, model):
        each.set_attn_implementation(implementation)
    attach(model)
    layouts, reason = exact_layouts(model, model, BOTH, 48)
    assert (layouts, reason) == ((BOTH, "") if implementation == "sdpa" else (["padded"], "the attention backend eager"))
    ids = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 8, 9, 10]])
    mask = (ids > 0).long()
    with torch.no_grad():
        for values in ({"attention_mask": mask}, {}, {"attention_mask": mask, "labels": ids}):
            found, expected = (each(input_ids=ids, **values) for each in (model, alone))
            assert torch.equal(found.logits, expected.logits)
            assert found.loss is None if "labels" not in values else torch.equal(found.loss, expected.loss)
        # Between two laid-out calls, too.
        score_batch(model, model, GROUPS["pairs"], layouts[0], pad=0)
        greedy = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
        assert torch.equal(model.generate(ids, **greedy), alone.generate(ids, **greedy))


def test_a_model_gets_its_attention_back() -> None:
    for implementation in ("sdpa", "eager"):
        model = fresh()
        model.set_attn_implementation(implementation)
        attach(model)
        exact_layouts(model, model, BOTH, 48)
        assert (model.config._attn_implementation == implementation) == (implementation == "eager")
        for _ in range(2):
            restore_attention(model)
            assert model.config._attn_implementation == implementation


def test_a_padded_call_may_come_between_a_laid_out_forward_and_its_backward() -> None:
    model, _, _ = settled("llama, GQA")
    alone = fresh()
    groups = GROUPS["pairs"]

    def disturbed() -> list[torch.Tensor]:
        found = ours(model, groups, "shared")
        with torch.no_grad():
            ours(model, GROUPS["unlike lengths"], "padded")
            ours(model, GROUPS["unlike lengths"], "packed")
        return found

    assert_same(learned(disturbed, model), learned(lambda: plain(alone, groups), alone))


def test_the_experts_balance_is_that_of_the_models_own_loss() -> None:
    alone, model = fresh("mixtral"), fresh("mixtral")
    attach(model)
    batch = to_batch(GROUPS["pairs"], "padded", 0)
    own = alone(**batch, output_router_logits=True)
    found = model(**batch, output_router_logits=True, fused_lm_head=True)
    torch.testing.assert_close(found.aux_loss, own.aux_loss)
    assert model(**batch, fused_lm_head=True).aux_loss is None


@pytest.mark.parametrize("layout", BOTH)
def test_the_experts_balance_counts_no_padding_in_any_layout(layout: Any) -> None:
    model, _, _ = settled("mixtral")
    # Of one length and nothing shared, so that the same tokens are computed in every layout.
    groups = [conversation_group(ids, [True] * 9) for ids in np.random.default_rng(0).integers(3, VOCABULARY, (3, 9)).tolist()]
    laid, padded = (
        model(**to_batch(groups, name, 0), output_router_logits=True, fused_lm_head=True).aux_loss for name in (layout, "padded")
    )
    torch.testing.assert_close(laid, padded)


# --- Scorer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "layout"), [("llama, GQA", "shared"), ("bloom", "padded"), ("granite", "shared")])
def test_a_scorer_gives_what_plain_passes_give_in_the_fastest_exact_layout(architecture: str, layout: str) -> None:
    scorer = Scorer(fresh(architecture), longest=48, pad=0)
    assert scorer.layout == layout
    groups = [*GROUPS["pairs"], *GROUPS["four branches"], *GROUPS["conversations"]]
    batches = list(scorer.batches(groups, 40))
    assert sorted(number for batch in batches for number in batch) == list(range(len(groups)))
    assert len(batches) > 2
    for batch in batches:
        for number, scored in zip(batch, scorer.score([groups[number] for number in batch]), strict=True):
            with torch.no_grad():
                for found, expected in zip(scored, plain(built(architecture), [groups[number]]), strict=True):
                    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama, GQA", "bloom"])
def test_a_scorer_says_how_sure_each_counted_token_was_predicted(architecture: str) -> None:
    scorer, alone = Scorer(fresh(architecture), longest=48, pad=0), built(architecture)
    groups = GROUPS["conversations"]
    for group, (found,) in zip(groups, scorer.predict(groups), strict=True):
        (branch,) = group.branches
        (counted,) = group.counted
        ids = [*group.prefix, *branch]
        with torch.no_grad():
            probs = alone(torch.tensor([ids])).logits[0].softmax(-1).numpy()
        places = [place for place in range(1, len(ids)) if [*[False] * len(group.prefix), *counted][place]]  # nothing predicts the first
        before = probs[[place - 1 for place in places]]
        np.testing.assert_allclose(found.top_probs, before.max(axis=1), rtol=1e-4)
        assert found.is_top1.tolist() == [float(row.argmax() == ids[place]) for row, place in zip(before, places, strict=True)]
        np.testing.assert_allclose(found.log_probs, np.log(before[np.arange(len(places)), [ids[place] for place in places]]), atol=1e-4)


@pytest.mark.real
def test_a_real_model_is_scored_as_a_plain_pass_scores_it(stories: Any) -> None:
    alone = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    scorer = Scorer(copy.deepcopy(alone), longest=64, pad=0)
    assert scorer.layout == "shared"
    for groups in GROUPS.values():
        with torch.no_grad():
            expected = plain(alone, groups)
        scored = scorer.score(groups)
        flat = [scored[n][b] for b in range(4) for n in range(len(groups)) if b < len(groups[n].branches)]
        for found, wanted in zip(flat, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
