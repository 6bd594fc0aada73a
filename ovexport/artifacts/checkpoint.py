"""A checkpoint: quantization parameters and adapters of each layer, before stripping."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from ovexport.artifacts.peft_adapter import AdaptedLayer, PeftAdapter
from ovexport.storage.digests import file_digest
from ovexport.storage.files import files_in
from ovexport.storage.records import Record, read_record
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.layer import CodeDigest, LayerFormat
from ovexport.weights.norm import TunedNorm
from ovexport.weights.ranks import Configuration, RankSpace
from ovexport.wording import model_named

DRAWN_RANKS = "drawn_ranks.json"


class Validation(Record):
    """How good tuned parameters are on the validation split.

    Attributes:
        figure: the objective's, with its unit: "validation_kl_nats" is the mean divergence per token of text,
            "validation_nll_nats" the mean negative log-likelihood per token of the answers.
        value: less is better.
    """

    figure: str
    value: float


class CheckpointManifest(Record):
    """checkpoint.json: what was compressed, from which weights, and the codes the last tuning step used.

    Attributes:
        model_id, revision, adapter: the base model as the recipe named it, and the LoRA adapter merged with it.
        weight_digests: SHA-256 of each compressed parameter's bytes in the base model, (output, input) order.
        replaced_weights: parameters whose weights the starting point replaced (AWQ, GPTQ); the new ones are in
            weights.safetensors.
        digests: of the codes that tuning ended with, by layer.
        steps: of the kept parameters; 0 for the twin, and where no step validated better than the start; None for a
            checkpoint that another tool tuned.
        validation: of the kept step; None for a starting point, and for a model that can't be tuned.
        rank_space: ranks that an adapter can have (FQ_LORA_NLS), largest first; empty for adapters used whole.
        rank_by: what has a rank of its own, a transformer block or a Linear.
        norms: parameters of normalization layers that were tuned, whose values are in adapters.safetensors.
    """

    format_version: Literal[2] = 2
    model_id: str
    revision: str | None
    adapter: str | None = None
    layers: tuple[LayerFormat, ...]
    weight_digests: dict[str, str]
    replaced_weights: tuple[str, ...] = ()
    digests: dict[str, CodeDigest]
    steps: int | None = 0
    validation: Validation | None = None
    rank_space: tuple[int, ...] = ()
    rank_by: Literal["block", "linear"] = "block"
    norms: tuple[TunedNorm, ...] = ()
    versions: dict[str, str]

    @property
    def model(self) -> str:
        """The base model, as a message names it."""
        return model_named(self.model_id, self.revision, self.adapter)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = {layer.name for layer in self.layers}
        if set(self.weight_digests) != names or set(self.digests) != {layer.name for layer in self.packed}:
            raise ValueError("its digests are not of its layers")
        return self

    @property
    def packed(self) -> tuple[LayerFormat, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if layer.encoding)

    @property
    def elastic_ranks(self) -> RankSpace:
        """The ranks that its adapters can have; a space without choice unless they are elastic."""
        return RankSpace.of(self.layers, self.rank_space, self.rank_by)


class DrawnStep(Record):
    """A tuning step of elastic adapters.

    Attributes:
        step: from 0.
        ranks: that it was taken with, one per unit of the rank space.
        loss_nats: its training loss.
    """

    step: int
    ranks: Configuration
    loss_nats: float


class DrawnRanks(Record):
    """drawn_ranks.json: which ranks each tuning step drew, and what came of it; a search begins with the best."""

    steps: tuple[DrawnStep, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with checkpoint.json, adapters.safetensors, reference.safetensors if it was tuned here,
    weights.safetensors if the starting point replaced weights, and drawn_ranks.json if its ranks are
    still to be chosen.

    adapters.safetensors holds per layer `NAME.input_low` and `NAME.input_range`, (output, groups, 1) float32, or
    `NAME.scale` for symmetric ones, and `NAME.lora_A` (rank, input; for QA-LoRA (rank, groups)), `NAME.lora_B` (output,
    rank), float32. A layer with NNCF's arithmetic has what `nncf_quantizer.NncfQuantizer.stored` gives. A tuned norm is
    `NAME`, in the parameter's shape, float32.
    reference.safetensors holds what the tuned model says of held-out text, in float32 throughout: `token_ids`
    (sequences, length) int32 and `logits` (sequences, length, vocabulary) float32.
    """

    path: Path

    @property
    def manifest(self) -> CheckpointManifest:
        """checkpoint.json, checked."""
        return read_record(self.path / "checkpoint.json", CheckpointManifest)

    @property
    def adapters(self) -> TensorFile:
        """Adapters and quantization parameters."""
        return TensorFile(self.path / "adapters.safetensors")

    @property
    def beside(self) -> PeftAdapter | None:
        """The adapters that no code absorbs, as one of PEFT's; None where there are none, or none adds anything."""
        manifest, tensors = self.manifest, self.adapters
        layers = (
            AdaptedLayer(
                module=layer.name.removesuffix(".weight"),
                lora_A=tensors.require(f"{layer.name}.lora_A"),
                lora_B=tensors.require(f"{layer.name}.lora_B"),
                factor=layer.adapter_factor,
            )
            for layer in manifest.packed
            if layer.adapter == "beside" and layer.rank
        )
        added = tuple(layer for layer in layers if layer.folded.lora_B.any())
        return PeftAdapter(name=str(self.path), base=manifest.model_id, layers=added) if added else None

    @property
    def weights(self) -> TensorFile:
        """The weights that the starting point replaced, (output, input) float32."""
        return TensorFile(self.path / "weights.safetensors")

    @property
    def reference(self) -> TensorFile | None:
        """The tuned model's logits of held-out text; None where none were recorded."""
        path = self.path / "reference.safetensors"
        return TensorFile(path) if path.is_file() else None

    @property
    def drawn_ranks(self) -> DrawnRanks | None:
        """What the search of ranks begins with; None unless ranks were drawn and none are chosen yet."""
        path = self.path / DRAWN_RANKS
        return read_record(path, DrawnRanks) if path.is_file() else None

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file, by name."""
        return {file.relative_to(self.path).as_posix(): file_digest(file) for file in files_in(self.path)}
