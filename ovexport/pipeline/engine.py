"""Carrying out stages in a run's folder: what is still missing of them, and nothing before every check has passed.

The engine is handed its stages and knows none of them by name.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from filelock import Timeout as LockTimeout

from ovexport import recipe as recipes
from ovexport.artifacts import RunFolder, StageRecord
from ovexport.checking import Finding
from ovexport.errors import ArtifactError, RecipeError
from ovexport.foreign import translated
from ovexport.pipeline.stage import Context, Stage, finished, other_versions, stage_digest
from ovexport.progress import Listener
from ovexport.recipe import Recipe
from ovexport.storage.digests import file_digest, json_digest
from ovexport.storage.files import PARTIAL, files_in, translated_disk_errors, write_text
from ovexport.storage.records import write_record
from ovexport.storage.scratch import clear_partial, clear_scratch
from ovexport.versions import stack_versions

if TYPE_CHECKING:
    from ovexport.pipeline.plan import Outlook, Plan

logger = logging.getLogger(__name__)

Stages = Sequence[Stage]

_LOCK = ".lock"
_FIRST_FILES = {
    _LOCK,
    "stages",
    "logs",
    *(name for one in ("recipe.toml", "data") for name in (one, f".{one}{PARTIAL}")),
}
"""What a run has written before its first stage is finished."""


def run(
    stages: Stages,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
    until: str | None,
    listener: Listener,
    announce: Callable[[str, bool], None],
) -> RunFolder:
    """Carry out the stages, or what is still missing of them.

    Args:
        resume, overwrite, until, announce: as pipeline.run.

    Raises:
        RecipeError: `until` is no stage.
        ArtifactError: the folder holds another run, or something that is no run.
        OvexportError: as the checks and the stages do.
    """
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        raise RecipeError(f"--until {until}: no such stage; they are {', '.join(names)}")
    folder, ours = RunFolder(out), _names(stages)
    anew = overwrite or _is_empty(folder)
    _check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    require_runnable(stages, recipe, out)
    with translated_disk_errors(out):
        folder.stages.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _forgotten_if_nothing_is_finished(folder, ours) if anew else nullcontext():
        if anew:
            _clear(folder, ours)
            folder.stages.mkdir()
        _clear_litter(folder, ours)
        write_text(recipes.dump(recipe), folder.recipe)
        results: dict[str, str] = {}
        for stage in stages[: names.index(until) + 1 if until else None]:
            digest = stage_digest(stage, recipe, results)
            record = finished(stage, folder, digest)
            announce(stage.name, record is not None)
            if record is None:
                identity = stage_digest(replace(stage, finishing=()), recipe, results)
                record = _carry_out(stage, Context(recipe, folder, identity, listener), digest)
            _tell_versions(stage, record)
            if not stage.keeps_scratch(recipe):
                for name in stage.scratch:
                    shutil.rmtree(folder.path / name, ignore_errors=True)
            results[stage.name] = json_digest(record.files)
    return folder


def plan(stages: Stages, recipe: Recipe, out: Path) -> "Plan":
    """The plan of a run, with every problem that `run` would refuse it for."""
    from ovexport.pipeline.plan import Outlook, plan_run

    outlook = Outlook(recipe, out)
    return plan_run(outlook, list(_findings(stages, outlook)))


def require_runnable(stages: Stages, recipe: Recipe, out: Path) -> None:
    """Refuse a recipe that can't be carried out, before any work starts.

    Raises:
        OvexportError: with every problem at once, of the class of the first.
    """
    from ovexport.pipeline.plan import Outlook, sorted_problems

    problems = sorted_problems(_findings(stages, Outlook(recipe, out)))
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))


def _findings(stages: Stages, outlook: "Outlook") -> Iterator[Finding]:
    """What every stage says of a run before any work."""
    for stage in stages:
        yield from stage.check(outlook)
    yield from outlook.folder()


def _tell_versions(stage: Stage, record: StageRecord) -> None:
    """Say that a stage's files were made with other versions."""
    others = other_versions(stage, record)
    if others:
        differing = ", ".join(f"{name} {then} ({now} is installed)" for name, (then, now) in others.items())
        logger.warning("  made with %s, and kept; --overwrite makes it anew", differing)


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


def _carry_out(stage: Stage, context: Context, digest: str) -> StageRecord:
    logger.debug("stage %s", stage.name)
    folder = context.folder
    folder.stage_record(stage.name).unlink(missing_ok=True)
    started = time.monotonic()
    with translated(f"stage {stage.name}"):
        stage.run(context)
    record = StageRecord(
        stage=stage.name,
        digest=digest,
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
    if _is_empty(folder):
        return
    if not folder.stages.is_dir():
        raise ArtifactError(f"{path}: holds files that are no run's; choose another --out")
    if overwrite:
        return
    if not resume:
        raise ArtifactError(f"{path}: holds a run; --resume to go on with it, --overwrite to begin anew")
    if not folder.recipe.is_file():
        return
    try:
        former = recipes.load(folder.recipe).model
    except RecipeError as error:
        raise ArtifactError(f"{folder.recipe}: damaged ({error}); --overwrite to begin anew") from error
    if former != recipe.model:
        raise ArtifactError(f"{path}: holds a run of another model, {former.id}; choose another --out, or --overwrite")


def _is_empty(folder: RunFolder) -> bool:
    """Whether there is nothing to resume and nothing to lose: no folder, no files, or what the first stage of a run
    left that was killed in it."""
    if not folder.path.is_dir():
        return not folder.path.exists()
    names = {path.name for path in folder.path.iterdir()}
    if folder.stages.is_dir():
        unfinished = all(path.name.endswith(PARTIAL) for path in folder.stages.iterdir())
        return unfinished and _LOCK in names and names <= _FIRST_FILES
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
