"""Rows of local files, value by value as they stand there: csv, JSON, JSON lines and parquet.

Rows are counted from 1, a csv file's header not among them; lines are those that an editor shows.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ovexport.storage.textfile import NotTextError, read_text, split_lines

Row = dict[str, Any]

_LONGEST_FIELD = 2**31 - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CSV_ERRORS = {
    "unexpected end of data": "a quote is opened and never closed",
    "',' expected after '\"'": "more text follows a closing quote; write a quote inside of a field twice",
}


def read_rows(path: Path, only: str | None = None) -> tuple[tuple[str, ...], list[Row]]:
    """The columns of a file with rows, and its rows; the suffix says which kind of file it is.

    Args:
        only: leave every other column out of the rows.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not of its kind; the row is named.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, only)
    rows = read_csv(path) if suffix == ".csv" else _read_json(path, lines=suffix == ".jsonl")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return columns, rows if only is None else [{name: row[name] for name in row if name == only} for row in rows]


def read_csv(path: Path) -> list[Row]:
    """Rows of a csv file with a header; every field is the text that stands there.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no such file; the row is named.
    """
    try:
        text = read_text(path)
    except NotTextError as error:
        with _long_fields():
            above = sum(1 for fields in csv.reader(io.StringIO(f"{error.before}?", newline="")) if fields)
        raise ValueError(f"{_csv_row(above - 1, error.line)}: {error.problem}") from error
    return _csv_rows(text)


def _csv_rows(text: str) -> list[Row]:
    header: list[str] | None = None
    rows: list[Row] = []
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        while True:
            line = reader.line_num + 1
            where = _csv_row(0 if header is None else len(rows) + 1, line)
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{where}: {_CSV_ERRORS.get(str(error), error)}") from error
            if fields is None:
                return rows
            if not fields:
                continue
            if header is None:
                header = _distinct(fields, where)
            elif len(fields) != len(header):
                raise ValueError(f"{where} has {len(fields)} fields, and the header {len(header)}")
            else:
                rows.append(dict(zip(header, fields, strict=True)))


def _csv_row(number: int, line: int) -> str:
    return f"row {number} (line {line})" if number > 0 else f"the header (line {line})"


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within, a csv field may have more than 131,072 characters."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path, *, lines: bool) -> list[Row]:
    """Objects of a JSON file: one on each line, or, where that is not asked for, one after the other or in a list,
    where a string stands for an object with the name "text"."""
    try:
        text = read_text(path)
    except NotTextError as error:
        number = sum(1 for line in split_lines(f"{error.before}?") if line.strip())
        where = f"row {number} (line {error.line})" if lines else f"line {error.line}"
        raise ValueError(f"{where}: {error.problem}") from error
    values = _json_lines(text) if lines else _json_values(text)
    may_be_cut = _SURROGATE.search(text) is not None
    return [_checked_row(value, where, may_be_cut=may_be_cut) for where, value in values]


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    number = 0
    for line, content in enumerate(split_lines(text), 1):
        if content.strip():
            number += 1
            where = f"row {number} (line {line})"
            try:
                value = decoder.decode(content)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {_json_problem(error)}") from error
            yield where, value


def _json_values(text: str) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    number, position = 0, _after_blanks(text, 0)
    while position < len(text):
        begin = position
        try:
            value, position = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            wrong = error.pos if isinstance(error, json.JSONDecodeError) else begin
            line = len(split_lines(f"{text[:wrong]}?"))
            where = f"line {line}" if text[begin] == "[" else f"row {number + 1} (line {line})"
            raise ValueError(f"{where}: {_json_problem(error)}") from error
        position = _after_blanks(text, position)
        whole = number == 0 and position == len(text)
        for item in value if whole and isinstance(value, list) else [value]:
            number += 1
            yield f"row {number}", {"text": item} if isinstance(item, str) else item


def _after_blanks(text: str, position: int) -> int:
    """The index of the first character from a position on that is not blank, as JSON knows blanks."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _json_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return str(error)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        _distinct([name for name, _ in pairs], "an object")
    return unique


def _checked_row(value: Any, where: str, *, may_be_cut: bool) -> Row:
    """The value, when it is an object whose strings are whole.

    Args:
        may_be_cut: the file has escapes that write a character in two halves; a half alone can't be encoded.
    """
    if not isinstance(value, dict):
        raise ValueError(f'{where} is {kind_of(value)}, and no object, such as {{"text": "..."}}')
    try:
        if may_be_cut:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where} holds half of a character, \\u{ord(half):04x}; its other half is missing") from error
    return value


def kind_of(value: Any) -> str:
    """What a value is called, such as "a list"."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _parquet_rows(path: Path, only: str | None) -> tuple[tuple[str, ...], list[Row]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as opened, ParquetFile(opened) as file:
            columns = tuple(_distinct(file.schema_arrow.names, "the schema"))
            rows: list[Row] = file.read(columns=None if only is None else [only]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"not a parquet file that can be read ({first})") from error
    return columns, rows


def _distinct(names: list[str], where: str) -> list[str]:
    """The names, when each that is not empty stands there once."""
    repeated = next((name for index, name in enumerate(names) if name and name in names[:index]), None)
    if repeated is not None:
        raise ValueError(f"{where} has the name {repeated!r} twice; rename one of them")
    return names
