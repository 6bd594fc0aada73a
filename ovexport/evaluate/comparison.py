"""Divergence and similarity put together to an EvaluationReport."""

from collections.abc import Mapping
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
from ovexport.progress import Listener, silent
from ovexport.recipe import EvaluateSpec
from ovexport.reports import EvaluationReport, ModelEvaluation
from ovexport.versions import stack_versions


def evaluate(
    models: Mapping[str, IR],
    reference: str,
    data: PreparedData,
    spec: EvaluateSpec,
    encoder: Encoder,
    out: Path,
    *,
    listener: Listener = silent,
) -> EvaluationReport:
    """Compare models with the reference among them, on the test sequences and the prompts.

    Args:
        models: by the name they have in the report; "plain" and "int4", where both are there, give recovered_gap.
        out: takes reference.csv and a folder of WhoWhatBench's csv files per model.

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
    evaluated = {}
    for name in models:
        common: dict[str, Any] = {
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
    gap, interval, reason = None, None, "no plain twin was compared"
    if {"plain", "int4"} <= set(models):
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
        },
        versions=stack_versions(),
    )
