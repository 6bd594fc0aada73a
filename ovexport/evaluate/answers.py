"""Generating answers, under settings where nothing but the weights is approximate."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import openvino_genai

from ovexport.artifacts import IR
from ovexport.errors import ArtifactError, DataError, UnsupportedModelError
from ovexport.evaluate.similarity import Answers
from ovexport.openvino.genai import adapter_settings, apply_template, load_tokenizer, told
from ovexport.openvino.runtime import ACCURATE
from ovexport.progress import Listener, Progress

_SETTINGS: Mapping[str, Any] = {"ATTENTION_BACKEND": "SDPA", **ACCURATE}
RUNTIME: Mapping[str, str] = {name: str(value) for name, value in _SETTINGS.items()}
"""What answers are generated under."""


class PromptTokenizer:
    """The tokenizer of an IR, with its chat template; `template` is None where there is none.

    Raises:
        ArtifactError, UnsupportedModelError: the IR has none, or openvino-genai can't load it.
    """

    def __init__(self, ir: IR) -> None:
        self._tokenizer, self._name = load_tokenizer(ir.path), str(ir.path)
        self.template = str(self._tokenizer.chat_template) or None

    def check_template(self) -> None:
        """Apply the chat template once.

        Raises:
            UnsupportedModelError: openvino-genai can't.
        """
        apply_template(self._tokenizer, "Hello", self._name)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, special tokens included."""
        return tuple(int(token) for token in self._tokenizer.encode(text).input_ids.data.reshape(-1))


def generate(
    name: str, ir: IR, prompts: Sequence[str], *, templated: bool, max_new_tokens: int, listener: Listener
) -> Answers:
    """Greedy answers, one prompt at a time.

    What generation_config.json says of sampling, penalties and lengths is left aside, but for the tokens that end a
    text.

    Args:
        name: of the model, for messages.
        templated: whether each prompt is wrapped in the tokenizer's chat template, as the one message of a user with
            the generation prompt behind it.

    Raises:
        UnsupportedModelError: openvino-genai can't load the IR, or apply its chat template.
        DataError: there is no answer to any prompt.
    """
    try:
        pipeline = openvino_genai.LLMPipeline(str(ir.path), "CPU", **_SETTINGS, **adapter_settings(ir))
    except RuntimeError as error:
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load it ({told(error)})") from error
    tokenizer, config = pipeline.get_tokenizer(), _greedy(pipeline.get_generation_config(), max_new_tokens)
    texts, generated = [], []
    for index, prompt in enumerate(prompts):
        wrapped = apply_template(tokenizer, prompt, name) if templated else prompt
        inputs = tokenizer.encode(wrapped, add_special_tokens=not templated)
        try:
            tokens = [int(token) for token in pipeline.generate(inputs, config).tokens[0]]
        except RuntimeError as error:
            raise UnsupportedModelError(f"{ir.path}: openvino-genai can't answer with it ({told(error)})") from error
        generated.append(tuple(tokens))
        texts.append(str(tokenizer.decode(np.array([tokens], dtype=np.int64))[0]) if tokens else "")
        listener(Progress(task=f"answers of {name}", done=index + 1, total=len(prompts)))
    if not any(texts):
        raise DataError(
            f"{name}: generated nothing for any of the {len(texts)} prompts, whose likeliest continuation is the end "
            "of the text; give other prompts, or another chat_template"
        )
    encoded = tuple(tuple(int(token) for token in tokenizer.encode(text).input_ids.data.reshape(-1)) for text in texts)
    return Answers(texts=tuple(texts), generated=tuple(generated), encoded=encoded)


def _greedy(own: openvino_genai.GenerationConfig, max_new_tokens: int) -> openvino_genai.GenerationConfig:
    """Greedy generation that ends at the tokens that the model's own configuration names."""
    config = openvino_genai.GenerationConfig()
    config.eos_token_id = own.eos_token_id
    config.stop_token_ids = own.stop_token_ids
    config.max_new_tokens = max_new_tokens
    config.do_sample = False
    return config


def common_template(tokenizers: Mapping[str, PromptTokenizer], wanted: Literal["auto", "off"]) -> str | None:
    """The chat template of every model; None where it is not wanted or one of them has none.

    Raises:
        ArtifactError: they differ.
        UnsupportedModelError: openvino-genai can't apply it.
    """
    templates = {name: tokenizer.template for name, tokenizer in tokenizers.items()}
    if wanted == "off" or None in templates.values():
        return None
    (first, template), *others = templates.items()
    tokenizers[first].check_template()
    for name, other in others:
        if other != template:
            raise ArtifactError(
                f"{name}: its chat template is not that of {first}, and the two would be asked different questions; "
                'give both the same, or set chat_template to "off"'
            )
    return template


def prompt_tokens(tokenizers: Mapping[str, PromptTokenizer], prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """The prompts' tokens, which every model's tokenizer agrees on.

    Raises:
        ArtifactError: one does not.
    """
    (first, tokenizer), *others = tokenizers.items()
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    for name, other in others:
        for index, prompt in enumerate(prompts):
            if other.encode(prompt) != tokens[index]:
                raise ArtifactError(
                    f"{name}: its tokenizer encodes prompt {index + 1} otherwise than that of {first}; compare a model "
                    "with the one that it was made from"
                )
    return tokens
