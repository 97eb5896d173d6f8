"""The Kubernetes launcher: a JobSet for each stage, with the driver in its first pod.

    where one submits   kubectl, a JobSet for each stage; then nothing stays alive
    pod `wait`          until the stages that it reads have ended well; it asks for no GPU, and only then are the others made
    pods `ranks`        one a node. The first is the driver: decide again -> lease -> stage.json -> started.json -> its ranks;
                        the others: started.json -> their ranks. All are plain workers (prepare, run, verify)

Exit codes speak to the JobSet controller: 75, and pods that are taken from a node, begin all pods again without being counted; 2 and 3
end the JobSet at once; whatever else is begun again `max_restarts` times. Kubernetes schedules and deletes; nothing here does, and no
pod asks the cluster for anything. What is known of jobs lies beside the stages (`posttrain/launch/jobs.py`).

JobSet 0.10 or later (`dependsOn`, `onJobFailureMessagePatterns`), Kubernetes 1.31 or later (`podFailurePolicy`).
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posttrain
from posttrain import disk
from posttrain.config import KubernetesLauncher
from posttrain.error import EXIT_GATE, EXIT_PREEMPTED, EXIT_USER, Preempted, UserError, heed_signals
from posttrain.heartbeat import Lookout
from posttrain.launch.local import LIBRARIES, POLL_S, STOP_WITHIN_S
from posttrain.launch.one_launch import following, is_published
from posttrain.launch.queue import Queued, call
from posttrain.launch.words import first_words, raise_words
from posttrain.ledger import JOBS, Attempt, LeaseLost, read_attempt
from posttrain.smoke import DIRECTORY as SMOKE
from posttrain.worker import CORES

if TYPE_CHECKING:
    from rich.console import Console

KIND = "jobsets.jobset.x-k8s.io"
RANKS, WAIT = "ranks", "wait"
"""The two jobs of a JobSet, and the containers in their pods."""
JOB, RESTART, INDEX = "POSTTRAIN_JOB", "POSTTRAIN_RESTART", "JOB_COMPLETION_INDEX"
"""Environment variables of a pod: number of the job, how often it was begun again, and which of its pods this one is."""
PORT = 29500
"""Port of the first pod at which ranks find one another: each pod has all ports for itself."""
STARTED = "started.json"
LONGEST_NAME = 37
"""Characters of a JobSet's name before what makes it unlike others: with what follows, names of pods have 63 at most."""
KILL_AFTER_S = 30
"""Seconds beyond `save_within_s` after which a pod is killed."""
LOOK_EVERY_S = 1.0


# --- what a JobSet is made of: pure functions ------------------------------------------------------------------------


