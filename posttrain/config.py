"""Configuration: from a pipeline file and `key=value` overrides to checked, frozen objects. No torch, no network.

A config class lists its fields with type, bound and one line of help: the line under a field is its docstring, and the
only place where its help stands. What changes the bytes of a stage's output bears identity and is fingerprinted; a class
whose fields only say where and how fast states `bears_identity = False`, and its fields never are.
"""

import difflib
import errno
import functools
import inspect
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from posttrain import disk
from posttrain.error import UserError
from posttrain.hardware import NAMES
from posttrain.secret import find_secrets

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz")
MAX_FILE_BYTES = 4 << 20
MAX_DEPTH = 100
MAX_VALUES = 200_000
"""Values in a YAML text, each counted as often as an alias repeats it."""
INPUT_FILE = "input file"
"""Marks a field that names a file, `Annotated[str | None, INPUT_FILE]`: what the file holds bears identity, not where it lies.

In a list, `Annotated[list[str], INPUT_FILE]`, an entry is a file where it ends as one of `FILE_ENDINGS`."""
FILE_ENDINGS = (".yaml", ".yml")


class Config(BaseModel):
    """A frozen set of checked fields; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
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
    allow_pickle: bool = False
    """Load weights that are pickles where there are no safetensors; PyTorch takes nothing but tensors from them. Better convert them."""
    license: str | None = None
    """Licence that the model is under, such as `apache-2.0`, for the card of what is exported; it changes no fingerprint."""

    @field_validator("model")
    @classmethod
    def _expand_home(cls, model: str) -> str:
        return _expand_home(model)

    @model_validator(mode="after")
    def _pinned(self) -> "ModelSource":
        _check_pin(self.model, self.revision, field="model", pin_field="revision")
        return self


class DataSource(Config):
    """Data from outside: local files or Hub data sets, one or several, in one format or detected ones."""

    data: str | list[str]
    """Path of a JSON, JSONL, CSV or Parquet file, or a Hub id as `some-org/some-set@<40 hex>`; or a list of these."""
    format: Literal["messages", "prompt_completion", "alpaca", "sharegpt", "preference", "unpaired", "prompt", "text"] | None = None
    """How a row is laid out; by default read off the columns, where they leave no doubt."""
    columns: dict[str, str] = {}
    """Our field name to the name of the column that holds it, e.g. `{prompt: question, completion: answer}`."""
    column_names: list[str] | None = None
    """Names of the columns of a CSV file that has no header line, as in `datasets`; by default the first line names them."""
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
    license: str | None = None
    """Licence that the data are under, such as `cc-by-4.0`, for the card of what is exported; it changes no fingerprint."""

    @property
    def paths(self) -> list[str]:
        """The entries of `data`, as a list."""
        return [self.data] if isinstance(self.data, str) else self.data

    @field_validator("data")
    @classmethod
    def _expand_home(cls, data: str | list[str]) -> str | list[str]:
        return _expand_home(data) if isinstance(data, str) else [_expand_home(entry) for entry in data]

    @model_validator(mode="after")
    def _consistent(self) -> "DataSource":
        if not self.paths:
            raise ValueError("data: the list is empty; name at least one file or Hub data set")
        for entry in self.paths:
            name, _, revision = entry.partition("@")
            _check_pin(name, revision or None, field="data", pin_field="data")
        if self.column_names is not None:
            _check_column_names(self.column_names, self.paths)
        if self.weights is not None:
            if len(self.weights) != len(self.paths):
                raise ValueError(f"weights: {len(self.weights)} given for {len(self.paths)} entries of data; give one for each")
            if any(w <= 0 for w in self.weights):
                raise ValueError(f"weights: {self.weights} must all be above 0; leave the entry out instead")
        if self.part != "all" and self.held_out == 0:
            raise ValueError(f"part: {self.part} needs held_out, the share of the prompts to hold out, such as 0.05")
        return self


class Machines(Config):
    """What the machines of a launcher are, for `plan`, and for `run` to refuse what cannot fit on them."""

    bears_identity: ClassVar[bool] = False

    hardware: str | None = None
    """Name of the GPU that each process has, such as `h100-80gb`, or `cpu`; by default what is found on this machine."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU for an hour, in whatever currency, for what `plan` says of costs."""

    @field_validator("hardware")
    @classmethod
    def _is_known(cls, hardware: str | None) -> str | None:
        if hardware is not None and hardware not in NAMES:
            raise ValueError(f"{hardware!r} is not known here; {nearest(hardware.lower(), NAMES)}")
        return hardware


