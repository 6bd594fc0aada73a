"""Stage bench: latency and memory of several IRs, interleaved under pinned conditions. Needs openvino-genai only."""

from ovexport.bench.latency import bench

__all__ = ["bench"]
