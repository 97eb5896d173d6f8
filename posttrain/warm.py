"""What the warm parent imports before any stage is forked from it: the heavy libraries, and the modules that use them.

Imported by nothing else. An import that fails here fails again, with its traceback, in the stage that needs it.
"""

import ctypes
import importlib
import os
import signal
import sys
import threading
from pathlib import Path

PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    # While it imports, the warm parent cannot see that the driver is gone; afterwards it does.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get("POSTTRAIN_DRIVER") != str(os.getppid()):
        os._exit(0)

import tqdm  # noqa: E402

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

import posttrain.ahead  # noqa: E402
import posttrain.evaluate  # noqa: E402
import posttrain.fit  # noqa: E402
import posttrain.generate  # noqa: E402
import posttrain.models  # noqa: E402, F401
from stages import STAGES  # noqa: E402

for module in STAGES.values():
    importlib.import_module(module)

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)  # from here on it ends in order, and takes its semaphores down
