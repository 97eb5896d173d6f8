"""Tether: a command that ends with the connection by which it was started, as under ssh.

    python -m posttrain.tether COMMAND...

Standard input says in how many seconds the command must have ended, on a line; where it breaks without a word, it is `LEFT_ALONE_S`. In
that time SIGTERM has it end in order, and then it is killed with all that it has started.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil

LEFT_ALONE_S = 600.0


def keep(command: Sequence[str]) -> int:
    """Run a command to its end, whatever ends it; its exit code, as a shell has it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def stop() -> None:
        said = sys.stdin.buffer.readline().strip()
        within_s = float(said) if said else LEFT_ALONE_S
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(child.pid)
            # torchrun that is killed leaves its workers behind.
            started = root.children(recursive=True)
            if within_s:
                root.terminate()
                psutil.wait_procs([root, *started], timeout=within_s)
            for process in [*started, root]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    threading.Thread(target=stop, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(keep(sys.argv[1:]))  # not waiting for the thread that reads
