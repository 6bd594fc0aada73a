"""What the models are asked to continue: a packaged set, a file, a data set's column, or the test text itself."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovexport.data.languages import language_of, unit_ends
from ovexport.errors import DataError
from ovexport.prompt_sets import LANGUAGES, packaged_prompts
from ovexport.recipe import ROW_SUFFIXES, EvaluateSpec, SourceSpec, section

_LONG_CHARACTERS = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts with what WhoWhatBench's csv files say of them.

    Attributes:
        name: of the set or file.
        language: as ovexport.data.languages.language_of writes it.
        length_type: "short" or "long".
    """

    name: str
    texts: tuple[str, ...]
    language: str
    length_type: str


def choose_prompts(test_documents: Sequence[str], spec: EvaluateSpec) -> Prompts:
    """The prompts that the recipe names, each once; without a name the beginnings of the test documents that are at
    least twice as long, or the first halves of the documents, where none is.

    Raises:
        DataError: a file can't be read, is of the wrong type, or there are no prompts in it or in the text.
    """
    if spec.prompts is None:
        prompts = _beginnings(test_documents, spec)
    elif spec.prompts in LANGUAGES:
        prompts = _packaged(spec.prompts)
    else:
        prompts = _read(spec.prompts, spec)
    distinct = tuple(dict.fromkeys(prompts.texts))
    if len(distinct) < len(prompts.texts):
        logger.info("prompts of %s: %d duplicates are left out", prompts.name, len(prompts.texts) - len(distinct))
    return replace(prompts, texts=distinct[: spec.prompt_count])


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
    return Prompts(name=name, texts=tuple(texts), language=language_of(texts), length_type=length_type)


def _lines(path: Path) -> list[str]:
    from ovexport.data.rows import load_lines

    return [line.strip() for line in load_lines(path) if line.strip()]


def _column(name: str, spec: EvaluateSpec) -> list[str]:
    """A column of a file with rows, or of a hub data set."""
    from ovexport.data.rows import load_texts

    local = Path(name).suffix.lower() in ROW_SUFFIXES
    where = {"path": name} if local else {"hub": name, "split": spec.prompts_split}
    return load_texts(section(SourceSpec, **where, column=spec.prompts_column), "evaluate.prompts_column")


def _beginnings(test_documents: Sequence[str], spec: EvaluateSpec) -> Prompts:
    """Prompts cut from documents behind a word, or a character where there are no blanks; line ends are kept."""
    documents = [(text, unit_ends(text)) for text in test_documents]
    enough = [(text, ends[spec.prompt_words - 1]) for text, ends in documents if len(ends) >= 2 * spec.prompt_words]
    halves = [(text, ends[len(ends) // 2 - 1]) for text, ends in documents if len(ends) > 1]
    texts = tuple(text[:end].strip() for text, end in enough or halves)
    if not texts:
        raise DataError(
            "data.test: holds single words; set evaluate.prompts to a file with a prompt on each line, or to "
            + ", ".join(f'"{name}"' for name in LANGUAGES)
        )
    return Prompts(name="test", texts=texts, language=language_of(texts), length_type="short")
