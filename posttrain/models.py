"""Models: loaded under a chat contract, published as plain Hugging Face directories, and read back to prove it.

What a stage publishes is verified in a fresh process: plain `from_pretrained`, every tensor against the hash taken from
the trained model, logits on a probe batch against those of the live model, and the contract against what was written.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils.hub import cached_file

from posttrain import disk
from posttrain.adapters import Adapted
from posttrain.artifact import OUTPUT
from posttrain.chat import ChatContract, adopt, apply_to_generation, check_contract, establish, read_contract
from posttrain.config import ModelSource
from posttrain.error import Preempted, UserError
from posttrain.fsdp import PREFIX, gathered_beside_layers, layers_of, reshard
from posttrain.machine import give_memory_back, giving_memory_back
from posttrain.ranks import any_rank
from posttrain.recipe import MAX_SHARD_BYTES, LoraRecipe, TrainingConfig
from posttrain.sandbox import MAX_TEMPLATE_CHARS
from posttrain.share import reading_rows
from posttrain.stage import ArtifactKind, Input, StageContext
from posttrain.weights import Trained, Weights, describe, gather_state, gathered, open_stored, tensors_of, write_weights

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a model that transformers reads as JSON objects, whose keys decide what it loads."""
TEMPLATE_FILE = "chat_template.jinja"
ADAPTER_FILE = "adapter_config.json"
SCORE = "score.weight"
"""What a reward model has and a policy has not."""
MAX_SETTINGS_BYTES = 64 << 20
PROBE_FILE = "probe.safetensors"
PUBLISHED_FILE = "published.json"
ADAPTER = "adapter"
PROBE_TOKENS = 48
"""Length of the probe rows; logits are kept for their last positions."""
PROBE_KEPT = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 5e-2}
"""Allowed root mean square difference of the logits after the hand-off, in standard deviations of all logits, by the coarsest type
involved. Rounding weights to bfloat16 gave 0.015 to 0.09 for a model of 135 M (an instruct model after 20 steps at 3e-5, whose steps are as
small as what is rounded away); logits of unrelated models differ by 1.4. The bytes themselves are compared by hash."""


def load_tokenizer(
    given: Input, at: str, *, chat_template: str | None = None, system_prompt: str | None = None, contract: ChatContract | None = None
) -> tuple[PreTrainedTokenizerBase, ChatContract]:
    """The tokenizer of a policy and its chat contract: its own, else `contract`, else one established now.

    Reads no weights. Raises `UserError` where the model's files are no model, and where a policy with a contract is asked to change it.
    """
    source = given.model
    tokenizer = load_bare_tokenizer(given, at)
    own = read_contract(Path(source.model))
    template = _read_template(chat_template, at)
    if own is not None:
        if template is not None or system_prompt is not None:
            field = "chat_template" if template is not None else "system_prompt"
            raise UserError(
                f"{at}.{field}: {given.name} has a chat contract already, which must not change on the way; set it on the first stage"
            )
        check_contract(own, tokenizer, f"{at}: {given.name}")
        return tokenizer, own
    if contract is not None and tokenizer.chat_template is None:
        adopt(tokenizer, contract)
        return tokenizer, contract
    generation = load_generation_config(source)
    return tokenizer, establish(tokenizer, generation, template=template, system_prompt=system_prompt, at=at)


