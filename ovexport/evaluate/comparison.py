"""Divergence and similarity put together to an EvaluationReport."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovexport.artifacts import IR, PreparedData, json_digest
from ovexport.evaluate.answers import Encoder, aggregate, compare_answers, generate, write_answers, write_metrics
from ovexport.evaluate.divergence import (
    HISTOGRAM_EDGES_NATS,
    compare,
    perplexity,
    recovered_gap,
    summarize,
    word_perplexity,
)
from ovexport.evaluate.prompts import choose_prompts
from ovexport.evaluate.tasks import Loaded, ask_models, loaded
from ovexport.progress import Listener, silent
from ovexport.recipe import EvaluateSpec, ModelSpec
from ovexport.reports import EvaluationReport, ModelEvaluation
from ovexport.tasks import HarnessTask
from ovexport.versions import installed_version, stack_versions


def evaluate(
    models: Mapping[str, IR],
    reference: str,
    data: PreparedData,
    spec: EvaluateSpec,
    encoder: Encoder,
    out: Path,
    *,
    tasks: Sequence[HarnessTask] = (),
    torch_model: Loaded | None = None,
    distilled: bool = True,
    listener: Listener = silent,
) -> EvaluationReport:
    """Compare models with the reference among them, on the test sequences, the prompts and the tasks.

    Args:
        models: by the name they have in the report; "plain" and "int4", where both are there, give recovered_gap.
        out: takes reference.csv and a folder of WhoWhatBench's csv files and the tasks' answers per model.
        torch_model: loads what the IR "int4" was made of; it is asked the tasks, as "torch", and nothing else.
        distilled: whether "int4" was tuned to be like the reference, so that there is a gap to recover.

    Raises:
        ArtifactError, UnsupportedModelError: a model can't be loaded.
    """
    manifest = data.manifest
    tokens = data.tokens("test")
    prompts = choose_prompts(data.test_documents, spec)
    for ir in models.values():
        ir.require()
    figures, properties = compare(models, reference, tokens, spec.batch_size, listener)
    answers = {name: generate(name, ir, prompts, spec, listener) for name, ir in models.items()}
    write_answers(prompts, answers[reference], out / "reference.csv")
    asked = {name: loaded(ir) for name, ir in models.items()} | ({"torch": torch_model} if torch_model else {})
    tokenizer = ModelSpec(id=str(models[reference].path))
    results = {task.spec.name: ask_models(task, asked, tokenizer, out, listener) for task in tasks}
    evaluated = {}
    for name in models:
        common: dict[str, Any] = {
            "tasks": {task: reached[name] for task, reached in results.items()},
            "perplexity": perplexity(figures[name]),
            "word_perplexity": word_perplexity(figures[name], manifest.sequence_length, manifest.test_words),
        }
        if name == reference:
            evaluated[name] = ModelEvaluation(**common, reason="the reference: nothing to compare it with")
            continue
        rows = compare_answers(answers[reference], answers[name], encoder)
        write_answers(prompts, answers[name], out / name / "target.csv")
        write_metrics(prompts, answers[reference], answers[name], rows, out / name)
        divergence, histogram = summarize(figures[name])
        evaluated[name] = ModelEvaluation(
            **common, **divergence.model_dump(), **aggregate(rows).model_dump(), kl_histogram=histogram
        )
    if torch_model and tasks:
        evaluated["torch"] = ModelEvaluation(
            tasks={task: reached["torch"] for task, reached in results.items()},
            reason="the tuned model in torch, asked the tasks alone",
        )
    gap, interval, reason = None, None, "no plain twin was compared"
    if not distilled:
        reason = "tuned for a task, not to be like the reference"
    elif {"plain", "int4"} <= set(models):
        gap, interval = recovered_gap(figures["plain"], figures["int4"], spec.seed)
        reason = ""
    return EvaluationReport(
        reference=reference,
        models=evaluated,
        recovered_gap=gap,
        recovered_gap_ci95=interval,
        reason=reason or None,
        histogram_edges_nats=HISTOGRAM_EDGES_NATS,
        conditions={
            "encoder": spec.encoder,
            "prompts": len(prompts),
            "prompts_sha256": json_digest(prompts),
            "max_new_tokens": spec.max_new_tokens,
            "chat_template": answers[reference].chat_template,
            "test_sequences": len(tokens),
            "sequence_length": manifest.sequence_length,
            "test_tokens_sha256": json_digest(tokens.tolist()),
            "runtime": properties,
            "tasks": {task.spec.name: _asked_with(task) for task in tasks},
        },
        versions=stack_versions(),
    )


def _asked_with(task: HarnessTask) -> dict[str, Any]:
    """A task's conditions."""
    return {"metric": task.metric, "num_fewshot": task.num_fewshot, "lm_eval": installed_version("lm-eval")}
