"""Configuration: from a pipeline file and `key=value` overrides to checked, frozen objects. No torch, no network.

A config class lists its fields with type, bound and one line of help: the line under a field is its docstring, and the
only place where its help stands. What changes the bytes of a stage's output bears identity and is fingerprinted; a class
whose fields only say where and how fast states `bears_identity = False`, and its fields never are.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from posttrain.error import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Config(BaseModel):
    """A frozen set of checked fields; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
    bears_identity: ClassVar[bool] = True
    """Whether the fields of this very class (not of those derived from it) change the bytes of an output."""


class ModelSource(Config):
    """A model from outside: a local directory, or a Hub id pinned to a commit."""

    model: str
    """Local directory in Hugging Face layout, or a Hub id such as `some-org/some-base`."""
    revision: str | None = None
    """Full commit hash (40 hex digits) of a Hub id. A branch or a tag moves, so it is refused."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off unless you have read that code."""

    @model_validator(mode="after")
    def _pinned(self) -> "ModelSource":
        _check_pin(self.model, self.revision, "model")
        return self


class DataSource(Config):
    """Data from outside: local files or Hub data sets, one or several, in one format or detected ones."""

    data: str | list[str]
    """Path of a JSON, JSONL, CSV or Parquet file, or a Hub id as `some-org/some-set@<40 hex>`; or a list of these."""
    format: Literal["messages", "prompt_completion", "alpaca", "sharegpt", "preference", "prompt"] | None = None
    """How a row is laid out; by default read off the columns, where they leave no doubt."""
    columns: dict[str, str] = {}
    """Our field name to the name of the column that holds it, e.g. `{prompt: question, completion: answer}`."""
    weights: list[float] | None = None
    """Share of the rows taken from each entry of `data`; no row is repeated, so the scarcest entry sets the total."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts that is held out. A prompt goes to one side whole, whatever rows it stands in."""
    part: Literal["train", "held_out", "all"] = "all"
    """Which side of the `held_out` split this source is."""
    invalid_rows: Literal["error", "drop"] = "error"
    """What happens to a row that does not fit its format: refuse the whole source, or leave the row out and say how many."""
    max_samples: int | None = Field(None, ge=1)
    """At most this many rows, drawn at random by `seed`; all by default."""
    seed: int = 0
    """Seed of the draw, of the mixture and of the held-out split."""

    @property
    def paths(self) -> list[str]:
        """The entries of `data`, as a list."""
        return [self.data] if isinstance(self.data, str) else self.data

    @model_validator(mode="after")
    def _consistent(self) -> "DataSource":
        if not self.paths:
            raise ValueError("data: the list is empty; name at least one file or Hub data set")
        for entry in self.paths:
            name, _, revision = entry.partition("@")
            _check_pin(name, revision or None, "data")
        if self.weights is not None:
            if len(self.weights) != len(self.paths):
                raise ValueError(f"weights: {len(self.weights)} given for {len(self.paths)} entries of data; give one for each")
            if any(w <= 0 for w in self.weights):
                raise ValueError(f"weights: {self.weights} must all be above 0; leave the entry out instead")
        if self.part != "all" and self.held_out == 0:
            raise ValueError(f"part: {self.part} needs held_out, the share of the prompts to hold out, such as 0.05")
        return self


class LauncherConfig(Config):
    """How a stage becomes processes on machines."""

    bears_identity: ClassVar[bool] = False

    kind: Literal["local"] = "local"
    """`local`: processes on this machine, forked from one warm parent."""
    num_processes: int | None = Field(None, ge=1)
    """Processes of a stage; by default one for each GPU, or one on a CPU."""


class PipelineConfig(Config):
    """One pipeline file: the name of the run, what enters from outside, and the stages in order."""

    run: str
    """Name of the run, and of its directory under the root."""
    sources: dict[str, ModelSource | DataSource]
    """Everything that enters from outside, by name."""
    stages: dict[str, dict[str, Any]]
    """The stages in the order in which they run; each may read sources and stages listed above it."""
    launcher: LauncherConfig = LauncherConfig()
    """How stages become processes."""

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, sources: object) -> object:
        if not isinstance(sources, Mapping):
            raise ValueError("sources must be a mapping of names to `{model: ...}` or `{data: ...}`")
        return {name: read_source(f"sources.{name}", raw) for name, raw in sources.items()}

    @model_validator(mode="after")
    def _names(self) -> "PipelineConfig":
        for what, names in (("run", [self.run]), ("sources", list(self.sources)), ("stages", list(self.stages))):
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(f"{what}: {name!r} is no usable name; use letters, digits, '.', '_', '-', beginning with a letter or digit")
        if both := sorted(set(self.sources) & set(self.stages)):
            raise ValueError(f"stages.{both[0]}: a source has that name too; rename one of them")
        if not self.stages:
            raise ValueError("stages: none listed; add at least one")
        return self