def load_bare_tokenizer(given: Input, at: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy as it lies there. Raises `UserError` where the model's files are no model."""
    source = given.model
    check_files(given, at)
    with _explain(source, f"{at}: {given.name}"):
        tokenizer = AutoTokenizer.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    if not len(tokenizer):
        raise UserError(f"{at}: {given.name}: {source.model} holds no tokenizer; copy the tokenizer files of the model there")
    return tokenizer


def check_files(given: Input, at: str) -> None:
    """Raise `UserError` where a model's settings are damaged, or ask for what its source does not permit: code, pickles, another model.

    Nothing of transformers has read the files by then.
    """
    source = given.model
    at = f"{at}: {given.name}"
    for name in SETTINGS:
        path = _find(source, name)
        if path is None:
            continue
        settings = _read_settings(path, at)
        if "auto_map" in settings and not source.trust_remote_code:
            raise UserError(
                f"{at}: {path} asks for Python code that the model ships (auto_map); set sources.{given.name}.trust_remote_code: true once "
                "you have read that code, or take auto_map out where transformers knows the architecture itself"
            )
        if kernel := next(_kernels(settings), None):
            raise UserError(f"{at}: {path} asks for code from the Hub ({kernel}); take that key out")
        weights = settings.get("transformers_weights")
        if weights is not None and not (isinstance(weights, str) and weights.endswith((".safetensors", ".safetensors.index.json"))):
            raise UserError(f"{at}: {path} names {weights!r} as its weights, which are no safetensors; take transformers_weights out")
    template = _find(source, TEMPLATE_FILE)
    if template is not None and template.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
        raise UserError(f"{at}: {template} is over {4 * MAX_TEMPLATE_CHARS >> 20} MiB, so it is no chat template")
    if _find(source, ADAPTER_FILE) is not None:
        raise UserError(f"{at}: {source.model} holds an adapter ({ADAPTER_FILE}), which names another model; merge it into that one first")
    if source.revision is None and not source.allow_pickle and not _weights(source, WEIGHTS) and (found := _weights(source, PICKLES)):
        raise UserError(
            f"{at}: {found} is a pickle, which may run code when it is loaded, and there are no safetensors; convert the weights, "
            f"or set sources.{given.name}.allow_pickle: true"
        )


def _find(source: ModelSource, name: str) -> Path | None:
    """Where a file of a model lies on this disk, fetched from the Hub where it is not here yet; None where the model has none."""
    found = cached_file(
        source.model,
        name,
        revision=source.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _kernels(settings: dict[str, Any]) -> Iterator[str]:
    """Kernels of the Hub that the settings of a model, or of a part of it, name; a slash makes a name one."""
    for key, value in settings.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            yield f"{key}: {value}"
        elif isinstance(value, dict):
            yield from _kernels(value)


def _weights(source: ModelSource, names: Sequence[str]) -> Path | None:
    return next((path for name in names if (path := Path(source.model) / name).is_file()), None)


def _read_settings(path: Path, at: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise UserError(f"{at}: {path} is over {MAX_SETTINGS_BYTES >> 20} MiB, so it is no settings of a model; copy it again")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{at}: {path} is damaged ({_one_line(error)}); copy it again") from None
    if not isinstance(settings, dict):
        raise UserError(f"{at}: {path} must hold a JSON object; copy it again")
    return settings


def check_weights(given: Input, at: str) -> None:
    """Raise `UserError` where a local model's weights are missing or cut off, or nobody knows what they are the weights of.

    A tokenizer alone can be inspected with, and not trained.
    """
    source = given.model
    check_files(given, at)
    at = f"{at}: {given.name}"
    if source.revision is not None:
        return
    found = _weights(source, (*WEIGHTS, *PICKLES))
    if found is None:
        raise UserError(f"{at}: {source.model} holds none of {', '.join(WEIGHTS)}, so it is no model directory with safetensors weights")
    for path in _shards(found, at) if found.suffix == ".json" else [found]:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):  # reads the header, and knows how long the file must be
                    pass
            except (OSError, SafetensorError) as error:
                raise UserError(f"{at}: {path} is damaged ({_one_line(error)}); copy it again") from None
    with _explain(source, at):
        AutoConfig.from_pretrained(source.model, trust_remote_code=source.trust_remote_code)


def weight_files(given: Input, at: str, *, or_pickles: bool = False) -> list[Path]:
    """The safetensors that hold a model's weights, fetched from the Hub where they are not here yet; or pickles, where there are none.

    Raises `UserError`.
    """
    source, at = given.model, f"{at}: {given.name}"
    settings = _find(source, "config.json")
    told = None if settings is None else _read_settings(settings, at).get("transformers_weights")
    names = [told] if told else [*WEIGHTS, *PICKLES] if or_pickles else WEIGHTS
    found = next((path for name in names if (path := _find(source, name))), None)
    if found is None:
        raise UserError(f"{at}: {source.model} holds none of {', '.join(names)}, and nothing else is read here; convert its weights")
    if found.suffix != ".json":
        return [found]
    for name in set(_read_settings(found, at).get("weight_map", {}).values()):
        _find(source, str(name))
    return _shards(found, at)


def _shards(index: Path, at: str) -> list[Path]:
    """The files of weights that an index names, all of which must lie beside it."""
    record = _read_settings(index, at)
    names = record.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()) or "metadata" not in record:
        raise UserError(f"{at}: {index} has no metadata, or no weight_map of tensors to files; copy it again")
    for name in sorted(set(names.values())):
        # By the name alone: in the cache of the Hub, files are links to elsewhere.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{at}: {index} names {name!r}, which lies outside of the model's directory")
        if not (index.parent / name).is_file():
            raise UserError(f"{at}: {index} names {name!r}, which is not there; copy it too")
    return [index.parent / name for name in sorted(set(names.values()))]


def load_generation_config(source: ModelSource) -> GenerationConfig:
    """The generation config of a model, or the defaults that its config implies."""
    if _find(source, "generation_config.json") is not None:
        return GenerationConfig.from_pretrained(source.model, revision=source.revision or "main")
    config = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    return GenerationConfig.from_model_config(config)


def load_policy(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    at: str,
    *,
    dtype: Any,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model that knows every token of its contract, and stops where the contract says.

    `dtype` is a torch type or `auto`, the stored one; `options` are further ones of `from_pretrained`. Under DeepSpeed ZeRO-3 the
    weights are sharded while they are read, and with a `mesh` each rank reads its rows alone (`share`), for `fsdp.shard`.
    """
    whole_tables = _brings_tokens(source.model, contract)
    model = load_bare_policy(source, at, dtype=dtype, reading=reading_rows(mesh, whole_tables=whole_tables), **options)
    _add_tokens(model, tokenizer, contract)
    apply_to_generation(contract, tokenizer, model)
    return model


def load_bare_policy(source: ModelSource, at: str, *, dtype: Any, **options: Any) -> PreTrainedModel:
    """A causal language model as it lies there, which knows of no contract; the options are those of `load_policy`."""
    return _load(AutoModelForCausalLM, source, at, dtype=dtype, **options)


def load_reward_model(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    at: str,
    *,
    dtype: Any,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model with one number for a whole sequence, that knows every token of its contract; a policy gets a new, random head.

    The number is read off the last token that is no padding.
    """
    model = _load(
        AutoModelForSequenceClassification,
        source,
        at,
        new=(SCORE,),
        reading=reading_rows(mesh, new=(SCORE,), whole_tables=_brings_tokens(source.model, contract)),
        dtype=dtype,
        num_labels=1,
        **options,
    )
    _add_tokens(model, tokenizer, contract)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _load(
    auto_class: Any,
    source: ModelSource,
    at: str,
    *,
    new: Sequence[str] = (),
    reading: contextlib.AbstractContextManager[None] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model, all of whose weights are there but those that may be `new`; its files are read in `reading`."""
    with _explain(source, at), giving_memory_back(), reading or contextlib.nullcontext(), _reading_shards():
        loaded: Any = auto_class.from_pretrained(
            source.model,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=None if source.allow_pickle else True,  # None takes them where they are
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            output_loading_info=True,
            **options,
        )
    model, loading = loaded
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"{at}: {source.model} has weights of the shape {list(stored)} for {name}, and config.json says {list(wanted)}; copy it again"
        )
    if missing := sorted(set(loading["missing_keys"]) - set(new)):
        raise UserError(
            f"{at}: {source.model} has no weights for {missing[0]}, one of {len(missing)}; its config.json promises more than is there"
        )
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _reading_shards() -> Iterator[None]:
    """Under ZeRO-3, have tensors that are read be whole where they are shared out, and no earlier."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from posttrain.zero3 import reading

    with reading():
        yield


def loaded_dtype(config: TrainingConfig) -> torch.dtype:
    """The type in which a stage that trains holds the weights of its model."""
    return torch.bfloat16 if config.lora and config.uses_bf16 else torch.float32


def quantization(lora: LoraRecipe | None, dtype: torch.dtype) -> dict[str, Any]:
    """What has `from_pretrained` keep the weights of linear modules in 4 bits, and compute in `dtype`; nothing where none is asked for."""
    if lora is None or not lora.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # as in the paper
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)}


LOADERS: dict[ArtifactKind, Any] = {"policy": load_policy, "reward_model": load_reward_model}
AUTO_CLASSES: dict[ArtifactKind, Any] = {"policy": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The type in which a model's weights are stored."""
    config = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


@giving_memory_back()
def _add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contract: ChatContract) -> None:
    """Make room for the contract's new tokens; they start as the mean of the old ones (Hewitt, 2021), without noise."""
    if not _brings_tokens(model.config._name_or_path, contract):
        return
    known = model.config.get_text_config().vocab_size
    new = sorted({*token_ids(tokenizer, contract.added_tokens), *range(known, len(tokenizer))})
    if len(tokenizer) > known:
        _enlarge(model, len(tokenizer))
    for table in _embedding_tables(model):
        with gathered([table.weight], modify=True), torch.no_grad():
            if table.weight.numel():  # under ZeRO-3 the ranks that do not modify hold nothing
                start_tokens(table.weight, new)


def _enlarge(model: Any, size: int) -> None:
    """Give the model room for `size` tokens; the vectors of new ones are still to be set.

    Under ZeRO-3 no more than one table is whole at a time: transformers would leave all of them so until the engine is set up.
    """
    tables = _embedding_tables(model)
    if not all(hasattr(table.weight, "ds_id") and getattr(table, "bias", None) is None for table in tables):
        model.resize_token_embeddings(size, mean_resizing=False)
        return
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    for table in tables:
        old = table.weight
        with gathered([old]):
            enlarged = old.new_zeros(size, old.shape[1])
            enlarged[: len(old)] = old.detach()
        table.weight = torch.nn.Parameter(enlarged, requires_grad=old.requires_grad)
        del old, enlarged
        deepspeed.zero.Init(module=table, config_dict_or_path=deepspeed_config())
    model.get_input_embeddings().num_embeddings = size
    if (head := model.get_output_embeddings()) is not None:
        head.out_features = size
    model.config.get_text_config().vocab_size = model.vocab_size = size
    model.tie_weights()


def start_tokens(table: torch.Tensor, new: Sequence[int]) -> None:
    """Set the vectors of new tokens in a table `(vocabulary, H)`, in place, to the mean of those before them."""
    table[new] = table[: min(new)].mean(dim=0)


def _brings_tokens(stored: str, contract: ChatContract) -> bool:
    """Whether the contract has tokens that the model stored there does not know: one with a contract of its own knows all."""
    return bool(contract.added_tokens) and read_contract(Path(stored)) is None


def _embedding_tables(model: Any) -> list[Any]:
    """The modules that hold a vector for each token: one where input and output are tied, else two."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(table.weight): table for table in tables if table is not None}.values())


def token_tables(source: ModelSource) -> set[str]:
    """Names of the tensors that hold a vector for each token. Loads no weights."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=source.trust_remote_code)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    tables = {id(table.weight) for table in _embedding_tables(model)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in tables}


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens, in rising order."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list), "several tokens give several ids"
    return sorted(ids)


def train_new_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contract: ChatContract) -> None:
    """Let the embeddings of the contract's new tokens be trained in a LoRA model, whose other weights are frozen.

    Otherwise they would all stay at the same mean, and a stop token that equals another token is never chosen.
    """
    if not _brings_tokens(model.config._name_or_path, contract):
        return
    new = token_ids(tokenizer, contract.added_tokens)
    for table in _embedding_tables(model):

        def only_new(gradient: torch.Tensor) -> torch.Tensor:
            kept = torch.zeros_like(gradient)
            kept[new] = gradient[new]
            return kept

        table.weight.requires_grad_(True)
        with gathered_beside_layers(model):
            table.weight.register_hook(only_new)


