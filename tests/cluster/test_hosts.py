"""On two machines with an ssh server each: what they train, and what becomes of one where the other is lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain.artifact import read_artifact
from posttrain.disk import hash_file
from posttrain.parallel import num_cores
from tests.cluster.harness import SCRIPTS, Cluster, missing, wait
from tests.conftest import REPOSITORY, Ended, write_chat
from tests.posttrain.launch.test_hosts import attempted, names

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
REASON = missing() or (None if SSHD and shutil.which("ssh") else "there is no ssh server; tests/cluster/up.sh installs it")

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("hosts")
    try:
        subprocess.run([SCRIPTS / "up.sh", directory], check=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True)
        (directory / "sshd_config").write_text(
            f"HostKey {directory}/key\nAuthorizedKeysFile {directory}/key.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        cluster = Cluster(directory)
        for name in ("node1", "node2"):
            serve(cluster, name)
        yield cluster
    finally:
        subprocess.run([SCRIPTS / "down.sh", directory], check=False)


def serve(cluster: Cluster, name: str) -> None:
    assert SSHD is not None
    cluster.on(name, SSHD, "-f", cluster.directory / "sshd_config")


def ssh(cluster: Cluster) -> list[str]:
    """Options by which the machines let one in."""
    return [
        "-i",
        f"{cluster.directory}/key",
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "LogLevel=ERROR",
    ]


def test_a_machine_that_is_lost_is_named_and_the_other_one_stopped(cluster: Cluster, tmp_path: Path) -> None:
    stage = attempted(tmp_path)
    program = f"""
from pathlib import Path
from tests.posttrain.launch.test_hosts import run
run(Path({str(stage)!r}), "time.sleep(60)", "node1", "node2", ssh={ssh(cluster)!r})
"""
    command = [cluster.directory / "on", "head", sys.executable, "-c", program]
    driver = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    wait(lambda: driver.poll() is not None or len(names(stage, "started")) == 2, "both were to start")
    for pid in cluster.pids("node2"):
        os.kill(pid, signal.SIGKILL)
    _, err = driver.communicate(timeout=60)
    assert "StageFailed: stages.sft: the connection to node2 broke or could not be made, so the others were stopped" in err
    assert names(stage, "saved") == ["node1"]
    assert not cluster.pids("node1", str(stage))
    serve(cluster, "node2")


def test_two_machines_train_what_two_ranks_of_one_do(cluster: Cluster, tmp_path: Path, tiny: Path, posttrain: Callable[..., Ended]) -> None:
    write_chat(tmp_path / "chat.jsonl", 24)
    config = tmp_path / "pipeline.yaml"
    config.write_text(f"""
run: r
sources: {{base: {{model: {tiny}}}, chat: {{data: {tmp_path}/chat.jsonl}}}}
stages: {{sft: {{inputs: {{policy: base, data: chat}}, max_steps: 2, global_batch_size: 8, learning_rate: 1e-3, max_length: 128}}}}
launcher: {{kind: hosts, hosts: [node1, node2], cpus_per_process: {max(1, num_cores() // 2)}, ssh: {ssh(cluster)},
           setup: [export HF_HUB_OFFLINE=1]}}
""")
    local = posttrain("run", config, "launcher={kind: local, num_processes: 2}", "--root", tmp_path / "plain")
    assert local.code == 0, local.err
    done = cluster.pipeline("head", "run", config, "--root", tmp_path / "runs")
    assert done.returncode == 0, (done.stdout, done.stderr)
    found, expected = (read_artifact(tmp_path / root / "r" / "sft") for root in ("runs", "plain"))
    assert found is not None and expected is not None
    assert hash_file(found.output / "model.safetensors") == hash_file(expected.output / "model.safetensors")
    hosts = [(found.directory / "logs" / "attempt_1" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert "rank 0 of 2 on node1" in hosts[0] and "rank 1 of 2 on node2" in hosts[1]