class LocalLauncher(Machines):
    """Processes on this machine, forked from one warm parent."""

    bears_identity: ClassVar[bool] = False

    kind: Literal["local"] = "local"
    """`local`: processes on this machine, forked from one warm parent."""
    num_processes: int | None = Field(default=None, ge=1)
    """Processes of a stage; by default one for each GPU, or one on a CPU."""


class Nodes(Machines):
    """Nodes of a cluster that a job is given to, all alike, whose files they share."""

    bears_identity: ClassVar[bool] = False

    num_nodes: int = Field(1, ge=1)
    """Nodes of a job."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each node; none are asked for by default."""
    processes_per_node: int | None = Field(None, ge=1)
    """Ranks on each node; by default one for each GPU, or one where there is none."""
    cpus_per_process: int | None = Field(None, ge=1)
    """Cores of each rank, and so its threads; by default what the cluster gives, which under Slurm often is a single one."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def num_processes(self) -> int:
        """Ranks of a job."""
        return self.num_nodes * self.tasks_per_node

    @model_validator(mode="after")
    def _lines_of_text(self) -> "Nodes":
        for name in type(self).model_fields:
            value = getattr(self, name)
            for text in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not (text.strip() and text.replace("\t", " ").isprintable()):
                    raise ValueError(f"{name}: {text!r} is no line of text")
        return self


class SlurmLauncher(Nodes):
    """A job of a Slurm cluster for each stage, whose files all nodes share."""

    bears_identity: ClassVar[bool] = False

    kind: Literal["slurm"] = "slurm"
    """`slurm`: a job for each stage."""
    partition: str | None = None
    """Partition, as `sinfo` names it; by default the cluster's own."""
    account: str | None = None
    """Account that the job is charged to."""
    qos: str | None = None
    """Quality of service."""
    time: int | str | None = None
    """Time limit of a job, as `sbatch` reads it: minutes, `4:00:00` or `2-00:00:00`; by default the partition's."""
    save_before_s: int = Field(300, ge=1, le=65535)
    """Seconds before the time limit at which ranks save and the job requeues itself; Slurm may say so a minute early."""
    max_requeues: int = Field(5, ge=0)
    """How often in a row a job is started again although the time before it came no further; then it fails."""
    check_nodes: bool = True
    """Whether a job of several nodes first finds out if they fit together: a minute, at most once a day for the same nodes and code."""
    setup: list[str] = []
    """Lines of shell that the job's script begins with, such as `module load cuda`."""
    sbatch: list[str] = []
    """Further options of `sbatch`, such as `--constraint=a100`, each a line of the script."""
    ranks: Literal["srun", "torchrun"] = "srun"
    """What starts ranks: `srun` each of them, or one `torchrun` a node."""
    python: str | None = None
    """Interpreter of the ranks; by default the one that submits, and `python` in a container."""
    container: str | None = None
    """Image that the ranks run in, which holds this project and its libraries; the driver runs outside of it."""
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """What runs the image: the command `apptainer`, or options that the plugin pyxis adds to `srun`."""
    container_mounts: list[str] = []
    """Directories that the image is to see under the same path, beside the working directory and the root of all runs."""

    @model_validator(mode="after")
    def _consistent(self) -> "SlurmLauncher":
        for option in self.sbatch:
            _check_sbatch_option(option)
        if self.time is not None:
            limit_s = _slurm_seconds(str(self.time))
            if limit_s is None:
                raise ValueError(f"time: {self.time!r} is no time limit; give minutes, `4:00:00` or `2-00:00:00`")
            if limit_s <= self.save_before_s:
                raise ValueError(f"save_before_s: {self.save_before_s} leaves nothing of the {limit_s} s of time; lower it, or raise time")
        return self