C = TypeVar("C", bound=Config)


def read_source(at: str, raw: object) -> ModelSource | DataSource:
    """The source that `raw` describes: a model where it has the key `model`, data where it has `data`."""
    if not isinstance(raw, Mapping) or ("model" in raw) == ("data" in raw):
        raise UserError(f"{at}: must have either `model: ...` or `data: ...`")
    return validate(ModelSource if "model" in raw else DataSource, raw, at)


def read_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The checked pipeline file at `path`, with dotted `key=value` overrides applied. Raises `UserError`."""
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return validate(PipelineConfig, raw, "")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, by YAML 1.2 rules (`3e-5` is a number, `no` is a string). Raises `UserError`."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); give the path of a pipeline file") from None
    try:
        raw = _yaml().load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold a mapping with the keys run, sources and stages")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in `raw`, in place; the value is read as YAML. Raises `UserError`."""
    from ruamel.yaml.error import YAMLError

    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override!r}: an override is written key.key=value, such as stages.dpo.beta=0.05")
    try:
        value = _yaml().load(text)
    except YAMLError:
        raise UserError(f"{key}: {text!r} is not valid YAML; quote it") from None
    *parents, last = key.split(".")
    at = raw
    for depth, parent in enumerate(parents):
        below = at.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"{'.'.join(parents[: depth + 1])}: is no mapping, so {override!r} cannot be set in it")
        at = below
    at[last] = value


def validate(cls: type[C], raw: object, at: str) -> C:
    """`raw` as a `cls`, or one `UserError` naming the dotted path under `at`, the value and the fix."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(cls, error, at)) from None


def identity(config: Config) -> dict[str, Any]:
    """The fields that change the bytes of an output and differ from their defaults, as plain JSON values."""
    plain = config.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in plain.items() if _bears_identity(type(config), name)}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint `; did you mean X?`, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as a Hub id and not as something on this disk."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists() and Path(name).suffix not in DATA_SUFFIXES


DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz")


def _yaml() -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True)


def _bears_identity(cls: type[Config], field: str) -> bool:
    owners = [base for base in cls.__mro__ if field in base.__dict__.get("__annotations__", {})]
    return bool(owners[0].__dict__.get("bears_identity", True))


def _check_pin(name: str, revision: str | None, what: str) -> None:
    if is_hub_id(name):
        if revision is None:
            raise ValueError(f"{what}: {name!r} is not on this disk, and as a Hub id it needs a pinned commit of 40 hex digits")
        if not COMMIT.fullmatch(revision):
            raise ValueError(f"revision: {revision!r} is no commit hash; a branch or tag moves, so give the 40 hex digits it points to")
    elif revision is not None:
        raise ValueError(f"revision: {name!r} is a local path and has no revision; leave it out")


def _explain(cls: type[Config], error: ValidationError, at: str) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"] if not str(part).endswith("]")]
    dotted = ".".join(([at] if at else []) + location)
    if first["type"] == "extra_forbidden":
        return f"{dotted}: unknown key; {nearest(location[-1], _known_keys(cls, location[:-1]))}"
    if first["type"] == "missing":
        return f"{dotted}: missing; it is required"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message if message.startswith(("sources.", "stages.")) else f"{dotted}: {message}" if dotted else message
    message = message[0].lower() + message[1:]
    return f"{dotted}: {message}, got {_short(first['input'])}"


def _known_keys(cls: type[Config], location: Sequence[str]) -> list[str]:
    for part in location:
        field = cls.model_fields.get(part)
        nested = [c for c in _config_classes(field.annotation)] if field else []
        if not nested:
            return []
        cls = nested[0]
    return list(cls.model_fields)


def _config_classes(annotation: object) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _config_classes(argument)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fields_help(cls: type[Config]) -> list[tuple[str, str, str, str]]:
    """`(name, type, default, help)` of every field, in the order of definition."""
    rows = []
    for name, field in cls.model_fields.items():
        kind = _type_name(field.annotation)
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        rows.append((name, kind, default, field.description or ""))
    return rows


def _type_name(annotation: object) -> str:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("posttrain.config.", "").replace("NoneType", "None")
