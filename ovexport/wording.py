"""How values are put into words: sizes with a unit that fits, and text of files and folders made harmless.

A name can hold what a terminal or a reader of Markdown obeys: escape sequences that paint over a verdict, line ends
that add a line, tags that run. Everything that is shown passes one of the functions here.
"""

import re
import unicodedata

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_OBEYED = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
"""Characters that turn the direction of text, so that it reads otherwise than it is, and one that is not seen."""
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def byte_size(count: float) -> str:
    """A number of bytes with three significant digits and the decimal unit that fits: "512 B", "1.52 MB", "34.4 GB"."""
    value, unit = float(count), 0
    while unit < len(_UNITS) - 1 and abs(value) >= 999.5:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or abs(value) >= 99.95 else f"{value:.3g} {_UNITS[unit]}"


def printable(text: str) -> str:
    r"""The text on one line, with what a terminal would obey written as Python writes it: `\x1b`, `\n`, `\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written(character) for character in text)


def in_json(document: str) -> str:
    r"""A JSON document with what a terminal would obey written as JSON writes it: `\u009b`, `\u202e`."""
    return "".join(f"\\u{ord(character):04x}" if _obeyed(character) else character for character in document)


def inert_markdown(text: str) -> str:
    """Text that stays on its line of a Markdown document and adds no tag, link, image or column to it."""
    return _TAG.sub("&lt;", printable(text)).replace("](", "]\\(").replace("|", "\\|")


def model_named(model_id: str, revision: str | None, adapter: str | None) -> str:
    """A model as a message names it: with its revision, and with the adapter that was merged with it."""
    named = f"{model_id} at {revision}" if revision else model_id
    return f"{named} with the adapter {adapter}" if adapter else named


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text that is longer than a line has room for."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _obeyed(character: str) -> bool:
    return unicodedata.category(character) in _OBEYED or character in _DIRECTION


def _written(character: str) -> str:
    if not _obeyed(character):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
