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

    Attributes:
        prompt_tokens, output_tokens: fixed lengths, end-of-sequence ignored.
        batch_size: prompts at once.
        attention_backend: of openvino-genai. Each of these four is one value or several; every combination of them is
            measured, the first of all with its memory too.
        pairs: rounds in which every model runs once, one after the other, at most.
        sessions: the rounds are spread over so many at most; for each the models are loaded anew, and `warmup` more
            rounds are dropped first.
        precision: from the eighth session on, no other one is begun once the 95 % interval of every ratio is within
            this share of its median, either way; 0 never stops for it.
        time_limit_s: seconds that all of it should take, memory and limits included: no other session is begun that
            would end later. Five sessions are measured in any case, of fewer rounds where time is short, as fewer
            give no interval.
        memory: measure each model's memory, in a process of its own.
        limits: measure the memory's bandwidth and the processor's rate too, and say how near to them each model comes.
        inference_precision, kv_cache_precision, dynamic_quantization_group_size, threads, streams: pinned; without
            them it is as the IR and the device have it.
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
