"""Stage prepare: text to packed token sequences, and a task's rows to examples, for tuning, validation and test;
nothing stands in two of them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ovexport.artifacts import DataManifest, PreparedData
from ovexport.checking import Caution, Finding
from ovexport.data.languages import count_words
from ovexport.data.rows import load_lines, load_texts, without_repeats
from ovexport.errors import DataError, OvexportError, RecipeError
from ovexport.models.loading import load_config, load_tokenizer
from ovexport.openvino.tokenizer import check_tokenizer
from ovexport.recipe import DataSpec, ModelSpec, SourceSpec, TaskSpec
from ovexport.storage.files import atomic_folder, write_text
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import write_tensors
from ovexport.tasks import HarnessTask, hub_sources, read_task_rows

logger = logging.getLogger(__name__)

PLAIN_TEXT = (".txt", ".raw")
LEAST_SEQUENCES = {"train": 1, "validation": 1, "test": 4}
"""What each split needs at least, or all that the recipe asks for where that is less; fewer test sequences than these
make no interval."""
CHECKED_DOCUMENTS = 16
"""So many documents of a split show whether the IR's tokenizer is the model's."""


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


@dataclass(frozen=True, slots=True)
class Survey:
    """What the text holds, looked at before any work.

    Attributes:
        sequences: how many each split will have, where that is known.
        test_documents: the texts of the test split; None where they are not known.
        checked_documents: the texts that prepare lets go through the IR's tokenizer.
        findings: what stops the stage, and what it does otherwise than asked.
    """

    sequences: dict[str, int] = field(default_factory=dict)
    test_documents: list[str] | None = None
    checked_documents: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def survey(tokenizer: PreTrainedTokenizerBase, data: DataSpec, task: TaskSpec | None, positions: int | None) -> Survey:
    """Look at the text as prepare will read it, and tokenize as much of it as the sizes need.

    What is on the hub is not fetched for that; a text that is split with it is not looked at either.

    Args:
        positions: how many tokens the model can read; None where it has no limit.
    """
    findings: list[Finding] = []
    if positions is not None and data.sequence_length > positions:
        told = f"data.sequence_length={data.sequence_length}: the model reads {positions} tokens at most"
        findings.append(RecipeError(f"{told}; lower it to {positions}"))
    missing = missing_files(data, task)
    remote = {key: source.hub for key, source in _sources(data).items() if source.hub}
    task_here = task if task and task.files else None
    findings += missing
    findings += [Caution(f"{key}: {hub} is on the hub, and is read when the run starts") for key, hub in remote.items()]
    if task and not task_here:
        findings.append(Caution(f"task.name={task.name}: its rows are on the hub, and are read when the run starts"))
    if missing or remote or not (data.train or task_here):
        return Survey(findings=tuple(findings))
    try:
        splits, _, found = _read(data, task_here)
        if found:
            examples(found, tokenizer, data.sequence_length)
    except OvexportError as error:
        return Survey(findings=(*findings, error))
    notes = _notes(tokenizer, splits, generates=found is not None and found.generates)
    findings += [Caution(note) for note in notes]
    sequences: dict[str, int] = {}
    looked_at = data.model_copy(update={"train_sequences": data.train_sequences or 1})
    for split, documents in splits.items():
        try:
            stream, _ = _stream(documents, tokenizer, looked_at, split)
            count = _count(len(stream), len(documents.texts), looked_at, split, of_task=data.train is None)
        except DataError as error:
            findings.append(error)
            continue
        findings += [Caution(text) for text in _fewer(data, split, count)]
        if _wanted(data, split) is not None:
            sequences[split] = count
    return Survey(sequences, splits["test"].texts, _checked_documents(splits), tuple(findings))


def prepare(model: ModelSpec, data: DataSpec, out: Path, task: TaskSpec | None = None) -> PreparedData:
    """Read, split, tokenize and pack the text; the same with a task's examples, each of which stays by itself.

    Raises:
        DataError: a source can't be read, or there is too little text; a row is not of the task's layout.
        MissingDependencyError: a task needs lm-evaluation-harness.
        UnsupportedModelError: the tokenizer does not fit the model, or the IR's would encode the text otherwise.
    """
    splits, dropped, found = _read(data, task)
    _check_tokenizer(model, splits)
    return _write(model, data, splits, dropped, out, found)


def prepare_test(model: ModelSpec, source: SourceSpec, data: DataSpec, out: Path) -> PreparedData:
    """The test split alone, of all documents of its source.

    Raises:
        DataError, UnsupportedModelError: as prepare.
    """
    return _write(model, data, {"test": read_documents(source)}, 0, out)


def _read(data: DataSpec, task: TaskSpec | None) -> tuple[dict[str, Documents], int, TaskData | None]:
    """The documents of each split, how many were dropped as repeats, and the task's examples."""
    dropped = 0
    found = None
    if task is not None:
        rows, dropped = read_task_rows(task, data, {} if task.files else hub_sources(task.name))
        harness = HarnessTask(task, rows)
        answered = {split: list(harness.answered(some)) for split, some in rows.items()}
        found = TaskData(rows, answered, harness.generates)
    if data.train is not None:
        splits, repeated = split_documents(data)
        return splits, dropped + repeated, found
    assert found is not None, "a recipe has text or a task"
    texts = {split: [question + answer for question, answer in pairs] for split, pairs in found.answered.items()}
    return {split: Documents(some, running=False) for split, some in texts.items()}, dropped, found


