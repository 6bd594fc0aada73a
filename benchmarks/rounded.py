"""The recipe's model rounded by ovexport alone: one format for all layers, no tuning, nothing before the rounding."""

import shutil
from pathlib import Path
from typing import Literal

from ovexport.artifacts import IR, Checkpoint, RunFolder
from ovexport.compress import compress
from ovexport.convert import convert
from ovexport.recipe import Recipe
from ovexport.strip import strip

NO_BUDGET = {"bits_per_weight": None, "size_mb": None, "at_most_slower": None, "sensitivities": None}


def rounded(rounding: Literal["nearest", "gptq"], recipe: Recipe, run: RunFolder, scratch: Path) -> IR:
    """Its IR.

    Args:
        run: of the recipe; the text and the BF16 IR are its.
        scratch: where the checkpoint and the IR are made.
    """
    alone = {"awq": False, "scale_estimation": False, "rounding": rounding, **NO_BUDGET}
    spec = recipe.compress.model_copy(update=alone)
    checkpoint = compress(recipe.model, spec, run.data, 0, scratch / f"ours-{rounding}")
    return converted(checkpoint, run.ir("bf16"), scratch / f"ours-{rounding}-ir")


def converted(checkpoint: Checkpoint, base: IR, out: Path) -> IR:
    """The IR of a checkpoint, in a folder that is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    return convert(base, strip(checkpoint, base, out / "packed"), out / "ir")
