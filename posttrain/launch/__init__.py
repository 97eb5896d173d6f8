"""Launchers: how a stage directory becomes processes on machines. One kind a module, one interface.

A launcher is a context manager that yields a function of a stage directory and its attempt, which returns when the
stage has finished, and otherwise raises `UserError`, `Preempted` or `StageFailed`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config import HostsLauncher, KubernetesLauncher, LauncherConfig, LocalLauncher
from posttrain.launch.hosts import hosts_launcher
from posttrain.launch.kubernetes import kubernetes_launcher
from posttrain.launch.local import local_launcher
from posttrain.launch.slurm import slurm_launcher
from posttrain.ledger import Attempt

if TYPE_CHECKING:
    from rich.console import Console

Launch = Callable[[Path, Attempt], None]


def open_launcher(
    config: LauncherConfig, console: "Console", deadline: float, *, has_deepspeed: bool = False
) -> AbstractContextManager[Launch]:
    """The launcher of that config, made ready, also for stages that train under DeepSpeed where there are any. What it runs by itself
    stops in order before `deadline`, a time of the monotonic clock; a job of a cluster has a time limit of its own."""
    if isinstance(config, LocalLauncher):
        return local_launcher(console, deadline, has_deepspeed=has_deepspeed)
    if isinstance(config, HostsLauncher):
        return hosts_launcher(config, console, deadline)
    return kubernetes_launcher(config, console) if isinstance(config, KubernetesLauncher) else slurm_launcher(config, console)
