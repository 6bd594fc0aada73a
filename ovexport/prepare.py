"""Stage prepare: text to packed token sequences, and a task's rows to examples, for tuning, validation and test;
nothing stands in two of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ovexport.artifacts import DataManifest, PreparedData, atomic_folder, write_record, write_text
from ovexport.errors import DataError
from ovexport.model import load_config, load_tokenizer
from ovexport.recipe import DataSpec, ModelSpec, SourceSpec, TaskSpec
from ovexport.rows import load_rows, without_repeats
from ovexport.tasks import HarnessTask, hub_sources, read_task_rows
from ovexport.tensorfile import write_tensors
from ovexport.tokenizer import check_tokenizer

_CHECKED_DOCUMENTS = 64

PLAIN_TEXT = (".txt", ".raw")


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts, and whether they are parts of one running text (plain text) or stand alone (rows)."""

    texts: list[str]
    running: bool


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task's rows as lm-evaluation-harness reads them, and of each a question and its right answer, by split."""

    rows: dict[str, list[dict[str, Any]]]
    answered: dict[str, list[tuple[str, str]]]
    generates: bool


def prepare(model: ModelSpec, data: DataSpec, out: Path, task: TaskSpec | None = None) -> PreparedData:
    """Read, split, tokenize and pack the text; the same with a task's examples, each of which stays by itself.

    Raises:
        DataError: a source can't be read, or there is too little text; a row is not of the task's layout.
        MissingDependencyError: a task needs lm-evaluation-harness.
        UnsupportedModelError: the tokenizer does not fit the model, or the IR's would encode the text otherwise.
    """
    dropped = 0
    found = None
    if task is not None:
        rows, dropped = read_task_rows(task, data, {} if task.files else hub_sources(task.name))
        harness = HarnessTask(task, rows)
        answered = {split: list(harness.answered(some)) for split, some in rows.items()}
        found = TaskData(rows, answered, harness.generates)
    if data.train is not None:
        splits, repeated = split_documents(data)
        _check_tokenizer(model, splits)
        return _write(model, data, splits, dropped + repeated, out, found)
    assert found is not None, "a recipe has text or a task"
    texts = {split: [question + answer for question, answer in pairs] for split, pairs in found.answered.items()}
    splits = {split: Documents(some, running=False) for split, some in texts.items()}
    _check_tokenizer(model, splits)
    return _write(model, data, splits, dropped, out, found)


def prepare_test(model: ModelSpec, source: SourceSpec, data: DataSpec, out: Path) -> PreparedData:
    """The test split alone, of all documents of its source.

    Raises:
        DataError, UnsupportedModelError: as prepare.
    """
    return _write(model, data, {"test": read_documents(source)}, 0, out)


def _check_tokenizer(model: ModelSpec, splits: Mapping[str, Documents]) -> None:
    """Let the first documents of every split go through the tokenizer that the IR is going to have.

    Raises:
        UnsupportedModelError: it encodes or decodes one of them otherwise.
    """
    check_tokenizer(model, [text for documents in splits.values() for text in documents.texts[:_CHECKED_DOCUMENTS]])


def _write(
    model: ModelSpec,
    data: DataSpec,
    splits: Mapping[str, Documents],
    dropped: int,
    out: Path,
    task: TaskData | None = None,
) -> PreparedData:
    tokenizer = load_tokenizer(model, load_config(model).get_text_config().vocab_size)
    of_task = data.train is None and task is not None
    packed = {name: pack(documents, tokenizer, data, name, fewer=of_task) for name, documents in splits.items()}
    sequences = {name: tokens for name, (tokens, _) in packed.items()}
    of_documents = {} if splits["test"].running else {"test.documents": packed["test"][1]}
    text = tokenizer.decode(sequences["test"].reshape(-1), skip_special_tokens=True)
    manifest = DataManifest(
        sequence_length=data.sequence_length,
        documents={name: len(documents.texts) for name, documents in splits.items()},
        sequences={name: len(tokens) for name, tokens in sequences.items()},
        examples={name: len(rows) for name, rows in task.rows.items()} if task else {},
        dropped_duplicates=dropped,
        test_words=len(text.split()),
    )
    with atomic_folder(out) as folder:
        write_tensors(sequences | of_documents, folder / "tokens.safetensors")
        write_text(json.dumps(splits["test"].texts, ensure_ascii=False, indent=0), folder / "test_documents.json")
        if task:
            write_tensors(examples(task, tokenizer, data.sequence_length), folder / "examples.safetensors")
            write_text(json.dumps(task.rows, ensure_ascii=False, indent=0), folder / "task_rows.json")
        write_record(manifest, folder / "data.json")
    return PreparedData(out)


