"""The door to openvino-genai: its tokenizer, its adapters, and what it says in words of ours."""

from pathlib import Path
from typing import Any

import openvino_genai

from ovexport.artifacts import IR
from ovexport.errors import ArtifactError, UnsupportedModelError, last_line

_FILES = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
_KNOWN = {
    "weak ptr": "it has no special token; add one, such as the token that ends a text",
    "openvino_tokenizer.xml was not provided": "it has no openvino_tokenizer.xml; convert the model again",
    "Detokenizer model has not been provided": "it has no openvino_detokenizer.xml; convert the model again",
    "must be non-negative": "generation_config.json has an id below 0 among the tokens that end a text; remove it",
    "json.exception": "a configuration is no valid JSON, or a value of it has the wrong type; mend it",
}
"""By what openvino-genai's message holds, what is wrong and what to do."""


def load_tokenizer(folder: Path, name: str | None = None) -> openvino_genai.Tokenizer:
    """The tokenizer of an IR.

    Args:
        name: for the message; the folder when None.

    Raises:
        ArtifactError: the folder lacks it.
        UnsupportedModelError: openvino-genai can't load it.
    """
    for file in _FILES:
        if not (folder / file).is_file():
            raise ArtifactError(f"{folder / file}: missing; convert the model again")
    try:
        return openvino_genai.Tokenizer(str(folder))
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{name or folder}: openvino-genai can't load its tokenizer: {told(error)}"
        ) from error


def end_tokens(generation_config: Path, name: str) -> set[int]:
    """The tokens that end a text, as openvino-genai reads them from a generation_config.json.

    Args:
        name: of the model, for the message.

    Raises:
        UnsupportedModelError: openvino-genai can't read the file.
    """
    try:
        return set(openvino_genai.GenerationConfig(str(generation_config)).stop_token_ids)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{name}: openvino-genai can't read its generation_config.json: {told(error)}"
        ) from error


def adapter_settings(ir: IR) -> dict[str, Any]:
    """What a pipeline of openvino-genai is loaded with beside the device's settings: the IR's adapter, if it has one.

    Its factors are folded into its tensors, so alpha is 1.
    """
    if ir.adapter is None:
        return {}
    adapter = openvino_genai.Adapter(str(ir.adapter_tensors))
    return {"adapters": openvino_genai.AdapterConfig(adapter, 1.0, openvino_genai.AdapterConfig.Mode.MODE_STATIC)}


def apply_template(tokenizer: openvino_genai.Tokenizer, message: str, name: str) -> str:
    """The chat template around the one message of a user, with the generation prompt behind it.

    Args:
        name: of the IR, for the message.

    Raises:
        UnsupportedModelError: openvino-genai can't apply the template.
    """
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": message}], True))
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{name}: openvino-genai can't apply its chat template ({_reason_of_template(error)}); "
            'set evaluate.chat_template = "off", or simplify the template'
        ) from error


def told(error: BaseException) -> str:
    """What openvino-genai's error means and its cure where that is known, else its last line."""
    return next((told for part, told in _KNOWN.items() if part in str(error)), last_line(error))


def _reason_of_template(error: BaseException) -> str:
    """What the template engine says, without the excerpts of the template that follow."""
    text = str(error).rpartition("Minja's error:")[2].strip()
    return text.splitlines()[0] if text else type(error).__name__