def publish(
    context: StageContext[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contract: ChatContract,
    probe_ids: list[list[int]],
    *,
    given: Input,
    dtype: torch.dtype,
    forward: torch.nn.Module,
    max_shard_size: int = MAX_SHARD_BYTES,
) -> None:
    """Write the trained model to the stage's output, with all that its verification needs. All ranks call it.

    `model` is the bare (or peft) model, `forward` what computes its logits in training (the DeepSpeed engine, say). Ranks write the
    files of weights in turn, so that none ever holds more than its shards and one such file. Adapters are merged into the weights of the
    input policy as these are written, and lie beside them too.
    """
    logits = _probe(forward, model, probe_ids)
    release(forward)
    if context.is_main:
        shutil.rmtree(context.output, ignore_errors=True)
        context.output.mkdir(parents=True)
        save_file({"ids": torch.tensor(probe_ids), "logits": logits}, str(context.directory / PROBE_FILE))
    any_rank(False)  # the directory is there
    weights: Weights
    if hasattr(model, "peft_config"):
        state = gather_state({name: tensor for name, tensor in tensors_of(model).items() if tensor.requires_grad}, keep=context.is_main)
        if context.is_main:
            adapted: Any = model
            brings_tokens = _brings_tokens(adapted.get_base_model().config._name_or_path, contract)
            adapted.save_pretrained(context.output / ADAPTER, state_dict=state, save_embedding_layers=brings_tokens)
        del state
        weights = Adapted(model, open_stored(weight_files(given, context.at, or_pickles=given.model.allow_pickle)))
    else:
        weights = Trained(model)
    described = write_weights(context, weights, dtype, max_shard_size)
    if not context.is_main:
        return
    model = weights.model
    model.config.architectures = [type(model).__name__.removeprefix(PREFIX)]
    if model.can_generate():
        model.generation_config.save_pretrained(context.output)
    model.config.dtype = dtype  # after the weights: saving them writes down the type they were trained in
    model.config.save_pretrained(context.output)
    tokenizer.save_pretrained(context.output)
    contract.save(context.output)
    disk.write_json(context.directory / PUBLISHED_FILE, {"tensors": described})


def release(forward: torch.nn.Module) -> None:
    """Have ranks hold their shards alone, and give back what they held beside them, now that they train no more. All ranks call it."""
    if hasattr(forward, "empty_partition_cache"):
        forward.empty_partition_cache()  # type: ignore[operator]  # ZeRO-3 fetches ahead, also beyond the last pass
    reshard(forward)
    give_memory_back()
    any_rank(False)  # none holds more while others go on


def probe_rows(dataset: Any, columns: tuple[str, ...], count: int = 2) -> list[list[int]]:
    """Rows of token ids, `(count, T)`, cut to one length, for comparing a model before and after the hand-off."""
    indices = [round(number * (len(dataset) - 1) / (count - 1)) for number in range(count)]
    rows = [[token for column in columns for token in dataset[index][column]][:PROBE_TOKENS] for index in indices]
    length = min(map(len, rows))
    return [row[:length] for row in rows]


def _probe(forward: torch.nn.Module, model: PreTrainedModel, ids: list[list[int]]) -> torch.Tensor:
    """Logits `(B, K, V)` at the last positions of the probe rows, or their rewards `(B, 1)`, in float32 on the CPU."""
    was_training = forward.training
    forward.eval()
    with torch.no_grad():
        output = forward(input_ids=torch.tensor(ids, device=model.device), use_cache=False)
    forward.train(was_training)
    logits: torch.Tensor = output.logits[:, -PROBE_KEPT:]
    return logits.float().cpu().contiguous()


def compute_in_float32(model: Any) -> None:
    """Have a model compute in float32, as if all of it were that, while its weights stay as they are: a layer is cast for its own pass."""

    def cast_for_pass(module: torch.nn.Module, tensors: list[torch.Tensor]) -> None:
        kept: list[torch.Tensor] = []

        def before(*_: Any) -> None:
            kept.extend(tensor.data for tensor in tensors)
            for tensor in tensors:
                tensor.data = tensor.data.float()

        def after(*_: Any) -> None:
            for tensor, data in zip(tensors, kept, strict=True):
                tensor.data = data
            kept.clear()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    layers = set(layers_of(model))

    def visit(module: torch.nn.Module) -> None:
        is_layer = module in layers
        own = [*module.parameters(recurse=is_layer), *module.buffers(recurse=is_layer)]
        if lower := [tensor for tensor in own if tensor.is_floating_point() and tensor.dtype != torch.float32]:
            cast_for_pass(module, lower)
        for child in () if is_layer else module.children():
            visit(child)

    visit(model)


def verify_published(context: StageContext[Any], kind: ArtifactKind) -> dict[str, float]:
    """Reload the stage's output as any user would, and compare it with the live model. Raises `UserError` on a mismatch.

    Returns the root mean square difference of the probe logits, in standard deviations of all logits.
    """
    output = context.directory / OUTPUT
    at = f"{context.at}: {output}"
    unset_hf_deepspeed_config()  # a process that has trained under ZeRO-3 would share out what it loads
    loaded: Any = AUTO_CLASSES[kind].from_pretrained(output, dtype="auto", output_loading_info=True)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"]):
        raise RuntimeError(f"{at}: reloading it misses or invents tensors: {missing[:5]}")
    state = tensors_of(model)
    promised = disk.read_json(context.directory / PUBLISHED_FILE)["tensors"]
    tied = {name for name in promised if name not in state}
    if tied and not model.config.tie_word_embeddings:
        raise RuntimeError(f"{at}: {sorted(tied)[:5]} are gone after reloading")
    for name, tensor in state.items():
        if promised.get(name) != describe(tensor):
            raise RuntimeError(f"{at}: tensor {name} is {describe(tensor)} after reloading, and was {promised.get(name)}")
    tokenizer = AutoTokenizer.from_pretrained(output)
    _verify_contract(output, tokenizer, model, at)
    probe = load_file(str(context.directory / PROBE_FILE))
    compute_in_float32(model)
    logits = _probe(model, model, probe["ids"].tolist())
    live = probe["logits"]
    if logits.shape != live.shape:
        raise RuntimeError(f"{at}: logits have shape {tuple(logits.shape)} after reloading, and had {tuple(live.shape)}")
    drift = float((logits - live).square().mean().sqrt() / live.std())
    coarsest = _coarsest(context, promised)
    if not drift <= TOLERANCE[coarsest]:
        raise RuntimeError(
            f"{at}: logits differ by {drift:.2g} of their spread after reloading, over {TOLERANCE[coarsest]:g} for {coarsest}"
        )
    return {"handoff_logit_drift": drift}


def _verify_contract(output: Path, tokenizer: PreTrainedTokenizerBase, model: Any, at: str) -> None:
    contract = read_contract(output)
    assert contract is not None, f"{at}: published without a chat contract"
    check_contract(contract, tokenizer, at)
    if not model.can_generate():
        return
    stops = model.generation_config.eos_token_id
    promised = token_ids(tokenizer, contract.stop_tokens)
    if sorted(stops if isinstance(stops, list) else [stops]) != promised:
        raise RuntimeError(f"{at}: generation stops at token {stops}, but the chat contract says {promised}")
    if model.generation_config.pad_token_id != tokenizer.pad_token_id:
        raise RuntimeError(
            f"{at}: generation pads with token {model.generation_config.pad_token_id}, the tokenizer with {tokenizer.pad_token_id}"
        )


def _coarsest(context: StageContext[Any], tensors: dict[str, list[Any]]) -> torch.dtype:
    names = {described[1] for described in tensors.values()}
    lora = getattr(context.config, "lora", None)
    if context.config.uses_bf16 or (lora is not None and lora.load_in_4bit):  # some kernels for 4 bits compute in bfloat16 alone
        names.add("bfloat16")
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if str(dtype).removeprefix("torch.") in names), torch.float32)


def _read_template(chat_template: str | None, at: str) -> str | None:
    if chat_template is None:
        return None
    path = Path(chat_template)
    try:
        if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise UserError(f"{at}.chat_template: {path} is over {4 * MAX_TEMPLATE_CHARS >> 20} MiB, so it is no chat template")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{at}.chat_template: {chat_template} cannot be read ({reason}); give the path of a Jinja file") from None


@contextlib.contextmanager
def _explain(source: ModelSource, at: str) -> Iterator[None]:
    """One line for the user where transformers cannot load what a source names."""
    try:
        yield
    except (Preempted, MemoryError):
        raise
    except Exception as error:  # files that a stranger made may fail in any way, and `tokenizers` raises plain exceptions
        is_pickle = type(error).__name__ == "UnpicklingError"  # which tells how to let the pickle do as it likes
        reason = "its pickled weights are damaged, or hold more than tensors" if is_pickle else _one_line(error)
        raise UserError(f"{at}: {source.model} cannot be loaded as a causal language model: {reason}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
