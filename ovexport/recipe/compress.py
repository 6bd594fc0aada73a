"""Section [compress]."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ovexport.recipe.spec import Positive, Spec


class CompressSpec(Spec):
    """How the weights are quantized.

    Attributes:
        mode: 4-bit codes with a zero point per group (asymmetric) or without one (symmetric).
        group_size: input channels that share a scale; -1 for one scale per output channel.
        format: FQ_LORA, or FQ_LORA_NLS, whose ranks are searched within `rank_space`, one for each transformer block
            or for each Linear as `rank_by` says; a space of one is plain LoRA.
        rank: adapter rank; a layer with a smaller side takes that side.
        awq, scale_estimation: NNCF's data-aware starting points, on `calibration_sequences` of the training text.
        gptq: round as GPTQ does, on the same text and on whatever scales there are by then.
        ignored: shell patterns of layer names that stay in floating point.
        fallback: for a layer whose in-features `group_size` does not divide, or which the CPU runtime computes wrongly
            in groups of that size: the largest power of two below `group_size` that divides them and is at least 4,
            one scale per channel, INT8, or an error.
    """

    mode: Literal["int4_asym", "int4_sym"] = "int4_asym"
    group_size: Annotated[int, Field(ge=-1)] = 64
    format: Literal["fq_lora", "fq_lora_nls"] = "fq_lora"
    rank: Positive = 64
    rank_space: tuple[Positive, ...] | None = None
    rank_by: Literal["block", "linear"] = "block"
    awq: bool = False
    scale_estimation: bool = False
    gptq: bool = False
    calibration_sequences: Positive = 128
    ignored: tuple[str, ...] = ()
    fallback: Literal["error", "smaller_group", "per_channel", "int8"] = "error"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group_size == 0:
            raise ValueError("group_size=0; give a divisor of the layers' in-features, or -1 for one scale a channel")
        if (self.format == "fq_lora_nls") != (self.rank_space is not None):
            raise ValueError('rank_space and format = "fq_lora_nls" go together; set both or neither')
        if self.rank_space is not None and len(self.rank_space) == 0:
            raise ValueError("rank_space=[] holds no rank; list some, such as [32, 24, 16]")
        return self
