"""Text for the search of runtime settings, on a device that has nothing but the IR: the packaged prompts."""

import json
from importlib.resources import files

import numpy as np
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.errors import UnsupportedModelError

_LENGTH = 128


def packaged_text(ir: IR, sequences: int) -> NDArray[np.int64]:
    """The packaged long prompts in the IR's own tokens, (at most `sequences`, 128).

    Raises:
        UnsupportedModelError: openvino-genai can't load the IR's tokenizer.
    """
    try:
        tokenizer = openvino_genai.Tokenizer(str(ir.path))
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load its tokenizer ({last})") from error
    lines = (files("ovexport") / "prompt_sets" / "long.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    tokens = np.concatenate([tokenizer.encode(text).input_ids.data.reshape(-1) for text in texts])
    count = min(sequences, len(tokens) // _LENGTH)
    found: NDArray[np.int64] = tokens[: count * _LENGTH].reshape(count, _LENGTH).astype(np.int64)
    return found
