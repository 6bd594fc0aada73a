"""The digests of what a recipe names and a stage reads: local files, and the code of plug-ins. What is on the hub has
none."""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ovexport.recipe import OBJECTIVES, Recipe
from ovexport.storage.digests import file_digest
from ovexport.storage.files import files_in

_TOLD_OF_A_MODEL = re.compile(r"(licen[cs]e|notice)(\.txt)?|.*\.(md|png|jpe?g|gif|svg|pdf)", re.IGNORECASE)
"""Names of files beside a model that nothing loads: texts about it, and pictures."""


def model_files(recipe: Recipe) -> dict[str, str] | None:
    """What a local model and its adapter are loaded from: neither hidden files nor what is told of them."""
    own = _folder_digests(recipe.model.id, _is_loaded)
    if recipe.model.adapter is None:
        return own
    added = _folder_digests(recipe.model.adapter, _is_loaded) or {}
    return (own or {}) | {f"adapter: {name}": digest for name, digest in added.items()}


def card_files(recipe: Recipe) -> dict[str, str] | None:
    """The texts about a local model."""
    return _folder_digests(recipe.model.id, lambda file: file.suffix.lower() == ".md")


def text_files(recipe: Recipe) -> list[str | None]:
    """The files of text and of a task's rows."""
    sources = (recipe.data.train, recipe.data.validation, recipe.data.test)
    paths = [source.path if source else None for source in sources]
    paths += recipe.task.files.values() if recipe.task else []
    return [_file_digest(path) for path in paths]


def compress_plug_ins(recipe: Recipe) -> dict[str, str | None]:
    """By key, the plug-ins that section [compress] names."""
    if recipe.compress.starting_point is None and recipe.compress.layer_policy == "recipe":
        return {}  # without importing what compresses
    from ovexport import compress

    return compress.plug_ins(recipe.compress)


def sensitivities_file(recipe: Recipe) -> str | None:
    """What formats of layers cost, where another run measured it."""
    return _file_digest(recipe.compress.sensitivities)


def prompts_file(recipe: Recipe) -> str | None:
    """The file of the evaluation's prompts."""
    return _file_digest(recipe.evaluate.prompts)


def encoder_files(recipe: Recipe) -> dict[str, str] | None:
    """A local sentence encoder."""
    return _folder_digests(recipe.evaluate.encoder, lambda file: True)


def objective_code(recipe: Recipe) -> str | None:
    """The plug-in that the objective of tuning is of."""
    if recipe.tune.objective in OBJECTIVES:
        return None  # without importing what tunes
    from ovexport.objectives import objectives

    return objectives.identity(recipe.tune.objective)


def _is_loaded(file: Path) -> bool:
    return _TOLD_OF_A_MODEL.fullmatch(file.name) is None


def _folder_digests(name: str, counts: Callable[[Path], bool]) -> dict[str, str] | None:
    root = Path(name)
    if not root.is_dir():
        return None
    files = {file.relative_to(root): file for file in files_in(root) if counts(file)}
    return {
        path.as_posix(): _digest(file)
        for path, file in files.items()
        if not any(part.startswith(".") for part in path.parts)
    }


def _file_digest(name: str | None) -> str | None:
    return _digest(Path(name)) if name is not None and Path(name).is_file() else None


def _digest(file: Path) -> str:
    state = file.stat()
    return _remembered_digest(file, state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=4096)
def _remembered_digest(file: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    """Of a file that several stages read; a run hashes it once."""
    return file_digest(file)
