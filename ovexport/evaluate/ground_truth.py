"""Answers and metrics on disk, in WhoWhatBench's csv layouts, and the sidecar that ties answers to how they came about.

WhoWhatBench reads these files, and we read its own, which have no sidecar.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovexport.data.rowfile import read_csv
from ovexport.errors import ArtifactError
from ovexport.evaluate.prompts import Prompts
from ovexport.evaluate.similarity import Answers, Mode, QuestionMetrics, aggregate
from ovexport.storage.digests import json_digest
from ovexport.storage.files import write_text
from ovexport.storage.records import Record, read_record, write_record

_LAYOUT = ("", "prompts", "answers", "language", "prompt_length_type")
_FIGURES = ("similarity", "FDT", "SDT", "FDT norm", "SDT norm")


class Circumstances(Record):
    """How answers came about; answers of other circumstances are not compared.

    Attributes:
        prompts_sha256: of the prompts.
        prompt_tokens_sha256: of their tokens, so that another tokenizer shows.
        chat_template_sha256: of the template that wrapped them; None where none did.
        runtime: settings that the answers are generated under.
    """

    prompts_sha256: str
    prompt_tokens_sha256: str
    chat_template_sha256: str | None
    max_new_tokens: int
    runtime: dict[str, str]


class Sidecar(Record):
    """FILE.json beside FILE.csv.

    Attributes:
        answers_sha256: of the answers in the csv file.
        generated: the tokens of each answer, which the csv file has no column for.
    """

    circumstances: Circumstances
    answers_sha256: str
    generated: tuple[tuple[int, ...], ...]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundTruth:
    """A reference's answers as they lie on disk; `sidecar` is None for a file of WhoWhatBench's own."""

    path: Path
    prompts: Prompts
    texts: tuple[str, ...]
    sidecar: Sidecar | None


def sidecar_of(file: Path) -> Path:
    """Where the sidecar of a csv file lies."""
    return file.with_suffix(".json")


def write_answers(prompts: Prompts, answers: Answers, path: Path) -> None:
    """WhoWhatBench's csv of answers: an index, then prompts, answers, language, prompt_length_type."""
    rows = [
        [index, prompt, text, prompts.language, prompts.length_type]
        for index, (prompt, text) in enumerate(zip(prompts.texts, answers.texts, strict=True))
    ]
    write_text(_csv(_LAYOUT, rows), path)


def write_ground_truth(
    prompts: Prompts, answers: Answers, circumstances: Circumstances, versions: dict[str, str], path: Path
) -> None:
    """The csv of a reference's answers and its sidecar."""
    write_answers(prompts, answers, path)
    sidecar = Sidecar(
        circumstances=circumstances,
        answers_sha256=json_digest(answers.texts),
        generated=answers.generated,
        versions=versions,
    )
    write_record(sidecar, sidecar_of(path))


def read_ground_truth(path: Path) -> GroundTruth:
    """A csv of answers, ours or WhoWhatBench's.

    Raises:
        ArtifactError: it can't be read, lacks a column or a row, or is not the one that its sidecar is of.
    """
    try:
        rows = read_csv(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: can't be read ({error}); give a csv of answers") from error
    if not rows or not {"prompts", "answers"} <= set(rows[0]):
        raise ArtifactError(f"{path}: no ground truth, which has rows with the columns prompts and answers")
    prompts = Prompts(
        name=path.name,
        texts=tuple(row["prompts"] for row in rows),
        language=rows[0].get("language") or "en",
        length_type=rows[0].get("prompt_length_type") or "short",
    )
    texts = tuple(row["answers"] for row in rows)
    beside = sidecar_of(path)
    sidecar = read_record(beside, Sidecar) if beside.is_file() else None
    if sidecar is not None and sidecar.answers_sha256 != json_digest(texts):
        raise ArtifactError(f"{path}: its answers are not those that {beside.name} is of; make both again")
    return GroundTruth(path=path, prompts=prompts, texts=texts, sidecar=sidecar)


def require_same_circumstances(truth: GroundTruth, own: Circumstances) -> None:
    """Refuse a ground truth that was made in another way than the candidate's answers will be.

    Raises:
        ArtifactError: with what differs.
    """
    if truth.sidecar is None:
        return
    theirs = truth.sidecar.circumstances
    for name in Circumstances.model_fields:
        expected, actual = getattr(theirs, name), getattr(own, name)
        if expected != actual:
            raise ArtifactError(
                f"{truth.path}: of another run, its {name} is {_short(expected)} and not {_short(actual)}; evaluate in "
                "the same way, or make the ground truth again"
            )


def write_metrics(
    prompts: Prompts, reference: Answers, candidate: Answers, rows: Sequence[QuestionMetrics], mode: Mode, folder: Path
) -> None:
    """WhoWhatBench's metrics_per_question.csv and metrics.csv."""
    lines: list[list[Any]] = [
        [index, row.similarity, row.fdt, row.sdt, row.fdt_norm, row.sdt_norm, prompt, expected, actual]
        for index, (row, prompt, expected, actual) in enumerate(
            zip(rows, prompts.texts, reference.texts, candidate.texts, strict=True)
        )
    ]
    header = ["", *_FIGURES, "prompts", "source_model", "optimized_model"]
    write_text(_csv(header, lines), folder / "metrics_per_question.csv")
    mean = aggregate(rows, mode)
    total = [0, mean.similarity, mean.fdt, mean.sdt, "" if mean.fdt_norm is None else mean.fdt_norm, mean.sdt_norm]
    write_text(_csv(["", *_FIGURES], [total]), folder / "metrics.csv")


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else str(value)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
