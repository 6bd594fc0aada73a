"""A name that begins with an underscore is its file's own: nothing else imports it, reads it or replaces it."""

import ast
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY

FILES = sorted(
    file for room in ("ovexport", "tests", "benchmarks", "models") for file in (REPOSITORY / room).rglob("*.py")
)
OF_LIBRARIES = {
    "_asdict",  # of a named tuple
    "_enabled",  # of torch.autocast
    "_encode_pair",  # of lm-eval's model, from which ours is derived
    "_exit",  # of os
    "_forward_pre_hooks",  # of torch's modules
    "_scale",  # of NNCF's decompressors
    "_yaml_loader",  # of lm-eval, whose public way reads 13,000 files
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in OF_LIBRARIES | {"_"}


def own_names(tree: ast.AST) -> set[str]:
    """Names and attributes that the file binds."""
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound.add(node.id if isinstance(node, ast.Name) else node.attr)
    return bound


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every private name that the file takes from elsewhere."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "attr" in node.func.attr:
            texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            parts = [part for text in texts[:1] for part in text.split(".")]
            yield from ((node.lineno, part) for part in parts if is_private(part))


def test_no_private_name_of_another_file_is_used() -> None:
    used = {file: list(private_names(ast.parse(file.read_text(encoding="utf-8")))) for file in FILES}
    assert {str(file.relative_to(REPOSITORY)): names for file, names in used.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from ovexport.strip import _rows",
        "from ovexport._strip import rows",
        "strip._rows()",
        'monkeypatch.setattr(strip, "_rows", None)',
        'monkeypatch.setattr("ovexport.strip._rows", None)',
        "def f(other): return other._rows",
    ],
)
def test_each_way_to_use_one_is_noticed(line: str) -> None:
    assert [name for _, name in private_names(ast.parse(line))][-1] in ("_rows", "_strip")


def test_what_a_file_binds_is_its_own() -> None:
    assert not list(private_names(ast.parse("class A:\n    def f(self, other):\n        self._x = other._x\n")))
