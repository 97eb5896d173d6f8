"""Notes when each step of a transformers Trainer begins and ends, and what it logs, unrounded, as JSON lines in $BENCHMARK_RECORD.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH: so the command lines of TRL and
LLaMA-Factory are measured as they are. It does nothing but add a callback that writes a line.
"""

import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINER = "transformers.trainer"


class _Finder:
    """Finds the Trainer's module as ever, and adds the callback once it is loaded."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != TRAINER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_add(module: ModuleType) -> None:
            load(module)
            module.DEFAULT_CALLBACKS.append(_recorder())

        spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def _recorder() -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def write(self, event: str, **values: Any) -> None:
            self.lines.append(json.dumps({"event": event, "at": time.monotonic(), **values}) + "\n")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            Path(os.environ["BENCHMARK_RECORD"]).write_text("".join(self.lines), encoding="utf-8")

        def on_init_end(self, *_: Any, **__: Any) -> None:
            self.write("made")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.write("begin")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.write("end")

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            self.write("log", **{name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))})

    return Recorder


if "BENCHMARK_RECORD" in os.environ:
    sys.meta_path.insert(0, _Finder)
