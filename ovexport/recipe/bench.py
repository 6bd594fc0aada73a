"""Section [bench]."""

from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from ovexport.recipe.spec import Fraction, NotNegative, Positive, PositiveReal, Spec


def _several(value: Any) -> Any:
    """One value stands for a list of it."""
    return value if isinstance(value, (tuple, list)) else (value,)


Backend = Literal["SDPA", "PA"]
Lengths = Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_several)]
OutputLengths = Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1), BeforeValidator(_several)]
Backends = Annotated[tuple[Backend, ...], Field(min_length=1), BeforeValidator(_several)]


class BenchSpec(Spec):
    """How latency is measured.

    `prompt_tokens`, `output_tokens`, `batch_size` and `attention_backend` are one value each or several. Every
    combination is measured; the memory, for the first combination only.

    Attributes:
        prompt_tokens: length of the prompt.
        output_tokens: tokens to generate, whatever the model says about ending.
        batch_size: prompts at once.
        attention_backend: attention backend of openvino-genai.
        pairs: the most rounds; in each round, every model runs once, one after the other.
        sessions: the most sessions over which the rounds are spread; each session loads the models again.
        warmup: rounds at the start of each session that are not counted.
        precision: stop early, from the eighth session on, when the 95 % interval of every ratio is within this share
            of its median; 0 never stops early.
        time_limit_s: seconds for everything, memory and limits included. No session starts that would end later, but
            five sessions are always measured, with fewer rounds if time is short: fewer give no interval.
        memory: measure each model's memory, in a process of its own.
        limits: measure the memory bandwidth and the processor's rate too, and report how close each model comes.
        device: OpenVINO device.
        inference_precision: precision of inference, pinned for all models; "default" leaves what the IR and the device
            say.
        kv_cache_precision: precision of the KV cache, pinned for all models; "default" leaves what the IR and the
            device say.
        dynamic_quantization_group_size: group size in which activations are quantized, pinned for all models; 0 for
            none; without it, what the IR and the device say.
        threads: threads of inference, pinned for all models; without it, the device's number.
        streams: streams of inference, pinned for all models; without it, the device's number.
        seed: seed of the order of the models and of the bootstrap intervals.
    """

    prompt_tokens: Lengths = (128,)
    output_tokens: OutputLengths = (64,)
    batch_size: Lengths = (1,)
    attention_backend: Backends = ("SDPA",)
    pairs: Annotated[int, Field(ge=5)] = 128
    sessions: Positive = 32
    warmup: Positive = 1
    precision: Fraction = 0.025
    time_limit_s: PositiveReal = 120.0
    memory: bool = True
    limits: bool = True
    device: str = "CPU"
    inference_precision: Literal["default", "f32", "bf16", "f16"] = "default"
    kv_cache_precision: Literal["default", "u4", "u8", "f16", "bf16", "f32"] = "default"
    dynamic_quantization_group_size: NotNegative | None = None
    threads: Positive | None = None
    streams: Positive | None = None
    seed: NotNegative = 0

    @property
    def points(self) -> "tuple[GridPoint, ...]":
        """Every combination of backend, batch size and lengths, the first of each first."""
        axes = (self.attention_backend, self.batch_size, self.prompt_tokens, self.output_tokens)
        return tuple(GridPoint(*values) for values in product(*axes))


class GridPoint(NamedTuple):
    """A point of the benchmark's grid."""

    attention_backend: Backend
    batch_size: int
    prompt_tokens: int
    output_tokens: int
