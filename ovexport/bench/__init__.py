"""Stage bench: latency and memory of several IRs, interleaved under pinned conditions. Needs openvino-genai only."""

from ovexport.bench.adapters import own_adapter, require_applied, save_adapter
from ovexport.bench.check import check
from ovexport.bench.latency import bench
from ovexport.bench.loading import RuntimeAdapter
from ovexport.bench.search import search_settings

__all__ = ["RuntimeAdapter", "bench", "check", "own_adapter", "require_applied", "save_adapter", "search_settings"]
