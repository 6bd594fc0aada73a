"""What would stop the stage, found before any work: the device, and lengths beyond the model or the text."""

from collections.abc import Iterator

from ovexport.checking import Finding, raised
from ovexport.errors import DataError, RecipeError
from ovexport.openvino.runtime import check_device
from ovexport.recipe import BenchSpec


def check(spec: BenchSpec, prompt_tokens: int | None, positions: int | None) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        prompt_tokens: how many tokens the test text has; None where that is not known yet.
        positions: how many tokens the model can read; None where it has no limit.
    """
    yield from raised(check_device, spec.device)
    prompt = max(spec.prompt_tokens)
    if prompt_tokens is not None and prompt > prompt_tokens:
        yield DataError(f"bench.prompt_tokens={prompt}: the test text has {prompt_tokens} tokens; lower it")
    yield from raised(check_lengths, spec, positions)


def check_lengths(spec: BenchSpec, positions: int | None) -> None:
    """Refuse prompts and answers that are longer than what a model can read.

    Raises:
        RecipeError: they are.
    """
    prompt, output = max(spec.prompt_tokens), max(spec.output_tokens)
    if positions is None or prompt + output - 1 <= positions:  # the last token is not read any more
        return
    room = positions + 1 - output
    cure = f"lower bench.prompt_tokens to {room}" if room > 0 else f"lower bench.output_tokens below {positions}"
    lengths = f"bench.prompt_tokens={prompt}, bench.output_tokens={output}"
    raise RecipeError(f"{lengths}: the model reads {positions} tokens at most; {cure}")
