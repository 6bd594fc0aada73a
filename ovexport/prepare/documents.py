"""Documents of text: read from their sources, and split into train, validation and test; none stands in two of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ovexport.data.rows import load_lines, load_texts, without_repeats
from ovexport.errors import DataError
from ovexport.recipe import DataSpec, SourceSpec

PLAIN_TEXT = (".txt", ".raw")
CHECKED_DOCUMENTS = 16
"""So many documents of a split show whether the IR's tokenizer is the model's."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts, and whether they are parts of one running text (plain text) or stand alone (rows)."""

    texts: list[str]
    running: bool


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


def checked_documents(splits: Mapping[str, Documents]) -> tuple[str, ...]:
    """The first documents of every split."""
    return tuple(text for documents in splits.values() for text in documents.texts[:CHECKED_DOCUMENTS])


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
