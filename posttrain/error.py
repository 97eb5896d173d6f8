"""What can go wrong, by whose hand: the four ways a command ends early, and their exit codes.

Anything else that is raised is a crash: exit code 1, with a traceback in the log.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER = 2
EXIT_GATE = 3
EXIT_PREEMPTED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""The signals by which a scheduler asks work to stop in order."""


class UserError(Exception):
    """The user's input is wrong: one line that says where, which value, and how to fix it. Exit code 2, no traceback."""


class StageFailed(Exception):
    """A stage crashed: which rank, its last words, and where its log is. Exit code 1."""


class GateFailed(Exception):
    """All that could run has run, and a policy does not keep a limit: which gate, its value and the limit. Exit code 3."""


class Preempted(BaseException):
    """A signal asked the work to stop, and its state is saved: run the same command again. Exit code 75.

    Like `KeyboardInterrupt` no `Exception`, since a signal may come where a library catches all of those.
    """


@contextmanager
def heed_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Give `STOP_SIGNALS` to `handler` while the block runs."""
    before = {number: signal.signal(number, lambda signum, _: handler(signum)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
