"""Section [data]."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from ovexport.recipe.spec import Fraction, Positive, Spec

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
TEXT_SUFFIXES = (".txt", ".raw", *ROW_SUFFIXES)


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
