"""Generated answers and WhoWhatBench's metrics on them."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR, write_text
from ovexport.errors import UnsupportedModelError
from ovexport.progress import Listener, Progress
from ovexport.recipe import EvaluateSpec
from ovexport.reports import Similarity
from ovexport.runtime import ACCURATE

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]
"""Sentence embeddings, (texts, width), of unit length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a model said: texts, and their tokens as the model's own tokenizer encodes the texts."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionMetrics:
    """WhoWhatBench's figures of one question."""

    similarity: float
    fdt: int
    sdt: int
    fdt_norm: float
    sdt_norm: float


def generate(name: str, ir: IR, prompts: Sequence[str], spec: EvaluateSpec, listener: Listener) -> Answers:
    """Greedy answers, one prompt at a time, with sampling and penalties of generation_config.json neutralised.

    Raises:
        UnsupportedModelError: openvino-genai can't load the IR.
    """
    try:
        pipeline = openvino_genai.LLMPipeline(str(ir.path), "CPU", ATTENTION_BACKEND="SDPA", **ACCURATE)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load it ({last.strip()})") from error
    tokenizer = pipeline.get_tokenizer()
    config = pipeline.get_generation_config()
    config.max_new_tokens = spec.max_new_tokens
    config.do_sample = False
    config.num_beams = 1
    config.repetition_penalty = 1.0
    config.presence_penalty = 0.0
    config.frequency_penalty = 0.0
    config.apply_chat_template = spec.chat_template == "auto" and bool(tokenizer.chat_template)
    texts = []
    for index, prompt in enumerate(prompts):
        texts.append(str(pipeline.generate([prompt], config).texts[0]))
        listener(Progress(task=f"answers of {name}", done=index + 1, total=len(prompts)))
    tokens = [tuple(int(token) for token in tokenizer.encode(text).input_ids.data.reshape(-1)) for text in texts]
    return Answers(texts=tuple(texts), tokens=tuple(tokens), chat_template=config.apply_chat_template)


def compare_answers(reference: Answers, candidate: Answers, encode: Encoder) -> list[QuestionMetrics]:
    """WhoWhatBench's metrics, question by question."""
    cosines = np.sum(encode(reference.texts) * encode(candidate.texts), axis=1)
    mean_length = float(np.mean([len(tokens) for tokens in reference.tokens]))
    rows = []
    for cosine, expected, actual in zip(cosines, reference.tokens, candidate.tokens, strict=True):
        fdt, sdt, sdt_norm = divergent_tokens(expected, actual)
        rows.append(
            QuestionMetrics(
                similarity=float(cosine),
                fdt=fdt,
                sdt=sdt,
                fdt_norm=fdt / mean_length if mean_length else 0.0,
                sdt_norm=sdt_norm,
            )
        )
    return rows


def divergent_tokens(reference: Sequence[int], candidate: Sequence[int]) -> tuple[int, int, float]:
    """First divergent token, share of divergent tokens and its norm (FDT, SDT, SDT norm).

    Source: WhoWhatBench's divergency metric: matching blocks of difflib.SequenceMatcher with its defaults.
    """
    if not reference and not candidate:
        return 0, 0, 0.0
    if not candidate:
        return 0, len(reference), 1.0
    if not reference:
        return 0, len(candidate), 1.0
    blocks = SequenceMatcher(None, reference, candidate).get_matching_blocks()
    first = blocks[0]
    fdt = first.size if (first.a, first.b) == (0, 0) else 0
    sdt = len(candidate) - sum(block.size for block in blocks)
    return fdt, sdt, sdt / len(candidate)


def aggregate(rows: Sequence[QuestionMetrics]) -> Similarity:
    """Means over the questions, as WhoWhatBench aggregates them."""
    return Similarity(
        similarity=float(np.mean([row.similarity for row in rows])),
        fdt=float(np.mean([row.fdt for row in rows])),
        fdt_norm=float(np.mean([row.fdt_norm for row in rows])),
        sdt=float(np.mean([row.sdt for row in rows])),
        sdt_norm=float(np.mean([row.sdt_norm for row in rows])),
    )


def write_answers(prompts: Sequence[str], answers: Answers, path: Path) -> None:
    """WhoWhatBench's csv of answers: an index, then prompts, answers, language, prompt_length_type."""
    rows = [
        [index, prompt, text, "en", "short"]
        for index, (prompt, text) in enumerate(zip(prompts, answers.texts, strict=True))
    ]
    write_text(_csv(["", "prompts", "answers", "language", "prompt_length_type"], rows), path)


def write_metrics(
    prompts: Sequence[str], reference: Answers, candidate: Answers, rows: Sequence[QuestionMetrics], folder: Path
) -> None:
    """WhoWhatBench's metrics_per_question.csv and metrics.csv."""
    names = ["similarity", "FDT", "SDT", "FDT norm", "SDT norm"]
    lines: list[list[Any]] = [
        [index, row.similarity, row.fdt, row.sdt, row.fdt_norm, row.sdt_norm, prompt, expected, actual]
        for index, (row, prompt, expected, actual) in enumerate(
            zip(rows, prompts, reference.texts, candidate.texts, strict=True)
        )
    ]
    header = ["", *names, "prompts", "source_model", "optimized_model"]
    write_text(_csv(header, lines), folder / "metrics_per_question.csv")
    mean = aggregate(rows)
    total = [0, mean.similarity, mean.fdt, mean.sdt, mean.fdt_norm, mean.sdt_norm]
    write_text(_csv(["", *names], [total]), folder / "metrics.csv")


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
