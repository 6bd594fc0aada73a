"""Where the templates are, and how they are filled: what is text stays text."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ovexport.numbers import number, number_with_interval, with_interval, written


def environment() -> Environment:
    """The package's templates; those of pages escape every value, and all write figures as ovexport.numbers does."""
    made = Environment(
        loader=PackageLoader("ovexport.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"written": written, "number": number}
    made.globals |= {"with_interval": with_interval, "number_with_interval": number_with_interval}
    return made
