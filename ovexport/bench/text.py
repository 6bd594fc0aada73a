"""Text for the search of runtime settings, on a device that has nothing but the IR: the packaged prompts."""

import numpy as np
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.errors import UnsupportedModelError, last_line
from ovexport.prompt_sets import packaged_prompts

_LENGTH = 128


def packaged_text(ir: IR, sequences: int) -> NDArray[np.int64]:
    """The packaged long prompts in the IR's own tokens, (at most `sequences`, 128).

    Raises:
        UnsupportedModelError: openvino-genai can't load the IR's tokenizer.
    """
    try:
        tokenizer = openvino_genai.Tokenizer(str(ir.path))
    except RuntimeError as error:
        raise UnsupportedModelError(f"{ir.path}: its tokenizer can't be loaded ({last_line(error)})") from error
    texts = packaged_prompts("long")
    tokens = np.concatenate([tokenizer.encode(text).input_ids.data.reshape(-1) for text in texts])
    count = min(sequences, len(tokens) // _LENGTH)
    found: NDArray[np.int64] = tokens[: count * _LENGTH].reshape(count, _LENGTH).astype(np.int64)
    return found
