"""Rows of a file or a hub data set; errors of the datasets library are translated here, once."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import datasets

from ovexport.errors import DataError, OvexportError
from ovexport.foreign import exhausted, said
from ovexport.recipe import SourceSpec

Item = TypeVar("Item")

_BUILDERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def load_rows(source: SourceSpec) -> datasets.Dataset:
    """The rows of a source; lines, as the column `text`, of plain text.

    Raises:
        DataError: it is not there, can't be read or is empty.
    """
    with _translated(source.path or str(source.hub)):
        if source.hub is not None:
            return datasets.load_dataset(source.hub, source.config, split=source.split)
        path = Path(str(source.path))
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; paths are looked for beside the recipe, then in the working directory"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path}: holds no text; give a file with some")
        builder = _BUILDERS.get(path.suffix.lower(), "text")
        return datasets.load_dataset(builder, data_files=str(path), split="train")


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
    except OvexportError:
        raise
    except Exception as error:  # the readers of csv, JSON and parquet raise many kinds
        raise exhausted(error, name) or DataError(f"{name}: can't be read ({said(error)})") from error
    finally:
        if progress:
            datasets.enable_progress_bars()
