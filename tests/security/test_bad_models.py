"""A zoo of model directories: what is damaged, or would run code, is refused with one line before anything is trained."""

import ast
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import disk
from posttrain.artifact import fingerprint_source
from posttrain.config import ModelSource
from posttrain.error import UserError
from posttrain.models import load_policy, load_tokenizer
from posttrain.stage import Input
from tests.conftest import REPOSITORY, Ended
from tests.security.preparing import Refuse, refuse, run_prepare, write_pipeline

__all__ = ["refuse"]

Break = Callable[[Path], object]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(name: str, **values: Any) -> Break:
    def apply(model: Path) -> None:
        settings = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps({**settings, **values}))

    return apply


def write(name: str, content: str | bytes) -> Break:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*names: str) -> Break:
    return lambda model: [(model / name).unlink() for name in names if (model / name).exists()]


def index(weight_map: Any, *, keep: bool = False) -> Break:
    def apply(model: Path) -> None:
        if not keep:
            (model / "model.safetensors").rename(model / "part.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def weights(edit: Callable[[bytes], bytes]) -> Break:
    return lambda model: (model / "model.safetensors").write_bytes(edit((model / "model.safetensors").read_bytes()))


def to_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def replace_head(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, model / "model.safetensors", metadata={"format": "pt"})


def without_weights(name: str, content: str) -> Break:
    return lambda model: (remove("model.safetensors")(model), write(name, content)(model))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ZOO: list[tuple[str, Break, str]] = [
    ("no config", remove("config.json"), "holds no config.json"),
    ("an empty config", write("config.json", ""), "config.json is damaged"),
    ("a config cut off", write("config.json", '{"model_type": "lla'), "config.json is damaged"),
    ("a config that is a list", write("config.json", "[]"), "config.json must hold a JSON object"),
    ("a config that is null", write("config.json", "null"), "config.json must hold a JSON object"),
    ("a config nested beyond sense", write("config.json", '{"a":' * 100_000), "config.json is damaged"),
    ("a config with a huge integer", write("config.json", '{"a": ' + "9" * 10_000 + "}"), "config.json is damaged"),
    ("a config in UTF-16", write("config.json", '{"a": 1}'.encode("utf-16")), "config.json is damaged"),
    ("a binary config", write("config.json", bytes(range(256))), "config.json is damaged"),
    ("no architecture", write("config.json", "{}"), "cannot be loaded"),
    ("an unknown architecture", change("config.json", model_type="no-such-model"), "cannot be loaded"),
    ("an architecture that is a list", change("config.json", model_type=["llama"]), "cannot be loaded"),
    ("a damaged generation config", write("generation_config.json", "{"), "generation_config.json is damaged"),
    ("a generation config that is text", write("generation_config.json", '"x"'), "generation_config.json must hold a JSON object"),
    ("no tokenizer", remove(*TOKENIZER), "tokenizer"),
    ("an empty tokenizer", write("tokenizer.json", ""), "cannot be loaded"),
    ("a tokenizer cut off", write("tokenizer.json", '{"version": "1.0", "model": {'), "cannot be loaded"),
    ("a tokenizer that is a list", write("tokenizer.json", "[]"), "cannot be loaded"),
    ("a tokenizer of another kind", write("tokenizer.json", '{"version": "1.0", "model": {"type": "Magic"}}'), "cannot be loaded"),
    ("a damaged tokenizer config", write("tokenizer_config.json", "{"), "tokenizer_config.json is damaged"),
    ("a tokenizer config that is a list", write("tokenizer_config.json", "[1]"), "tokenizer_config.json must hold a JSON object"),
    ("no weights", remove("model.safetensors"), "holds none of model.safetensors"),
    ("empty weights", write("model.safetensors", b""), "model.safetensors is damaged"),
    ("weights that are text", write("model.safetensors", b"weights"), "model.safetensors is damaged"),
    ("weights cut off", weights(lambda whole: whole[:-100]), "model.safetensors is damaged"),
    ("weights cut off in their header", weights(lambda whole: whole[:40]), "model.safetensors is damaged"),
    ("a header longer than the file", weights(lambda whole: struct.pack("<Q", 1 << 40) + whole[8:]), "model.safetensors is damaged"),
    ("a header that is no JSON", weights(lambda whole: whole[:8] + b"x" * 20 + whole[28:]), "model.safetensors is damaged"),
    ("a pickle named safetensors", write("model.safetensors", pickle.dumps({"a": 1})), "model.safetensors is damaged"),
    ("an index without a map", index(None), "or no weight_map"),
    ("an index of numbers", index({"lm_head.weight": 5}), "or no weight_map"),
    ("an index of a missing part", index({"lm_head.weight": "other.safetensors"}), "names 'other.safetensors', which is not there"),
    ("an index that leaves the directory", index({"lm_head.weight": "../part.safetensors"}), "outside of the model's directory"),
    ("an index with a way around", index({"lm_head.weight": "a/../../x.safetensors"}), "outside of the model's directory"),
    ("an index of an absolute path", index({"lm_head.weight": "/etc/passwd"}), "outside of the model's directory"),
    ("a damaged index", without_weights("model.safetensors.index.json", "{"), "is damaged"),
    ("pickled weights alone", to_pickle, "pytorch_model.bin is a pickle, which may run code"),
    ("a pickled index alone", without_weights("pytorch_model.bin.index.json", "{}"), "is a pickle"),
    ("weights under another name", change("config.json", transformers_weights="evil.bin"), "names 'evil.bin' as its weights"),
    ("an adapter that names another model", write("adapter_config.json", '{"base_model_name_or_path": "o/m"}'), "holds an adapter"),
    ("a kernel of the Hub", change("config.json", attn_implementation="someone/kernel"), "asks for code from the Hub"),
    ("a kernel of the Hub in a part", change("config.json", text_config={"_attn_implementation": "a/b"}), "asks for code from the Hub"),
    ("code for the model", change("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}), "trust_remote_code: true"),
    ("code for the tokenizer", change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}), "trust_remote_code: true"),
    ("a template without end", write("chat_template.jinja", "{# " + "x" * (5 << 20) + " #}"), "is no chat template"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in ZOO], ids=[case[0] for case in ZOO])
def test_a_bad_model_is_refused_in_one_line(model: Path, chat_file: Path, refuse: Refuse, spoil: Break, said: str) -> None:
    spoil(model)
    line = refuse(model, chat_file)
    assert said in line
    assert str(model) in line


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (replace_head, "weights of the shape [3, 3] for lm_head.weight"),
        (change("config.json", num_hidden_layers=3), "has no weights for model.layers.2"),
    ],
    ids=["wrong shapes", "a layer too few"],
)
def test_weights_that_do_not_fit_are_refused_when_they_are_loaded(
    model: Path, chat_file: Path, tmp_path: Path, posttrain: Callable[..., Ended], spoil: Break, said: str
) -> None:
    spoil(model)
    ended = posttrain("run", write_pipeline(tmp_path / "pipeline.yaml", model, chat_file), "--root", tmp_path / "runs")
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and said in line and str(model) in line
    assert not {path.name for path in (tmp_path / "runs").rglob("*")} & {"output", "artifact.json", "checkpoints", "lease.json"}


