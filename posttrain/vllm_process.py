"""The process in which vLLM holds a policy: it ends with whoever started it, and what vLLM held is free then.

    python -P vllm_process.py REPLY_DESCRIPTOR

Standard input has a line of JSON for the settings of the engine, and one for each batch of prompts; replies go to the descriptor, a line
each. It imports nothing of the pipeline, and ignores the signals that ask for an end: its parent hears them, and hangs up.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from tqdm import tqdm

BAR = "Processed prompts"
"""What vLLM writes before the bar of prompts that are done; it shows others too."""


def main(descriptor: int) -> None:
    """Load the engine, and answer until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    with os.fdopen(descriptor, "w", encoding="utf-8") as replies, open(os.devnull, "w") as nowhere:

        def reply(**said: Any) -> None:
            replies.write(json.dumps(said) + "\n")
            replies.flush()

        class Bar(tqdm):  # type: ignore[misc]
            """Tells how many answers are done, instead of showing it."""

            def __init__(self, *arguments: Any, **settings: Any) -> None:
                super().__init__(*arguments, **{**settings, "file": nowhere})

            def update(self, n: float | None = 1) -> Any:
                moved = super().update(n)
                if str(self.desc).startswith(BAR):
                    reply(done=int(self.n))
                return moved

        try:
            from vllm import LLM, SamplingParams

            engine = LLM(**asked.get())
        except Exception as error:
            reply(error=_one_line(error))
            raise
        reply(is_ready=True)
        while True:
            batch = asked.get()
            try:
                found = engine.generate(
                    [{"prompt_token_ids": ids} for ids in batch["prompts"]],
                    sampling_params=[SamplingParams(**batch["sampling"], seed=seed) for seed in batch["seeds"]],
                    use_tqdm=Bar,
                )
            except Exception as error:
                reply(error=_one_line(error))
                raise
            reply(answers=[[list(answer.token_ids) for answer in each.outputs] for each in found])


def _read(asked: "queue.SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        asked.put(json.loads(line))
    os._exit(0)  # whatever is under way


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # not waiting for the thread that reads
