"""Memory and disk that give out, for real, in the middle of the work: one line with the cure."""

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ovexport, refused

from ovexport import artifacts, recipe
from ovexport.errors import ArtifactError, OutOfMemory, OvexportError
from ovexport.foreign import translated
from ovexport.pipeline import engine
from ovexport.pipeline.stage import Stage
from ovexport.progress import silent
from ovexport.recipe import Recipe
from ovexport.storage.files import atomic_folder, write_text
from ovexport.storage.tensorfile import write_tensors
from ovexport.tune.log import TuningLog


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may become larger, as on a file system with that limit."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="ulimit -f"), files_of_at_most(1000):
        write_text("x" * 10_000, tmp_path / "a.txt")
    with (
        pytest.raises(ArtifactError, match="ulimit -f"),
        files_of_at_most(1000),
        atomic_folder(tmp_path / "a") as folder,
    ):
        write_tensors({"a": np.zeros(10_000)}, folder / "a.safetensors")
    assert not (tmp_path / "a").exists()


def test_a_disk_that_is_full_where_tensorboard_writes_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="ulimit -f"), files_of_at_most(0), TuningLog(tmp_path) as log:
        for step in range(100):
            log.write(step, loss_nats=1.0)


def test_a_disk_that_is_full_where_tensorboard_opens_its_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ovexport.tune.log.SummaryWriter", full)
    with pytest.raises(ArtifactError, match="no space left on the disk; free some"), TuningLog(tmp_path):
        pass


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(10**15)])
def test_memory_that_gives_out_in_a_stage_is_one_line(allocate, tiny_recipe: Recipe, tmp_path: Path) -> None:
    stage: Stage[Any] = Stage(name="tune", run=lambda _: allocate())
    asked: dict[str, Any] = {"resume": False, "overwrite": False, "until": None, "listener": silent}
    with pytest.raises(OutOfMemory, match=r"stage tune: out of memory .*; lower tune.batch_size") as caught:
        engine.run((stage,), tiny_recipe, tmp_path, check=tuple, announce=lambda *_: None, **asked)
    assert caught.value.exit_code == 5


def test_a_name_that_is_too_long_is_one_line(tiny_recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.dump(tiny_recipe))
    long = tmp_path / ("n" * 300)
    for arguments in (
        ("plan", path, "--set", f"data.train.path={long}.txt"),
        ("run", path, "--out", long),
        ("report", long),
    ):
        assert "longer than the file system takes" in refused(ovexport(*arguments), 4)


def test_what_gives_out_keeps_the_subject_of_the_nearest_seam() -> None:
    with pytest.raises(OvexportError, match="outer: out of memory"), translated("outer"):
        raise MemoryError
    with pytest.raises(ArtifactError, match=r"^inner$"), translated("outer"):
        raise ArtifactError("inner")


def test_a_painted_folder_is_shown_and_does_not_speak(run_copy: artifacts.RunFolder) -> None:
    """The verdict is the program's, whatever the folder is called."""
    painted = run_copy.path / "in[red]t4\x1b[2J\x1b[32mPROVEN"
    run_copy.ir("int4").path.rename(painted)
    done = ovexport("verify", painted, "--no-runtime")
    assert r"in[red]t4\x1b[2J\x1b[32mPROVEN" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    document = ovexport("verify", painted, "--no-runtime", "--json").stdout
    assert json.loads(document)["subject"] == painted.name
    assert "\x1b" not in document