# --- code ------------------------------------------------------------------------------------------------------------

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.mark.parametrize("known", [True, False], ids=["known architecture", "unknown architecture"])
def test_code_of_a_model_is_not_run_unless_the_source_trusts_it(
    model: Path,
    chat_file: Path,
    tmp_path: Path,
    posttrain: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    refuse: Refuse,
    known: bool,
) -> None:
    mark = tmp_path / "was-run"
    (model / "evil.py").write_text(EVIL.format(mark=str(mark)))
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    change("config.json", auto_map=classes, **({} if known else {"model_type": "evil"}))(model)
    line = refuse(model, chat_file)
    assert "sources.base.trust_remote_code: true" in line
    assert not mark.exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline = write_pipeline(tmp_path / "pipeline.yaml", model, chat_file)
    trusting = run_prepare(posttrain, monkeypatch, pipeline, "--root", tmp_path / "runs", "sources.base.trust_remote_code=true")
    assert trusting.code == 1 and "prepared" in trusting.err
    assert mark.exists()
    recorded = json.loads((tmp_path / "runs" / "r" / "sft" / "stage.json").read_text())
    recorded = recorded.get("payload", recorded)
    assert recorded["inputs"]["policy"][0]["source"]["trust_remote_code"] is True


# --- pickles ---------------------------------------------------------------------------------------------------------


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_trained_where_the_source_allows_them(
    model: Path, chat_file: Path, tmp_path: Path, posttrain: Callable[..., Ended]
) -> None:
    to_pickle(model)
    pipeline = write_pipeline(tmp_path / "pipeline.yaml", model, chat_file)
    permitted = ("sources.base.allow_pickle=true", "stages.sft.max_steps=1")
    ended = posttrain("run", pipeline, "--root", tmp_path / "runs", *permitted)
    assert ended.code == 0, ended.err
    stage = tmp_path / "runs" / "r" / "sft"
    assert (stage / "output" / "model.safetensors").is_file()
    assert not list((stage / "output").rglob("*.bin"))
    recorded = json.loads((stage / "stage.json").read_text())
    assert recorded.get("payload", recorded)["inputs"]["policy"][0]["source"]["allow_pickle"] is True


