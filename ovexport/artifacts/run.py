"""The layout of a run's folder, and the record of a finished stage."""

from dataclasses import dataclass
from pathlib import Path

from ovexport.artifacts.checkpoint import Checkpoint
from ovexport.artifacts.data import PreparedData
from ovexport.artifacts.ir import IR
from ovexport.artifacts.packed import PackedWeights
from ovexport.storage.records import Record

FORMAT_VERSION = 4
"""Of the layout of a run; a run of another one is not gone on with."""
RUN_FILES = (
    "README.md",
    "report.html",
    "recipe.toml",
    "verification.json",
    "evaluation.json",
    "benchmark.json",
    "gates.json",
    "sensitivities.json",
)
"""What of a run lies beside the product's files once it is uploaded."""
MODELS = ("bf16", "plain", "int4")
"""The IRs of a run, in the order in which they are compared; the last one is the product."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of a run lies."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every default spelled out."""
        return self.path / "recipe.toml"

    @property
    def data(self) -> PreparedData:
        """Token sequences and prompts."""
        return PreparedData(self.path / "data")

    @property
    def compressed(self) -> Checkpoint:
        """The starting point of tuning, and the plain twin's checkpoint."""
        return Checkpoint(self.path / "compressed")

    @property
    def tuned(self) -> Checkpoint:
        """What was tuned; elastic adapters have the median ranks."""
        return Checkpoint(self.path / "tuned")

    @property
    def checkpoint(self) -> Checkpoint:
        """What becomes the product: tuned, with the ranks that were chosen."""
        return Checkpoint(self.path / "checkpoint")

    def packed(self, name: str) -> PackedWeights:
        """Packed weights of "plain" or "int4"."""
        return PackedWeights(self.path / "packed" / name)

    def ir(self, name: str) -> IR:
        """The IR of "bf16", "plain" or "int4"."""
        return IR(self.path / name)

    def product(self, file_format: str) -> Path:
        """The product in a format beside the IR, such as "onnx"."""
        return self.path / f"int4-{file_format}"

    @property
    def search(self) -> Path:
        """How the ranks of elastic adapters were chosen."""
        return self.path / "search.json"

    @property
    def sensitivities(self) -> Path:
        """How a budget chose the formats of layers; not there where the recipe has none."""
        return self.path / "sensitivities.json"

    @property
    def gates(self) -> Path:
        """How the figures stand to the recipe's limits; not there where it has none."""
        return self.path / "gates.json"

    @property
    def stages(self) -> Path:
        """A record per finished stage; the folder marks a run as ours."""
        return self.path / "stages"

    def stage_record(self, stage: str) -> Path:
        """The record of a finished stage."""
        return self.stages / f"{stage}.json"

    @property
    def logs(self) -> Path:
        """TensorBoard, tuning.jsonl and run.log."""
        return self.path / "logs"


class StageRecord(Record):
    """A finished stage: what it was made from and what it wrote.

    Attributes:
        format_version: FORMAT_VERSION of the ovexport that wrote it.
        digest: SHA-256 over the recipe sections and the upstream stages that it depends on.
        files: SHA-256 of each file written, by path relative to the run.
    """

    stage: str
    format_version: int
    digest: str
    files: dict[str, str]
    seconds: float
    versions: dict[str, str]
