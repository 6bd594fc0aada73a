"""Graphs of IRs that tests change."""

from collections.abc import Callable

import openvino as ov

from ovexport.artifacts import IR
from ovexport.openvino.graph import read_graph


def rewrite(ir: IR, change: Callable[[ov.Model], None]) -> None:
    """Change the graph of an IR in place."""
    graph = read_graph(ir)
    change(graph)
    ov.save_model(graph, ir.path / "changed.xml", compress_to_fp16=False)
    del graph
    for suffix in ("xml", "bin"):
        (ir.path / f"changed.{suffix}").replace(ir.path / f"openvino_model.{suffix}")
