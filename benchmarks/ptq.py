"""NNCF's post-training quantization of an OpenVINO IR."""

from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.openvino.graph import read_graph
from ovexport.recipe import CompressSpec


def post_training(base: IR, spec: CompressSpec, tokens: NDArray[np.int32], out: Path, **methods: bool) -> IR:
    """The IR with its Linear layers in the recipe's bits and groups, embeddings and head in 8 bits.

    Args:
        tokens: calibrate it, (sequences, length); as many as the recipe's own calibration takes, from the first.
        methods: awq, scale_estimation, gptq.
    """
    count = min(spec.calibration_sequences, len(tokens))
    graph = read_graph(base)
    graph = nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(spec.mode),
        ratio=1.0,
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