def examples(task: TaskData, tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, NDArray[np.generic]]:
    """Tokens of the examples to tune on and to validate with, as PreparedData.examples reads them.

    A question that does not fit before its answer loses its beginning. Where answers are generated, the token that ends
    a text is part of them.

    Raises:
        DataError: an answer is longer than `longest` tokens.
    """
    from ovexport.tasks.asked import AskedModel

    encode = AskedModel(tokenizer).encode
    ending = [tokenizer.eos_token_id] if task.generates and tokenizer.eos_token_id is not None else []
    tensors: dict[str, NDArray[np.generic]] = {}
    for split in ("train", "validation"):
        tokens: list[int] = []
        ends, answers = [0], []
        for number, pair in enumerate(task.answered[split], 1):
            question, answer = encode(*pair)
            answer += ending
            if len(answer) >= longest:
                raise DataError(
                    f"task: {split} row {number}: its answer has {len(answer)} tokens, and "
                    f"data.sequence_length={longest} has to hold some of the question too; raise it"
                )
            tokens += [*question[-(longest - len(answer)) :], *answer]
            answers.append(len(tokens) - len(answer) - ends[-1])
            ends.append(len(tokens))
        tensors |= {
            f"{split}.tokens": np.array(tokens, dtype=np.int32),
            f"{split}.ends": np.array(ends[1:], dtype=np.int64),
            f"{split}.answers": np.array(answers, dtype=np.int64),
        }
    return tensors


def split_documents(spec: DataSpec) -> tuple[dict[str, Documents], int]:
    """The documents of each split and how many were dropped because another split holds the same text.

    Test takes precedence over validation, and validation over train, so what is measured is as it was asked for.

    Raises:
        DataError: a source can't be read, is empty, or holds nothing that another split does not hold.
    """
    assert spec.train is not None
    train = read_documents(spec.train)
    splits: dict[str, Documents] = {}
    rest = train.texts
    for name, source, fraction in (
        ("test", spec.test, spec.test_fraction),
        ("validation", spec.validation, spec.validation_fraction),
    ):
        if source is not None:
            splits[name] = read_documents(source)
            continue
        count = max(1, round(fraction * len(train.texts)))
        rest, taken = rest[:-count], rest[-count:]
        splits[name] = Documents(taken, train.running)
    splits["train"] = Documents(rest, train.running)

    texts = {name: splits[name].texts for name in ("test", "validation", "train")}
    kept, dropped = without_repeats(texts, str.strip, "data")
    return {name: Documents(kept[name], splits[name].running) for name in kept}, dropped


def read_documents(source: SourceSpec) -> Documents:
    """The documents of a source, empty ones left out.

    Raises:
        DataError: it is not there, can't be read, lacks the column or holds no text.
    """
    name = source.path or str(source.hub)
    running = source.path is not None and Path(source.path).suffix.lower() in PLAIN_TEXT
    rows = load_rows(source)
    if source.column not in rows.column_names and not running:
        raise DataError(f"{name}: no column {source.column!r}; it has {', '.join(rows.column_names)}; set column")
    texts = rows["text" if running else source.column]
    documents = _blocks(texts) if running else [text for text in texts if isinstance(text, str) and text.strip()]
    if not documents:
        raise DataError(f"{name}: holds no text; give a file or a column with some")
    return Documents(documents, running)


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, split: str, *, fewer: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens of the documents, one after the other, cut to (sequences, sequence_length) int32, and of each token the
    document it is of.

    Documents that stand alone begin as the tokenizer begins a text; where it adds nothing of its own, they end with the
    end-of-sequence token. Parts of a running text are joined by line ends.

    Args:
        fewer: be content with fewer sequences than the spec asks for, where there is no more text.

    Raises:
        DataError: there is too little text for the sequences asked for.
    """
    wanted = {
        "train": spec.train_sequences,
        "validation": spec.validation_sequences,
        "test": spec.test_sequences,
    }[split]
    needed = None if wanted is None else wanted * spec.sequence_length
    stream: list[int] = []
    ends: list[int] = []
    marked = bool(tokenizer("")["input_ids"])
    for text in documents.texts:
        if documents.running:
            stream += tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        else:
            stream += tokenizer(text, verbose=False)["input_ids"]
            stream += [] if marked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends.append(len(stream))
        if needed is not None and len(stream) >= needed:
            break
    available = len(stream) // spec.sequence_length
    if fewer and wanted is not None:
        wanted = max(1, min(wanted, available))
    if available < (wanted or 1):
        raise DataError(
            f"data.{split}: {len(stream):,} tokens in {len(documents.texts):,} documents, and "
            f"{needed or spec.sequence_length:,} are needed for {wanted or 1} sequences of {spec.sequence_length}; "
            f"give more text, or lower data.{split}_sequences or data.sequence_length"
        )
    count = wanted or available
    shape = (count, spec.sequence_length)
    tokens = np.asarray(stream[: count * spec.sequence_length], dtype=np.int32)
    of_document = np.searchsorted(ends, np.arange(tokens.size), side="right").astype(np.int32)
    return tokens.reshape(shape), of_document.reshape(shape)


def _blocks(lines: list[str]) -> list[str]:
    """Runs of lines between blank ones; each line, where none is blank."""
    if all(line.strip() for line in lines):
        return list(lines)
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]
