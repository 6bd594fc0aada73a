"""evaluation.json."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ovexport.reports.figures import Estimate, Figures, Interval, Meaning
from ovexport.storage.records import Record


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
        float | None, Meaning("share of the untuned twin's kl_mean_nats that tuning recovered", "higher")
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
