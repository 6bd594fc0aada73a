"""Stage prepare: text to packed token sequences for tuning, validation and test, no document in two of them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ovexport.artifacts import DataManifest, PreparedData, atomic_folder, write_record, write_text
from ovexport.errors import DataError
from ovexport.model import load_config, load_tokenizer
from ovexport.recipe import DataSpec, ModelSpec, SourceSpec
from ovexport.tensorfile import write_tensors

PLAIN_TEXT = (".txt", ".raw")


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts, and whether they are parts of one running text (plain text) or stand alone (rows)."""

    texts: list[str]
    running: bool


def prepare(model: ModelSpec, data: DataSpec, out: Path) -> PreparedData:
    """Read, split, tokenize and pack the text.

    Raises:
        DataError: a source can't be read, or there is too little text.
        UnsupportedModelError: the tokenizer does not fit the model.
    """
    splits, dropped = split_documents(data)
    return _write(model, data, splits, dropped, out)


def prepare_test(model: ModelSpec, data: DataSpec, out: Path) -> PreparedData:
    """The test split alone, of all documents of its source.

    Raises:
        DataError, UnsupportedModelError: as prepare.
    """
    return _write(model, data, {"test": read_documents(data.test or data.train)}, 0, out)


def _write(model: ModelSpec, data: DataSpec, splits: Mapping[str, Documents], dropped: int, out: Path) -> PreparedData:
    tokenizer = load_tokenizer(model, load_config(model).get_text_config().vocab_size)
    sequences = {name: pack(documents, tokenizer, data, name) for name, documents in splits.items()}
    text = tokenizer.decode(sequences["test"].reshape(-1), skip_special_tokens=True)
    manifest = DataManifest(
        sequence_length=data.sequence_length,
        documents={name: len(documents.texts) for name, documents in splits.items()},
        sequences={name: len(tokens) for name, tokens in sequences.items()},
        dropped_duplicates=dropped,
        test_words=len(text.split()),
    )
    with atomic_folder(out) as folder:
        write_tensors(sequences, folder / "tokens.safetensors")
        write_text(json.dumps(splits["test"].texts, ensure_ascii=False, indent=0), folder / "test_documents.json")
        write_record(manifest, folder / "data.json")
    return PreparedData(out)


def split_documents(spec: DataSpec) -> tuple[dict[str, Documents], int]:
    """The documents of each split and how many were dropped because another split holds the same text.

    Test takes precedence over validation, and validation over train, so what is measured is as it was asked for.

    Raises:
        DataError: a source can't be read, is empty, or holds nothing that another split does not hold.
    """
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

    seen: set[bytes] = set()
    dropped = 0
    for name in ("test", "validation", "train"):
        digests = [hashlib.sha256(text.strip().encode()).digest() for text in splits[name].texts]
        kept = [text for text, digest in zip(splits[name].texts, digests, strict=True) if digest not in seen]
        dropped += len(digests) - len(kept)
        if not digests:
            raise DataError(f"data.{name}: no document is left for it; give more text, or a source of its own")
        if not kept:
            raise DataError(
                f"data.{name}: each of its {len(digests)} documents is in another split too; give other text"
            )
        seen.update(digests)
        splits[name] = Documents(kept, splits[name].running)
    return splits, dropped


def read_documents(source: SourceSpec) -> Documents:
    """The documents of a source, empty ones left out.

    Raises:
        DataError: it is not there, can't be read, lacks the column or holds no text.
    """
    name = source.path or str(source.hub)
    running = source.path is not None and Path(source.path).suffix.lower() in PLAIN_TEXT
    with _translated(name):
        rows = _load(source)
    if source.column not in rows.column_names and not running:
        raise DataError(f"{name}: no column {source.column!r}; it has {', '.join(rows.column_names)}; set column")
    texts = rows["text" if running else source.column]
    documents = _blocks(texts) if running else [text for text in texts if isinstance(text, str) and text.strip()]
    if not documents:
        raise DataError(f"{name}: holds no text; give a file or a column with some")
    return Documents(documents, running)


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, split: str) -> NDArray[np.int32]:
    """Tokens of the documents, one after the other, cut to (sequences, sequence_length) int32.

    Documents that stand alone begin as the tokenizer begins a text; where it adds nothing of its own, they end with the
    end-of-sequence token. Parts of a running text are joined by line ends.

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
    marked = bool(tokenizer("")["input_ids"])
    for text in documents.texts:
        if documents.running:
            stream += tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        else:
            stream += tokenizer(text, verbose=False)["input_ids"]
            stream += [] if marked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if needed is not None and len(stream) >= needed:
            break
    available = len(stream) // spec.sequence_length
    if available < (wanted or 1):
        raise DataError(
            f"data.{split}: {len(stream):,} tokens in {len(documents.texts):,} documents, and "
            f"{needed or spec.sequence_length:,} are needed for {wanted or 1} sequences of {spec.sequence_length}; "
            f"give more text, or lower data.{split}_sequences or data.sequence_length"
        )
    count = wanted or available
    return np.asarray(stream[: count * spec.sequence_length], dtype=np.int32).reshape(count, spec.sequence_length)


def _load(source: SourceSpec) -> datasets.Dataset:
    if source.hub is not None:
        return datasets.load_dataset(source.hub, source.config, split=source.split)
    path = Path(str(source.path))
    if not path.is_file():
        raise DataError(f"{path}: no such file; paths are looked for beside the recipe, then in the working directory")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: holds no text; give a file with some")
    builder = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(path.suffix.lower(), "text")
    return datasets.load_dataset(builder, data_files=str(path), split="train")


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


@contextmanager
def _translated(name: str) -> Iterator[None]:
    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"{name}: not to be had from the hub; check the name and the network, or give a file as path"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{name}: can't be read ({first})") from error
    finally:
        if progress:
            datasets.enable_progress_bars()
