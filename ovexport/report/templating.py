"""Where the templates are, and how they are filled: what is text stays text."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def environment() -> Environment:
    """The package's templates; those of pages escape every value."""
    return Environment(
        loader=PackageLoader("ovexport.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