@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_what_is_no_tensor_in_a_pickle_is_not_run_even_where_pickles_are_allowed(model: Path, tmp_path: Path, dtype: Any) -> None:
    mark = tmp_path / "was-run"
    change("config.json", dtype=None)(model)  # so that `auto` looks into the weights for it
    torch.save({**load_file(model / "model.safetensors"), "evil": Bomb(mark)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    source = ModelSource(model=str(model), allow_pickle=True)
    tokenizer, contract = load_tokenizer(Input("base", "policy", "", source), "stages.sft")
    with pytest.raises(UserError, match="hold more than tensors"):
        load_policy(source, tokenizer, contract, "stages.sft", dtype=dtype)
    assert not mark.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "it would have run"


def test_safetensors_are_taken_where_both_are_there(model: Path, chat_file: Path, tmp_path: Path, posttrain: Callable[..., Ended]) -> None:
    (model / "pytorch_model.bin").write_bytes(b"no weights")
    pipeline = write_pipeline(tmp_path / "pipeline.yaml", model, chat_file)
    ended = posttrain("run", pipeline, "--root", tmp_path / "runs", "stages.sft.max_steps=1", "sources.base.allow_pickle=true")
    assert ended.code == 0, ended.err


def test_what_is_permitted_changes_no_fingerprint(model: Path, tmp_path: Path) -> None:
    """The same files give the same bytes; what is not permitted gives none."""
    hashes = disk.HashCache(tmp_path / "hashes.json")
    sources = [
        ModelSource(model=str(model), allow_pickle=pickles, trust_remote_code=code) for pickles in (True, False) for code in (True, False)
    ]
    assert len({fingerprint_source(source, "sources.base", hashes) for source in sources}) == 1


def test_nothing_of_ours_unpickles() -> None:
    """`torch.load` only with `weights_only=True`, `numpy.load` never with `allow_pickle`, and no module that unpickles is imported."""
    found = []
    for path in [
        REPOSITORY / "pipeline.py",
        *(p for folder in ("posttrain", "stages", "benchmarks") for p in (REPOSITORY / folder).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            at = f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [
                    f"{at}: imports {name}"
                    for name in names
                    if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
                ]
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            called = ast.unparse(node.func)
            if called == "torch.load" and not (
                isinstance(options.get("weights_only"), ast.Constant) and options["weights_only"].value is True
            ):
                found.append(f"{at}: {called}")
            permits = options.get("allow_pickle")
            if called in ("np.load", "np.save", "numpy.load") and permits is not None and ast.unparse(permits) != "False":
                found.append(f"{at}: {called}")
    assert not found
