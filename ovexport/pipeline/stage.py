"""A stage: what its result depends on, and whether it is done.

It is done when its record holds the digest of everything that its result depends on, and its files are as it wrote
them. What was measured with other versions of a library is measured again; what was made with others is kept, and said.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from ovexport.artifacts import FORMAT_VERSION, IR, MODELS, RunFolder, StageRecord
from ovexport.checking import Finding
from ovexport.errors import ArtifactError
from ovexport.openvino.runtime_settings import changed_files
from ovexport.progress import Listener
from ovexport.recipe import Recipe
from ovexport.storage.digests import file_digest, json_digest
from ovexport.storage.files import files_in
from ovexport.storage.records import read_record
from ovexport.versions import installed_version

Seen = TypeVar("Seen")
"""What can be seen of a run before any work."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage is run with.

    Attributes:
        digest: SHA-256 over all that the stage's result depends on; what it saves on the way is kept under it.
    """

    recipe: Recipe
    folder: RunFolder
    digest: str
    listener: Listener

    def models(self) -> dict[str, IR]:
        """The three IRs of the run."""
        return {name: self.folder.ir(name).require() for name in MODELS}


def _nothing_to_check(_: object) -> Iterator[Finding]:
    return iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[Seen]):
    """One step of the way.

    Attributes:
        check: what would stop it, found before any work in what can be seen of a run by then.
        sections: the recipe's parts that its result depends on, as paths.
        without: keys of these sections that its result does not depend on, as paths.
        reads: local files whose content its result depends on, by their names in LOCAL_FILES.
        upstream: stages whose artifacts it reads.
        libraries: distributions that it computes with.
        measures: whether it leaves figures, which are measured again with other versions of its libraries.
        outputs: what it writes, relative to the run.
        scratch: folders that it can go on from when it was interrupted, and that go once it is done.
    """

    name: str
    run: Callable[[Context], None]
    check: Callable[[Seen], Iterator[Finding]] = _nothing_to_check
    sections: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    measures: bool = False
    outputs: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()


def stage_digest(stage: Stage[Any], recipe: Recipe, results: Mapping[str, str]) -> str:
    """SHA-256 over all that a stage's result depends on.

    Args:
        results: by upstream stage, a digest of what it wrote.
    """
    return json_digest(
        {
            "stage": stage.name,
            "format": FORMAT_VERSION,
            "sections": {path: _section(recipe, path, stage.without) for path in stage.sections},
            "upstream": [results[name] for name in stage.upstream],
            "files": {name: LOCAL_FILES[name](recipe) for name in stage.reads},
            "versions": {name: installed_version(name) for name in stage.libraries} if stage.measures else None,
        }
    )


def finished(stage: Stage[Any], folder: RunFolder, digest: str) -> StageRecord | None:
    """The stage's record, when it is of these inputs and its files are untouched."""
    path = folder.stage_record(stage.name)
    if not path.is_file():
        return None
    try:
        record = read_record(path, StageRecord)
    except ArtifactError:
        return None
    if record.digest != digest or changed_files(folder.ir("int4"), record.files, folder.path):
        return None
    return record


def other_versions(stage: Stage[Any], record: StageRecord) -> dict[str, tuple[str, str]]:
    """Of the stage's libraries those that another version of is installed than it was made with: then and now."""
    now = {name: installed_version(name) or "none" for name in stage.libraries}
    return {
        name: (record.versions[name], now[name])
        for name in stage.libraries
        if name in record.versions and record.versions[name] != now[name]
    }


def _section(recipe: Recipe, path: str, without: tuple[str, ...]) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = getattr(value, key) if value is not None else None
    if not hasattr(value, "model_dump"):
        return value
    return {key: found for key, found in value.model_dump(mode="json").items() if f"{path}.{key}" not in without}


_TOLD_OF_A_MODEL = re.compile(r"(licen[cs]e|notice)(\.txt)?|.*\.(md|png|jpe?g|gif|svg|pdf)", re.IGNORECASE)
"""Names of files beside a model that nothing loads: texts about it, and pictures."""


def _model_files(recipe: Recipe) -> dict[str, str] | None:
    """What a local model is loaded from: neither hidden files nor what is told of it."""
    return _folder_digests(recipe.model.id, lambda file: not _TOLD_OF_A_MODEL.fullmatch(file.name))


def _card_files(recipe: Recipe) -> dict[str, str] | None:
    """The texts about a local model."""
    return _folder_digests(recipe.model.id, lambda file: file.suffix.lower() == ".md")


def _text_files(recipe: Recipe) -> list[str | None]:
    sources = (recipe.data.train, recipe.data.validation, recipe.data.test)
    paths = [source.path if source else None for source in sources]
    paths += recipe.task.files.values() if recipe.task else []
    return [_file_digest(path) for path in paths]


LOCAL_FILES: Mapping[str, Callable[[Recipe], Any]] = {
    "model": _model_files,
    "card": _card_files,
    "text": _text_files,
    "prompts": lambda recipe: _file_digest(recipe.evaluate.prompts),
    "encoder": lambda recipe: _folder_digests(recipe.evaluate.encoder, lambda file: True),
}
"""The digests of local files, by what they are of; what is on the hub has none."""


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
