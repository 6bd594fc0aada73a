"""An OpenVINO IR and its manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovexport.artifacts.peft_adapter import ADAPTER_FOLDER, ADAPTER_TENSORS, is_peft_adapter
from ovexport.errors import ArtifactError
from ovexport.storage.records import Record, read_record
from ovexport.wording import model_named

IR_MANIFEST = "ovexport.json"


class IRManifest(Record):
    """ovexport.json in a product's folder: what it was made from, and what it was when it was made.

    Attributes:
        model_id, revision, adapter: the base model as the recipe named it, and the LoRA adapter merged with it.
        checkpoint_files: SHA-256 of each file of the checkpoint that it was made from.
        files: SHA-256 of each other file of the folder.
        tuning_steps: of the parameters that were kept: 0 without tuning, None where it is not known.
        norms: names of the norms that were tuned, whose constants have other values than the base's.
    """

    format_version: Literal[1] = 1
    model_id: str
    revision: str | None
    adapter: str | None = None
    checkpoint_files: dict[str, str]
    tuning_steps: int | None = None
    norms: tuple[str, ...] = ()
    files: dict[str, str]
    versions: dict[str, str]

    @property
    def model(self) -> str:
        """The base model, as a message names it."""
        return model_named(self.model_id, self.revision, self.adapter)


class IndexedConstant(Record):
    """A constant of a traced graph that holds a weight matrix.

    Attributes:
        constant: its name in the graph.
        digest: SHA-256 of the matrix's bytes, row by row as (output, input).
        out_features, in_features: the matrix's shape.
        transposed: the constant holds it as (input, output).
    """

    constant: str
    digest: str
    out_features: int
    in_features: int
    transposed: bool


class WeightIndex(Record):
    """bf16.weights.json: where a traced graph holds the model's weight matrices, so that they are hashed once.

    Attributes:
        constants: an entry for each type that the values may have had in the model; a float32 constant whose values fit
            into bfloat16 has two.
    """

    format_version: Literal[1] = 1
    constants: tuple[IndexedConstant, ...]


@dataclass(frozen=True, slots=True)
class IR:
    """A folder that openvino-genai and optimum-intel load: openvino_model.xml / .bin, tokenizers, configurations."""

    path: Path

    @property
    def xml(self) -> Path:
        """The graph."""
        return self.path / "openvino_model.xml"

    @property
    def bin(self) -> Path:
        """The weights."""
        return self.path / "openvino_model.bin"

    @property
    def adapter(self) -> Path | None:
        """The folder of a LoRA adapter in PEFT's layout, without which the model is not the one that was tuned; None
        where every adapter is absorbed."""
        folder = self.path / ADAPTER_FOLDER
        return folder if is_peft_adapter(folder) else None

    @property
    def adapter_tensors(self) -> Path:
        """That adapter as openvino-genai takes it."""
        return self.path / ADAPTER_FOLDER / ADAPTER_TENSORS

    @property
    def weight_bytes(self) -> int:
        """Size of the .bin."""
        return self.bin.stat().st_size

    @property
    def manifest(self) -> IRManifest | None:
        """ovexport.json, checked; None for an IR that another tool made."""
        path = self.path / IR_MANIFEST
        return read_record(path, IRManifest) if path.is_file() else None

    @property
    def index_file(self) -> Path:
        """The index of a traced IR's weights. It lies beside the folder, whose files are compared with a product's."""
        return self.path.with_name(f"{self.path.name}.weights.json")

    @property
    def weight_index(self) -> WeightIndex:
        """The index of a traced IR's weights, checked; it is trusted to be of this IR."""
        return read_record(self.index_file, WeightIndex)

    def require(self) -> "IR":
        """Itself, when its graph and weights are there.

        Raises:
            ArtifactError: they are not.
        """
        if (self.path / "model.onnx").is_file() and not self.xml.is_file():
            raise ArtifactError(
                f"{self.path}: an ONNX model, which is proven by ovexport verify and measured by no command; give an IR"
            )
        for file in (self.xml, self.bin):
            if not file.is_file():
                raise ArtifactError(f"{file}: missing; give a folder with an OpenVINO IR, made by run or convert")
        return self