class HostsLauncher(Machines):
    """Machines that are reached by ssh and share their files: torchrun on each, started and stopped from here."""

    bears_identity: ClassVar[bool] = False

    kind: Literal["hosts"] = "hosts"
    """`hosts`: machines that are reached by ssh."""
    hosts: list[str] = Field(min_length=1)
    """Names of the machines, as ssh takes them; ranks find one another at the first."""
    hostfile: str | None = None
    """File with a machine a line, as `name slots=8`, in place of `hosts` and `processes_per_host`."""
    processes_per_host: int = Field(1, ge=1)
    """Ranks on each machine: one for each GPU."""
    cpus_per_process: int | None = Field(None, ge=1)
    """Cores of each rank, and so its threads; by default they share those of their machine."""
    port: int = Field(29500, ge=1024, le=65535)
    """Port of the first machine at which ranks find one another."""
    ssh: list[str] = []
    """Further options of ssh, such as `-p` and `2222`. It must ask for nothing."""
    setup: list[str] = []
    """Lines of shell that come first on each machine, such as `export NCCL_SOCKET_IFNAME=ib0`; the environment here does not reach them."""
    python: str | None = None
    """Interpreter on the machines; by default the path of the one here."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each machine."""
        return self.processes_per_host

    @property
    def num_processes(self) -> int:
        """Ranks of a stage."""
        return len(self.hosts) * self.processes_per_host

    @model_validator(mode="before")
    @classmethod
    def _read_hostfile(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or not isinstance(raw.get("hostfile"), str):
            return raw
        if "hosts" in raw:
            raise ValueError("hostfile: names the machines, and hosts does too; give one or the other")
        names, slots = read_hostfile(raw["hostfile"])
        return {**{name: value for name, value in raw.items() if name != "hostfile"}, "hosts": names, "processes_per_host": slots}

    @model_validator(mode="after")
    def _consistent(self) -> "HostsLauncher":
        for name in self.hosts:
            if not HOST.fullmatch(name):
                raise ValueError(f"hosts: {name!r} is no name of a machine")
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError(f"hosts: {next(name for name in self.hosts if self.hosts.count(name) > 1)!r} stands twice; name it once")
        for name in ("ssh", "setup"):
            for text in getattr(self, name):
                if not (text.strip() and text.replace("\t", " ").isprintable()):
                    raise ValueError(f"{name}: {text!r} is no line of text")
        return self


def read_hostfile(path: str) -> tuple[list[str], int]:
    """The machines in a hostfile of DeepSpeed's form, and the slots of each, which must be as many. Raises `ValueError`."""
    try:
        lines = _read_file(Path(path)).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"hostfile: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found = re.fullmatch(r"slots=([1-9]\d{0,3})", words[1]) if len(words) == 2 else None
        if found is None or words[0] in slots:
            raise ValueError(
                f"hostfile: {path}:{number}: {line.strip()!r} is no line `name slots=8` of a machine that stands nowhere above"
            )
        slots[words[0]] = int(found[1])
    if len(set(slots.values())) != 1:
        raise ValueError(f"hostfile: {path} must name machines with as many slots each")
    return list(slots), next(iter(slots.values()))


class Toleration(Config):
    """A taint of nodes that pods may run on all the same; names as in Kubernetes."""

    bears_identity: ClassVar[bool] = False

    key: str | None = None
    """Key of the taint; none is every one."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint need but be there, or have that value."""
    value: str | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; none is every one."""


class SecretVariable(Config):
    """An environment variable whose value stands in a Secret of the cluster, and nowhere else."""

    bears_identity: ClassVar[bool] = False

    variable: str
    """Name of the variable, such as `HF_TOKEN`."""
    name: str
    """Name of the Secret."""
    key: str
    """Its entry that holds the value."""


class KubernetesLauncher(Nodes):
    """A JobSet of a Kubernetes cluster for each stage, whose pods share volumes."""

    bears_identity: ClassVar[bool] = False

    kind: Literal["kubernetes"] = "kubernetes"
    """`kubernetes`: a JobSet for each stage, one pod a node."""
    image: str
    """Image of the pods, which holds this project and its libraries."""
    volumes: dict[str, str] = Field(min_length=1)
    """Directory to the PersistentVolumeClaim that all pods see there: the root of all runs and the data, under the same paths as here."""
    namespace: str | None = None
    """Namespace; by default that of kubectl's context."""
    memory: str | None = None
    """Memory of each pod beside that of its GPUs, such as `1500Gi`."""
    shared_memory: str | None = None
    """Most of it that `/dev/shm` may take, such as `64Gi`; by default half of the node's. NCCL needs more than a pod has otherwise."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    resources: dict[str, str] = {}
    """Further resources of each pod, such as `rdma/hca: "8"`."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    tolerations: list[Toleration] = []
    """Taints that a node may have."""
    env: dict[str, str] = {}
    """Environment variables of the ranks, such as `NCCL_SOCKET_IFNAME: eth0`."""
    secrets: list[SecretVariable] = []
    """Environment variables that come from Secrets of the cluster."""
    service_account: str | None = None
    """Service account of the pods; they ask nothing of the cluster themselves."""
    image_pull_secrets: list[str] = []
    """Secrets by which the image is pulled."""
    priority_class: str | None = None
    """Priority class of the pods."""
    queue: str | None = None
    """Local queue of Kueue that the JobSets are given to."""
    python: str = "python"
    """Interpreter in the image."""
    max_restarts: int = Field(3, ge=0)
    """How often a stage is begun again after a crash. Drained nodes and whatever else saves first (exit code 75) do not count."""
    save_within_s: int = Field(600, ge=1)
    """Seconds that a pod has to save and end when it is asked to."""
    keep_finished_s: int = Field(7 * 24 * 3600, ge=0)
    """Seconds after which the cluster forgets a JobSet that has ended; what it made stays."""

    @model_validator(mode="after")
    def _consistent(self) -> "KubernetesLauncher":
        for directory in self.volumes:
            if not directory.startswith("/") or ":" in directory:
                raise ValueError(f"volumes: {directory!r} is no absolute path")
        for name in ("memory", "shared_memory"):
            value = getattr(self, name)
            if value is not None and not QUANTITY.fullmatch(value):
                raise ValueError(f"{name}: {value!r} is no quantity of Kubernetes; write it as `1500Gi`")
        for name, value in self.resources.items():
            if name in ("cpu", "memory", self.gpu_resource):
                field = {"cpu": "cpus_per_process", "memory": "memory"}.get(name, "gpus_per_node")
                raise ValueError(f"resources: {name!r} is a field of the launcher; set {field} instead")
            if not QUANTITY.fullmatch(value):
                raise ValueError(f"resources: {name!r} is {value!r}, which is no quantity of Kubernetes; write it as `8` or `64Gi`")
        for name in [*self.env, *(entry.variable for entry in self.secrets)]:
            if not VARIABLE_NAME.fullmatch(name):
                raise ValueError(f"env: {name!r} is no name of an environment variable")
            if name in POD_VARIABLES:
                raise ValueError(f"env: {name!r} is set by the pipeline; leave it out")
        return self


LauncherConfig: TypeAlias = LocalLauncher | HostsLauncher | SlurmLauncher | KubernetesLauncher
"""How a stage becomes processes on machines."""
LAUNCHERS: Mapping[str, type[LocalLauncher] | type[HostsLauncher] | type[SlurmLauncher] | type[KubernetesLauncher]] = {
    "local": LocalLauncher,
    "hosts": HostsLauncher,
    "slurm": SlurmLauncher,
    "kubernetes": KubernetesLauncher,
}
HOST = re.compile(r"[A-Za-z0-9_][\w.@:-]*")
"""A machine, as ssh is given it: it must not look like an option."""
QUANTITY = re.compile(r"[1-9][0-9]*(?:\.[0-9]+)?(?:m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
"""An amount of something, as Kubernetes writes it."""
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
POD_VARIABLES = (
    "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JOB_COMPLETION_INDEX",
    "POSTTRAIN_JOB", "POSTTRAIN_RESTART",
)  # fmt: skip
"""Environment variables of a pod that the pipeline itself relies on."""
SBATCH_FIELDS = {
    "--partition": "partition",
    "--account": "account",
    "--qos": "qos",
    "--nodes": "num_nodes",
    "--ntasks-per-node": "processes_per_node",
    "--ntasks": "processes_per_node",
    "--gpus-per-node": "gpus_per_node",
    "--cpus-per-task": "cpus_per_process",
    "--time": "time",
    "--signal": "save_before_s",
}
"""Options of `sbatch` that a field stands for."""
SBATCH_OWNED = (
    "--job-name", "--output", "--error", "--open-mode", "--chdir", "--requeue", "--no-requeue", "--dependency", "--kill-on-invalid-dep",
    "--array", "--wrap", "--parsable", "--test-only", "--wait", "--hold",
)  # fmt: skip
"""Options of `sbatch` that the pipeline itself relies on."""


def _check_sbatch_option(option: str) -> None:
    name = re.split(r"[=\s]", option)[0]
    if not name.startswith("--"):
        raise ValueError(f"sbatch: {option!r} is no long option; write it as `--name=value`")
    if name in SBATCH_FIELDS:
        raise ValueError(f"sbatch: {option!r} is a field of the launcher; set {SBATCH_FIELDS[name]} instead")
    if name in SBATCH_OWNED:
        raise ValueError(f"sbatch: {option!r} is set by the pipeline; leave it out")


def _slurm_seconds(text: str) -> int | None:
    """A time limit in seconds: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`; None where it is none of these, or is nothing."""
    if not re.fullmatch(r"\d{1,6}(?::\d{1,2}){0,2}|\d{1,4}-\d{1,2}(?::\d{1,2}){0,2}", text, re.ASCII):
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = ([*parts, 0, 0] if dash else [0, *parts, 0] if len(parts) < 3 else parts)[:3]
    return (((int(days or 0) * 24 + hours) * 60) + minutes) * 60 + seconds or None


class PipelineConfig(Config):
    """One pipeline file: the name of the run, what enters from outside, and the stages in order."""

    run: str
    """Name of the run, and of its directory under the root."""
    sources: dict[str, ModelSource | DataSource]
    """Everything that enters from outside, by name."""
    stages: dict[str, dict[str, Any]]
    """The stages in the order in which they run; each may read sources and stages listed above it."""
    launcher: LauncherConfig = LocalLauncher()
    """How stages become processes."""
    smoke: bool | list[str] | None = None
    """Whether stages that train are first tried for two steps: all, none, or those named. By default those that other machines or several
    GPUs are to train for long."""

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, sources: object) -> object:
        if not isinstance(sources, Mapping):
            raise ValueError("must be a mapping of names to `{model: ...}` or `{data: ...}`")
        return {name: read_source(f"sources.{name}", raw) for name, raw in sources.items()}

    @field_validator("launcher", mode="before")
    @classmethod
    def _read_launcher(cls, launcher: object) -> object:
        return read_launcher("launcher", launcher)

    @model_validator(mode="after")
    def _names(self) -> "PipelineConfig":
        for what, names in (("run", [self.run]), ("sources", list(self.sources)), ("stages", list(self.stages))):
            for name in names:
                if not NAME.fullmatch(name):
                    rule = "use up to 100 letters, digits, '.', '_', '-', beginning with a letter or digit"
                    raise ValueError(f"{what}: {name!r} is no usable name; {rule}")
        if both := sorted(set(self.sources) & set(self.stages)):
            raise ValueError(f"stages.{both[0]}: a source has that name too; rename one of them")
        if not self.stages:
            raise ValueError("stages: none listed; add at least one")
        for name in self.smoke if isinstance(self.smoke, list) else []:
            if name not in self.stages:
                raise ValueError(f"smoke: {name!r} is no stage; {nearest(name, list(self.stages))}")
        return self


C = TypeVar("C", bound=Config)


def read_source(at: str, raw: object) -> ModelSource | DataSource:
    """The source that `raw` describes: a model where it has the key `model`, data where it has `data`."""
    if not isinstance(raw, Mapping) or ("model" in raw) == ("data" in raw):
        raise UserError(f"{at}: must have either `model: ...` or `data: ...`")
    return validate(ModelSource, raw, at) if "model" in raw else validate(DataSource, raw, at)


def read_launcher(at: str, raw: object) -> LauncherConfig:
    """The launcher that `raw` describes, by its `kind`: that of this machine where it names none."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{at}: must be a mapping such as `{{kind: local}}`, got {_short(raw)}")
    kind = raw.get("kind", "local")
    if not isinstance(kind, str) or kind not in LAUNCHERS:
        raise UserError(f"{at}.kind: input should be {' or '.join(map(repr, LAUNCHERS))}, got {_short(kind)}")
    return validate(LAUNCHERS[kind], raw, at)


def read_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The checked pipeline file at `path`, with dotted `key=value` overrides applied. Raises `UserError`."""
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    if place := next(find_secrets(raw), None):
        raise UserError(
            f"{place}: reads like a credential, and all settings are recorded beside what is built; take it from the environment "
            "(HF_TOKEN for the Hub, the variable that api_key_env names for a judge)"
        )
    return validate(PipelineConfig, raw, "")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, by YAML 1.2 rules (`3e-5` is a number, `no` is a string). Raises `UserError`."""
    try:
        text = _read_file(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); give the path of a pipeline file") from None
    try:
        raw = load_yaml(text)
    except YamlProblem as problem:
        raise UserError(f"{path}{f':{problem.line}' if problem.line else ''}: {problem}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold a mapping with the keys run, sources and stages")
    return raw


def _read_file(path: Path) -> str:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise ValueError(f"over {MAX_FILE_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8")


class YamlProblem(ValueError):
    """What is wrong with a YAML text, and in which line, where that is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def load_yaml(text: str) -> Any:
    """The value of a YAML text, as JSON could hold it, no two places of it sharing an object. Raises `YamlProblem`."""
    import yaml

    try:
        _refuse_depth(text)
        loader = _yaml_loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_repeated_keys(node)
            if _num_values(node, {}) > MAX_VALUES:
                raise YamlProblem(f"its aliases make more than {MAX_VALUES:,} values of it; write less, or repeat less")
            return _plain(loader.construct_document(node), "")
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = _one_line(error.problem or error.context or "not readable")
        line = mark.line + 1 if mark else 1
        raise YamlProblem(f"not valid YAML: {reason}", min(line, len(text.splitlines()) or 1)) from None  # not one past the end
    except YamlProblem:
        raise
    except Exception as error:  # an odd tag or deep nesting ends in errors of any kind inside the parser
        raise YamlProblem(f"not valid YAML: {_one_line(str(error) or type(error).__name__)}") from None


@functools.cache
def _yaml_loader() -> Any:
    """PyYAML's loader in C, with the scalars of YAML 1.2: no dates (a run may be named 2026-10-01), no yes and no, no octal 017."""
    import yaml

    class Loader(yaml.CSafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    for tag, pattern, first in _SCALARS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))
    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _read_int(loader.construct_scalar(node)))
    return Loader


