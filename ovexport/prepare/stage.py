"""The stage: text becomes packed token sequences, and a task's rows examples, for tuning, validation and test."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from ovexport.artifacts import DataManifest, PreparedData
from ovexport.data.languages import count_words
from ovexport.models.loading import load_own_tokenizer
from ovexport.openvino.tokenizer import check_tokenizer
from ovexport.prepare.documents import Documents, checked_documents, read_documents
from ovexport.prepare.examples import TaskData, examples
from ovexport.prepare.notes import notes_on
from ovexport.prepare.reading import read_splits
from ovexport.prepare.sequences import pack, tell_fewer
from ovexport.recipe import DataSpec, ModelSpec, SourceSpec, TaskSpec
from ovexport.storage.files import atomic_folder, write_text
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import write_tensors

logger = logging.getLogger(__name__)


def prepare(model: ModelSpec, data: DataSpec, out: Path, task: TaskSpec | None = None) -> PreparedData:
    """Read, split, tokenize and pack the text; the same with a task's examples, each of which stays by itself.

    Raises:
        DataError: a source can't be read, or there is too little text; a row is not of the task's layout.
        MissingDependencyError: a task needs lm-evaluation-harness.
        UnsupportedModelError: the tokenizer does not fit the model, or the IR's would encode the text otherwise.
    """
    splits, dropped, answered_rows = read_splits(data, task)
    check_tokenizer(model, checked_documents(splits))
    return _write(model, data, splits, dropped, out, answered_rows)


def prepare_test(model: ModelSpec, source: SourceSpec, data: DataSpec, out: Path) -> PreparedData:
    """The test split alone, of all documents of its source.

    Raises:
        DataError, UnsupportedModelError: as prepare.
    """
    return _write(model, data, {"test": read_documents(source)}, 0, out)


def _write(
    model: ModelSpec,
    data: DataSpec,
    splits: Mapping[str, Documents],
    dropped: int,
    out: Path,
    task: TaskData | None = None,
) -> PreparedData:
    tokenizer = load_own_tokenizer(model)
    of_task = data.train is None and task is not None
    packed = {name: pack(documents, tokenizer, data, name, of_task=of_task) for name, documents in splits.items()}
    sequences = {name: tokens for name, (tokens, _) in packed.items()}
    for name, tokens in sequences.items():
        for said in tell_fewer(data, name, len(tokens)):
            logger.warning("  %s", said)
    of_documents = {} if splits["test"].running else {"test.documents": packed["test"][1]}
    text = tokenizer.decode(sequences["test"].reshape(-1), skip_special_tokens=True)
    words, no_words = count_words(text)
    notes = notes_on(tokenizer, splits, generates=task is not None and task.generates)
    for note in notes:
        logger.warning("  %s", note)
    manifest = DataManifest(
        sequence_length=data.sequence_length,
        documents={name: len(documents.texts) for name, documents in splits.items()},
        sequences={name: len(tokens) for name, tokens in sequences.items()},
        examples={name: len(rows) for name, rows in task.rows.items()} if task else {},
        dropped_duplicates=dropped,
        test_words=words,
        test_words_reason=no_words,
        notes=notes,
    )
    with atomic_folder(out) as folder:
        write_tensors(sequences | of_documents, folder / "tokens.safetensors")
        write_text(json.dumps(splits["test"].texts, ensure_ascii=False, indent=0), folder / "test_documents.json")
        if task:
            write_tensors(examples(task, tokenizer, data.sequence_length), folder / "examples.safetensors")
            write_text(json.dumps(task.rows, ensure_ascii=False, indent=0), folder / "task_rows.json")
        write_record(manifest, folder / "data.json")
    return PreparedData(out)
