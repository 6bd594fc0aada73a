"""benchmark.json."""

from typing import Annotated, Any, Self

from pydantic import model_validator

from ovexport.reports.figures import Figures, Meaning, Samples
from ovexport.storage.records import Record


class PeakMemory(Record):
    """The most memory that a phase of a process held; anonymous and file-backed parts were sampled, and need not have
    peaked together."""

    peak_rss_bytes: Annotated[int, Meaning("resident memory at its peak", "lower")]
    peak_anonymous_bytes: Annotated[int, Meaning("anonymous memory at its peak", "lower")]
    peak_file_bytes: Annotated[int, Meaning("file-backed memory at its peak", "lower")]


class PhysicalLimit(Figures):
    """What the machine could do at best, and how near the model comes; shares are above 1 where the weights stay in the
    processor's caches, or the model multiplies in int8."""

    bytes_per_token: Annotated[int, Meaning("weights and KV cache that one decoding step reads", "lower")]
    time_per_output_token_ms: Annotated[float, Meaning("bytes_per_token over the memory bandwidth", "lower")]
    share_of_bandwidth: Annotated[
        float, Meaning("the least time that the bandwidth allows for a token, over the measured median", "higher")
    ]
    operations_first_token: Annotated[int, Meaning("floating-point operations of the prompt's forward pass", "lower")]
    time_to_first_token_ms: Annotated[float, Meaning("operations_first_token over the measured rate", "lower")]
    share_of_compute: Annotated[
        float, Meaning("the least time that the rate allows for the first token, over the measured median", "higher")
    ]


class Generation(Figures):
    """One generation as llm_bench lists it.

    Attributes:
        warmup: it is in no statistic.
        began, ended: the local time, ISO 8601.
        first_inference_ms, other_inferences_ms: of the model alone: the first, and the mean of the others.
        tokenization_ms, detokenization_ms: the prompts' text encoded, and the answers decoded, beside the timed
            generation; None where the IR has no tokenizer for it.
        result_md5: of each answer's text.
    """

    warmup: bool
    began: str
    ended: str
    first_token_ms: float
    output_token_ms: float
    whole_ms: float
    first_inference_ms: float
    other_inferences_ms: float
    tokenization_ms: float | None
    detokenization_ms: float | None
    result_md5: tuple[str, ...]


class ModelBenchmark(Figures):
    """One model in benchmark.json.

    Attributes:
        generations: the first session's first warm-up, then those that the statistics are of.
        weight_precision: the narrowest that a Linear layer is stored in, as compression modes are named: "INT4_ASYM",
            "INT8_SYM", "BF16", …; empty where that is not known.
        load_memory, generation_memory: of a process that does nothing else.
        limit: None where bandwidth and rate were not measured.
    """

    time_to_first_token_ms: Annotated[Samples, Meaning("from the call to the first token, the median", "lower")]
    time_per_output_token_ms: Annotated[
        Samples, Meaning("between two tokens of one sequence, a mean per round, the median of rounds", "lower")
    ]
    inter_token_latency_ms: Annotated[
        Samples | None, Meaning("between two tokens of one sequence, the median of all", "lower")
    ] = None
    generation_ms: Annotated[Samples | None, Meaning("from the call to the last token, the median", "lower")] = None
    throughput_tokens_per_s: Annotated[
        float, Meaning("tokens that a batch generates over the whole generation's seconds, prompt included", "higher")
    ]
    load_time_ms: Annotated[float, Meaning("from the files to a model that can be asked, the median", "lower")]
    peak_rss_bytes: Annotated[int | None, Meaning("resident memory at its peak, loading and generating", "lower")]
    load_memory: PeakMemory | None = None
    generation_memory: PeakMemory | None = None
    limit: PhysicalLimit | None = None
    weight_bytes: Annotated[int, Meaning("size of the weights on disk", "lower")]
    weight_precision: str = ""
    generations: tuple[Generation, ...] = ()
    reason: str | None = None


class Ratio(Figures):
    """The median of the ratios of two models' figures, pair by pair.

    Attributes:
        ci95: the median's 95 % interval, by bootstrap over sessions and pairs; None where the sessions are too few.
    """

    median: float
    ci95: tuple[float, float] | None
    reason: str | None = None


class LatencyRatios(Record):
    """First over second model, below 1 when the first is faster."""

    time_to_first_token: Annotated[Ratio, Meaning("the first model's time to first token over the second's", "lower")]
    time_per_output_token: Annotated[
        Ratio, Meaning("the first model's time per output token over the second's", "lower")
    ]


class PointBenchmark(Record):
    """One point of the grid; the models' memory is measured at the first alone."""

    prompt_tokens: Annotated[int, Meaning("tokens of each prompt")]
    output_tokens: Annotated[int, Meaning("tokens generated to each prompt")]
    batch_size: Annotated[int, Meaning("prompts at once")]
    attention_backend: str
    models: dict[str, ModelBenchmark]
    ratios: dict[str, LatencyRatios]


class MachineLimits(Record):
    """What the machine reaches, measured in the same run with the same number of threads.

    Attributes:
        bandwidth_bytes_per_s: reading from memory, the best of several passes over more than the caches hold.
        operations_per_s: of a product of matrices, by the inference precision it was measured in.
    """

    bandwidth_bytes_per_s: Annotated[float, Meaning("what the machine reads from memory at best", "higher")]
    operations_per_s: Annotated[
        dict[str, float], Meaning("operations of a matrix product at best, by the precision computed in", "higher")
    ]


class BenchmarkReport(Record):
    """benchmark.json; `models` and `ratios` are those of the grid's first point.

    Attributes:
        grid: every point, the first one included.
    """

    models: dict[str, ModelBenchmark]
    ratios: dict[str, LatencyRatios]
    grid: Annotated[
        tuple[PointBenchmark, ...],
        Meaning("a figure at a point of the grid: grid.128x64x1.SDPA.int4.load_time_ms, …"),
    ] = ()
    machine: MachineLimits | None = None
    conditions: dict[str, Any]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.models:
            raise ValueError("no model was measured")
        if any(not set(name.split("/")) <= set(self.models) for name in self.ratios):
            raise ValueError("a ratio of models that were not measured")
        return self