_SCALARS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("float", r"[-+]?(?:\.[0-9_]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("int", r"[-+]?(?:[0-9][0-9_]*|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$", "-+0123456789"),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
)
"""What a plain scalar is read as, if not as text: tag, pattern and the letters it begins with (the core schema, and merge keys)."""


def _read_int(text: str) -> int:
    digits = text.replace("_", "")
    return int(digits, 0) if digits.lstrip("+-")[:2] in ("0b", "0o", "0x") else int(digits)


def _refuse_depth(text: str) -> None:
    """Refuse what is nested beyond sense, before a parser recurses into it."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_yaml_loader()):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise yaml.MarkedYAMLError(problem=f"nested over {MAX_DEPTH} deep", problem_mark=event.start_mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _refuse_repeated_keys(node: Any) -> None:
    import yaml

    left, seen = [node], set()
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        keys = set()
        for key, value in node.value:
            left += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(problem=f'found duplicate key "{key.value}"', problem_mark=key.start_mark)
                keys.add((key.tag, key.value))


def _num_values(node: Any, known: dict[int, int]) -> int:
    """How many values a node makes where each alias is a copy, and each merged mapping too; a node within itself is not counted again."""
    if id(node) not in known:
        known[id(node)] = 0
        parts = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value if node.id == "sequence" else []
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def _plain(value: object, at: str) -> Any:
    """A copy without aliases, so that an override changes only the place it names; refuses what JSON could not hold."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise YamlProblem(f"the key {_short(key)}{f' in {at}' if at else ''} is no text; put it in quotes")
        return {_plain(key, at): _plain(entry, f"{at}.{key}" if at else key) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, f"{at}.{number}" if at else str(number)) for number, entry in enumerate(value)]
    in_place = f"{at}: " if at else ""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise YamlProblem(f"{in_place}{_short(value)} holds half of a character; write it whole")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise YamlProblem(f"{in_place}a number of more than 64 bits is too large")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise YamlProblem(f"{in_place}{value} is not finite; give a number")
    elif value is not None:
        raise YamlProblem(f"{in_place}{_short(value)} is neither text, number, list nor mapping; put it in quotes")
    return value


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in `raw`, in place; the value is read as YAML. Raises `UserError`."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override!r}: an override is written key.key=value, such as stages.dpo.beta=0.05")
    try:
        value = load_yaml(text)
    except YamlProblem as problem:
        raise UserError(f"{key}: {_short(text)}: {problem}") from None
    *parents, last = key.split(".")
    at = raw
    for depth, parent in enumerate(parents):
        if at.get(parent) is None:
            at[parent] = {}
        at = at[parent]
        if not isinstance(at, dict):
            raise UserError(f"{'.'.join(parents[: depth + 1])}: is no mapping, so {override!r} cannot be set in it")
    at[last] = value


