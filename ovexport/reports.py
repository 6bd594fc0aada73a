"""What is measured and proven, as JSON: verification.json, evaluation.json, benchmark.json.

A figure that could not be measured is None, and `reason` beside it says why. Each figure has its Meaning beside it,
which `ovexport gates` shows; its unit is in its name.
"""

import builtins
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, computed_field, model_validator

from ovexport.artifacts import Record

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a figure says, and which way is better; None where neither is."""

    text: str
    better: Literal["lower", "higher"] | None = None


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
    """The counts of the proof; None where no checkpoint, twin or runtime was there to compare with."""

    linear_layers: Annotated[int, Meaning("Linear layers in the graph")]
    packed_int4: Annotated[int, Meaning("Linear layers whose weights are 4-bit codes", "higher")]
    packed_int8: Annotated[int, Meaning("Linear layers whose weights are 8-bit codes")]
    float: Annotated[int, Meaning("Linear layers whose weights are in floating point", "lower")]
    code_mismatches: Annotated[int | None, Meaning("codes that differ from those computed anew", "lower")]
    scale_mismatches: Annotated[int | None, Meaning("scales that differ from those computed anew", "lower")]
    zero_point_mismatches: Annotated[int | None, Meaning("zero points that differ from those computed anew", "lower")]
    adapter_nodes: Annotated[int, Meaning("adapter operations that are left in the graph", "lower")]
    operators_beyond_twin: Annotated[int | None, Meaning("operations that the untuned twin does not have", "lower")]
    runtime_packed_linears: Annotated[
        int | None, Meaning("Linear layers that the compiled model computes from packed weights", "higher")
    ]
    weight_bytes: Annotated[int, Meaning("codes, scales and zero points of every weight matrix", "lower")]
    predicted_weight_bytes: Annotated[int | None, Meaning("what the formats in the checkpoint add up to")]
    bits_per_weight: Annotated[
        "builtins.float | None", Meaning("bits of codes, scales and zero points for one weight", "lower")
    ]
    bytes_read_per_token: Annotated[int, Meaning("weights of every Linear layer, which each token reads", "lower")]
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

    passed: Annotated[bool, Meaning("1 where every check of the proof passed, otherwise 0", "higher")]
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
    """A figure with its 95 % interval; None where there were too few values for one."""

    value: float
    ci95: Interval | None


class Divergence(Figures):
    """How a model's next-token distributions differ from the reference's, over held-out tokens.

    Intervals are by bootstrap over the units that EvaluationReport.conditions name as `interval_over`; None where there
    are fewer than FEWEST_VALUES.

    Attributes:
        perplexity_verdict: "tie" where 1 is in the ratio's interval; None where it has none.
    """

    kl_mean_nats: Annotated[float | None, Meaning("KL(reference ‖ model) of a token, the mean", "lower")] = None
    kl_median_nats: Annotated[float | None, Meaning("KL(reference ‖ model) of a token, the median", "lower")] = None
    kl_p90_nats: Annotated[float | None, Meaning("what KL of 90 % of the tokens is below", "lower")] = None
    kl_p95_nats: Annotated[float | None, Meaning("what KL of 95 % of the tokens is below", "lower")] = None
    kl_p99_nats: Annotated[float | None, Meaning("what KL of 99 % of the tokens is below", "lower")] = None
    kl_p999_nats: Annotated[float | None, Meaning("what KL of 99.9 % of the tokens is below", "lower")] = None
    kl_maximum_nats: Annotated[float | None, Meaning("KL of the token that diverges most", "lower")] = None
    kl_standard_error_nats: Annotated[float | None, Meaning("standard error of kl_mean_nats, by token", "lower")] = None
    kl_mean_ci95: Interval | None = None
    same_top1: Annotated[
        float | None, Meaning("share of positions where model and reference find the same token likeliest", "higher")
    ] = None
    same_top1_ci95: Interval | None = None
    same_top1_standard_error: Annotated[float | None, Meaning("standard error of same_top1, by token", "lower")] = None
    perplexity_ratio: Annotated[Estimate | None, Meaning("the model's perplexity over the reference's", "lower")] = None
    perplexity_verdict: Literal["lower", "higher", "tie"] | None = None
    true_token_probability_change_mean: Annotated[
        float | None, Meaning("change of the true token's probability from the reference's, the mean", "higher")
    ] = None
    true_token_probability_change_rms: Annotated[
        float | None, Meaning("change of the true token's probability from the reference's, root mean square", "lower")
    ] = None


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

    similarity: Annotated[
        float | None,
        Meaning("cosine of the two answers' sentence embeddings, the mean", "higher"),
    ] = None
    similarity_ci95: Interval | None = None
    fdt: Annotated[float | None, Meaning("tokens before an answer first differs, the mean", "higher")] = None
    fdt_norm: Annotated[float | None, Meaning("fdt as a share of the reference answer's length", "higher")] = None
    sdt: Annotated[float | None, Meaning("tokens of an answer that differ, the mean", "lower")] = None
    sdt_norm: Annotated[float | None, Meaning("sdt as a share of the answer's length", "lower")] = None


class IsolationStep(Figures):
    """How far a model is from the reference at full precision, with some of the runtime's approximations on.

    Attributes:
        name: "weights", "kv_cache", "dynamic_quantization", "activations" or "deployment".
        settings: asked for; `runtime` holds what was read back.
        reason: why a step has no figures.
    """

    name: str
    settings: dict[str, str]
    runtime: dict[str, str] | None = None
    kl_mean_nats: Annotated[float | None, Meaning("KL from the reference at full precision, the mean", "lower")] = None
    kl_mean_ci95: Interval | None = None
    same_top1: Annotated[
        float | None, Meaning("share of positions with the reference's likeliest token, at these settings", "higher")
    ] = None
    perplexity: Annotated[float | None, Meaning("perplexity per token at these settings", "lower")] = None
    reference_kl_mean_nats: Annotated[
        float | None, Meaning("KL of the reference at these settings from itself at full precision", "lower")
    ] = None
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

    perplexity: Annotated[float | None, Meaning("perplexity per token of held-out text", "lower")] = None
    word_perplexity: Annotated[float | None, Meaning("perplexity per word of held-out text", "lower")] = None
    word_perplexity_reason: str | None = None
    different_answers: Annotated[int | None, Meaning("how many of the answers differ from each other", "higher")] = None
    kl_histogram: tuple[int, ...] | None = None
    worst_answers: tuple[WorstAnswer, ...] = ()
    isolation: Annotated[
        tuple[IsolationStep, ...], Meaning("a figure of a step of evaluate.isolate: isolation.STEP.kl_mean_nats, …")
    ] = ()
    tasks: Annotated[
        dict[str, dict[str, float]], Meaning("a metric of a downstream task, as lm-evaluation-harness counts it")
    ] = Field(default_factory=dict)
    reason: str | None = None


class Comparison(Record):
    """Two candidates on the same tokens: the first's mean figure less the second's, in nats.

    Attributes:
        kl_verdict, nll_verdict: whether the first's is "lower" or "higher", or a "tie", where 0 is in the interval,
            which is by paired bootstrap; None where there is none.
    """

    kl_mean_nats: Annotated[Estimate, Meaning("the first model's kl_mean_nats less the second's", "lower")]
    kl_verdict: Literal["lower", "higher", "tie"] | None
    nll_mean_nats: Annotated[Estimate, Meaning("the first model's mean -log p(token) less the second's", "lower")]
    nll_verdict: Literal["lower", "higher", "tie"] | None


class EvaluationReport(Record):
    """evaluation.json.

    Attributes:
        comparisons: "int4 - plain", …: every two models that are not the reference, the later one first.
        recovered_gap_ci95: by bootstrap over the units that the conditions name as `interval_over`; None where there
            are too few of them.
        histogram_edges_nats: bin edges of each model's kl_histogram.
        notes: what the reader of the figures has to know of text, prompts and encoder.
    """

    reference: str
    models: dict[str, ModelEvaluation]
    comparisons: dict[str, Comparison] = Field(default_factory=dict)
    recovered_gap: Annotated[
        float | None, Meaning("share of the untuned twin's kl_mean_nats that tuning took away", "higher")
    ] = None
    recovered_gap_ci95: Interval | None = None
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
    p90: Annotated[float, Meaning("90th percentile", "lower")]
    p99: Annotated[float, Meaning("99th percentile", "lower")]
    samples: tuple[float, ...]


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
        ci95: the value's 95 % interval, where it has one.
        margin: how far the value is on the right side of the limit; negative where it fails.
        undecided: whether the limit is inside the interval; `reason` says what there is too little of, and the gate has
            not passed.
    """

    gate: str
    metric: str
    operator: Literal["<", "<=", "==", ">=", ">"]
    limit: float
    value: float | None
    ci95: Interval | None = None
    margin: float | None
    passed: bool
    undecided: bool = False
    reason: str | None = None

    @property
    def status(self) -> Literal["passed", "failed", "undecided"]:
        """The verdict in a word."""
        if self.passed:
            return "passed"
        return "undecided" if self.undecided else "failed"


class GateReport(Record):
    """gates.json.

    Attributes:
        passed: whether every gate did.
    """

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
