"""Limits on what others wrote: depth, size and numbers of TOML, JSON, YAML and XML, and what has no end."""

import os
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from ovexport import recipe
from ovexport.artifacts import StageRecord
from ovexport.errors import ArtifactError, OvexportError, RecipeError
from ovexport.openvino.graph import describe, read_xml
from ovexport.storage.bounded import parse_json, parse_toml, parse_yaml, read_bytes
from ovexport.storage.records import read_json_lines, read_record

DEEP_TOML = {
    "lists": "a = " + "[" * 5000 + "]" * 5000,
    "tables": "a = " + "{a = " * 200 + "1" + "}" * 200,
    "a dotted key": ".".join("a" * 500) + " = 1",
    "a long dotted key": ".".join("a" * 60_000) + " = 1",
    "a table's name": "[" + ".".join("a" * 500) + "]",
    "a long number": "a = " + "9" * 6000,
    "a hexadecimal number": "a = 0x" + "f" * 6000,
    "a long text": 'a = "' + "x" * 2_000_000 + '"',
}


@pytest.mark.parametrize("text", DEEP_TOML.values(), ids=DEEP_TOML)
def test_a_recipe_beyond_the_limits_is_one_short_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="not TOML") as caught:
        recipe.load(path)
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match=r"deep|number|digits|larger"):
        parse_toml(text)


@pytest.mark.parametrize("value", ["9" * 6000, "0x" + "f" * 6000, "[" * 5000, '"' + "y" * 100_000 + '"'])
def test_an_override_beyond_the_limits_is_one_short_line(value: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("")
    with pytest.raises(RecipeError, match=r"tune\.steps=") as caught:
        recipe.load(path, [f"tune.steps={value}"])
    assert len(str(caught.value)) < 1000
    with pytest.raises(RecipeError, match="--set"):
        recipe.load(path, [".".join("a" * 5000) + "=1"])


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, '{"a":' * 5000, "[" * 100 + "]" * 100, "9" * 6000, '{"a": ' + "9" * 6000 + "}", "\x00", "nan x"],
)
def test_json_beyond_the_limits_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"record\.json"):
        read_record(path, StageRecord)
    path.write_text(f'{text}\n{{"step": 1}}\n')
    assert read_json_lines(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: [*a, *a]",
        "a: &a [*a]",
        "[" * 5000,
        "a: " + "9" * 6000,
        "a: 2020-13-45",
        "a: !!python/object/apply:os.system ['true']",
        "? [a]\n: b",
        "a: 2001-01-01 00:00:00 +99:99",
        "---\n---\n",
        "{: [",
        "\x00",
        "a: '" + "x" * 2_000_000 + "'",
    ],
    ids=lambda text: text[:20],
)
def test_yaml_is_plain_values_without_references(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_yaml(text)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin"])
def test_what_may_have_no_end_is_not_read(path: str) -> None:
    with pytest.raises(ValueError, match="a device or a pipe"):
        read_bytes(Path(path))
    with pytest.raises(RecipeError, match="a device or a pipe"):
        recipe.load(Path(path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="a device or a pipe"):
        recipe.load(tmp_path / "recipe.toml")


ENTITIES = (
    '<!DOCTYPE l [<!ENTITY b0 "aaaaaaaaaa">'
    + "".join(f'<!ENTITY b{level} "{f"&b{level - 1};" * 10}">' for level in range(1, 10))
    + "]><net>&b9;</net>"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<net>" * 100_000, "64 levels deep"),
        ("<net>" * 100 + "</net>" * 100, "64 levels deep"),
        (ENTITIES, "document type"),
        ("<net", "no XML"),
        ("", "no XML"),
    ],
    ids=["open", "deep", "entities", "cut", "empty"],
)
def test_a_graphs_file_beyond_the_limits_is_refused_before_openvino_reads_it(
    text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "openvino_model.xml"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said):
        read_xml(path)


def test_a_weight_that_is_unpacked_by_too_many_operations_is_refused_at_once() -> None:
    """Each operation reads the former one twice: written out, 2^60 operations."""
    node = opset13.constant(np.array([4], np.int64))
    for _ in range(60):
        node = opset13.minimum(node, node)
    table = opset13.reshape(opset13.constant(np.ones(4, np.float32)), node, special_zero=False)
    with pytest.raises(ArtifactError, match="unpacked by more than 100 operations"):
        describe(table)
    deep = opset13.constant(np.ones(4, np.float32))
    for _ in range(3000):
        deep = opset13.convert(deep, ov.Type.f32)
    with pytest.raises(ArtifactError, match="unpacked by more than 100 operations"):
        describe(deep)


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    from ovexport.foreign import translated

    with pytest.raises(OvexportError, match="longer than the file system takes"), translated():
        read_bytes(tmp_path / ("n" * 300))
