"""Prepared data: token sequences, test documents, a task's examples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ovexport.errors import ArtifactError
from ovexport.storage.bounded import parse_json
from ovexport.storage.records import Record, read_record
from ovexport.storage.tensorfile import TensorFile
from ovexport.storage.textfile import read_text


class DataManifest(Record):
    """data.json: what the sequences hold.

    Attributes:
        documents, sequences: counts by split.
        examples: of the task, counts by split.
        dropped_duplicates: documents that stood in an earlier split too and were left out of the later one.
        test_words: whitespace-separated words in the text of the test sequences, for the word perplexity; 0 where the
            text is not written in words between blanks, as `test_words_reason` says.
        notes: what the reader of the figures has to know of the text.
    """

    sequence_length: int
    documents: dict[str, int]
    sequences: dict[str, int]
    examples: dict[str, int] = Field(default_factory=dict)
    dropped_duplicates: int
    test_words: int
    test_words_reason: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its answer.

    Attributes:
        tokens: (length,) int32.
        answer: index of the answer's first token.
    """

    tokens: NDArray[np.int32]
    answer: int


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A folder with data.json, tokens.safetensors (train, validation and test, each (sequences, length) int32, and
    `test.documents`, of the same shape, the document of each test token) and test_documents.json (the texts of the test
    split).

    Where the recipe has a task, examples.safetensors too: for train and validation `SPLIT.tokens` of all examples one
    after the other, int32, `SPLIT.ends`, where each ends, and `SPLIT.answers`, at which of its own tokens its answer
    begins, int64; and task_rows.json, the rows of every split as lm-evaluation-harness's task reads them.
    """

    path: Path

    @property
    def exists(self) -> bool:
        """Whether the folder is one."""
        return (self.path / "data.json").is_file()

    @property
    def manifest(self) -> DataManifest:
        """data.json, checked."""
        return read_record(self.path / "data.json", DataManifest)

    def tokens(self, split: str) -> NDArray[np.int32]:
        """The sequences of a split."""
        return TensorFile(self.path / "tokens.safetensors").require(split)

    @property
    def token_documents(self) -> NDArray[np.int32] | None:
        """Which document each token of the test split is of; None where they are parts of one running text."""
        return TensorFile(self.path / "tokens.safetensors").get("test.documents")

    def examples(self, split: str) -> list[Example]:
        """The task's examples of train or validation."""
        file = TensorFile(self.path / "examples.safetensors")
        tokens, ends = file.require(f"{split}.tokens"), file.require(f"{split}.ends")
        begins = np.concatenate([[0], ends[:-1]])
        bounds = zip(begins, ends, file.require(f"{split}.answers"), strict=True)
        return [Example(tokens[begin:end], int(answer)) for begin, end, answer in bounds]

    @property
    def task_rows(self) -> dict[str, list[dict[str, Any]]]:
        """The task's rows, by split.

        Raises:
            ArtifactError: the file is missing or corrupt.
        """
        return dict(self._read_json("task_rows.json"))

    @property
    def test_documents(self) -> list[str]:
        """The texts of the test split.

        Raises:
            ArtifactError: the file is missing or corrupt.
        """
        return [str(text) for text in self._read_json("test_documents.json")]

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return parse_json(read_text(path), largest=path.stat().st_size)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: can't be read ({error}); run the stage prepare again") from error
