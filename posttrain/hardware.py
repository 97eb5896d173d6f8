"""Hardware: what one device can do at most, as its data sheet says, and what of that a training stage is taken to reach.

    name          bf16, dense     memory       its bandwidth   to its node   to others   data sheet
    h100-80gb     989.4 TFLOP/s    81,559 MiB  3.35 TB/s       450 GB/s      50 GB/s     NVIDIA H100 Tensor Core GPU (SXM)
    h200-141gb    989.4           143,771      4.8             450           50          NVIDIA H200 Tensor Core GPU (SXM)
    a100-80gb     312              81,920      2.039           300           25          NVIDIA A100 Tensor Core GPU (SXM)
    a100-40gb     312              40,960      1.555           300           25          the same
    l40s-48gb     362.05           46,068      0.864            32 (PCIe)    12.5        NVIDIA L40S
    cpu           what this machine has: `this_machine`

Data sheets print matrix speeds with sparsity, which is half of it without. Links are one way, and half of what is printed for both;
memory is what `nvidia-smi` shows. Networks are those of NVIDIA's own machines: 8 ports of 400 Gb/s for 8 GPUs (DGX H100 user
guide), 8 of 200 Gb/s (DGX A100 user guide), and of L40S servers 100 Gb/s a GPU, which is a guess. Their memory is 2 TB, with A100 of 40
GB 1 TB (the same guides); that of L40S servers is a guess too.

`efficiency` is an assumption, and the only one that times hang on: the share of the peak that products reach all in all, what is
computed again counted. MosaicML's tuned pretraining measured 0.47 to 0.59 on H100 and 0.59 to 0.79 on A100 (llm-foundry,
`scripts/train/benchmarking`, column HFU, 1 to 70 B); eager PyTorch is below that: 0.32 without what it computed again on H100 (torchtitan,
`benchmarks/llama3_h100_202412`, table 1) and 0.47 on A100 (Qwen's README, LoRA of 7B). That of L40S is a guess. Prices are not
here: they are the user's to give.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9


@dataclass(frozen=True)
class Hardware:
    """One device: a GPU, or all cores of a machine that a process may use."""

    name: str
    peak_flops: float
    """Operations a second of dense matrix products, in bfloat16 on a GPU and in float32 on a CPU."""
    memory_bytes: int
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second that it sends to another of its node."""
    network: float
    """Bytes a second that it sends to another node, when all of its node do."""
    host_link: float
    """Bytes a second between it and the memory of its machine."""
    per_node: int
    """How many a node has, usually."""
    host_bytes: int
    """Memory of such a node beside that of its devices."""
    efficiency: float
    """Share of the peak that matrix products of training reach."""
    runtime_bytes: int
    """What a process holds there before it has a model: libraries, the context of CUDA, buffers of NCCL and cuBLAS."""

    @property
    def is_gpu(self) -> bool:
        """Whether it has a memory of its own."""
        return self.name != "cpu"


_GPU_RUNTIME_BYTES = 3 * GIB // 2
"""Context of CUDA with the kernels of PyTorch 0.5 GiB, NCCL's channels 0.5 GiB, workspaces of cuBLAS and FlashAttention the rest."""

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100-80gb", 989.4e12, 81559 * MIB, 3.35e12, 450e9, 50e9, 64e9, 8, 2000 * GB, 0.40, _GPU_RUNTIME_BYTES),
        Hardware("h200-141gb", 989.4e12, 143771 * MIB, 4.8e12, 450e9, 50e9, 64e9, 8, 2000 * GB, 0.40, _GPU_RUNTIME_BYTES),
        Hardware("a100-80gb", 312e12, 81920 * MIB, 2.039e12, 300e9, 25e9, 32e9, 8, 2000 * GB, 0.50, _GPU_RUNTIME_BYTES),
        Hardware("a100-40gb", 312e12, 40960 * MIB, 1.555e12, 300e9, 25e9, 32e9, 8, 1000 * GB, 0.50, _GPU_RUNTIME_BYTES),
        Hardware("l40s-48gb", 362.05e12, 46068 * MIB, 0.864e12, 32e9, 12.5e9, 32e9, 8, 1000 * GB, 0.40, _GPU_RUNTIME_BYTES),
    )
}
NAMES: Sequence[str] = (*HARDWARE, "cpu")
CORE_FLOPS = 2.4e9 * 64
"""Operations a second of one core in float32, at 2.4 GHz: two fused products and sums of 16 numbers a cycle (AVX-512)."""
CPU_RUNTIME_BYTES = 700 * MIB
"""What a process has resident once it has imported torch, transformers, trl and deepspeed."""


def this_machine(num_cores: int) -> Hardware:
    """The CPU of this machine, with its memory; ranks on it talk over its loopback interface."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", CORE_FLOPS * num_cores, memory_bytes, 20e9, 1e9, 1e9, 20e9, 1, 0, 0.55, CPU_RUNTIME_BYTES)


def find(name: str, num_cores: int) -> Hardware:
    """The hardware of that name, one of `NAMES`."""
    return this_machine(num_cores) if name == "cpu" else HARDWARE[name]


def detect(gpus: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """The name of this machine's hardware, without asking torch; None where its GPU is not in the table."""
    models = []
    for information in gpus.glob("*/information"):
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        models += [line.partition(":")[2].strip().lower() for line in lines if line.startswith("Model:")]
    if not models:
        return "cpu"
    for name in HARDWARE:
        kind, size = name.split("-")
        # Names such as `NVIDIA A100-SXM4-80GB`, `NVIDIA H100 80GB HBM3` and `NVIDIA L40S`.
        if kind in models[0] and (size in models[0] or sum(other.startswith(kind) for other in HARDWARE) == 1):
            return name
    return None