def validate(cls: type[C], raw: object, at: str) -> C:
    """`raw` as a `cls`, or one `UserError` naming the dotted path under `at`, the value and the fix."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(cls, error, at)) from None


def identity(config: Config, at: str) -> dict[str, Any]:
    """The fields that change the bytes of an output and differ from their defaults, as plain JSON values; of a nested config the same.

    A field that names an input file is replaced by the hash of its content. Raises `UserError`, naming the path under `at`.
    """
    plain = config.model_dump(mode="json", exclude_defaults=True)
    fields = type(config).model_fields
    return {
        name: identity(nested, f"{at}.{name}")
        if isinstance(nested := getattr(config, name), Config)
        else _by_content(fields[name], value, f"{at}.{name}")
        for name, value in plain.items()
        if _bears_identity(type(config), name)
    }


def _by_content(field: FieldInfo, value: Any, at: str) -> Any:
    if INPUT_FILE not in field.metadata or value is None:
        return value
    if isinstance(value, list):
        places = enumerate(value)
        return [_by_content(field, entry, f"{at}.{number}") if entry.endswith(FILE_ENDINGS) else entry for number, entry in places]
    path = Path(value)
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise UserError(f"{at}: {value} is no regular file; give the path of one")
        return f"sha256 {disk.hash_file(path)}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{at}: {value} cannot be read ({reason}); give the path of a file") from None


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint `; did you mean X?`, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as a Hub id and not as something on this disk."""
    if not HUB_ID.fullmatch(name) or Path(name).suffix in DATA_SUFFIXES:
        return False
    try:
        return not Path(name).exists()
    except OSError:
        return False  # something of that name cannot be looked at, or no name could be that long: reading it will say


