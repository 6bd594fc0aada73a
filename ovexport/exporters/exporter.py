"""What an exporter is: packed weights to a product on disk, with what the proof needs to read it back."""

import shutil
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ovexport.artifacts import IR, IR_MANIFEST, IRManifest, PackedWeights
from ovexport.convert import convert
from ovexport.recipe import ModelSpec
from ovexport.registry import Registry
from ovexport.storage.digests import file_digest
from ovexport.storage.files import files_in
from ovexport.storage.records import write_record
from ovexport.versions import stack_versions
from ovexport.weights.layer import LayerFormat


class Exporter(Protocol):
    """Writes packed weights in a format that a runtime loads.

    Derive from this class and register it by the name that `convert.formats` and `--format` use.
    """

    def check(self, layers: Sequence[LayerFormat]) -> None:
        """Refuse, before any work, what the format can't hold; nothing is refused by default.

        Raises:
            MissingDependencyError: a package that it is written with is not installed.
            UnsupportedModelError: naming the layer.
        """
        return

    @abstractmethod
    def export(self, model: ModelSpec, base: IR, packed: PackedWeights, out: Path) -> None:
        """Write the product, with tokenizer and configurations beside it, or nothing.

        Args:
            model: that was compressed.
            base: its traced IR.

        Raises:
            ArtifactError: an input is missing or corrupt.
            UnsupportedModelError: the model can't be written in this format.
        """


exporters: Registry[type[Exporter]] = Registry("ovexport.exporters", "format")
"""By name."""


@exporters.register("openvino")
class OpenvinoExporter(Exporter):
    """The OpenVINO IR."""

    def export(self, model: ModelSpec, base: IR, packed: PackedWeights, out: Path) -> None:
        """As Exporter."""
        convert(base, packed, out)


def write_beside(base: IR, packed: PackedWeights, folder: Path) -> None:
    """Copy what stands beside the base's graph, the runtime's own files left out, and write ovexport.json."""
    own = shutil.ignore_patterns("openvino_*", IR_MANIFEST)
    shutil.copytree(base.path, folder, ignore=own, dirs_exist_ok=True)
    manifest = packed.manifest
    record = IRManifest(
        model_id=manifest.model_id,
        revision=manifest.revision,
        adapter=manifest.adapter,
        checkpoint_files=manifest.checkpoint_files,
        tuning_steps=manifest.tuning_steps,
        norms=tuple(norm.name for norm in manifest.norms),
        files={file.relative_to(folder).as_posix(): file_digest(file) for file in files_in(folder)},
        versions=stack_versions(),
    )
    write_record(record, folder / IR_MANIFEST)