def _sources(data: DataSpec) -> dict[str, SourceSpec]:
    """The sources that the recipe names, by their keys."""
    named = {f"data.{name}": getattr(data, name) for name in ("train", "validation", "test")}
    return {key: source for key, source in named.items() if source is not None}


def missing_files(data: DataSpec, task: TaskSpec | None) -> list[DataError]:
    """A problem for each file that the recipe names and that is not there."""
    paths = {f"{key}.path": source.path for key, source in _sources(data).items() if source.path}
    paths |= {f"task.{split}": path for split, path in task.files.items()} if task else {}
    return [
        DataError(f"{key}={path}: no such file; paths are looked for beside the recipe, then in the working directory")
        for key, path in paths.items()
        if not Path(path).is_file()
    ]


def _check_tokenizer(model: ModelSpec, splits: Mapping[str, Documents]) -> None:
    """Let the first documents of every split go through the tokenizer that the IR is going to have.

    Raises:
        UnsupportedModelError: it encodes or decodes one of them otherwise.
    """
    check_tokenizer(model, _checked_documents(splits))


def _checked_documents(splits: Mapping[str, Documents]) -> tuple[str, ...]:
    """The first documents of every split."""
    return tuple(text for documents in splits.values() for text in documents.texts[:CHECKED_DOCUMENTS])


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
    packed = {name: pack(documents, tokenizer, data, name, of_task=of_task) for name, documents in splits.items()}
    sequences = {name: tokens for name, (tokens, _) in packed.items()}
    for name, tokens in sequences.items():
        for said in _fewer(data, name, len(tokens)):
            logger.warning("  %s", said)
    of_documents = {} if splits["test"].running else {"test.documents": packed["test"][1]}
    text = tokenizer.decode(sequences["test"].reshape(-1), skip_special_tokens=True)
    words, no_words = count_words(text)
    notes = _notes(tokenizer, splits, generates=task is not None and task.generates)
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


