"""What the models are asked to continue: a packaged set, a file, a data set's column, or the test text itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovexport.errors import DataError
from ovexport.prompt_sets import LANGUAGES, packaged_prompts
from ovexport.recipe import ROW_SUFFIXES, EvaluateSpec, SourceSpec, section

_LONG_CHARACTERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts with what WhoWhatBench's csv files say of them.

    Attributes:
        name: of the set or file.
        language: two letters, WhoWhatBench's "cn" included.
        length_type: "short" or "long".
    """

    name: str
    texts: tuple[str, ...]
    language: str
    length_type: str


def choose_prompts(test_documents: Sequence[str], spec: EvaluateSpec) -> Prompts:
    """The prompts that the recipe names; without a name the first words of the test documents that are at least twice
    as long, or the first halves of the documents, where none is.

    Raises:
        DataError: a file can't be read, is of the wrong type, or there are no prompts in it or in the text.
    """
    if spec.prompts is None:
        found = _beginnings(test_documents, spec)
    elif spec.prompts in LANGUAGES:
        found = _packaged(spec.prompts)
    else:
        found = _read(spec.prompts, spec)
    return replace(found, texts=found.texts[: spec.prompt_count])


def _packaged(name: str) -> Prompts:
    length_type = "long" if name == "long" else "short"
    return Prompts(name=name, texts=packaged_prompts(name), language=LANGUAGES[name], length_type=length_type)


def _read(name: str, spec: EvaluateSpec) -> Prompts:
    path = Path(name)
    kind = path.suffix.lower()
    if kind in ROW_SUFFIXES or not (path.is_file() or kind):
        texts = _column(name, spec)
    elif kind in ("", ".txt"):
        texts = _lines(path)
    else:
        raise DataError(f"evaluate.prompts={name}: neither .txt nor {', '.join(ROW_SUFFIXES)}; convert it")
    if not texts:
        raise DataError(f"evaluate.prompts={name}: holds no prompt; write one on each line")
    length_type = "long" if sum(map(len, texts)) / len(texts) >= _LONG_CHARACTERS else "short"
    return Prompts(name=name, texts=tuple(texts), language="en", length_type=length_type)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"evaluate.prompts={path}: can't be read ({error}); give a text file in UTF-8") from error
    if "\0" in "".join(lines):
        raise DataError(f"evaluate.prompts={path}: no text file; give one with a prompt on each line")
    return [line.strip() for line in lines if line.strip()]


def _column(name: str, spec: EvaluateSpec) -> list[str]:
    """A column of a file with rows, or of a hub data set."""
    from ovexport.rows import load_rows

    local = Path(name).suffix.lower() in ROW_SUFFIXES
    where = {"path": name} if local else {"hub": name, "split": spec.prompts_split}
    rows = load_rows(section(SourceSpec, **where))
    column = spec.prompts_column
    if column not in rows.column_names:
        raise DataError(
            f"evaluate.prompts={name}: no column {column!r}; it has {', '.join(rows.column_names)}; set "
            "evaluate.prompts_column"
        )
    return [text for text in rows[column] if isinstance(text, str) and text.strip()]


def _beginnings(test_documents: Sequence[str], spec: EvaluateSpec) -> Prompts:
    words = [text.split() for text in test_documents]
    enough = [text for text in words if len(text) >= 2 * spec.prompt_words]
    texts = [" ".join(text[: spec.prompt_words]) for text in enough]
    texts = texts or [" ".join(text[: len(text) // 2]) for text in words if len(text) > 1]
    if not texts:
        raise DataError(
            "data.test: holds single words; set evaluate.prompts to a file with a prompt on each line, or to "
            + ", ".join(f'"{name}"' for name in LANGUAGES)
        )
    return Prompts(name="test", texts=tuple(texts), language="en", length_type="short")
