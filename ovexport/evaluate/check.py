"""What would stop the stage, found before any work: the encoder, the prompts, and answers that are too long."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from ovexport.checking import Finding, raised
from ovexport.errors import OvexportError, RecipeError
from ovexport.evaluate.encoder import check_encoder
from ovexport.evaluate.prompts import choose_prompts
from ovexport.recipe import EvaluateSpec


def check(
    spec: EvaluateSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    test_documents: Sequence[str] | None,
    positions: int | None,
) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        tokenizer: of the model; None where it can't be loaded.
        test_documents: None where they are not known yet.
        positions: how many tokens the model can read; None where it has no limit.
    """
    yield from raised(check_encoder, spec.encoder)
    if spec.prompts is None and test_documents is None:
        return
    try:
        prompts = choose_prompts(test_documents or (), spec)
    except OvexportError as error:
        yield error
        return
    if positions is None or tokenizer is None:
        return
    longest = max(_length(text, tokenizer, templated=spec.chat_template == "auto") for text in prompts.texts)
    room = positions + 1 - longest  # the last token is not read any more
    if spec.max_new_tokens > room:
        where = "evaluate.prompts" if spec.prompts else "evaluate.prompt_words"
        cure = f"lower it to {room}" if room > 0 else f"give shorter ones ({where})"
        yield RecipeError(
            f"evaluate.max_new_tokens={spec.max_new_tokens}: the longest prompt has {longest} tokens, and the model "
            f"reads {positions} at most; {cure}"
        )


def _length(text: str, tokenizer: PreTrainedTokenizerBase, *, templated: bool) -> int:
    """Tokens of a prompt as the models are asked it."""
    templated = templated and bool(tokenizer.chat_template)
    if templated:
        message = [{"role": "user", "content": text}]
        with suppress(Exception):  # a template is code of the model's; what it can't do is found where it is applied
            text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    return len(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
