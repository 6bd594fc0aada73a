"""Where the templates are, and how they are filled: what is text stays text."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def environment(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The package's templates; those of pages escape every value.

    Args:
        finalize: what becomes of a value before it is filled in.
    """
    return Environment(
        loader=PackageLoader("ovexport.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