def _expand_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        return path  # no such user: the path does not exist, and that is said where it is read


@functools.cache
def _bears_identity(cls: type[Config], field: str) -> bool:
    owners = [base for base in cls.__mro__ if field in inspect.get_annotations(base)]
    return bool(owners[0].__dict__.get("bears_identity", True))


def _check_pin(name: str, revision: str | None, *, field: str, pin_field: str) -> None:
    if is_hub_id(name):
        if revision is None:
            raise ValueError(f"{field}: {name!r} is not on this disk, and as a Hub id it needs a pinned commit of 40 hex digits")
        if not COMMIT.fullmatch(revision):
            raise ValueError(f"{pin_field}: {revision!r} is no commit hash; a branch or tag moves, so give the 40 hex digits it points to")
    elif revision is not None:
        raise ValueError(f"{pin_field}: {name!r} is a local path and has no revision; leave it out")


def _check_column_names(names: list[str], paths: Sequence[str]) -> None:
    if not names:
        raise ValueError("column_names: the list is empty; name every column, or leave it out")
    if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
        raise ValueError(f"column_names: {twice!r} stands twice; rename one")
    if other := next((path for path in paths if not path.lower().removesuffix(".gz").endswith(".csv")), None):
        raise ValueError(f"column_names: has no effect on {other!r}, which is no CSV file; leave it out, or make two sources")


