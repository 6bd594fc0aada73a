"""The table of every recipe key in pipelines/README.md, from the Specs: their fields, and what their docstrings say.

python pipelines/recipe_keys.py            write the table
python pipelines/recipe_keys.py --check    exit 1 if the table is not what the Specs say
"""

import argparse
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ovexport.recipe import Recipe, Spec

MANUAL = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: recipe keys -->\n", "<!-- end of table: recipe keys -->"
ROWS = "| key | type | default | what it means |\n|---|---|---|---|"
LARGEST = 1_000_000_000
"""The limit that every integer has; the table does not repeat it."""


def table() -> str:
    """A heading, the Spec's own words and a table for each section, in the order of the recipe."""
    return "\n\n".join(_section(titles, spec) for spec, titles in _sections().items()) + "\n\n" + _gates()


def _sections() -> dict[type[Spec], list[str]]:
    """Each Spec with the headers that it has in TOML: one, or several for a Spec that is used more than once."""
    sections: dict[type[Spec], list[str]] = {}

    def visit(owner: type[Spec], prefix: str) -> None:
        for name, field in owner.model_fields.items():
            if spec := _nested(field):
                header = f"{prefix}{name}"
                title = f"[[{header}]]" if "tuple" in str(field.annotation) else f"[{header}]"
                sections.setdefault(spec, []).append(title)
                if len(sections[spec]) == 1:
                    visit(spec, f"{header}.")

    visit(Recipe, "")
    return sections


def _nested(field: FieldInfo) -> type[Spec] | None:
    """The Spec that a field holds, directly, as an option or as an entry of a list."""
    waiting = [field.annotation]
    while waiting:
        annotation = waiting.pop()
        if inspect.isclass(annotation) and issubclass(annotation, Spec):
            return annotation
        waiting.extend(get_args(annotation))
    return None


def _section(titles: list[str], spec: type[Spec]) -> str:
    introduction, meanings = described(spec)
    properties = spec.model_json_schema()["properties"]
    lines = [f"### {', '.join(f'`{title}`' for title in titles)}", "", introduction, "", ROWS]
    for name, field in spec.model_fields.items():
        shown = "section" if _nested(field) else _type(properties[name])
        lines.append(_row(name, shown, _default(field), meanings[name]))
    return "\n".join(lines)


def _gates() -> str:
    """The one section whose keys are names of figures."""
    meaning = described(Recipe)[1]["gates"]
    return "\n".join(["### `[gates]`", "", ROWS, _row("FIGURE", "condition", "not set", meaning)])


def _row(name: str, shown: str, default: str, meaning: str) -> str:
    cells = (f"`{name}`", shown, default, meaning[:1].upper() + meaning[1:])
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def described(spec: type[Spec]) -> tuple[str, dict[str, str]]:
    """What stands before "Attributes:" in a Spec's docstring, and the text of each attribute.

    Raises:
        ValueError: a key of a section has no text, or a text has no key.
    """
    introduction, _, attributes = inspect.cleandoc(spec.__doc__ or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    ([a-z_][a-z0-9_, ]*): (.+(?:\n     .+)*)", attributes, re.MULTILINE)
    meanings = {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    keys = {"gates"} if spec is Recipe else set(spec.model_fields)
    if keys != set(meanings):
        raise ValueError(f"{spec.__name__}: keys and lines under Attributes differ: {sorted(keys ^ set(meanings))}")
    return "\n\n".join(" ".join(part.split()) for part in introduction.split("\n\n")), meanings


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    return "not set" if default is None else "–" if isinstance(default, Spec) else f"`{json.dumps(default)}`"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    name = schema["type"]
    if name == "array":
        return f"list: {_type(schema['items'])}"
    return " ".join([name, *_limits(schema)])


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    """The limits of a number, such as "≥ 1" for an integer above 0."""
    if schema["type"] == "integer" and schema.get("exclusiveMinimum") == 0:
        schema = schema | {"minimum": 1, "exclusiveMinimum": -math.inf}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    for name, sign in signs.items():
        if abs(schema.get(name, math.inf)) < LARGEST:
            yield f"{sign} {schema[name]:g}"


def filled(text: str) -> str:
    """The manual with the table between its two marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{MANUAL.name}: the marks of the table of recipe keys are missing")
    return f"{head}{begin}\n{table()}\n\n{end}{tail}"


def main() -> None:
    """Write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is stale")
    options = parser.parse_args()
    text = MANUAL.read_text(encoding="utf-8")
    if not options.check:
        MANUAL.write_text(filled(text), encoding="utf-8")
    elif filled(text) != text:
        sys.exit(f"pipelines/{MANUAL.name}: the table of recipe keys is stale; run pipelines/recipe_keys.py")


if __name__ == "__main__":
    main()
