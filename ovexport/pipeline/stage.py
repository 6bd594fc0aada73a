"""A stage: what its result depends on, and whether it is done.

It is done when its record holds the digest of everything that its result depends on, and its files are as it wrote
them. What was measured with other versions of a library is measured again; what was made with others is kept, and said.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from ovexport.pipeline.plan import Outlook


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage is run with.

    Attributes:
        identity: digest of all that the stage depends on, but for its finishing sections.
    """

    recipe: Recipe
    folder: RunFolder
    identity: str
    listener: Listener

    def models(self) -> dict[str, IR]:
        """The three IRs of the run."""
        return {name: self.folder.ir(name).require() for name in MODELS}


def _nothing_to_check(_: "Outlook") -> Iterator[Finding]:
    return iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the way.

    Attributes:
        check: what would stop it, found before any work.
        sections: the recipe's parts that its result depends on, as paths.
        without: keys of these sections that its result does not depend on, as paths.
        reads: local files and plug-ins whose content its result depends on, by their names in LOCAL_FILES.
        upstream: stages whose artifacts it reads.
        libraries: distributions that it computes with.
        measures: whether it leaves figures, which are measured again with other versions of its libraries.
        outputs: what it writes, relative to the run.
        scratch: folders that it can go on from when it was interrupted, and that go once it is done.
        finishing: sections that only what it does after its scratch is made depends on.
        keeps_scratch: whether it does that, so that the scratch stays and a change of those sections can use it again.
    """

    name: str
    run: Callable[[Context], None]
    check: "Callable[[Outlook], Iterator[Finding]]" = _nothing_to_check
    sections: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    measures: bool = False
    outputs: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    finishing: tuple[str, ...] = ()
    keeps_scratch: Callable[[Recipe], bool] = lambda _: False


def stage_digest(stage: Stage, recipe: Recipe, results: Mapping[str, str]) -> str:
    """SHA-256 over all that a stage's result depends on.

    Args:
        results: by upstream stage, a digest of what it wrote.
    """
    finishing = stage.finishing if stage.keeps_scratch(recipe) else ()
    return json_digest(
        {
            "stage": stage.name,
            "format": FORMAT_VERSION,
            "sections": {path: _section(recipe, path, stage.without) for path in (*stage.sections, *finishing)},
            "upstream": [results[name] for name in stage.upstream],
            "files": {name: LOCAL_FILES[name](recipe) for name in stage.reads},
            "versions": {name: installed_version(name) for name in stage.libraries} if stage.measures else None,
        }
    )


def finished(stage: Stage, folder: RunFolder, digest: str) -> StageRecord | None:
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


def other_versions(stage: Stage, record: StageRecord) -> dict[str, tuple[str, str]]:
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


def _compress_plug_ins(recipe: Recipe) -> dict[str, str | None]:
    """By key, the plug-ins that section [compress] names."""
    if recipe.compress.starting_point is None and recipe.compress.layer_policy == "recipe":
        return {}  # without importing what compresses
    from ovexport import compress

    return compress.plug_ins(recipe.compress)


LOCAL_FILES: Mapping[str, Callable[[Recipe], Any]] = {
    "model": _model_files,
    "card": _card_files,
    "text": _text_files,
    "prompts": lambda recipe: _file_digest(recipe.evaluate.prompts),
    "encoder": lambda recipe: _folder_digests(recipe.evaluate.encoder, lambda file: True),
    "compress plug-ins": _compress_plug_ins,
}
"""The digests of local files and of plug-ins, by what they are of; what is on the hub has none."""


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
