"""What is measured and proven, as JSON: verification.json, evaluation.json, benchmark.json.

A figure that could not be measured is None, and `reason` beside it says why.
"""

import builtins
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, computed_field, model_validator

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
        weight_error, twin_weight_error: the Frobenius norm of the unpacked matrix less the base model's, over the
            latter's; of the IR and of its untuned twin, where they were given.
        note: what is not packed to 4 bits, and what that costs; None where there is nothing to say.
    """

    name: str
    kind: Literal["linear", "embedding"]
    element_type: str
    shape: tuple[int, ...]
    group_size: int
    weight_bytes: int
    bits_per_weight: float
    weight_error: float | None = None
    twin_weight_error: float | None = None
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


PROOF_VERDICTS = {
    "proven": "PROVEN",
    "partial": "PARTLY PROVEN",
    "described": "DESCRIBED, NOT PROVEN",
    "failed": "FAILED",
}
"""What a proof can come to, with the words for it on the page, the card, the terminal and the hub."""


class VerificationReport(Record):
    """verification.json.

    Attributes:
        notes: what a reader has to know beside the checks, such as runtime settings that the IR carries.
    """

    passed: bool
    subject: str
    checks: tuple[Check, ...]
    summary: VerificationSummary
    layers: tuple[LayerRow, ...]
    files: dict[str, str] = Field(description="SHA-256 of each file of the IR")
    notes: tuple[str, ...] = ()
    versions: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _verdict_is_computed(cls, values: Any) -> Any:
        """A verdict in a file says nothing beside the checks and what was not compared."""
        return {key: value for key, value in values.items() if key != "verdict"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["proven", "partial", "described", "failed"]:
        """ "partial" where something was not there to compare with, or was not looked at (`summary.reason` says what);
        "described" without a checkpoint."""
        if not self.passed:
            return "failed"
        if self.summary.predicted_weight_bytes is None:
            return "described"
        return "proven" if self.summary.reason is None else "partial"

    @property
    def heading(self) -> str:
        """The verdict in words."""
        return PROOF_VERDICTS[self.verdict]

    @property
    def told(self) -> str:
        """The verdict, how many checks passed, the notes, and what was not looked at."""
        passed = sum(check.passed for check in self.checks)
        missing = [f"not looked at: {self.summary.reason}"] if self.summary.reason else []
        return "; ".join([f"{self.heading}: {passed:,} of {len(self.checks):,} checks passed", *self.notes, *missing])


class Figures(Record):
    """Measured numbers: none of them is infinite or not a number."""

    model_config = ConfigDict(allow_inf_nan=False)


class Estimate(Figures):
    """A figure with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


class Divergence(Figures):
    """How a model's next-token distributions differ from the reference's, over held-out tokens.

    Attributes:
        kl_mean_ci95: by bootstrap over the units that EvaluationReport.conditions name as `interval_over`.
        perplexity_ratio: the model's perplexity over the reference's; `perplexity_verdict` calls it a tie where 1 is
            in its interval.
    """

    kl_mean_nats: float | None = None
    kl_median_nats: float | None = None
    kl_p90_nats: float | None = None
    kl_p95_nats: float | None = None
    kl_p99_nats: float | None = None
    kl_p999_nats: float | None = None
    kl_maximum_nats: float | None = None
    kl_standard_error_nats: float | None = None
    kl_mean_ci95: tuple[float, float] | None = None
    same_top1: float | None = None
    same_top1_standard_error: float | None = None
    perplexity_ratio: Estimate | None = None
    perplexity_verdict: Literal["lower", "higher", "tie"] | None = None
    true_token_probability_change_mean: float | None = None
    true_token_probability_change_rms: float | None = None


class WorstAnswer(Record):
    """A question whose answers are least alike.

    Attributes:
        similarity: None where it could not be measured.
        first_difference: how many characters the two answers begin with in common.
    """

    prompt: str
    reference: str
    candidate: str
    similarity: float | None
    first_difference: int


class Similarity(Figures):
    """Figures over the generated answers, as ovexport.evaluate.similarity defines them in each mode.

    Attributes:
        similarity_ci95: by bootstrap over prompts; None where they are too few.
    """

    similarity: float | None = None
    similarity_ci95: tuple[float, float] | None = None
    fdt: float | None = None
    fdt_norm: float | None = None
    sdt: float | None = None
    sdt_norm: float | None = None


