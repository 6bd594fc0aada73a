"""NNCF's post-training quantization of an OpenVINO IR."""

import shutil
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.openvino.graph import read_graph, weights
from ovexport.recipe import CompressSpec

_RATIO_STEP = 1 / 64
_NEXT_TO_NONE = 1e-9
"""A ratio that leaves all in 8 bits; of 0.0 NNCF takes its default, 1.0."""
_SEARCH_SEQUENCES = 8


def post_training(
    base: IR,
    spec: CompressSpec,
    tokens: NDArray[np.int32],
    out: Path,
    *,
    ratio: float = 1.0,
    sensitivity_metric: nncf.SensitivityMetric | None = None,
    **methods: bool,
) -> IR:
    """The IR with its Linear layers in the recipe's bits and groups, embeddings and head in 8 bits.

    Args:
        tokens: calibrate it, (sequences, length); as many as the recipe's own calibration takes, from the first.
        ratio: share of the Linear layers' weights in the recipe's bits; the others have 8.
        sensitivity_metric: chooses them.
        methods: awq, scale_estimation, gptq.
    """
    count = min(spec.calibration_sequences, len(tokens))
    graph = read_graph(base)
    graph = nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(spec.mode),
        ratio=ratio,
        sensitivity_metric=sensitivity_metric,
        group_size=spec.group_size,
        dataset=nncf.Dataset([_inputs(graph, row) for row in tokens[:count]]),
        subset_size=count,
        **methods,
    )
    out.mkdir()
    ov.save_model(graph, out / "openvino_model.xml", compress_to_fp16=False)
    for file in base.path.iterdir():
        if not file.name.startswith("openvino_model."):
            (out / file.name).symlink_to(file)
    return IR(out)


def _inputs(graph: ov.Model, row: NDArray[np.int32]) -> dict[str, NDArray[np.int64]]:
    ids = row.astype(np.int64)[None]
    every: dict[str, np.ndarray] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    names = {name for port in graph.inputs for name in port.get_names()}
    return {name: value for name, value in every.items() if name in names}


def packed_bytes(ir: IR) -> int:
    """Codes, scales and zero points of an IR's packed matrices."""
    return sum(weight.byte_size for weight in weights(read_graph(ir)) if weight.packed)


def mixed_precision(
    base: IR, spec: CompressSpec, tokens: NDArray[np.int32], out: Path, limit: int, metric: str
) -> IR | None:
    """NNCF's mixed precision within a limit of bytes: as few 4-bit weights as that allows, the others in 8 bits, GPTQ's
    rounding; None where not even 4 bits for all Linear layers are within it.

    Bytes fall in proportion to the ratio, but for its last layer: from there the ratio rises until they are within the
    limit, with little text, and then with all of it, with which the metric may put the layers in another order.

    Args:
        metric: name of one of nncf.SensitivityMetric.
    """

    def made(ratio: float, spec: CompressSpec, **methods: bool) -> IR:
        shutil.rmtree(out, ignore_errors=True)
        chosen = nncf.SensitivityMetric[metric] if ratio < 1 else None
        return post_training(base, spec, tokens, out, ratio=ratio, sensitivity_metric=chosen, **methods)

    little = spec.model_copy(update={"calibration_sequences": min(spec.calibration_sequences, _SEARCH_SEQUENCES)})
    largest, smallest = (packed_bytes(made(ratio, little)) for ratio in (_NEXT_TO_NONE, 1.0))
    if smallest > limit:
        return None
    ratio = max(0.0, (largest - limit) / (largest - smallest))
    while packed_bytes(made(ratio, little)) > limit:
        ratio = min(1.0, ratio + _RATIO_STEP)
    while packed_bytes(found := made(ratio, spec, gptq=True)) > limit:
        ratio = min(1.0, ratio + _RATIO_STEP)
    return found
