"""Files that others wrote, read within limits: each limit has its place and its reason here.

A parser that recurses ends in a RecursionError or takes the process with it; one that follows references turns a
kilobyte into gigabytes. What is over a limit is no recipe, model or IR that anybody uses, and is refused by a
ValueError that says which limit it is.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.parsers import expat

from ovexport.wording import byte_size

DEEPEST = 64
"""Levels of lists, tables and elements: a recipe has 4, a config.json 6, an IR 8 and 5 more for a graph in a graph."""

LARGEST_RECIPE_BYTES = 1 << 18
"""A recipe with every default spelled out has 3 kB."""

MOST_DOTS = 1000
"""In a line of TOML: Python's reader takes a time that grows with the square of the length of a dotted key."""

LARGEST_CONFIG_BYTES = 16 << 20
"""A config.json, or an index of shards, which has 100 bytes for each tensor."""

LARGEST_CARD_BYTES = 1 << 20
"""The beginning of a model card, which holds its metadata; the rest is not read."""

LARGEST_NUMBER = 1 << 53
"""Whole numbers up to it are the same in every reader of JSON; no size of a model comes near."""

MOST_BITS = 1024
"""Of a whole number: one that is written in hexadecimal may be longer than Python can write in decimal."""

MOST_LAYERS = 4096
"""Of a model; the deepest in use have about 200. Building one takes time for each layer, before any weight is read."""

LARGEST_SIZE = 1 << 31
"""Of a model's vocabulary, width or context; the largest in use are below 2^24."""

MOST_UNPACKING = 100
"""Operations between the constants of a weight and what it is multiplied with; ours have 12. What is unpacked by more
is no weight."""

MOST_NESTED_GRAPHS = 8
"""Graphs inside each other: bodies of If, Loop and TensorIterator."""

MOST_DIMENSIONS = 8
"""Of a tensor; a weight of ours has 3 at most, and NumPy takes 64."""

LARGEST_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as its own library has it."""


def read_bytes(path: Path, largest: int | None = LARGEST_CONFIG_BYTES) -> bytes:
    """A regular file's content.

    Args:
        largest: bytes of a file that is read; any number when None.

    Raises:
        ValueError: it is larger, or a device or a pipe, which may have no end.
        OSError: it can't be read.
    """
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise ValueError("a device or a pipe, not a file")
        path.open("rb").close()  # the system's own words for a folder, or for what is not there
    with path.open("rb") as file:
        content = file.read(-1 if largest is None else largest + 1)
    if largest is not None:
        _require_size(len(content), largest)
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ValueError: it is none, too large or too deep, or has a number that Python does not read.
    """
    _require_size(len(text), LARGEST_RECIPE_BYTES)
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise _too_deep()
    return dict(_parsed(tomllib.loads, text))


def parse_json(text: str | bytes, *, largest: int = LARGEST_CONFIG_BYTES) -> Any:
    """A JSON document.

    Raises:
        ValueError: it is none, too large or too deep, or has a number that Python does not read.
    """
    _require_size(len(text), largest)
    return _parsed(json.loads, text)


def parse_yaml(text: str) -> Any:
    """A YAML document of plain values: strings, numbers, dates, lists and mappings.

    Raises:
        ValueError: it is none, too large or too deep, or refers to parts of itself.
    """
    import yaml

    _require_size(len(text), LARGEST_CARD_BYTES)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("refers to a part of itself (*name), which multiplies it")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _too_deep()
        return yaml.load(text, Loader=loader)  # a safe loader, whichever it is
    except (yaml.YAMLError, RecursionError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"no YAML of plain values ({type(error).__name__})") from error


def check_xml(path: Path) -> None:
    """Refuse a graph's file that is no XML, too deep, or declares a document type, whose entities can multiply it.

    Raises:
        ValueError: it is one of these.
        OSError: it can't be read.
    """
    depth = 0

    def begin(_name: str, _attributes: Mapping[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise _too_deep()

    def end(_name: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_: Any) -> None:
        raise ValueError("declares a document type, which no IR has")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.StartDoctypeDeclHandler = refuse
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        raise ValueError(f"no XML: {error}") from error


def numbers(values: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a parsed document with its path, such as "rope_scaling.factor"."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from numbers(value, name)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, values


def _parsed(parse: Callable[[Any], Any], text: str | bytes) -> Any:
    """What a parser that recurses reads, where it is not too deep."""
    try:
        values = parse(text)
    except RecursionError:
        raise _too_deep() from None
    _require_shape(values)
    return values


def _require_shape(values: Any) -> None:
    """Refuse values that are too deep, without recursion."""
    level = [values]
    for _ in range(DEEPEST + 1):
        if any(type(value) is int and value.bit_length() > MOST_BITS for value in level):
            raise ValueError(f"holds a whole number of more than {MOST_BITS} bits")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise _too_deep()


def _require_size(size: int, largest: int) -> None:
    if size > largest:
        raise ValueError(f"larger than the {byte_size(largest)} that are read")


def _too_deep() -> ValueError:
    return ValueError(f"more than {DEEPEST} levels deep")
