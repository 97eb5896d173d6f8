"""Export: what a stage published as a plain Hugging Face directory to pass on, with its card, proved to answer the same.

    copy -> shards -> GGUF -> checks -> card -> rename -> the Hub, where that is asked for

All is made in a directory beside and renamed when it is whole, so nobody ever sees half of it. A check that fails ends it. Adapters
stay where they are: what is exported are the merged weights. Importing this imports no torch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from posttrain import disk
from posttrain.artifact import Artifact
from posttrain.card import Check, make_card
from posttrain.config import HUB_ID, DataSource, ModelSource, nearest
from posttrain.error import StageFailed, UserError
from posttrain.report.read import RunReport
from posttrain.shards import INDEX, split, write_index

CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
"""Types that llama.cpp's converter writes."""
CARD = "README.md"
RECORD = "export.json"


def check_request(to: Path, *, gguf: str | None, push: str | None, max_shard_size: str) -> None:
    """Raise `UserError` for what can be seen to fail before anything is read."""
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to {to}: is there already, and not an empty directory; give another, or delete it")
    try:
        split({}, max_shard_size)
    except ValueError:
        raise UserError(f"--max-shard-size {max_shard_size}: is no size; give one such as 5GB or 500MB") from None
    if gguf is not None:
        if gguf not in GGUF_TYPES:
            raise UserError(f"--gguf {gguf}: is no type that llama.cpp's converter writes; {nearest(gguf, GGUF_TYPES)}")
        _find_converter()
    if push is not None:
        if not HUB_ID.fullmatch(push):
            raise UserError(f"--push {push}: is no name of a repository; give one such as some-org/some-name")
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"--push {push}: HF_HUB_OFFLINE is set; take it out of the environment, or leave --push out")


def export(
    finished: Artifact,
    run: RunReport,
    sources: Mapping[str, ModelSource | DataSource],
    to: Path,
    *,
    gguf: str | None,
    max_shard_size: str,
) -> list[Check]:
    """Write what a stage of `run` made, which is `finished`, to the directory `to`. Returns what was compared.

    Raises `StageFailed` where something is not the same as in the artifact, or the converter fails; then nothing is left.
    """
    from posttrain import proof

    name = finished.directory.name
    with _beside(to) as aside:
        for file in finished.files:
            if "/" not in file and not file.endswith(".safetensors") and file != INDEX:
                shutil.copyfile(finished.output / file, aside / file)
        tensors = proof.read_tensors(finished.output)
        _write_shards(tensors, aside, max_shard_size)
        converted = [] if gguf is None else [_convert(aside, f"{run.name}-{name}", gguf)]
        checks = [proof.compare_tensors(tensors, aside), *proof.compare_answers(finished, aside), *converted]
        if fault := next((check for check in checks if check.is_same is False), None):
            raise StageFailed(f"stages.{name}: {fault.what} of what would be exported differ: {fault.found}; nothing was written")
        make_card(run, name, sources, checks).save(aside / CARD)
        record = {
            "run": run.name,
            "stage": name,
            "kind": finished.kind,
            "build": finished.id,
            "fingerprint": finished.fingerprint,
            "checks": [asdict(check) for check in checks],
            "files": disk.describe_files(aside, disk.list_files(aside)),
        }
        disk.write_json(aside / RECORD, record)
        for path in aside.iterdir():
            path.chmod(0o644)
        disk.publish_directory(aside, to)
    return checks


@contextmanager
def _beside(to: Path) -> Iterator[Path]:
    """A directory beside `to`, of which nothing is left where the block fails. Raises `UserError` where it cannot be made."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror}); give another directory") from None
    try:
        aside.chmod(0o755)
        yield aside
    except BaseException:
        shutil.rmtree(aside)
        raise


def _write_shards(tensors: Mapping[str, Any], directory: Path, max_shard_size: str) -> None:
    from safetensors.torch import save_file

    files = split({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_size)
    for file, names in files.filename_to_tensors.items():
        # Copies: tensors of one file share the memory that it is read into.
        save_file({name: tensors[name].clone() for name in names}, directory / file, metadata={"format": "pt"})
    write_index(directory, files)


def _find_converter() -> list[str]:
    """The command that converts to GGUF. Raises `UserError` where there is none."""
    if on_path := shutil.which(CONVERTER):
        return [on_path]
    folder = os.environ.get("LLAMA_CPP")
    if folder and (script := Path(folder) / CONVERTER).is_file():
        return [sys.executable, str(script)]
    raise UserError(f"--gguf: {CONVERTER} is not on PATH; clone llama.cpp, and set LLAMA_CPP to its directory")


def _convert(directory: Path, name: str, gguf: str) -> Check:
    converter, made = _find_converter(), directory / f"{name}-{gguf}.gguf"
    options = ["--outfile", str(made), "--outtype", gguf, "--model-name", name]
    ran = subprocess.run([*converter, str(directory), *options], capture_output=True, text=True)
    if ran.returncode or not made.is_file():
        said = (ran.stderr.strip() or ran.stdout.strip() or "without a word").splitlines()[-1]
        raise StageFailed(f"--gguf {gguf}: {converter[-1]} failed with {ran.returncode}: {said}; nothing was written")
    with made.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise StageFailed(f"--gguf {gguf}: what {converter[-1]} wrote is no GGUF; nothing was written")
    return Check("GGUF", f"{made.name}, {disk.show_bytes(made.stat().st_size)}; llama.cpp was not asked anything", None)


def push_to_hub(directory: Path, repository: str) -> str:
    """Upload an exported directory to a repository of the Hub, a private one where it is new. Returns the address of the commit."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export by posttrain"))
    except Exception as error:  # of the network, the login or the Hub, by any of the libraries in between
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push {repository}: {reason}; {directory} is whole, and `hf upload {repository} {directory}` sends it later"
        ) from error
