"""Serving: a client of the API of OpenAI gets the answers that plain transformers gives, from this machine alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from openai import OpenAI

from posttrain import serving
from posttrain.error import UserError
from tests.conftest import REPOSITORY
from tests.posttrain.test_conversation import answer, published

START = "import sys; from pathlib import Path; from posttrain.serving import serve; serve(Path(sys.argv[1]), port=int(sys.argv[2]))"
QUESTION = {"role": "user", "content": "what is the colour of the sky?"}


@pytest.fixture(scope="module")
def stage(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage directory with a policy in it."""
    return published(tiny, tmp_path_factory.mktemp("run") / "sft" / "output").parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((serving.HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def client(stage: Path, tmp_path: Path) -> Iterator[OpenAI]:
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        server = subprocess.Popen([sys.executable, "-c", START, str(stage), str(port)], stdout=log, stderr=log, env=environment)
    client = OpenAI(base_url=f"http://{serving.HOST}:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"http://{serving.HOST}:{port}/health").close()
                break
            except URLError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
        assert f"http://127.0.0.1:{port}/v1, with the model 'sft/output'; Ctrl-C ends it" in (tmp_path / "log").read_text()
        yield client
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_a_client_gets_the_answer_of_plain_transformers(stage: Path, client: OpenAI) -> None:
    found = client.chat.completions.create(model="sft/output", messages=[QUESTION], max_tokens=12)  # type: ignore[list-item]
    assert found.choices[0].message.content == answer(stage / "output", [QUESTION])


def test_without_a_server_the_extra_is_named(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"openai"}
    monkeypatch.setattr(serving, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(UserError, match=r'^--serve: needs fastapi and uvicorn, or vllm; run: pip install "posttrain\[serve\]"$'):
        serving.serve(stage, port=free_port())


def test_a_port_that_is_taken_is_named(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    with socket.socket() as taken:
        taken.bind((serving.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port {port}: cannot be listened on \\(Address already in use\\); give another one$"):
            serving.serve(stage, port=port)
