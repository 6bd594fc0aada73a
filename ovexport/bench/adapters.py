"""Adapters as files that openvino-genai reads, and the proof that a runtime adapter does what it should.

openvino-genai passes over a tensor that fits no layer with no more than a warning, and a model that runs without its
adapter would be timed as one that runs with it.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
from numpy.typing import NDArray

from ovexport.artifacts import IR, Checkpoint
from ovexport.bench.loading import RuntimeAdapter, generate, load_pipeline
from ovexport.errors import UnsupportedModelError
from ovexport.recipe import BenchSpec
from ovexport.storage.tensorfile import TensorFile, write_tensors

_PREFIX = "base_model.model."
_CONTROL = f"{_PREFIX}no.such.layer"
_UNUSED = re.compile(r"Unused LoRA tensor: (\S+)")
_STDERR = 2
_SCORED_TOKENS = 8


def save_adapter(checkpoint: Checkpoint, path: Path) -> Path:
    """Write a checkpoint's adapters with PEFT's names, in float16, as adapters are shipped.

    `base_model.model.LAYER.lora_A.weight` is (rank, input), `base_model.model.LAYER.lora_B.weight` (output, rank).
    """
    adapters = checkpoint.adapters
    tensors: dict[str, NDArray[np.float16]] = {}
    for layer in checkpoint.manifest.packed:
        if layer.used_rank == 0:
            continue
        name = _PREFIX + layer.name.removesuffix(".weight")
        lora_a, lora_b = adapters.require(f"{layer.name}.lora_A"), adapters.require(f"{layer.name}.lora_B")
        tensors[f"{name}.lora_A.weight"] = lora_a[: layer.used_rank].astype(np.float16)
        tensors[f"{name}.lora_B.weight"] = lora_b[:, : layer.used_rank].astype(np.float16)
    write_tensors(tensors, path)
    return path


def own_adapter(ir: IR) -> RuntimeAdapter | None:
    """The adapter that lies beside an IR, as evaluate and bench load it; None where every adapter is absorbed."""
    return RuntimeAdapter(path=ir.adapter_tensors, mode="static") if ir.adapter is not None else None


def require_applied(ir: IR, adapter: RuntimeAdapter, spec: BenchSpec, prompt: Sequence[int]) -> int:
    """Refuse an adapter that openvino-genai leaves out, wholly or in part.

    What it leaves out it names in a warning, so an adapter of a layer that no model has is loaded first: it must be
    named. Then the adapter's must not be, and with it the likelihood of the answer must move farther than it does with
    the same adapter at scale 0, which is no more than rounding: float32's, since in the precision that is timed it can
    be larger than what the adapter does.

    Returns:
        How many layers it is added to.

    Raises:
        UnsupportedModelError: a layer of it is not applied, it changes nothing, or that can't be told.
    """
    tokens = np.asarray(prompt[: spec.prompt_tokens[0]], dtype=np.int64).reshape(1, -1)
    with TemporaryDirectory(prefix="ovexport-") as scratch:
        control = Path(scratch) / "control.safetensors"
        ones = {f"{_CONTROL}.{side}.weight": np.ones((1, 1), np.float32) for side in ("lora_A", "lora_B")}
        write_tensors(ones, control)
        unused, _ = _try(ir, replace(adapter, path=control), spec, tokens)
    if unused != {_CONTROL}:
        raise UnsupportedModelError(
            f"{ir.path}: openvino-genai does not name an adapter that it leaves out; this version of it can't be timed"
        )
    unused, score = _try(ir, adapter, spec, tokens)
    layers = {name.partition(".lora_")[0] for name in TensorFile(adapter.path)}
    if unused:
        raise UnsupportedModelError(
            f"{adapter.path}: {len(unused)} of its {len(layers)} layers are not in {ir.path}, first {min(unused)}; "
            "give the adapter of this model"
        )
    _, without = _try(ir, None, spec, tokens)
    _, scaled_to_nothing = _try(ir, replace(adapter, scale=0.0), spec, tokens)
    if not abs(score - without) > abs(scaled_to_nothing - without):
        raise UnsupportedModelError(
            f"{adapter.path}: changes nothing in what {ir.path} answers; give an adapter that was tuned"
        )
    return len(layers)


def _try(ir: IR, adapter: RuntimeAdapter | None, spec: BenchSpec, tokens: NDArray[np.int64]) -> tuple[set[str], float]:
    """The layers that openvino-genai leaves out, and the log-likelihood of the likelier of two beams."""
    with _standard_error() as lines:
        pipeline = load_pipeline(ir, spec, spec.attention_backend[0], adapter, accurate=True)
        score = float(generate(pipeline, tokens, _SCORED_TOKENS, beams=2).scores[0])
    return {match[1] for line in lines if (match := _UNUSED.search(line))}, score


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Collects, until the block ends, what native code writes to the process's standard error."""
    lines: list[str] = []
    kept = os.dup(_STDERR)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), _STDERR)
        try:
            yield lines
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