def job_name(run: str, stage: str, token: str) -> str:
    """The name of a stage's JobSet, which is a part of a host's name; `token`, six characters, makes it unlike those of other jobs."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{run}-{stage}".lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    return f"{words[:LONGEST_NAME].rstrip('-')}-{token}"


@dataclass(frozen=True)
class Manifest:
    """All that the JobSet of a stage says."""

    run: str
    stage: str
    launcher: KubernetesLauncher
    name: str
    directory: Path
    """Where it runs: paths of the pipeline file are relative to it."""
    command: Sequence[str]
    """The driver, without its interpreter."""
    after: Mapping[str, str]
    """The stages whose jobs must end well before, and the numbers of these."""

    file = "jobset.yaml"

    @property
    def number(self) -> str:
        """What the job is called by: the name, and its namespace where one is given."""
        return f"{self.launcher.namespace}/{self.name}" if self.launcher.namespace else self.name

    @property
    def placeholder(self) -> str:
        """The number itself, which is known before it is given."""
        return self.number

    def log(self, number: str) -> str:
        """What shows it."""
        namespace, name = _split(number)
        of = ["--namespace", namespace] if namespace else []
        return f"`{' '.join(['kubectl', 'logs', *of, f'job/{name}-{RANKS}-0'])}`"

    def text(self) -> str:
        """The JobSet, as `kubectl` takes it."""
        import yaml

        said = f"# Stage {self.stage} of the run {self.run}, as `submit` wrote it. The driver in it decides again what is to be done.\n"
        plain: str = yaml.safe_dump(self.plain(), sort_keys=False, width=140)
        return f"---\n{said}{plain}"

    def plain(self) -> dict[str, Any]:
        """The JobSet, as plain values."""
        launcher = self.launcher
        jobs = [self._job(WAIT, self._waiting(), num_pods=1)] if self.after else []
        ranks = self._job(RANKS, self._ranks(), num_pods=launcher.num_nodes)
        jobs.append({**ranks, "dependsOn": [{"name": WAIT, "status": "Complete"}]} if self.after else ranks)
        labels = {"kueue.x-k8s.io/queue-name": launcher.queue} if launcher.queue else {}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": self.name,
                **({"namespace": launcher.namespace} if launcher.namespace else {}),
                **({"labels": labels} if labels else {}),
                "annotations": {"posttrain/job": self.number, "posttrain/run": self.run, "posttrain/stage": self.stage},
            },
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "ttlSecondsAfterFinished": launcher.keep_finished_s,
                "failurePolicy": {
                    "maxRestarts": launcher.max_restarts,
                    "rules": [
                        {
                            "name": "wrongInput",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                            "onJobFailureMessagePatterns": [f"failed with exit code ({EXIT_USER}|{EXIT_GATE}) "],
                        },
                        {
                            "name": "madeRoom",
                            "action": "RestartJobSetAndIgnoreMaxRestarts",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        },
                    ],
                },
                "replicatedJobs": jobs,
            },
        }

    def _job(self, name: str, pod: dict[str, Any], *, num_pods: int) -> dict[str, Any]:
        # Ranks cannot do without one of them, so a pod that ends otherwise than well ends the Job, and the JobSet sees by its reason.
        ending = [
            {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": [EXIT_USER, EXIT_GATE]}},
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": [EXIT_PREEMPTED]}},
        ]
        return {
            "name": name,
            "replicas": 1,
            "template": {
                "spec": {
                    "completionMode": "Indexed",
                    "completions": num_pods,
                    "parallelism": num_pods,
                    "backoffLimit": 0,
                    "podFailurePolicy": {"rules": ending},
                    "template": {"spec": pod},
                }
            },
        }

    def _waiting(self) -> dict[str, Any]:
        after = [f"--after={stage}={number}" for stage, number in self.after.items()]
        asked = {"cpu": "100m", "memory": "512Mi"}
        return self._pod(WAIT, [*self.command, *after], env=[], resources={"requests": asked, "limits": {"memory": "512Mi"}})

    def _ranks(self) -> dict[str, Any]:
        launcher = self.launcher
        restart = {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}
        env: list[dict[str, Any]] = [
            {"name": JOB, "value": self.number},
            {"name": RESTART, "valueFrom": {"fieldRef": restart}},
            {"name": "MASTER_ADDR", "value": f"{self.name}-{RANKS}-0-0.{self.name}"},
            {"name": "MASTER_PORT", "value": str(PORT)},
            *({"name": name, "value": value} for name, value in launcher.env.items()),
        ]
        for entry in launcher.secrets:
            env.append({"name": entry.variable, "valueFrom": {"secretKeyRef": {"name": entry.name, "key": entry.key}}})
        cores = launcher.cpus_per_process and launcher.cpus_per_process * launcher.tasks_per_node
        limits = {
            **({"cpu": str(cores)} if cores else {}),
            **({"memory": launcher.memory} if launcher.memory else {}),
            **({launcher.gpu_resource: str(launcher.gpus_per_node)} if launcher.gpus_per_node else {}),
            **launcher.resources,
        }
        command = [*self.command, f"--max-restarts={launcher.max_restarts}"]
        pod = self._pod(RANKS, command, env=env, resources={"limits": limits} if limits else {})  # as much is then requested
        size = {"sizeLimit": launcher.shared_memory} if launcher.shared_memory else {}
        pod["volumes"].append({"name": "shared-memory", "emptyDir": {"medium": "Memory", **size}})
        pod["containers"][0]["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108
        if launcher.node_selector:
            pod["nodeSelector"] = dict(launcher.node_selector)
        if launcher.tolerations:
            pod["tolerations"] = [entry.model_dump(exclude_none=True) for entry in launcher.tolerations]
        if launcher.priority_class:
            pod["priorityClassName"] = launcher.priority_class
        return pod

    def _pod(self, name: str, command: Sequence[str], *, env: list[dict[str, Any]], resources: dict[str, Any]) -> dict[str, Any]:
        launcher = self.launcher
        claims = {claim: f"volume-{number}" for number, claim in enumerate(dict.fromkeys(launcher.volumes.values()))}
        container: dict[str, Any] = {
            "name": name,
            "image": launcher.image,
            "command": [launcher.python, *(_literal(word) for word in command)],
            "workingDir": str(self.directory),
            **({"env": env} if env else {}),
            **({"resources": resources} if resources else {}),
            "volumeMounts": [{"name": claims[claim], "mountPath": path} for path, claim in launcher.volumes.items()],
        }
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": launcher.save_within_s + KILL_AFTER_S,
            "automountServiceAccountToken": launcher.service_account is not None,
            **({"serviceAccountName": launcher.service_account} if launcher.service_account else {}),
            **({"imagePullSecrets": [{"name": secret} for secret in launcher.image_pull_secrets]} if launcher.image_pull_secrets else {}),
            "containers": [container],
            "volumes": [{"name": volume, "persistentVolumeClaim": {"claimName": claim}} for claim, volume in claims.items()],
        }


def _literal(word: str) -> str:
    """`word`, in which Kubernetes would put the value of a variable for `$(NAME)`."""
    return word.replace("$(", "$$(")


def _split(number: str) -> tuple[str, str]:
    """The namespace of a job, empty where none was given, and its name."""
    namespace, _, name = number.rpartition("/")
    return namespace, name


# --- the cluster -----------------------------------------------------------------------------------------------------


class KubernetesQueue:
    """Kubernetes, by kubectl."""

    name = "Kubernetes"

    def ask(self, numbers: Sequence[str]) -> dict[str, Queued]:
        """What the JobSets' own status says."""
        found = {}
        for namespace, group in groupby(sorted(numbers, key=_split), key=lambda number: _split(number)[0]):
            names = [_split(number)[1] for number in group]
            said = _kubectl(namespace, "get", KIND, *names, "--ignore-not-found", "--output=json")
            if said.strip():
                answer = json.loads(said)
                for jobset in answer.get("items", [answer]):  # of one there is no list
                    name = jobset["metadata"]["name"]
                    found[f"{namespace}/{name}" if namespace else name] = _queued(jobset)
        return found

    def give(self, path: Path) -> str:
        """The number that stands in it."""
        made = json.loads(_kubectl("", "apply", f"--filename={path}", "--output=json"))
        return str(made["metadata"]["annotations"]["posttrain/job"])

    def withdraw(self, number: str) -> str | None:
        """Pods are told to end, and those that run have the time to save."""
        namespace, name = _split(number)
        queued = self.ask([number]).get(number)
        _kubectl(namespace, "delete", KIND, name, "--ignore-not-found", "--wait=false")
        return queued.where if queued is not None and queued.state == "RUNNING" else None

    def here(self) -> str | None:
        """As the JobSet tells its pods."""
        return os.environ.get(JOB)

    def again(self, number: str) -> str | None:
        """The JobSet sees to that, by the exit code."""
        return None


