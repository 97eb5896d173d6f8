"""A file that a disk cut off, or of which it lost a bit, is never used: it is made again, or the run stops and says which it is."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from posttrain.checkpoint import list_complete
from tests.conftest import Ended
from tests.faults.ground import EVIDENCE, Ground, flip, make_ground, publish, truncate
from tests.faults.harness import Chain, small_chain

Cli = Callable[..., Ended]
Damage = Callable[[Path], None]
both = pytest.mark.parametrize("damage", [truncate, flip])


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    here = tmp_path_factory.mktemp("damage")
    return make_ground(small_chain(here), "sft", here)


@pytest.fixture(scope="module")
def dpo(sft: Ground, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return make_ground(sft.whole, "dpo", tmp_path_factory.mktemp("damage"))


def copies(ground: Ground, of: Chain, files: list[Path], tmp_path: Path) -> Iterator[tuple[Chain, Path]]:
    """For each of `files`, which lie below the root of `of`, a copy of that root, and the file in it."""
    assert files
    for number, file in enumerate(files):
        chain = ground.copy(of, tmp_path / str(number))
        yield chain, chain.root / file.relative_to(of.root)
        shutil.rmtree(chain.root)


def run(posttrain: Cli, chain: Chain, until: str) -> Ended:
    return posttrain("run", chain.file, "--root", chain.root, "--until", until)


def logs(chain: Chain, stage: str) -> str:
    return "".join(path.read_text() for path in (chain.directory / stage).glob("logs/*/rank_0.log"))


def assert_refused(ended: Ended, file: Path) -> None:
    assert (ended.code, ended.err.count("\n")) == (2, 1), (file, ended)
    assert str(file) in ended.err


def assert_as_if_undamaged(ended: Ended, chain: Chain, ground: Ground, file: Path) -> None:
    assert ended.code == 0, (file, ended.err)
    assert chain.outcome().files == ground.whole.outcome().files, file


# --- artifacts -------------------------------------------------------------------------------------------------------


@both
def test_a_damaged_artifact_is_not_read_by_the_next_stage(sft: Ground, tmp_path: Path, posttrain: Cli, damage: Damage) -> None:
    output = sft.whole.directory / "sft" / "output"
    for chain, file in copies(sft, sft.whole, sorted(path for path in output.rglob("*") if path.is_file()), tmp_path):
        damage(file)
        assert_refused(run(posttrain, chain, "dpo"), file)
        assert_refused(posttrain("verify", chain.directory, "--root", chain.root), file)
        assert not (chain.directory / "dpo" / "checkpoints").exists()


def test_a_file_added_to_an_artifact_or_a_link_in_it_is_not_read_by_the_next_stage(sft: Ground, tmp_path: Path, posttrain: Cli) -> None:
    chain = sft.copy(sft.whole, tmp_path / "runs")
    output = chain.directory / "sft" / "output"
    (output / "adapter_config.json").write_text("{}")
    assert_refused(run(posttrain, chain, "dpo"), output / "adapter_config.json")
    (output / "adapter_config.json").unlink()
    (output / "model.safetensors").rename(tmp_path / "moved")
    (output / "model.safetensors").symlink_to(tmp_path / "moved")
    assert_refused(run(posttrain, chain, "dpo"), output / "model.safetensors")


@both
def test_a_damaged_record_of_an_artifact_is_named(sft: Ground, tmp_path: Path, posttrain: Cli, damage: Damage) -> None:
    chain = sft.copy(sft.whole, tmp_path / "runs")
    file = chain.directory / "sft" / "artifact.json"
    damage(file)
    assert_refused(run(posttrain, chain, "sft"), file)
    file.unlink()
    assert_as_if_undamaged(run(posttrain, chain, "sft"), chain, sft, file)


@both
def test_a_published_output_that_is_damaged_before_it_is_verified_is_published_again(
    sft: Ground, tmp_path: Path, posttrain: Cli, damage: Damage
) -> None:
    published = sft.copy(sft.cut, tmp_path / "published")
    publish(sft, published)
    stage = published.directory / "sft"
    files = [*sorted((stage / "output").iterdir()), *(stage / name for name in EVIDENCE)]
    for chain, file in copies(sft, published, files, tmp_path):
        damage(file)
        ended = run(posttrain, chain, "sft")
        assert_as_if_undamaged(ended, chain, sft, file)
        assert str(file) in ended.out or "resume: from the checkpoint of step" in ended.out, file


# --- checkpoints -----------------------------------------------------------------------------------------------------


@both
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(sft: Ground, tmp_path: Path, posttrain: Cli, damage: Damage) -> None:
    newest, before, *_ = list_complete(sft.cut.directory / "sft" / "checkpoints")
    for chain, file in copies(sft, sft.cut, sorted(newest.path.iterdir()), tmp_path):
        damage(file)
        assert_as_if_undamaged(run(posttrain, chain, "sft"), chain, sft, file)
        assert before.path.name in logs(chain, "sft")


@both
def test_without_a_whole_checkpoint_a_stage_starts_anew(sft: Ground, tmp_path: Path, posttrain: Cli, damage: Damage) -> None:
    chain = sft.copy(sft.cut, tmp_path / "runs")
    for file in chain.directory.glob("sft/checkpoints/*/rank_*"):
        damage(file)
    assert_as_if_undamaged(run(posttrain, chain, "sft"), chain, sft, chain.directory)


# --- what a stage was told, and what runs share ----------------------------------------------------------------------


@both
def test_a_damaged_record_of_an_attempt_changes_nothing(sft: Ground, tmp_path: Path, posttrain: Cli, damage: Damage) -> None:
    for name in ("stage.json", "prepared.json", "progress.json"):
        for chain, file in copies(sft, sft.cut, [sft.cut.directory / "sft" / name], tmp_path):
            damage(file)
            assert_as_if_undamaged(run(posttrain, chain, "sft"), chain, sft, file)


@contextmanager
def kept(root: Path) -> Iterator[None]:
    """Whatever the block does to a root, it is as before afterwards."""
    aside = root.with_name("kept")
    shutil.copytree(root, aside)
    yield
    shutil.rmtree(root)
    aside.rename(root)


@both
def test_damaged_prepared_data_are_made_again(sft: Ground, posttrain: Cli, damage: Damage) -> None:
    """In place: prepared data say which files they were made of, and a copy of the root has others."""
    chain = sft.cut
    for file in sorted(chain.root.glob(".prepared/[!.]*/*")):
        with kept(chain.root):
            damage(file)
            assert_as_if_undamaged(run(posttrain, chain, "sft"), chain, sft, file)
            (line,) = [line for line in logs(chain, "sft").splitlines() if "is made again" in line]
            assert line.startswith(str(file))
            assert list(chain.root.glob(f".prepared/.old/1/*/{file.name}")), "what was damaged is kept aside"


@both
def test_a_damaged_reference_is_made_again(dpo: Ground, tmp_path: Path, posttrain: Cli, damage: Damage) -> None:
    files = sorted(path for path in dpo.cut.root.glob(".reference/*/*"))
    for chain, file in copies(dpo, dpo.cut, files, tmp_path):
        damage(file)
        assert_as_if_undamaged(run(posttrain, chain, "dpo"), chain, dpo, file)
        (line,) = [line for line in logs(chain, "dpo").splitlines() if "is made again" in line]
        assert line.startswith(str(file))
