"""Text for the search of runtime settings, on a device that has nothing but the IR: the packaged prompts."""

import numpy as np
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.openvino.genai import load_tokenizer
from ovexport.prompt_sets import packaged_prompts

_LENGTH = 128


def packaged_text(ir: IR, sequences: int) -> NDArray[np.int64]:
    """The packaged long prompts in the IR's own tokens, (at most `sequences`, 128).

    Raises:
        ArtifactError, UnsupportedModelError: the IR has no tokenizer, or openvino-genai can't load it.
    """
    tokenizer = load_tokenizer(ir.path)
    texts = packaged_prompts("long")
    tokens = np.concatenate([tokenizer.encode(text).input_ids.data.reshape(-1) for text in texts])
    count = min(sequences, len(tokens) // _LENGTH)
    rows: NDArray[np.int64] = tokens[: count * _LENGTH].reshape(count, _LENGTH).astype(np.int64)
    return rows