def _notes(tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Documents], *, generates: bool) -> tuple[str, ...]:
    """What a tokenizer without an end-of-sequence token means for the sequences and the examples."""
    if tokenizer.eos_token_id is not None:
        return ()
    apart = [name for name, documents in splits.items() if not documents.running and len(documents.texts) > 1]
    notes = []
    if apart and not _marks(tokenizer):
        notes.append(
            f"the tokenizer has no end-of-sequence token: the documents of {', '.join(apart)} run together in the "
            "sequences, with nothing between them; set eos_token in tokenizer_config.json"
        )
    if generates:
        notes.append(
            "the tokenizer has no end-of-sequence token: the task's examples don't show where an answer ends; set "
            "eos_token in tokenizer_config.json"
        )
    return tuple(notes)


def _marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds tokens of its own to a text."""
    return bool(tokenizer("")["input_ids"])


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
    running = source.path is not None and Path(source.path).suffix.lower() in PLAIN_TEXT
    documents = _blocks(load_lines(Path(str(source.path)))) if running else load_texts(source)
    if not documents:
        raise DataError(f"{source.path or source.hub}: holds no text; give a file or a column with some")
    return Documents(documents, running)


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, split: str, *, of_task: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens of the documents, one after the other, cut to (sequences, sequence_length) int32, and of each token the
    document it is of.

    Documents that stand alone begin as the tokenizer begins a text; where it adds nothing of its own, they end with the
    end-of-sequence token. Parts of a running text are joined by line ends. Where there is less text than the spec asks
    for, validation and test get fewer sequences, down to LEAST_SEQUENCES.

    Args:
        of_task: the documents are a task's examples, of which one sequence is enough in every split.

    Raises:
        DataError: there is too little text.
    """
    stream, ends = _stream(documents, tokenizer, spec, split)
    count = _count(len(stream), len(documents.texts), spec, split, of_task=of_task)
    shape = (count, spec.sequence_length)
    tokens = np.asarray(stream[: count * spec.sequence_length], dtype=np.int32)
    of_document = np.searchsorted(ends, np.arange(tokens.size), side="right").astype(np.int32)
    return tokens.reshape(shape), of_document.reshape(shape)


def _wanted(spec: DataSpec, split: str) -> int | None:
    """How many sequences the spec asks for; None for all there are."""
    wanted: int | None = getattr(spec, f"{split}_sequences")
    return wanted


def _stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, split: str
) -> tuple[list[int], list[int]]:
    """As many tokens as the split needs, and where each document ends among them."""
    wanted = _wanted(spec, split)
    needed = None if wanted is None else wanted * spec.sequence_length
    stream: list[int] = []
    ends: list[int] = []
    marked = _marks(tokenizer)
    for text in documents.texts:
        if documents.running:
            stream += tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        else:
            stream += tokenizer(text, verbose=False)["input_ids"]
            stream += [] if marked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends.append(len(stream))
        if needed is not None and len(stream) >= needed:
            break
    return stream, ends


def _count(tokens: int, documents: int, spec: DataSpec, split: str, *, of_task: bool) -> int:
    """How many sequences so many tokens make.

    Raises:
        DataError: fewer than the split needs.
    """
    available, wanted = tokens // spec.sequence_length, _wanted(spec, split)
    shrinks = of_task or split != "train"
    least = 1 if of_task else LEAST_SEQUENCES[split]
    needed = min(least, wanted or least) if shrinks else wanted or least
    if available < needed:
        at_least = " at least" if shrinks else ""
        raise DataError(
            f"data.{split}: {tokens:,} tokens in {documents:,} documents, and {needed * spec.sequence_length:,} are "
            f"needed{at_least}, for {needed} sequences of {spec.sequence_length}; give more text, or lower "
            f"{'' if shrinks else f'data.{split}_sequences or '}data.sequence_length"
        )
    return available if wanted is None else min(wanted, available)


def _fewer(spec: DataSpec, split: str, count: int) -> list[str]:
    """What to say where a split has fewer sequences than were asked for."""
    wanted = _wanted(spec, split)
    if wanted is None or count >= wanted:
        return []
    return [f"data.{split}: its text makes {count} sequences of {spec.sequence_length}, not {wanted}; {count} are used"]


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
