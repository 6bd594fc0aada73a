"""What the models are asked to continue."""

from collections.abc import Sequence
from pathlib import Path

from ovexport.errors import DataError
from ovexport.recipe import EvaluateSpec


def choose_prompts(test_documents: Sequence[str], spec: EvaluateSpec) -> tuple[str, ...]:
    """The lines of the prompt file, or the first words of the test documents that are at least twice as long; the first
    halves of the documents, where none is.

    Raises:
        DataError: the file can't be read, or there are no prompts in it or in the text.
    """
    if spec.prompts is not None:
        try:
            lines = Path(spec.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"evaluate.prompts={spec.prompts}: can't be read ({error})") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise DataError(f"evaluate.prompts={spec.prompts}: holds no prompt; write one on each line")
    else:
        words = [text.split() for text in test_documents]
        enough = [text for text in words if len(text) >= 2 * spec.prompt_words]
        prompts = [" ".join(text[: spec.prompt_words]) for text in enough]
        prompts = prompts or [" ".join(text[: len(text) // 2]) for text in words if len(text) > 1]
    if not prompts:
        raise DataError("data.test: holds single words; give evaluate.prompts, a file with a prompt on each line")
    return tuple(prompts[: spec.prompt_count])
