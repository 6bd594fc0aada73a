"""Packed weights: what strip writes and convert reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovexport.artifacts.peft_adapter import ADAPTER_FOLDER, is_peft_adapter
from ovexport.storage.records import Record, read_record
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.layer import LayerFormat
from ovexport.weights.norm import TunedNorm


class PackedManifest(Record):
    """packed.json: the layers whose codes lie in packed.safetensors, and where their weights came from.

    Attributes:
        model_id, revision, adapter: the base model as the recipe named it, and the LoRA adapter merged with it.
        checkpoint_files: SHA-256 of each file of the checkpoint that was packed.
        replaced_weights, tuning_steps, norms: the checkpoint's `replaced_weights`, `steps` and `norms`.
    """

    format_version: Literal[2] = 2
    model_id: str
    revision: str | None
    adapter: str | None = None
    layers: tuple[LayerFormat, ...]
    weight_digests: dict[str, str]
    replaced_weights: tuple[str, ...] = ()
    checkpoint_files: dict[str, str]
    tuning_steps: int | None = None
    norms: tuple[TunedNorm, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A folder with packed.json and packed.safetensors, and `adapter` where layers have adapters that are not absorbed.

    Per layer `NAME.codes` (u4 and i4 two to a byte, low nibble first; u8; i8), `NAME.scale` float16 and, where
    asymmetric, `NAME.zero_point`, packed like the codes or float16; `NAME` itself, float32, for a replaced weight
    that stays in floating point and for a tuned norm.
    """

    path: Path

    @property
    def manifest(self) -> PackedManifest:
        """packed.json, checked."""
        return read_record(self.path / "packed.json", PackedManifest)

    @property
    def adapter(self) -> Path | None:
        """The folder of a LoRA adapter in PEFT's layout; None where every adapter is absorbed."""
        folder = self.path / ADAPTER_FOLDER
        return folder if is_peft_adapter(folder) else None

    @property
    def tensors(self) -> TensorFile:
        """Codes, scales and zero points."""
        return TensorFile(self.path / "packed.safetensors")
