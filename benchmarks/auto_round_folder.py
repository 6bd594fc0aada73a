"""Quantize a model with AutoRound, calibrated with given token ids, and leave its folder of 4-bit codes.

PYTHON benchmarks/auto_round_folder.py MODEL TOKENS.npy OUT --group-size N [--symmetric] [--iterations N] [--seed N]

quality.py runs this script with an interpreter that has auto-round, whose requirements are not ours; nothing of
ovexport is imported here. Everything is AutoRound's default but what the options say, the text, and that it computes in
float32, so that nothing of the model is rounded to bfloat16. OUT gets the folder, and `auto_round.json`: the folder's
name, the seconds from loading the model to the saved folder, and versions.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ITERATIONS = 200
"""AutoRound's default: steps of each transformer block."""
MULTIPLE = 32
"""AutoRound leaves a layer in floating point unless both its sides are multiples of this."""
NOTE = "auto_round.json"
_BATCH_SIZE = 8


def main() -> None:
    """Quantize, save, and note how long that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("tokens", type=Path, metavar="TOKENS.npy", help="(sequences, length), whole numbers")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    note = quantized(options, np.load(options.tokens, allow_pickle=False).astype(np.int64))
    (options.out / NOTE).write_text(json.dumps(note), encoding="utf-8")


def quantized(options: argparse.Namespace, tokens: np.ndarray) -> dict[str, Any]:
    """The note on a folder that is saved."""
    import torch
    from auto_round import AutoRound

    batches = [torch.from_numpy(tokens[first : first + _BATCH_SIZE]) for first in range(0, len(tokens), _BATCH_SIZE)]
    started = time.perf_counter()
    quantizer = AutoRound(
        options.model,
        bits=4,
        sym=options.symmetric,
        group_size=options.group_size,
        iters=options.iterations,
        # With a mask, as AutoRound takes the tokenizer's padding token for padding otherwise, which may end documents.
        dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=_BATCH_SIZE,
        seed=options.seed,
        device_map="cpu",
        amp=False,
    )
    _, folder = quantizer.quantize_and_save(str(options.out), format="auto_round")
    return {
        "folder": Path(folder).name,
        "seconds": time.perf_counter() - started,
        "iterations": options.iterations,
        "sequences": len(tokens),
        "versions": {name: version(name) for name in ("auto-round", "transformers", "torch")},
    }


if __name__ == "__main__":
    main()
