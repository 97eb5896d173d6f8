"""Serving: a policy behind an OpenAI-compatible endpoint of this machine, by a server that others maintain.

vLLM where it is installed, else `transformers serve`. Both read the chat template, the stop tokens and the generation config that the
policy was published with. Imports no torch.
"""

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from posttrain.artifact import OUTPUT
from posttrain.error import UserError

HOST = "127.0.0.1"
"""Nobody but this machine: whoever can ask a server of this kind can make it work as hard as they like."""
PORT = 8000
LIBRARIES = ("fastapi", "uvicorn", "openai")
"""What `transformers serve` needs beside transformers."""


def serve(directory: Path, *, port: int) -> NoReturn:
    """Become the server of the policy of the stage in `directory`. Raises `UserError` where there is no server, or the port is taken."""
    has_vllm = find_spec("vllm") is not None
    missing = [library for library in LIBRARIES if find_spec(library) is None]
    if missing and not has_vllm:
        raise UserError(f'--serve: needs {" and ".join(missing)}, or vllm; run: pip install "posttrain[serve]"')
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be listened on ({error.strerror}); give another one") from None
    # Clients must name the model as the server does, so that name is no path of this machine.
    model = f"{directory.name}/{OUTPUT}"
    module = "vllm.entrypoints.cli.main" if has_vllm else "transformers.cli.transformers"
    command = [sys.executable, "-P", "-m", module, "serve", model, "--host", HOST, "--port", str(port)]
    server = "vLLM" if has_vllm else "transformers serve"
    print(f"{server} is starting: http://{HOST}:{port}/v1, with the model {model!r}; Ctrl-C ends it", flush=True)
    os.chdir(directory.parent)
    os.execve(command[0], command, {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"})  # noqa: S606