class IsolationStep(Figures):
    """How far a model is from the reference at full precision, with some of the runtime's approximations on.

    Attributes:
        name: "weights", "kv_cache", "dynamic_quantization", "activations" or "deployment".
        settings: asked for; `runtime` holds what was read back.
        reference_kl_mean_nats: the same figure of the reference itself under these settings.
        reason: why a step has no figures.
    """

    name: str
    settings: dict[str, str]
    runtime: dict[str, str] | None = None
    kl_mean_nats: float | None = None
    kl_mean_ci95: tuple[float, float] | None = None
    same_top1: float | None = None
    perplexity: float | None = None
    reference_kl_mean_nats: float | None = None
    reason: str | None = None


class ModelEvaluation(Divergence, Similarity):
    """One model in evaluation.json; the reference has perplexities and tasks alone.

    Attributes:
        tasks: by name, lm-evaluation-harness's metrics with their standard errors, see ovexport.tasks.TaskResult.
        word_perplexity_reason: why there is none.
        different_answers: how many of the answers to all prompts differ from each other; where they are few, the
            similarity is that of a few answers.
        worst_answers: least alike first.
        isolation: where the divergence comes from, where it was asked for.
    """

    perplexity: float | None = None
    word_perplexity: float | None = None
    word_perplexity_reason: str | None = None
    different_answers: int | None = None
    kl_histogram: tuple[int, ...] | None = None
    worst_answers: tuple[WorstAnswer, ...] = ()
    isolation: tuple[IsolationStep, ...] = ()
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    reason: str | None = None


class Comparison(Record):
    """Two candidates on the same tokens: the first's mean figure less the second's, in nats.

    Attributes:
        kl_mean_nats, nll_mean_nats: with intervals by paired bootstrap.
        kl_verdict, nll_verdict: whether the first's is "lower" or "higher", or a "tie", where 0 is in the interval.
    """

    kl_mean_nats: Estimate
    kl_verdict: Literal["lower", "higher", "tie"]
    nll_mean_nats: Estimate
    nll_verdict: Literal["lower", "higher", "tie"]


class EvaluationReport(Record):
    """evaluation.json.

    Attributes:
        comparisons: "int4 - plain", …: every two models that are not the reference, the later one first.
        recovered_gap: share of the plain twin's mean KL that tuning took away.
        recovered_gap_ci95: by bootstrap over the units that the conditions name as `interval_over`.
        histogram_edges_nats: bin edges of each model's kl_histogram.
        notes: what the reader of the figures has to know of text, prompts and encoder.
    """

    reference: str
    models: dict[str, ModelEvaluation]
    comparisons: dict[str, Comparison] = Field(default_factory=dict)
    recovered_gap: float | None = None
    recovered_gap_ci95: tuple[float, float] | None = None
    reason: str | None = None
    histogram_edges_nats: tuple[float, ...]
    notes: tuple[str, ...] = ()
    conditions: dict[str, Any]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        bins = len(self.histogram_edges_nats) - 1
        if any(model.kl_histogram is not None and len(model.kl_histogram) != bins for model in self.models.values()):
            raise ValueError("a histogram does not fit its edges")
        return self


class Samples(Figures):
    """A latency in milliseconds: order statistics and what they were taken from."""

    median: float
    p90: float
    p99: float
    samples: tuple[float, ...]


class PeakMemory(Record):
    """The most memory that a phase of a process held; anonymous and file-backed parts were sampled, and need not have
    peaked together."""

    peak_rss_bytes: int
    peak_anonymous_bytes: int
    peak_file_bytes: int


