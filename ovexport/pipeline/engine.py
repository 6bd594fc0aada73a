"""Carrying out stages in a run's folder: what is still missing of them, and nothing before every check has passed.

The engine is handed its stages and knows none of them by name.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from filelock import Timeout as LockTimeout

from ovexport import recipe as recipes
from ovexport.artifacts import FORMAT_VERSION, RunFolder, StageRecord
from ovexport.checking import Finding, require_runnable
from ovexport.errors import ArtifactError, RecipeError
from ovexport.foreign import translated
from ovexport.pipeline.stage import Context, Stage, finished, other_versions, stage_digest
from ovexport.progress import Listener
from ovexport.recipe import Recipe
from ovexport.storage.bounded import parse_json
from ovexport.storage.digests import file_digest, json_digest
from ovexport.storage.files import PARTIAL, files_in, make_folder, write_text
from ovexport.storage.records import write_record
from ovexport.storage.scratch import clear_partial, clear_scratch
from ovexport.storage.textfile import read_text
from ovexport.versions import stack_versions

logger = logging.getLogger(__name__)

Stages = Sequence[Stage[Any]]

_LOCK = ".lock"


def run(
    stages: Stages,
    recipe: Recipe,
    out: Path,
    *,
    check: Callable[[], Iterable[Finding]],
    resume: bool,
    overwrite: bool,
    until: str | None,
    listener: Listener,
    announce: Callable[[str, bool], None],
) -> RunFolder:
    """Carry out the stages, or what is still missing of them.

    Args:
        check: says what would stop the run; asked before anything is written.
        resume, overwrite, until, announce: as services.run.

    Raises:
        RecipeError: `until` is no stage.
        ArtifactError: the folder holds another run, or something that is no run.
        OvexportError: as the checks and the stages do.
    """
    wanted = _up_to(stages, until)
    folder, ours = RunFolder(out), _names(stages)
    is_empty = _is_empty(folder, stages[0])
    if not is_empty:
        _check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    starts_over = overwrite or is_empty
    require_runnable(check())
    make_folder(folder.stages)
    with _alone(folder), _forgotten_if_nothing_is_finished(folder, ours) if starts_over else nullcontext():
        if starts_over:
            _clear(folder, ours)
            folder.stages.mkdir()
        _clear_litter(folder, ours)
        write_text(recipes.dump(recipe), folder.recipe)
        _complete(wanted, recipe, folder, listener, announce)
    return folder


def _up_to(stages: Stages, until: str | None) -> Stages:
    """The stages up to one of them; all of them without."""
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        raise RecipeError(f"--until {until}: no such stage; they are {', '.join(names)}")
    return stages if until is None else stages[: names.index(until) + 1]


def _complete(
    stages: Stages, recipe: Recipe, folder: RunFolder, listener: Listener, announce: Callable[[str, bool], None]
) -> None:
    """Carry out each stage that is not finished."""
    results: dict[str, str] = {}
    for stage in stages:
        digest = stage_digest(stage, recipe, results)
        record = finished(stage, folder, digest)
        announce(stage.name, record is not None)
        if record is None:
            record = _carry_out(stage, Context(recipe, folder, digest, listener))
        _tell_versions(stage, record)
        for name in stage.scratch:
            shutil.rmtree(folder.path / name, ignore_errors=True)
        results[stage.name] = json_digest(record.files)


def _tell_versions(stage: Stage[Any], record: StageRecord) -> None:
    """Say that a stage's files were made with other versions."""
    others = other_versions(stage, record)
    if others:
        differing = ", ".join(f"{name} {then} ({now} is installed)" for name, (then, now) in others.items())
        logger.warning("  made with %s, and kept; --overwrite makes it again", differing)


@contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Hold the run's lock, which the operating system frees however the process ends.

    Raises:
        ArtifactError: another process holds it.
    """
    try:
        with FileLock(folder.path / _LOCK, blocking=False):
            yield
    except LockTimeout:
        raise ArtifactError(
            f"{folder.path}: another ovexport works on it; wait for it, or choose another --out"
        ) from None


def _carry_out(stage: Stage[Any], context: Context) -> StageRecord:
    logger.debug("stage %s", stage.name)
    folder = context.folder
    folder.stage_record(stage.name).unlink(missing_ok=True)
    started = time.monotonic()
    with translated(f"stage {stage.name}"):
        stage.run(context)
    record = StageRecord(
        stage=stage.name,
        format_version=FORMAT_VERSION,
        digest=context.digest,
        files={
            file.relative_to(folder.path).as_posix(): file_digest(file)
            for output in stage.outputs
            for file in files_in(folder.path / output)
        },
        seconds=time.monotonic() - started,
        versions=stack_versions(),
    )
    write_record(record, folder.stage_record(stage.name))
    return record


def _check_folder(folder: RunFolder, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make sure that the folder is ours to write in."""
    path = folder.path
    if path.is_file():
        raise ArtifactError(f"{path}: a file; choose another --out")
    if not folder.stages.is_dir():
        raise ArtifactError(f"{path}: holds files that are no run's; choose another --out")
    if overwrite:
        return
    if not resume:
        raise ArtifactError(f"{path}: holds a run; --resume to go on with it, --overwrite to start over")
    _require_format(folder)
    if not folder.recipe.is_file():
        return
    try:
        former = recipes.load(folder.recipe).model
    except RecipeError as error:
        raise ArtifactError(f"{folder.recipe}: damaged ({error}); --overwrite to start over") from error
    if former != recipe.model:
        raise ArtifactError(f"{path}: holds a run of another model, {former.id}; choose another --out, or --overwrite")


def _require_format(folder: RunFolder) -> None:
    """Refuse to go on with a run of another version of ovexport; a damaged record tells nothing."""
    for path in sorted(folder.stages.glob("*.json")):
        try:
            record = parse_json(read_text(path))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{folder.path}: a run of another version of ovexport, whose files this one can't go on with; "
                "--overwrite to start over, or choose another --out"
            )


def _is_empty(folder: RunFolder, first: Stage[Any]) -> bool:
    """Whether there is nothing to resume and nothing to lose: no folder, no files, or what the first stage of a run
    left that was killed in it."""
    if not folder.path.is_dir():
        return not folder.path.exists()
    names = {path.name for path in folder.path.iterdir()}
    if folder.stages.is_dir():
        unfinished = all(path.name.endswith(PARTIAL) for path in folder.stages.iterdir())
        written = {name for one in ("recipe.toml", *first.outputs) for name in (one, f".{one}{PARTIAL}")}
        return unfinished and _LOCK in names and names <= {_LOCK, "stages", "logs", *written}
    return not names


@contextmanager
def _forgotten_if_nothing_is_finished(folder: RunFolder, ours: Iterable[str]) -> Iterator[None]:
    """Let a run that ends before its first stage is finished leave nothing, so that the same command can be given
    again."""
    try:
        yield
    except BaseException:
        if not any(folder.stages.glob("*.json")):
            _clear(folder, ours)
            clear_partial(folder.path, ours)
            if {path.name for path in folder.path.iterdir()} <= {_LOCK}:
                with suppress(OSError):
                    (folder.path / _LOCK).unlink()
                    folder.path.rmdir()
            else:  # files of the user's, in a folder that still is a run's
                folder.stages.mkdir()
        raise


def _clear_litter(folder: RunFolder, ours: Iterable[str]) -> None:
    """Remove what kills left half written in the run's folder and beside it; the run's lock is held."""
    clear_partial(folder.path, ours)
    clear_scratch(folder.path)
    clear_scratch(folder.path.absolute().parent)


def _clear(folder: RunFolder, ours: Iterable[str]) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in ours:
        target = folder.path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _names(stages: Stages) -> list[str]:
    """What a run writes at the top of its folder."""
    written = {path.split("/")[0] for stage in stages for path in (*stage.outputs, *stage.scratch)}
    return sorted(written | {"recipe.toml", "stages", "logs"})
