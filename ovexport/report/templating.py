"""Where the templates are, and how they are filled: what is text stays text."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ovexport.numbers import number, number_with_interval, with_interval, written


def environment(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """The package's templates; those of pages escape every value, and all write figures as ovexport.numbers does.

    Args:
        finalize: what becomes of a value before it is filled in.
    """
    made = Environment(
        loader=PackageLoader("ovexport.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"written": written, "number": number}
    made.globals |= {"with_interval": with_interval, "number_with_interval": number_with_interval}
    return made
