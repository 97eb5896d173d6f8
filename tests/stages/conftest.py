"""What the tests of stages share: a package that stands in for vLLM."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Ended

UNUSED = {
    "sampling_params": "StructuredOutputsParams",
    "utils.network_utils": "get_ip",
    "distributed.weight_transfer.nccl_common": "trainer_init",
    "distributed.weight_transfer.packed_tensor": "packed_nccl_broadcast_producer",
    "distributed.weight_transfer.nccl_engine": "NCCLTrainerSendWeightsArgs = NCCLWeightTransferEngine",
}
"""What TRL imports of vLLM, and does not use where engine and training share a process."""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A directory of packages, with one that stands in for vLLM."""
    root = tmp_path / "packages"
    for module, names in UNUSED.items():
        path = root.joinpath("vllm", *module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{names} = None\n")
    (root / "vllm" / "__init__.py").write_text(Path(__file__).with_name("stand_in_vllm.py").read_text())
    known = root / "vllm-0.25.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.25.0\n")
    (known / "top_level.txt").write_text("vllm\n")
    return root


@pytest.fixture
def with_vllm(stand_in: Path) -> Callable[..., Ended]:
    """`with_vllm("run", "x.yaml", ..., NAME="value")`: one command where the stand-in is installed, and variables are set."""

    def call(*arguments: object, **variables: object) -> Ended:
        ended = subprocess.run(
            [sys.executable, "pipeline.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(stand_in)} | {name: str(value) for name, value in variables.items()},
            capture_output=True,
            text=True,
            timeout=900,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return call
