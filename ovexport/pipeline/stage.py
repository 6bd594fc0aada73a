"""A stage: what its result depends on, and whether it is done.

It is done when its record holds the digest of everything that its result depends on, and its files are as it wrote
them. What was measured with other versions of a library is measured again; what was made with others is kept, and said.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ovexport.artifacts import FORMAT_VERSION, IR, MODELS, RunFolder, StageRecord
from ovexport.checking import Finding
from ovexport.errors import ArtifactError
from ovexport.openvino.runtime_settings import changed_files
from ovexport.progress import Listener
from ovexport.recipe import Recipe
from ovexport.storage.digests import json_digest
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
        reads: by a name, what gives a digest of local files, or of plug-ins, that its result depends on.
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
    reads: Mapping[str, Callable[[Recipe], Any]] = field(default_factory=dict)
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
            "files": {name: digest(recipe) for name, digest in stage.reads.items()},
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
    return {key: content for key, content in value.model_dump(mode="json").items() if f"{path}.{key}" not in without}
