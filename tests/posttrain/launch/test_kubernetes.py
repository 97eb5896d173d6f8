"""The JobSets that Kubernetes is given, by the typed models of others, and what its pods do: as processes of this machine."""

import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import disk
from posttrain.config import KubernetesLauncher, read_launcher
from posttrain.error import Preempted, StageFailed, UserError
from posttrain.launch import kubernetes
from posttrain.launch.kubernetes import Manifest, job_name

GOLDEN = Path(__file__).parent / "golden"


def launcher(**fields: Any) -> KubernetesLauncher:
    read = read_launcher(
        "launcher", {"kind": "kubernetes", "image": "registry.example/posttrain:1", "volumes": {"/data": "runs"}, **fields}
    )
    assert isinstance(read, KubernetesLauncher)
    return read


BIG = launcher(
    volumes={"/data": "training", "/models": "models", "/more": "training"},
    namespace="research",
    num_nodes=4,
    gpus_per_node=8,
    cpus_per_process=12,
    memory="1500Gi",
    shared_memory="64Gi",
    resources={"rdma/hca": "8"},
    node_selector={"gpu": "h100"},
    tolerations=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}, {"key": "team", "operator": "Equal", "value": "research"}],
    env={"NCCL_SOCKET_IFNAME": "eth0"},
    secrets=[{"variable": "HF_TOKEN", "name": "hub", "key": "token"}],
    service_account="trainer",
    image_pull_secrets=["registry"],
    priority_class="high",
    queue="team",
    python="/opt/venv/bin/python",
    max_restarts=5,
    save_within_s=1200,
    keep_finished_s=3600,
)
SMALL = Manifest(
    run="my-chat-model",
    stage="eval",
    launcher=launcher(),
    name="my-chat-model-eval-a1b2c3",
    directory=Path("/data/work"),
    command=["-m", "pipeline", "step", "/data/runs/my-chat-model/.jobs/eval/pipeline.json", "--stage", "eval", "--root", "/data/runs"],
    after={},
)
MANIFESTS = {
    "small": SMALL,
    "big": replace(SMALL, stage="dpo", launcher=BIG, after={"sft": "research/my-chat-model-sft-000001", "other": "research/x-000002"}),
    "odd_names": replace(SMALL, directory=Path("/data/a b"), command=["$(HOME)", "no", "1", 'it\'s "here"', "*", "$HOME", "a: b"]),
}


