"""What is measured and proven, as JSON: verification.json, evaluation.json, benchmark.json.

A figure that could not be measured is None, and `reason` beside it says why.
"""

import builtins
from typing import Any, Literal

from pydantic import Field

from ovexport.artifacts import Record


class Check(Record):
    """One check of the proof.

    Attributes:
        name: what is checked.
        subject: the layer, tensor or file it is checked on; "model" for all of them.
        value, limit: what was found and what it had to be.
        detail: what a failure means, or where the first difference is.
    """

    name: str
    subject: str
    value: Any
    limit: Any
    passed: bool
    detail: str = ""


class LayerRow(Record):
    """A weight matrix as the IR holds it.

    Attributes:
        group_size: entries that share a scale; 0 without scales.
        note: what is not packed to 4 bits, and what that costs; None where there is nothing to say.
    """

    name: str
    kind: Literal["linear", "embedding"]
    element_type: str
    shape: tuple[int, ...]
    group_size: int
    weight_bytes: int
    bits_per_weight: float
    note: str | None = None


class VerificationSummary(Record):
    """The counts of the proof; None where no checkpoint, twin or runtime was there to compare with.

    Attributes:
        bytes_read_per_token: codes, scales and zero points of every Linear: what one generated token reads.
    """

    linear_layers: int
    packed_int4: int
    packed_int8: int
    float: int
    code_mismatches: int | None
    scale_mismatches: int | None
    zero_point_mismatches: int | None
    adapter_nodes: int
    operators_beyond_twin: int | None
    runtime_packed_linears: int | None
    weight_bytes: int
    predicted_weight_bytes: int | None
    bits_per_weight: "builtins.float | None"
    bytes_read_per_token: int
    reason: str | None = None


class VerificationReport(Record):
    """verification.json."""

    passed: bool
    subject: str
    checks: tuple[Check, ...]
    summary: VerificationSummary
    layers: tuple[LayerRow, ...]
    files: dict[str, str] = Field(description="SHA-256 of each file of the IR")
    versions: dict[str, str]


class Divergence(Record):
    """How a model's next-token distributions differ from the reference's, over held-out tokens."""

    kl_mean_nats: float | None = None
    kl_median_nats: float | None = None
    kl_p90_nats: float | None = None
    kl_p95_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_p999_nats: float | None = None
    kl_maximum_nats: float | None = None
    kl_standard_error_nats: float | None = None
    same_top1: float | None = None
    true_token_probability_change_mean: float | None = None
    true_token_probability_change_rms: float | None = None


class Similarity(Record):
    """WhoWhatBench's figures over the generated answers."""

    similarity: float | None = None
    fdt: float | None = None
    fdt_norm: float | None = None
    sdt: float | None = None
    sdt_norm: float | None = None


class ModelEvaluation(Divergence, Similarity):
    """One model in evaluation.json; the reference has perplexities and tasks alone.

    Attributes:
        tasks: by name, lm-evaluation-harness's metrics with their standard errors, see ovexport.tasks.TaskResult.
    """

    perplexity: float | None = None
    word_perplexity: float | None = None
    kl_histogram: tuple[int, ...] | None = None
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    reason: str | None = None


class EvaluationReport(Record):
    """evaluation.json.

    Attributes:
        recovered_gap: share of the plain twin's mean KL that tuning took away.
        recovered_gap_ci95: by bootstrap over sequences.
        histogram_edges_nats: bin edges of each model's kl_histogram.
    """

    reference: str
    models: dict[str, ModelEvaluation]
    recovered_gap: float | None = None
    recovered_gap_ci95: tuple[float, float] | None = None
    reason: str | None = None
    histogram_edges_nats: tuple[float, ...]
    conditions: dict[str, Any]
    versions: dict[str, str]


class Samples(Record):
    """A latency in milliseconds: order statistics and what they were taken from."""

    median: float
    p90: float
    p99: float
    samples: tuple[float, ...]


class ModelBenchmark(Record):
    """One model in benchmark.json."""

    time_to_first_token_ms: Samples
    time_per_output_token_ms: Samples
    throughput_tokens_per_s: float
    load_time_ms: float
    peak_rss_bytes: int | None
    weight_bytes: int
    reason: str | None = None


class Ratio(Record):
    """A ratio of two models' figures, pair by pair, with a 95 % bootstrap interval of its median."""

    median: float
    ci95: tuple[float, float]


class LatencyRatios(Record):
    """First over second model, below 1 when the first is faster."""

    time_to_first_token: Ratio
    time_per_output_token: Ratio


class BenchmarkReport(Record):
    """benchmark.json."""

    models: dict[str, ModelBenchmark]
    ratios: dict[str, LatencyRatios]
    conditions: dict[str, Any]
    versions: dict[str, str]


class RankScore(Record):
    """A configuration that the search tried.

    Attributes:
        ranks: one for each unit.
        source: "median", "most frequent", "least loss", "largest", "smallest" or "evolution".
        sample_nll_nats, validation_nll_nats: mean -log p(token) of the right answers on the sample, and on the whole
            validation split; None for one that was no finalist.
        seconds: that its scores took.
    """

    ranks: tuple[int, ...]
    source: str
    sample_nll_nats: float
    validation_nll_nats: float | None = None
    seconds: float


class SearchReport(Record):
    """search.json: how the ranks of FQ_LORA_NLS adapters were chosen.

    Attributes:
        units: the transformer blocks, or Linear layers, that have a rank each.
        scores: best on the sample first.
    """

    units: tuple[str, ...]
    rank_space: tuple[int, ...]
    chosen: tuple[int, ...]
    scores: tuple[RankScore, ...]
    sample_examples: int
    validation_examples: int
    versions: dict[str, str]
