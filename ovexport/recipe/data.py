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
        path: a file. In .txt and .raw, documents are separated by blank lines, or are lines if there is no blank line;
            in .jsonl, .json, .csv and .parquet, each row is a document. UTF-8, or UTF-16 and UTF-32 with a byte order
            mark.
        hub: the id of a hub data set.
        config: the configuration of the hub data set.
        split: the split of the hub data set.
        column: the column that holds the text; ignored for .txt and .raw.
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
    """Text for tuning, validation and test, packed into sequences of tokens. No document is in two of them.

    Attributes:
        train: the text to tune on. If a task is tuned for, this text is for calibration, and the task's examples are
            used without it.
        validation: the text that watches the tuning. Without it, the last `validation_fraction` of train's documents.
        test: the text that every reported figure is measured on. Without it, the last `test_fraction` of train's
            documents.
        validation_fraction: share of train's documents that is held out for validation.
        test_fraction: share of train's documents that is held out for test.
        sequence_length: tokens per sequence.
        train_sequences: the most sequences for tuning; all of them without it.
        validation_sequences: sequences for validation; with a warning, fewer (at least 1) if the text is too short.
        test_sequences: sequences for test; with a warning, fewer (at least 4) if the text is too short.
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