# --- the JobSet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_the_jobset_of_a_stage_is_the_one_that_was_read_through(name: str) -> None:
    assert MANIFESTS[name].text() == (GOLDEN / f"{name}.jobset.yaml").read_text()


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_a_jobset_is_one_by_the_models_of_the_api(name: str) -> None:
    """These drop what they do not know, and refuse what is of another type."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api has the models of JobSet")
    plain = yaml.safe_load(MANIFESTS[name].text())
    assert models.JobsetV1alpha2JobSet.from_dict(plain).to_dict() == plain


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_a_jobset_keeps_what_the_api_demands_beside_types(name: str) -> None:
    """What the webhook of JobSet and the validation of Jobs look at (jobset_webhook.go, pkg/apis/batch/validation)."""
    plain = yaml.safe_load(MANIFESTS[name].text())
    jobs = plain["spec"]["replicatedJobs"]
    for number, job in enumerate(jobs):
        assert {entry["name"] for entry in job.get("dependsOn", [])} <= {above["name"] for above in jobs[:number]}
        spec = job["template"]["spec"]
        pod = spec["template"]["spec"]
        longest = f"{plain['metadata']['name']}-{job['name']}-{job['replicas'] - 1}-{spec['completions'] - 1}-abcde"
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", longest)
        assert pod["restartPolicy"] == "Never", "which podFailurePolicy demands"
        containers = {container["name"] for container in pod["containers"]}
        for rule in spec["podFailurePolicy"]["rules"]:
            assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
            codes = rule.get("onExitCodes", {"containerName": job["name"], "values": [1]})
            assert codes["containerName"] in containers
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert len(set(paths)) == len(paths)
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(set(names)) == len(names)
    rules = plain["spec"]["failurePolicy"]["rules"]
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) for rule in rules)


@pytest.mark.parametrize(
    ("run", "stage", "name"),
    [
        ("my-chat-model", "sft", "my-chat-model-sft-a1b2c3"),
        ("2026_Oct.v1", "DPO", "run-2026-oct-v1-dpo-a1b2c3"),
        ("x" * 100, "y" * 100, f"{'x' * 37}-a1b2c3"),
        ("a" * 36 + "-b", "sft", f"{'a' * 36}-a1b2c3"),
    ],
)
def test_whatever_a_run_is_called_its_jobset_has_a_name_that_hosts_may_have(run: str, stage: str, name: str) -> None:
    assert job_name(run, stage, "a1b2c3") == name
    assert len(f"{name}-ranks-0-9999-abcde") <= 63


def test_the_value_of_a_secret_stands_nowhere() -> None:
    (variable,) = [entry for entry in ranks_of(MANIFESTS["big"])["containers"][0]["env"] if entry["name"] == "HF_TOKEN"]
    assert variable == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}


def test_all_pods_find_the_first_by_the_name_that_jobset_gives_it() -> None:
    """`<jobset>-<replicated job>-<job index>-<pod index>.<subdomain>`, the subdomain being the JobSet's name (JobSet's Network API)."""
    environment = {entry["name"]: entry.get("value") for entry in ranks_of(MANIFESTS["big"])["containers"][0]["env"]}
    assert environment["MASTER_ADDR"] == "my-chat-model-eval-a1b2c3-ranks-0-0.my-chat-model-eval-a1b2c3"


def test_no_pod_with_gpus_is_made_before_what_it_reads_is_there() -> None:
    waiting, ranks = yaml.safe_load(MANIFESTS["big"].text())["spec"]["replicatedJobs"]
    assert ranks["dependsOn"] == [{"name": waiting["name"], "status": "Complete"}]
    (container,) = waiting["template"]["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    after = ["--after=sft=research/my-chat-model-sft-000001", "--after=other=research/x-000002"]
    assert container["command"][-2:] == after


def ranks_of(manifest: Manifest) -> dict[str, Any]:
    """The pod of the ranks."""
    pod: dict[str, Any] = yaml.safe_load(manifest.text())["spec"]["replicatedJobs"][-1]["template"]["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("name", ["small", "big"])
@pytest.mark.parametrize(
    ("ended", "action"),
    [
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (2, "FailJobSet"),
        (3, "FailJobSet"),
        (1, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_what_follows_the_end_of_a_pod(name: str, ended: int | str, action: str) -> None:
    """By the rules as Kubernetes and JobSet apply them: the first that matches; messages are those of the Job controller."""
    plain = yaml.safe_load(MANIFESTS[name].text())
    for job in plain["spec"]["replicatedJobs"]:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for number, rule in enumerate(job["template"]["spec"]["podFailurePolicy"]["rules"]):
            conditions = [pattern["type"] for pattern in rule.get("onPodConditions", [])]
            if ended in rule.get("onExitCodes", {}).get("values", []):
                said = f"Container {job['name']} for pod research/x failed with exit code {ended} matching FailJob rule at index {number}"
            elif ended in conditions:
                said = f"Pod research/x has condition {ended} matching FailJob rule at index {number}"
            else:
                continue
            assert rule["action"] == "FailJob"
            reason, message = "PodFailurePolicy", said
            break
        taken = "RestartJobSet"  # where no rule matches
        for rule in plain["spec"]["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns")
            if reason in rule["onJobFailureReasons"] and (patterns is None or any(re.search(pattern, message) for pattern in patterns)):
                taken = rule["action"]
                break
        assert taken == action


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": ""}, "launcher.image: '' is no line of text"),
        ({"volumes": {}}, "launcher.volumes: dictionary should have at least 1 item after validation, not 0, got {}"),
        ({"volumes": {"data": "runs"}}, "launcher.volumes: 'data' is no absolute path"),
        ({"memory": "lots"}, "launcher.memory: 'lots' is no quantity of Kubernetes; write it as `1500Gi`"),
        ({"resources": {"cpu": "8"}}, "launcher.resources: 'cpu' is a field of the launcher; set cpus_per_process instead"),
        (
            {"resources": {"nvidia.com/gpu": "8"}},
            "launcher.resources: 'nvidia.com/gpu' is a field of the launcher; set gpus_per_node instead",
        ),
        ({"env": {"RANK": "1"}}, "launcher.env: 'RANK' is set by the pipeline; leave it out"),
        ({"env": {"a b": "1"}}, "launcher.env: 'a b' is no name of an environment variable"),
        ({"secrets": [{"variable": "HF_TOKEN", "name": "hub"}]}, "launcher.secrets.0.key: missing; it is required"),
        ({"toleration": []}, "launcher.toleration: unknown key; did you mean 'tolerations'?"),
    ],
)
def test_a_launcher_that_is_set_wrongly_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        launcher(**fields)
    assert str(refused.value) == message


# --- in the pods -----------------------------------------------------------------------------------------------------

WORKER = """#!{python}
import os, signal, sys, time
from pathlib import Path
directory, rank = Path(sys.argv[-1]), os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), (directory / f"saved_{{rank}}").touch(), os._exit(75)))
(directory / f"rank_{{rank}}").write_text(" ".join(os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
while len(list(directory.glob("rank_?"))) < 2:
    time.sleep(0.05)  # so that both heed signals
{body}
"""
"""A rank in place of the real worker."""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a stage of four ranks that is being attempted, by a job of two pods."""
    monkeypatch.setenv("POSTTRAIN_JOB", "x-000001")
    monkeypatch.setenv("POSTTRAIN_RESTART", "0")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    directory = tmp_path / "r" / "sft"
    (directory / "logs" / "attempt_1").mkdir(parents=True)
    (tmp_path / "r" / ".jobs" / "sft").mkdir(parents=True)
    record: dict[str, Any] = {"identity": {}, "config": {"stall_timeout_s": None}, "inputs": {}, "held_out": []}
    record |= {"name": "sft", "kind": "sft", "run": "r", "root": str(tmp_path)}
    record |= {"version": 1, "fingerprint": "", "num_processes": 4, "number": 1, "started": "", "token": "now"}
    disk.write_json(directory / "stage.json", record)
    return directory


def started(stage: Path, **fields: Any) -> None:
    record = {"job": "x-000001", "restart": "0", "attempt": "now", "pods": 2, **fields}
    disk.write_sealed(stage.parent / ".jobs" / "sft" / "started.json", record)


def ranks_do(stage: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    path = stage.parent / "python"
    path.write_text(WORKER.format(python=sys.executable, body=body))
    path.chmod(0o755)
    monkeypatch.setattr("posttrain.launch.kubernetes.sys.executable", str(path))


TWO = launcher(num_nodes=2, processes_per_node=2, save_within_s=20)


def test_a_pod_starts_the_ranks_that_are_its_own(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_do(stage, monkeypatch, "")
    started(stage)
    kubernetes.join(TWO, stage)
    assert {path.name: path.read_text() for path in stage.glob("rank_*")} == {"rank_2": "0 4 2", "rank_3": "1 4 2"}


def test_a_pod_has_nothing_to_do_where_the_first_one_has_not(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_do(stage, monkeypatch, "")
    started(stage, restart="7", attempt="before")  # of another start
    disk.write_sealed(stage.parent / ".jobs" / "sft" / "ended.json", {"job": "x-000001", "code": 0})
    kubernetes.join(TWO, stage)
    started(stage, pods=1)  # to verify what is published
    kubernetes.join(TWO, stage)
    assert not list(stage.glob("rank_*"))


ASKED = "rank 3 ended (killed by SIGKILL); out of memory is the usual reason"


@pytest.mark.parametrize(
    ("body", "raised", "message", "saved"),
    [
        ("sys.exit(75)", Preempted, "stages.sft was asked to stop and saved its state", 0),
        ("sys.exit(75) if rank == '3' else (time.sleep(1), (directory / 'saved_2').touch(), os._exit(75))", Preempted, "was asked to", 1),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == '3' else time.sleep(60)", StageFailed, ASKED, 1),
        ("sys.exit(4) if rank == '3' else time.sleep(60)", StageFailed, "rank 3 ended (exit code 4)", 1),
    ],
    ids=["asked", "asked, and one is slow", "killed", "odd"],
)
def test_a_pod_ends_as_its_ranks_do(
    stage: Path, monkeypatch: pytest.MonkeyPatch, body: str, raised: type[BaseException], message: str, saved: int
) -> None:
    ranks_do(stage, monkeypatch, body)
    started(stage)
    with pytest.raises(raised, match=re.escape(message)):
        kubernetes.join(TWO, stage)
    assert len(list(stage.glob("saved_*"))) == saved


@pytest.mark.parametrize(("kind", "raised"), [("user", UserError), ("crash", StageFailed)])
def test_the_first_rank_to_fail_is_the_one_that_is_told_of(
    stage: Path, monkeypatch: pytest.MonkeyPatch, kind: str, raised: type[BaseException]
) -> None:
    """Rank 0, in the other pod, left word before rank 2 lost it."""
    ranks_do(stage, monkeypatch, "sys.exit(1)")
    logs = stage / "logs" / "attempt_1"
    disk.write_json(logs / "rank_2.error.json", {"kind": "crash", "message": "connection closed by peer", "time": 2.0})
    disk.write_json(logs / "rank_0.error.json", {"kind": kind, "message": "stages.sft.data: line 3 is wrong", "time": 1.0})
    started(stage)
    with pytest.raises(raised, match="line 3 is wrong"):
        kubernetes.join(TWO, stage)


def test_a_pod_that_is_to_end_has_its_ranks_save(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_do(stage, monkeypatch, "time.sleep(60)")
    started(stage)

    def asked(signum: int, _: object) -> None:
        raise Preempted("stopped by SIGTERM")

    before = signal.signal(signal.SIGALRM, asked)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            kubernetes.join(TWO, stage)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sorted(path.name for path in stage.glob("saved_*")) == ["saved_2", "saved_3"]
