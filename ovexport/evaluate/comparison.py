"""Divergence, similarity and tasks put together to an EvaluationReport."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ovexport.artifacts import IR, PreparedData
from ovexport.bootstrap import too_few
from ovexport.errors import DataError
from ovexport.evaluate import divergence
from ovexport.evaluate.answers import RUNTIME, PromptTokenizer, common_template, generate, prompt_tokens
from ovexport.evaluate.divergence import HISTOGRAM_EDGES_NATS, Resampling, TokenFigures
from ovexport.evaluate.encoder import language_note
from ovexport.evaluate.ground_truth import (
    Circumstances,
    GroundTruth,
    require_same_circumstances,
    write_answers,
    write_ground_truth,
    write_metrics,
)
from ovexport.evaluate.isolation import isolate
from ovexport.evaluate.prompts import Prompts, choose_prompts
from ovexport.evaluate.similarity import Answers, Encoder, aggregate, compare_answers, worst
from ovexport.evaluate.tasks import Loaded, ask_models, loaded
from ovexport.models.positions import readable_by_all, require_readable
from ovexport.openvino.identity import identify
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.progress import Listener, silent
from ovexport.recipe import EvaluateSpec, ModelSpec
from ovexport.reports import Comparison, EvaluationReport, Interval, IsolationStep, ModelEvaluation
from ovexport.storage.digests import bytes_digest, json_digest
from ovexport.tasks import HarnessTask
from ovexport.versions import installed_version, stack_versions

_FEWEST_PROMPTS = 4
_FEW_ANSWERS = 0.5
_BEYOND = "more than a 64-bit float holds"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Divergences:
    """What the test text showed of each model."""

    figures: dict[str, TokenFigures]
    resampling: Resampling
    isolation: dict[str, tuple[IsolationStep, ...]]
    conditions: dict[str, Any]
    length: int
    words: int
    no_words: str | None
    notes: tuple[str, ...]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What was noted of the text, and the models whose perplexity can't be written as a number."""
        beyond = [name for name, one in self.figures.items() if divergence.perplexity(one) is None]
        return (*self.notes, *(f"the perplexity of {name} is {_BEYOND}" for name in beyond))

    def of(self, name: str, reference: str) -> dict[str, Any]:
        """A model's fields in the report."""
        figures = self.figures[name]
        fields: dict[str, Any] = {
            "perplexity": divergence.perplexity(figures),
            "word_perplexity": divergence.word_perplexity(figures, self.length, self.words),
        }
        if fields["word_perplexity"] is None:
            fields["word_perplexity_reason"] = self.no_words or f"it is {_BEYOND}"
        if name == reference:
            return fields
        summary, histogram = divergence.summarize(figures, self.figures[reference], self.resampling)
        fields |= summary.model_dump() | {"kl_histogram": histogram}
        return fields | {"isolation": self.isolation.get(name, ())}

    def compared(self, reference: str) -> dict[str, Comparison]:
        """Every two models that are not the reference."""
        others = [name for name in self.figures if name != reference]
        return {
            f"{later} - {earlier}": divergence.difference(self.figures[later], self.figures[earlier], self.resampling)
            for earlier, later in combinations(others, 2)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conversations:
    """What each model said, the ground truth included; `truth` is the model whose answers it is."""

    prompts: Prompts
    truth: Answers
    answers: dict[str, Answers]
    circumstances: Circumstances
    conditions: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> Answers:
        """A model's answers; those of the ground truth for the reference, which is not asked again."""
        return self.answers.get(name, self.truth)


def evaluate(
    models: Mapping[str, IR],
    reference: str | None,
    data: PreparedData | None,
    spec: EvaluateSpec,
    encoder: Encoder,
    out: Path,
    *,
    ground_truth: GroundTruth | None = None,
    tasks: Sequence[HarnessTask] = (),
    torch_model: Loaded | None = None,
    distilled: bool = True,
    listener: Listener = silent,
) -> EvaluationReport:
    """Compare models with the reference among them, on the test sequences, the prompts and the tasks.

    Args:
        models: by the name they have in the report; "plain" and "int4", where both are there, give recovered_gap.
        reference: its name; None where there is a ground truth alone.
        data: without it, neither perplexity nor divergence is measured.
        out: takes reference.csv with its sidecar and a folder of WhoWhatBench's csv files and the tasks' answers per
            model.
        ground_truth: stands in for the reference's answers.
        torch_model: loads what the IR "int4" was made of; it is asked the tasks, as "torch", and nothing else.
        distilled: whether "int4" was tuned to be like the reference, so that there is a gap to recover.

    Raises:
        ArtifactError: a file is missing, or models, text and ground truth are not of each other.
        DataError: there are no prompts, or nothing is said to them.
        UnsupportedModelError: a model can't be loaded.
    """
    positions = _require_comparable(models, data, spec, ground_truth)
    prompts = ground_truth.prompts if ground_truth else choose_prompts(data.test_documents if data else (), spec)
    asking = _ask_how(models, prompts, spec, positions)
    diverged = _diverge(models, reference, data, spec, listener) if reference and data else None
    said = _converse(models, reference, asking, spec, ground_truth, listener)
    if ground_truth is None:
        write_ground_truth(said.prompts, said.truth, said.circumstances, stack_versions(), out / "reference.csv")
    asked = {name: loaded(ir) for name, ir in models.items()} | ({"torch": torch_model} if torch_model else {})
    tokenizer = ModelSpec(id=str(next(iter(models.values())).path))
    answered = {task.spec.name: ask_models(task, asked, tokenizer, out, listener) for task in tasks}
    tests = _Tests(reference=reference, diverged=diverged, said=said, answered=answered)
    evaluated = {name: tests.of(name, encoder, spec, out) for name in models}
    if torch_model and tasks:
        evaluated["torch"] = tests.of_torch()
    notes = (*(diverged.all_notes if diverged else ()), *_notes_on_answers(said, models, spec))
    for note in notes:
        logger.warning("  %s", note)
    described = {name: identify(ir) for name, ir in models.items()}
    tuned = described.get("int4", {}).get("tuning_steps") != 0
    gap, interval, reason = _recovered(diverged, reference, distilled=distilled, tuned=tuned)
    if torch_model:
        described["torch"] = described["int4"] | {"weights": "torch"}
    return EvaluationReport(
        reference=reference or str(ground_truth and ground_truth.path),
        models=evaluated,
        comparisons=diverged.compared(str(reference)) if diverged else {},
        recovered_gap=gap,
        recovered_gap_ci95=interval,
        reason=reason,
        histogram_edges_nats=HISTOGRAM_EDGES_NATS,
        notes=notes,
        conditions=_conditions(described, spec, said, diverged, tasks),
        versions=stack_versions(),
    )


def _require_comparable(
    models: Mapping[str, IR], data: PreparedData | None, spec: EvaluateSpec, ground_truth: GroundTruth | None
) -> int | None:
    """How many tokens every model can read; None where they have no limit.

    Raises:
        ArtifactError: a file of an IR is missing.
        DataError: the ground truth lacks the tokens that the strict mode compares.
        RecipeError: the text's sequences are longer than what the models can read.
    """
    for ir in models.values():
        ir.require()
    if ground_truth and ground_truth.sidecar is None and spec.similarity_mode == "strict":
        raise DataError(
            f"{ground_truth.path}: has no sidecar with the generated tokens, which the strict mode compares; use "
            'similarity_mode "wwb"'
        )
    positions = readable_by_all(models.values())
    if data:
        length = data.manifest.sequence_length
        require_readable(length, positions, f"data.sequence_length={length}")
    return positions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tests:
    """What was measured of all models: on text, on prompts, in tasks.

    Attributes:
        answered: by task, each model's figures.
    """

    reference: str | None
    diverged: _Divergences | None
    said: _Conversations
    answered: Mapping[str, Mapping[str, dict[str, float]]]

    def of(self, name: str, encoder: Encoder, spec: EvaluateSpec, out: Path) -> ModelEvaluation:
        """A model's figures; its csv files are written on the way."""
        fields: dict[str, Any] = {"tasks": self._tasks(name)}
        fields |= self.diverged.of(name, str(self.reference)) if self.diverged else {}
        if name == self.reference:
            fields["reason"] = "the reference: nothing to compare it with"
        else:
            fields |= _alike(self.said, name, encoder, spec, out)
            fields["reason"] = _missing(self.diverged, len(self.said.prompts.texts))
        return ModelEvaluation(**fields, different_answers=len(set(self.said.of(name).texts)))

    def of_torch(self) -> ModelEvaluation:
        """The figures of the model in torch, which was asked the tasks alone."""
        return ModelEvaluation(
            tasks=self._tasks("torch"), reason="the model in torch that int4 was made of, asked the tasks alone"
        )

    def _tasks(self, name: str) -> dict[str, dict[str, float]]:
        return {task: figures[name] for task, figures in self.answered.items()}


def _conditions(
    described: Mapping[str, Any],
    spec: EvaluateSpec,
    said: _Conversations,
    diverged: _Divergences | None,
    tasks: Sequence[HarnessTask],
) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "models": dict(described),
        "encoder": spec.encoder,
        "similarity_mode": spec.similarity_mode,
        **said.conditions,
        **(diverged.conditions if diverged else {}),
        "tasks": {task.spec.name: _asked_with(task) for task in tasks},
    }