def _explain(cls: type[Config], error: ValidationError, at: str) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key often also makes a required one missing: the misspelling is what helps.
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    location = _location(cls, first["loc"])
    dotted = ".".join(([at] if at else []) + location)
    if first["type"] == "extra_forbidden":
        return f"{dotted}: unknown key; {nearest(location[-1], _known_keys(cls, first['loc'][:-1]))}"
    if first["type"] == "union_tag_not_found":
        return f"{dotted}.{first['ctx']['discriminator'][1:-1]}: missing; it is required"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        known = re.findall("'(.*?)'", context["expected_tags"])
        return f"{dotted}.{context['discriminator'][1:-1]}: there is no {context['tag']!r}; {nearest(context['tag'], known)}"
    if first["type"] == "missing":
        return f"{dotted}: missing; it is required"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        # A check of a whole config begins its message with the field that is wrong.
        names_field = message.partition(":")[0] in _known_keys(cls, first["loc"])
        return f"{dotted}{'.' if names_field else ': '}{message}" if dotted else message
    message = message[0].lower() + message[1:]
    return f"{dotted}: {message}, got {_short(first['input'])}"


def _location(cls: type[Config], parts: Sequence[str | int]) -> list[str]:
    """The keys and positions that lead to an error, without pydantic's names for what it tried there."""
    annotation: Any = cls
    location = []
    for part in parts:
        arms = [arm for arm in get_args(annotation) if arm is not NoneType] if get_origin(annotation) in (Union, UnionType) else []
        if part == "[key]" or len(arms) > 1:
            annotation = None
            continue
        location.append(str(part))
        annotation = arms[0] if arms else annotation
        if isinstance(annotation, type) and issubclass(annotation, Config) and part in annotation.model_fields:
            annotation = annotation.model_fields[str(part)].annotation
        elif get_origin(annotation) in (dict, list):
            annotation = get_args(annotation)[-1]
    return location


def _known_keys(cls: type[Config], parts: Sequence[str | int]) -> list[str]:
    """The keys of the config that these parts, as pydantic names them, lead to."""
    arms = [cls]
    for part in parts:
        if isinstance(part, int):  # a place in a list
            continue
        if len(arms) > 1:  # which of several the config is, by its `kind`
            arms = [arm for arm in arms if part in get_args(arm.model_fields["kind"].annotation)]
            continue
        field = arms[0].model_fields.get(part)
        arms = list(_config_classes(field.annotation)) if field else []
        if not arms:
            return []
    return list(arms[0].model_fields)


def _config_classes(annotation: object) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from _config_classes(argument)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fields_help(cls: type[Config], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """`(name, type, default, help)` of every field, in the order of definition; those of a nested config follow it."""
    rows = []
    for name, field in cls.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else "" if isinstance(default, Config) else repr(default)
        rows.append((prefix + name, _type_name(field.annotation), shown, field.description or ""))
        for nested in _config_classes(field.annotation):
            rows += fields_help(nested, f"{prefix}{name}.")
    return rows


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    return "None" if annotation is NoneType else str(getattr(annotation, "__name__", annotation))