class PhysicalLimit(Figures):
    """What the machine could do at best, and how near the model comes.

    Attributes:
        bytes_per_token: of weights and of the KV cache that one decoding step reads.
        time_per_output_token_ms: those bytes over the bandwidth; `share_of_bandwidth` is that over the measured median,
            above 1 where the weights stay in the processor's caches.
        operations_first_token: floating-point operations of the prompt's forward pass; `time_to_first_token_ms` and
            `share_of_compute` likewise, from the rate measured.
    """

    bytes_per_token: int
    time_per_output_token_ms: float
    share_of_bandwidth: float
    operations_first_token: int
    time_to_first_token_ms: float
    share_of_compute: float


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
        time_per_output_token_ms: between two tokens of one sequence, whatever the batch: a mean per round.
        inter_token_latency_ms: every single such interval.
        generation_ms: from the call to the last token.
        throughput_tokens_per_s: all tokens that a batch generates over the whole generation's seconds, prompt included.
        load_memory, generation_memory: of a process that does nothing else.
        limit: None where bandwidth and rate were not measured.
    """

    time_to_first_token_ms: Samples
    time_per_output_token_ms: Samples
    inter_token_latency_ms: Samples | None = None
    generation_ms: Samples | None = None
    throughput_tokens_per_s: float
    load_time_ms: float
    peak_rss_bytes: int | None
    load_memory: PeakMemory | None = None
    generation_memory: PeakMemory | None = None
    limit: PhysicalLimit | None = None
    weight_bytes: int
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

    time_to_first_token: Ratio
    time_per_output_token: Ratio


class PointBenchmark(Record):
    """One point of the grid; the models' memory is measured at the first alone."""

    prompt_tokens: int
    output_tokens: int
    batch_size: int
    attention_backend: str
    models: dict[str, ModelBenchmark]
    ratios: dict[str, LatencyRatios]


class MachineLimits(Record):
    """What the machine reaches, measured in the same run with the same number of threads.

    Attributes:
        bandwidth_bytes_per_s: reading from memory, the best of several passes over more than the caches hold.
        operations_per_s: of a product of matrices, by the inference precision it was measured in.
    """

    bandwidth_bytes_per_s: float
    operations_per_s: dict[str, float]


class BenchmarkReport(Record):
    """benchmark.json; `models` and `ratios` are those of the grid's first point.

    Attributes:
        grid: every point, the first one included.
    """

    models: dict[str, ModelBenchmark]
    ratios: dict[str, LatencyRatios]
    grid: tuple[PointBenchmark, ...] = ()
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


class RuntimeTrial(Record):
    """A combination of runtime settings that was tried.

    Attributes:
        time_per_output_token: over that of the runtime's defaults, pair by pair.
        kl_mean_nats: how far these settings take the model from itself at full precision; None where not measured.
        reason: why it was not kept.
    """

    settings: dict[str, str]
    time_per_output_token: Ratio | None = None
    time_to_first_token: Ratio | None = None
    kl_mean_nats: float | None = None
    kept: bool
    reason: str | None = None


class WrittenSettings(Record):
    """What an IR carries for a plain `LLMPipeline(folder, "CPU")`, and how to take it out again.

    Attributes:
        options: in the graph's runtime_options, where the CPU plugin reads them.
        matmul_precision: "f32" where every MatMul is marked to keep the precision it is written in: the runtime's
            inference precision can't be written into an IR, and this is what comes nearest.
        former_xml_sha256: of the graph's file before; `former_block` is the text of it that `block` took the place of.
    """

    options: dict[str, str]
    matmul_precision: Literal["f32"] | None
    former_xml_sha256: str
    former_block: str
    block: str


class SettingsReport(Record):
    """ovexport_runtime.json in an IR's folder: the search for its best runtime settings on a machine.

    Attributes:
        chosen: the fastest that keep to the limit, as LLMPipeline takes them; none where nothing is faster than the
            defaults.
        gain: time per output token with them, over that with the runtime's defaults.
        written: what the IR itself carries from now on; `written_gain` is that of a plain LLMPipeline of the folder,
            `written_kl_mean_nats` what it costs.
        not_written: what of `chosen` has to be given to LLMPipeline.
    """

    trials: tuple[RuntimeTrial, ...]
    kl_limit_nats: float
    chosen: dict[str, str]
    gain: Ratio | None = None
    written: WrittenSettings | None = None
    written_gain: Ratio | None = None
    written_kl_mean_nats: float | None = None
    not_written: dict[str, str]
    conditions: dict[str, Any]
    versions: dict[str, str]


class GateResult(Record):
    """One gate: a metric and its limit.

    Attributes:
        gate: as it was written, such as "similarity>=0.9".
        value: None where it was not measured; `reason` says why.
        margin: how far the value is on the right side of the limit; negative where it fails.
    """

    gate: str
    metric: str
    operator: Literal["<", "<=", "==", ">=", ">"]
    limit: float
    value: float | None
    margin: float | None
    passed: bool
    reason: str | None = None


class GateReport(Record):
    """gates.json."""

    passed: bool
    gates: tuple[GateResult, ...]


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