def _diverge(
    models: Mapping[str, IR], reference: str, data: PreparedData, spec: EvaluateSpec, listener: Listener
) -> _Divergences:
    tokens = data.tokens("test")
    runners = {name: LogitsRunner(running_graph(ir), str(ir.path)) for name, ir in models.items()}
    figures = divergence.compare(runners, reference, tokens, spec.batch_size, listener)
    runtime = {name: runner.properties for name, runner in runners.items()}
    del runners
    resampling = Resampling.of(data.token_documents, (len(tokens), tokens.shape[1] - 1), spec.seed)
    isolation = isolate(models, reference, tokens, spec.batch_size, resampling, listener) if spec.isolate else {}
    manifest = data.manifest
    return _Divergences(
        figures=figures,
        resampling=resampling,
        isolation=isolation,
        conditions={
            "test_sequences": len(tokens),
            "sequence_length": manifest.sequence_length,
            "test_tokens_sha256": json_digest(tokens.tolist()),
            "interval_over": resampling.name,
            "interval_units": resampling.count,
            "runtime": runtime,
        },
        length=manifest.sequence_length,
        words=manifest.test_words,
        no_words=manifest.test_words_reason or (None if manifest.test_words else "the text holds no words"),
        notes=manifest.notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """How the models are asked: the prompts, wrapped in a chat template or not, and the circumstances."""

    prompts: Prompts
    tokenizer: PromptTokenizer
    templated: bool
    circumstances: Circumstances


def _ask_how(models: Mapping[str, IR], prompts: Prompts, spec: EvaluateSpec, positions: int | None) -> _Asked:
    """How the models will be asked, before any of them is.

    Raises:
        ArtifactError: their tokenizers or templates differ.
        RecipeError: prompt and answer are longer than what they can read.
    """
    tokenizers = {name: PromptTokenizer(ir) for name, ir in models.items()}
    template = common_template(tokenizers, spec.chat_template)
    tokens = prompt_tokens(tokenizers, prompts.texts)
    longest = max(map(len, tokens)) + spec.max_new_tokens - 1  # the last token is not read any more
    require_readable(longest, positions, f"the longest prompt and evaluate.max_new_tokens={spec.max_new_tokens}")
    return _Asked(
        prompts=prompts,
        tokenizer=next(iter(tokenizers.values())),
        templated=template is not None,
        circumstances=Circumstances(
            prompts_sha256=json_digest(prompts.texts),
            prompt_tokens_sha256=json_digest(tokens),
            chat_template_sha256=bytes_digest(template.encode()) if template else None,
            max_new_tokens=spec.max_new_tokens,
            runtime=dict(RUNTIME),
        ),
    )


def _converse(
    models: Mapping[str, IR],
    reference: str | None,
    asked: _Asked,
    spec: EvaluateSpec,
    truth: GroundTruth | None,
    listener: Listener,
) -> _Conversations:
    """Ask every model that has to be asked, one in memory at a time."""
    prompts, circumstances = asked.prompts, asked.circumstances
    if truth:
        require_same_circumstances(truth, circumstances)
    answers = {
        name: generate(
            name,
            ir,
            prompts.texts,
            templated=asked.templated,
            max_new_tokens=spec.max_new_tokens,
            listener=listener,
        )
        for name, ir in models.items()
        if truth is None or name != reference
    }
    return _Conversations(
        prompts=prompts,
        truth=_answers_of(truth, asked.tokenizer) if truth else answers[str(reference)],
        answers=answers,
        circumstances=circumstances,
        conditions={
            "prompt_set": prompts.name,
            "prompts": len(prompts.texts),
            "prompts_sha256": circumstances.prompts_sha256,
            "prompt_language": prompts.language,
            "max_new_tokens": spec.max_new_tokens,
            "chat_template": asked.templated,
            "ground_truth": _origin(truth),
            "answers_runtime": circumstances.runtime,
        },
    )


def _answers_of(truth: GroundTruth, tokenizer: PromptTokenizer) -> Answers:
    """The answers on disk; the tokens that were generated are in the sidecar alone."""
    return Answers(
        texts=truth.texts,
        generated=truth.sidecar.generated if truth.sidecar else (),
        encoded=tuple(tokenizer.encode(text) for text in truth.texts),
    )


def _origin(truth: GroundTruth | None) -> str:
    if truth is None:
        return "generated here"
    return f"{truth.path}, " + ("checked by its sidecar" if truth.sidecar else "which has no sidecar to check it by")


def _notes_on_answers(said: _Conversations, names: Iterable[str], spec: EvaluateSpec) -> Iterator[str]:
    """What keeps the similarity from saying much: the encoder's language, and answers that are the same."""
    count = len(said.prompts.texts)
    for name in names:
        different = len(set(said.of(name).texts))
        if count >= _FEWEST_PROMPTS and different <= _FEW_ANSWERS * count:
            answers = "the same text" if different == 1 else f"{different} different texts"
            yield (
                f"{name} answers {count} prompts with {answers}, and the similarity compares no more than that; give "
                "other prompts, or another chat_template"
            )
    note = language_note(spec.encoder, said.prompts.language)
    if note:
        yield note


def _alike(said: _Conversations, name: str, encoder: Encoder, spec: EvaluateSpec, out: Path) -> dict[str, Any]:
    """A model's fields of similarity; its csv files are written on the way."""
    answers, mode = said.answers[name], spec.similarity_mode
    rows = compare_answers(said.truth, answers, encoder, mode)
    write_answers(said.prompts, answers, out / name / "target.csv")
    write_metrics(said.prompts, said.truth, answers, rows, mode, out / name)
    worst_answers = worst(said.prompts.texts, said.truth, answers, rows)
    return aggregate(rows, mode, spec.seed).model_dump() | {"worst_answers": worst_answers}


def _recovered(
    diverged: _Divergences | None, reference: str | None, *, distilled: bool, tuned: bool
) -> tuple[float | None, Interval | None, str | None]:
    """The share of the plain twin's divergence that tuning recovered, with its interval, or why there is none."""
    if not tuned:
        return None, None, "int4 was not tuned: it took no step, or no step validated better than the starting point"
    if not distilled:
        return None, None, "tuned for a task, not to be like the reference"
    compared = set(diverged.figures) - {reference} if diverged else set()
    if diverged is None or not {"plain", "int4"} <= compared:
        return None, None, "no plain twin was compared"
    figures = diverged.figures
    if not figures["plain"].joined("kl").mean() > 0:
        return None, None, "the plain twin does not differ from the reference"
    gap, interval = divergence.recovered_gap(figures["plain"], figures["int4"], diverged.resampling)
    return gap, interval, diverged.resampling.too_few


def _missing(diverged: _Divergences | None, prompts: int) -> str | None:
    """Why a model's figures or intervals are not there."""
    reasons = (
        diverged.resampling.too_few if diverged else "no text and reference were given to measure the divergence on",
        too_few(prompts, "prompts"),
    )
    return "; ".join(filter(None, reasons)) or None


def _asked_with(task: HarnessTask) -> dict[str, Any]:
    """A task's conditions."""
    return {"metric": task.metric, "num_fewshot": task.num_fewshot, "lm_eval": installed_version("lm-eval")}