def _kubectl(namespace: str, *arguments: str) -> str:
    of = [f"--namespace={namespace}"] if namespace else []
    return call("kubectl", *of, *arguments, cluster="Kubernetes", check="kubectl cluster-info")


def _queued(jobset: Mapping[str, Any]) -> Queued:
    status = jobset.get("status", {})
    if end := {"Completed": "COMPLETED", "Failed": "FAILED"}.get(status.get("terminalState", "")):
        return Queued(end, "")
    restarts = status.get("restarts", 0)
    again = f", begun again {restarts} times" if restarts else ""
    if jobset["spec"].get("suspend"):
        return Queued("PENDING", f"(suspended{again})")
    jobs = {job["name"]: job for job in status.get("replicatedJobsStatus", [])}
    if jobs.get(RANKS, {}).get("ready"):
        return Queued("RUNNING", f"its pods{again}")
    return Queued("PENDING", f"(pods are missing{again})")


# --- in the pods -----------------------------------------------------------------------------------------------------


def is_first_pod() -> bool:
    """Whether this process is to be the driver; so it is outside of Kubernetes."""
    return os.environ.get(INDEX, "0") == "0"


@contextmanager
def kubernetes_launcher(launcher: KubernetesLauncher, console: "Console") -> Iterator[Callable[[Path, Attempt], None]]:
    """The function that launches a stage on the pods of the JobSet in whose first one this process runs."""
    number = KubernetesQueue().here()
    if number is None:
        raise UserError("launcher.kind: kubernetes, and this is no pod of a JobSet; `submit` makes JobSets of the stages")

    def launch(directory: Path, attempt: Attempt) -> None:
        pods, here = (1, 1) if is_published(directory) else (launcher.num_nodes, launcher.tasks_per_node)
        started = {"job": number, "restart": os.environ.get(RESTART), "attempt": attempt.token, "pods": pods}
        with following(directory, attempt, console) as follow:
            _started(directory).parent.mkdir(parents=True, exist_ok=True)  # of a stage that is only tried
            disk.write_sealed(_started(directory), started)
            _run_ranks(launcher, directory, attempt, follow.look, pods=pods, here=here)

    yield launch


