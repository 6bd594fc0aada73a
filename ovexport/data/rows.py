"""Texts and rows that a recipe names: of a file, or of a hub data set, whose library's errors are translated here."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ovexport.data.rowfile import Row, kind_of, read_rows
from ovexport.errors import DataError, OvexportError
from ovexport.foreign import exhausted, said
from ovexport.recipe import SourceSpec
from ovexport.storage.textfile import read_text, split_lines

Item = TypeVar("Item")
Found = TypeVar("Found")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows, and the columns that at least one of them has."""

    columns: tuple[str, ...]
    records: Iterable[Row]


def load_rows(source: SourceSpec, only: str | None = None) -> Rows:
    """The rows of a source.

    Args:
        only: leave every other column out of them.

    Raises:
        DataError: it is not there, can't be read or is empty; the row is named.
    """
    if source.hub is not None:
        return _hub_rows(source, only)
    columns, rows = _of_file(Path(str(source.path)), lambda path: read_rows(path, only))
    if not rows:
        raise DataError(f"{source.path}: holds no rows; give a file with some")
    return Rows(columns, rows)


def load_texts(source: SourceSpec, setting: str = "column") -> list[str]:
    """The texts of a source's column; empty ones are left out.

    Args:
        setting: what names the column, for messages.

    Raises:
        DataError: as load_rows; there is no such column, or a value in it is no text.
    """
    origin, column = source.path or str(source.hub), source.column
    rows = load_rows(source, column)
    if column not in rows.columns:
        raise DataError(f"{origin}: no column {column!r}; it has {', '.join(rows.columns)}; set {setting}")
    texts = []
    number = 0
    for number, row in enumerate(rows.records, 1):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{origin}: row {number}: {column} is {kind_of(text)}, not text; convert it, or name another column"
            )
        if text and text.strip():
            texts.append(text)
    if len(texts) < number:
        logger.info("%s: %d of %d rows hold no text and are left out", origin, number - len(texts), number)
    return texts


def load_lines(path: Path) -> list[str]:
    """The lines of a plain text file.

    Raises:
        DataError: it is not there, can't be read or is empty; the line is named.
    """
    return _of_file(path, lambda file: split_lines(read_text(file)))


def without_repeats(
    splits: Mapping[str, Sequence[Item]], key: Callable[[Item], str], what: str
) -> tuple[dict[str, list[Item]], int]:
    """The splits without what stands in an earlier one of them, and how much was left out.

    Args:
        splits: in order of precedence.
        key: what makes two items the same.
        what: of what there are splits, for messages, such as "data".

    Raises:
        DataError: nothing is left of a split.
    """
    seen: set[bytes] = set()
    kept: dict[str, list[Item]] = {}
    for name, items in splits.items():
        digests = [hashlib.sha256(key(item).encode()).digest() for item in items]
        kept[name] = [item for item, digest in zip(items, digests, strict=True) if digest not in seen]
        if not items:
            raise DataError(f"{what}.{name}: nothing is left for it; give more, or a source of its own")
        if not kept[name]:
            raise DataError(f"{what}.{name}: each of its {len(items)} entries is in another split too; give others")
        seen.update(digests)
    return kept, sum(map(len, splits.values())) - sum(map(len, kept.values()))


def _of_file(path: Path, read: Callable[[Path], Found]) -> Found:
    try:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; paths are looked for beside the recipe, then in the working directory"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path}: holds no text; give a file with some")
        return read(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); give another file") from error
    except ValueError as error:
        raise DataError(f"{path}: can't be read: {error}") from error


def _hub_rows(source: SourceSpec, only: str | None) -> Rows:
    import datasets

    with _translated(str(source.hub)):
        table = datasets.load_dataset(source.hub, source.config, split=source.split)
    columns = tuple(table.column_names)
    return Rows(columns, table.select_columns([only]) if only in columns else table)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    import datasets

    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"{name}: could not be downloaded from the Hugging Face hub; check the name and the network, or give a "
            "file as path"
        ) from error
    except OvexportError:
        raise
    except Exception as error:  # the readers of csv, JSON and parquet raise many kinds
        raise exhausted(error, name) or DataError(f"{name}: can't be read ({said(error)})") from error
    finally:
        if progress:
            datasets.enable_progress_bars()
