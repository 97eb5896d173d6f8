"""The `evaluate` modules that are shipped here, loaded by name.

They are imported as what they are, modules of this package. `evaluate.load(folder)` gives the same metric, but first copies the
file into the user's Hugging Face cache under a lock, and spools rows through files there: that fails where the cache cannot be
written, and a process killed while copying leaves half a file for all that follow. So here rows stay in memory, nothing is
copied, nothing is shared between processes, and nothing needs a network.
"""

import importlib
import tempfile
from typing import Any

from posttrain.config import nearest
from posttrain.error import UserError
from posttrain.metrics.check import KINDS

METRICS = ("assistant_nll", "preference", *KINDS)


def load_metric(name: str) -> Any:
    """The shipped `evaluate.Metric` called `name`, for `compute(predictions=..., references=...)`. Raises `UserError`."""
    if name not in METRICS:
        raise UserError(f"no metric is called {name!r}; {nearest(name, METRICS)}")
    module = importlib.import_module(f"posttrain.metrics.{name}.{name}")
    # The constructor makes a directory for the rows that it would spool; with the rows in memory it stays empty.
    with tempfile.TemporaryDirectory() as empty:
        return module.METRIC(cache_dir=empty, keep_in_memory=True)