def join(launcher: KubernetesLauncher, directory: Path) -> None:
    """In any pod but the first: run its ranks of the stage in `directory` to their end, once the driver has begun, and before that those
    of the stages that it tries. Raises as a launcher does; where the driver finds nothing to do, it returns."""
    done: set[str] = set()
    while True:
        if begun := _begun(directory, done):
            at, pods, attempt = begun
            if int(os.environ[INDEX]) < pods:
                _run_ranks(launcher, at, attempt, lambda: None, pods=pods, here=launcher.tasks_per_node)
            if at == directory:
                return
            done.add(attempt.token)
            continue
        ended = _read(_started(directory).with_name("ended.json"))
        if ended and (ended["job"], ended["code"]) == (os.environ[JOB], 0):
            return
        time.sleep(LOOK_EVERY_S)


def _begun(directory: Path, done: Collection[str]) -> tuple[Path, int, Attempt] | None:
    """What the driver of this job has begun: where, on how many pods, and which attempt; but for those attempts that are done."""
    for path in [_started(directory), *sorted(directory.parent.glob(f"{SMOKE}/{JOBS}/*/{STARTED}"))]:
        started = _read(path)
        if started and (started["job"], started["restart"]) == (os.environ[JOB], os.environ.get(RESTART)):
            at = path.parents[2] / path.parent.name
            attempt = read_attempt(at)
            # A network disk may show one file before the other.
            if attempt is not None and attempt.token == started["attempt"] and attempt.token not in done:
                return at, started["pods"], attempt
    return None


def _started(directory: Path) -> Path:
    return directory.parent / JOBS / directory.name / STARTED


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] | None = disk.read_sealed(path)
    except (OSError, ValueError):
        return None
    return record


def _run_ranks(launcher: KubernetesLauncher, directory: Path, attempt: Attempt, look: Callable[[], None], *, pods: int, here: int) -> None:
    """Run this pod's ranks to their end, `here` of `pods` times as many. Raises as a launcher does."""
    first = int(os.environ.get(INDEX, "0")) * here
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for local_rank in range(here):
            environment = {
                **os.environ,
                **LIBRARIES,
                **({CORES: str(launcher.cpus_per_process)} if launcher.cpus_per_process else {}),
                "RANK": str(first + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(pods * here),
                "LOCAL_WORLD_SIZE": str(here),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(posttrain.__file__).parents[1]), os.environ.get("PYTHONPATH")])),
            }
            command = [sys.executable, "-m", "posttrain.worker", str(directory)]
            ranks.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment))
        while any(rank.poll() is None for rank in ranks) and all(rank.poll() in (None, 0) for rank in ranks):
            time.sleep(POLL_S)
            look()
    except LeaseLost:
        _end(ranks, 0.0)  # another driver builds the stage, and must find nobody else at it
        raise
    except (Preempted, KeyboardInterrupt):
        with heed_signals(lambda signum: None):
            # Without a rank that has failed, the others can save nothing.
            _ask(ranks)
            _end(ranks, STOP_WITHIN_S if first_words(directory, attempt) else launcher.save_within_s)
        raise_words(directory, attempt)
        raise
    except BaseException:
        _end(ranks, 0.0)
        raise
    codes = [rank.poll() for rank in ranks]
    if EXIT_PREEMPTED in codes:
        _end(ranks, launcher.save_within_s)  # they all know, and are at it
    else:
        _ask(ranks)
        _end(ranks, STOP_WITHIN_S)
    _raise_failure(directory, attempt, first, codes)


def _ask(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask ranks to save and end."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()


def _end(ranks: Sequence[subprocess.Popen[bytes]], within_s: float) -> None:
    """Wait for the end of ranks, and kill those that take longer."""
    deadline = time.monotonic() + within_s
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def _raise_failure(directory: Path, attempt: Attempt, first: int, codes: Sequence[int | None]) -> None:
    """Raise what the exit codes of this pod's ranks, as they were when the first had ended, and the ranks' own words say; nothing where all
    went well."""
    if not any(codes):
        return
    lookout = Lookout(directory, attempt, attempt.num_processes)
    for rank, code in enumerate(codes, first):
        if code is not None and code < 0:
            hint = "; out of memory is the usual reason" if code == -signal.SIGKILL else ""
            raise lookout.died(rank, f"rank {rank} ended (killed by {signal.Signals(-code).name}){hint}")
    raise_words(directory, attempt)
    if all(code in (None, 0, EXIT_PREEMPTED) for code in codes):
        raise Preempted(f"stages.{attempt.name} was asked to stop and saved its state")
    rank, code = next((rank, code) for rank, code in enumerate(codes, first) if code not in (None, 0, EXIT_PREEMPTED))
    raise lookout.died(rank, f"rank {rank} ended (exit code {code})")
