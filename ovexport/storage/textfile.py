"""The one reader of text files: byte order marks, encodings and line ends."""

import codecs
import re
from pathlib import Path

from ovexport.storage.bounded import read_bytes

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # it begins with the mark of UTF-16, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_EXAMINED_BYTES = 1 << 16
_MOST_NULS = 0.01


class NotTextError(ValueError):
    """Bytes that are no text in the encoding that their byte order mark says, or in UTF-8 without one.

    Attributes:
        before: the text before the first wrong byte.
        line: the line of that byte.
        problem: what is wrong, and the cure.
    """

    def __init__(self, before: str, problem: str) -> None:
        self.before = before
        self.line = len(split_lines(f"{before}?"))
        self.problem = problem
        super().__init__(f"line {self.line}: {problem}")


def read_text(path: Path, largest: int | None = None) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; the mark is left out, line ends are kept.

    Args:
        largest: bytes of a file that is read; any number when None.

    Raises:
        OSError: the file can't be read.
        NotTextError: it is in another encoding, or no text; the line and the byte are named.
        ValueError: it is larger, or no regular file.
    """
    data = read_bytes(path, largest)
    mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    data = data[len(mark) :]
    wrong: UnicodeDecodeError | None = None
    problem = ""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        wrong, text = error, data[: error.start].decode(encoding)
        guess = _guess(data) if encoding == "utf-8" else ""
        problem = f"byte 0x{data[error.start]:02X} is not {encoding.upper()}{guess}; save the file as UTF-8"
    if _MOST_NULS * len(text) < text.count("\0"):
        text = text[: text.index("\0")]
        problem = "NUL characters, as in binary files and in UTF-16 without a byte order mark; save the file as UTF-8"
    if problem:
        raise NotTextError(text, problem) from wrong
    return text


def split_lines(text: str) -> list[str]:
    r"""The lines without their ends, which are "\n", "\r\n" or "\r"; str.splitlines also ends lines at form feeds,
    U+0085 and U+2028."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _guess(data: bytes) -> str:
    """What kind of encoding the bytes are probably in; nothing where most of them are UTF-8."""
    sample = data[:_EXAMINED_BYTES]
    decoded = sample.decode(errors="replace")
    wrong = decoded.count("\ufffd")
    if len(re.findall(r"[^\x00-\x7f]", decoded)) >= 2 * wrong:
        return ""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if 2 * sum(len(run) == 1 for run in runs) > len(runs):
        return " (Windows-1252 or Latin-1, probably)"
    return " (an encoding such as GB 18030, Shift-JIS or Windows-1251, probably)"
