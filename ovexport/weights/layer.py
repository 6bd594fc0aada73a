"""One weight matrix: its shape, and the format it is stored in."""

import math
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import model_validator

from ovexport.storage.records import Record
from ovexport.weights.encoding import ENCODINGS, Encoding, Mode

AdapterKind = Literal["lora", "qalora", "beside"]


class LayerFormat(Record):
    """The fate of one weight matrix.

    Attributes:
        name: the parameter in the PyTorch model, such as "model.layers.0.mlp.down_proj.weight".
        kind: the layer the parameter belongs to; "head" is the output embedding when it has weights of its own.
        mode: type of its codes; "float" when it is left alone.
        out_features, in_features: shape of the matrix as (output, input); for an embedding (vocabulary, width).
        transposed: the PyTorch parameter is stored as (input, output), as GPT-2's Conv1D does.
        group_size: input channels per scale; in_features when there is one scale per output channel.
        rank: of its adapter; 0 without one.
        adapter: what the adapter is added to: "lora" to the weight, before it is rounded (FQ_LORA); "qalora" to the
            zero points of the groups, and codes stay what they are; "beside" to the layer's output, and codes and zero
            points stay what they are.
        adapter_factor: what the product of the adapter's two matrices is multiplied with, such as alpha / rank.
        active_rank: how many of the adapter's rows of A and columns of B, from the first, are in use (FQ_LORA_NLS);
            all of them when None.
        arithmetic: how codes follow from weight, adapters and ranges: "ovexport" as in `quantizer`, "nncf" as in
            `nncf_quantizer`, of a checkpoint that was tuned with NNCF.
        note: why it is not as the recipe asked, such as where its codes are from; None when it is.
    """

    name: str
    kind: Literal["linear", "embedding", "head"]
    mode: Mode
    out_features: int
    in_features: int
    transposed: bool = False
    group_size: int
    rank: int = 0
    adapter: AdapterKind = "lora"
    adapter_factor: float = 1.0
    active_rank: int | None = None
    arithmetic: Literal["ovexport", "nncf"] = "ovexport"
    note: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group_size < 1 or self.in_features % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide in_features={self.in_features}")
        if self.active_rank is not None and not 0 <= self.active_rank <= self.rank:
            raise ValueError(f"active_rank={self.active_rank} is not within its adapter's rank={self.rank}")
        if not math.isfinite(self.adapter_factor):
            raise ValueError(f"adapter_factor={self.adapter_factor} is not finite")
        if self.adapter == "qalora" and (self.encoding is None or self.encoding.symmetric):
            raise ValueError(f"mode={self.mode} has no zero points, which QA-LoRA's adapter is added to")
        return self

    @property
    def encoding(self) -> Encoding | None:
        """What its mode means; None for a layer left in floating point."""
        return ENCODINGS.get(self.mode)

    def require_encoding(self) -> Encoding:
        """What its mode means.

        Raises:
            ValueError: the layer is left in floating point.
        """
        if self.encoding is None:
            raise ValueError(f"{self.name}: has no codes, it is left in floating point")
        return self.encoding

    @property
    def used_rank(self) -> int:
        """Rank of the product B·A that is added to the weight."""
        return self.rank if self.active_rank is None else self.active_rank

    @property
    def adapter_size(self) -> int:
        """Entries of the adapter's two matrices."""
        inputs = self.groups if self.adapter == "qalora" else self.in_features
        return self.rank * (self.out_features + inputs)

    @property
    def groups(self) -> int:
        """Scales per output channel."""
        return self.in_features // self.group_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, float16 scales and zero points in the IR; 0 for a layer left in floating point."""
        if self.encoding is None:
            return 0
        return self.encoding.layer_bytes(self.out_features * self.in_features, self.out_features * self.groups)


class CodeDigest(Record):
    """SHA-256 of a layer's unpacked codes (one byte each), float16 scales and unpacked zero points."""

    codes: str
    scale: str
    zero_point: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFormat:
    """The format that a checkpoint holds a matrix in already; see LayerFormat for the fields."""

    mode: Mode
    group_size: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMatrix:
    """A weight matrix of a model, shape as (output, input); see LayerFormat for the fields.

    Attributes:
        problem: why it can't be compressed, None where it can.
        own: the format that its codes have in the checkpoint; None where it holds floats.
    """

    name: str
    kind: Literal["linear", "embedding", "head"]
    out_features: int
    in_features: int
    transposed: bool = False
    problem: str | None = None
    own: OwnFormat | None = None
