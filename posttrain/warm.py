"""What the warm parent imports before any stage is forked from it: the heavy libraries, and the modules that use them.

Imported by nothing else. An import that fails here fails again, with its traceback, in the stage that needs it.
"""

import os
import threading
from pathlib import Path

import tqdm

if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed a search for accelerators, and its warning
# Its default lock is a semaphore of the whole machine, made anew in every rank and never taken down.
tqdm.tqdm.set_lock(threading.RLock())

import datasets  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import evaluate  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
import trl.trainer.dpo_trainer  # noqa: E402
import trl.trainer.sft_trainer  # noqa: E402, F401

import posttrain.evaluate  # noqa: E402
import posttrain.fit  # noqa: E402
import posttrain.generate  # noqa: E402
import posttrain.models  # noqa: E402, F401
