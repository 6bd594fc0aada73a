"""AutoRound's codes of a model as a checkpoint of ours; AutoRound itself runs in another environment."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import auto_round_folder
import numpy as np
import torch
from auto_round_folder import MULTIPLE, NOTE
from numpy.typing import NDArray

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.compress import compress
from ovexport.models.loading import open_packed
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.weights.layer import LayerFormat


def require_installed(python: Path) -> None:
    """Stop with one line if an interpreter is not there or has no auto-round."""
    try:
        done = subprocess.run([python, "-I", "-c", "import auto_round"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"--auto-round {python}: {error.strerror}; give the interpreter of an environment") from None
    if done.returncode:
        raise SystemExit(f"--auto-round {python}: {_last_line(done.stderr)}; run {python} -m pip install auto-round")


def reason_against(layers: Sequence[LayerFormat]) -> str | None:
    """Why AutoRound can't pack every layer that has 4 bits here, in one group size; None where it can."""
    sizes = _group_sizes(layers)
    sides = [(layer.out_features, layer.in_features) for layer in layers if layer.name in sizes]
    left = [(rows, columns) for rows, columns in sides if rows % MULTIPLE or columns % MULTIPLE]
    if left:
        return (
            f"it would leave {len(left)} of {len(sizes)} layers in floating point, such as one of {left[0][0]} x "
            f"{left[0][1]} weights, as it needs multiples of {MULTIPLE}"
        )
    return None if len(set(sizes.values())) == 1 else "the layers have several group sizes"


def make_folder(
    python: Path, model: ModelSpec, layers: Sequence[LayerFormat], tokens: NDArray[np.int32], seed: int, out: Path
) -> float:
    """Let AutoRound quantize a model, and return the seconds that it took; `out`, an empty folder, takes what it makes.

    Args:
        python: an interpreter that has auto-round.
        layers: formats of the model's layers, of one mode and group size.
        tokens: calibrate it, (sequences, length).
    """
    four_bit = [layer for layer in layers if layer.encoding and layer.encoding.bits == 4]
    np.save(out / "tokens.npy", tokens)
    command = [python, "-I", auto_round_folder.__file__, model.id, out / "tokens.npy", out]
    command += ["--group-size", str(four_bit[0].group_size), "--seed", str(seed)]
    command += ["--symmetric"] if four_bit[0].mode == "int4_sym" else []
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    if done.returncode:
        raise SystemExit(f"AutoRound ended with code {done.returncode}: {_last_line(done.stderr)}")
    return float(note(out)["seconds"])


def note(out: Path) -> dict[str, Any]:
    """What auto_round_folder.py notes of the folder that it made in `out`."""
    return dict(json.loads((out / NOTE).read_text(encoding="utf-8")))


def folder_of(out: Path) -> ModelSpec:
    """The folder in `out`, in float32: its config.json says float16, whatever the tensors are."""
    return ModelSpec(id=str(out / note(out)["folder"]), dtype="float32")


def checkpoint_of(
    folder: ModelSpec, spec: CompressSpec, data: PreparedData, layers: Sequence[LayerFormat], out: Path
) -> Checkpoint:
    """AutoRound's folder with its codes as they are, and all that it leaves in floating point rounded to nearest, as
    embeddings and head are in every row.

    Args:
        layers: formats that it should have.

    Raises:
        ValueError: AutoRound has other layers in 4 bits, or other group sizes.
    """
    packed = open_packed(folder)
    found = {name: packed.group_size(name) for name in packed.layers} if packed else {}
    if found != (expected := _group_sizes(layers)):
        unlike = sorted({name for name, _ in found.items() ^ expected.items()})
        raise ValueError(f"{folder.id}: {len(unlike)} layers have other formats than asked, such as {unlike[0]}")
    plain = spec.model_copy(update={"awq": False, "scale_estimation": False, "rounding": "nearest"})
    return compress(folder, plain, data, 0, out)


def _group_sizes(layers: Sequence[LayerFormat]) -> dict[str, int]:
    """Group sizes of the layers that have 4 bits, by name."""
    return {layer.name: layer.group_size for layer in layers if layer.encoding and layer.encoding.bits == 4}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
