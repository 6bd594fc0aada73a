"""What the machine could do at best: bytes read per token over the memory's bandwidth, operations over its rate.

A decoding step reads every weight once, so its time can't be less than their bytes over the bandwidth, unless they stay
in the processor's caches; the first token takes as many operations as the prompt needs. Bandwidth and rate are measured
in the same run, with as many threads as the model has.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from ovexport.artifacts import IR
from ovexport.openvino.graph import read_graph, weights
from ovexport.recipe import GridPoint
from ovexport.reports import MachineLimits, PhysicalLimit

_READ_BYTES = 1 << 29
_PASSES = 15
_ROWS, _WIDTH = 512, 1024
_CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "u8": 1.0, "u4": 0.5}


def machine_limits(runtime: Iterable[Mapping[str, str]]) -> MachineLimits:
    """Measure the machine.

    Args:
        runtime: the models' properties as read back: threads and inference precisions.
    """
    settings = list(runtime)
    threads = max(int(one["INFERENCE_NUM_THREADS"]) for one in settings)
    precisions = sorted({one["INFERENCE_PRECISION_HINT"] for one in settings})
    return MachineLimits(
        bandwidth_bytes_per_s=_bandwidth(threads),
        operations_per_s={precision: _rate(precision, threads) for precision in precisions},
    )


def _bandwidth(threads: int) -> float:
    """Bytes read per second: each thread takes the dot product of its part with itself."""
    parts = [np.ones(_READ_BYTES // 4 // threads, np.float32) for _ in range(threads)]

    def read(part: np.ndarray) -> float:
        return float(np.dot(part, part))

    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / _fastest(lambda: list(pool.map(read, parts)))


def _rate(precision: str, threads: int) -> float:
    """Floating-point operations per second of a product of two matrices."""
    rows = ops.parameter([_ROWS, _WIDTH], np.float32)
    matrix = ops.constant(np.random.default_rng(0).standard_normal((_WIDTH, _WIDTH), np.float32))
    graph = ov.Model([ops.matmul(rows, matrix, False, True).output(0)], [rows])
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(graph, "CPU", settings).create_infer_request()
    given = [np.ones((_ROWS, _WIDTH), np.float32)]
    return 2.0 * _ROWS * _WIDTH * _WIDTH / _fastest(lambda: request.infer(given, share_inputs=True))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some passes; one before them is dropped."""
    work()
    times = []
    for _ in range(_PASSES):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a model has to read and to multiply.

    Attributes:
        weight_bytes: of every Linear: codes, scales and zero points.
        cached_values: keys and values that the cache holds of one token.
        entries: of the Linears' matrices that every token of a prompt is multiplied with; `head_entries` of the head,
            which its last token alone is.
        attention_width: heads times their width, over all layers.
    """

    weight_bytes: int
    cached_values: int
    entries: int
    head_entries: int
    attention_width: int


def work_of(ir: IR) -> Work:
    """Read off an IR's graph what a token takes."""
    graph = read_graph(ir)
    linears = [weight for weight in weights(graph) if weight.layer_kind == "linear"]
    vocabulary = graph.output("logits").get_partial_shape()[2]
    head = vocabulary.get_length() if vocabulary.is_static else None
    return Work(
        weight_bytes=sum(weight.byte_size for weight in linears),
        cached_values=_cache_values(graph),
        entries=sum(weight.elements for weight in linears if weight.shape[0] != head),
        head_entries=sum(weight.elements for weight in linears if weight.shape[0] == head),
        attention_width=_attention_width(graph),
    )


def physical_limit(
    work: Work,
    point: GridPoint,
    machine: MachineLimits,
    runtime: Mapping[str, str],
    first_token_ms: float,
    output_token_ms: float,
) -> PhysicalLimit:
    """How near a model comes to the machine's limits at a point of the grid.

    Causal attention multiplies half of the pairs of tokens, twice: as many products as the prompt's length squared
    times its width.

    Args:
        runtime: the model's properties as read back.
        first_token_ms, output_token_ms: medians, as measured.
    """
    context = point.prompt_tokens + point.output_tokens / 2
    cached = work.cached_values * _CACHE_BYTES[runtime["KV_CACHE_PRECISION"]]
    read = work.weight_bytes + round(cached * context * point.batch_size)
    products = work.entries * point.prompt_tokens + work.head_entries + work.attention_width * point.prompt_tokens**2
    operations = 2 * point.batch_size * products
    best_token = 1000 * read / machine.bandwidth_bytes_per_s
    best_first = 1000 * operations / machine.operations_per_s[runtime["INFERENCE_PRECISION_HINT"]]
    return PhysicalLimit(
        bytes_per_token=read,
        time_per_output_token_ms=best_token,
        share_of_bandwidth=best_token / output_token_ms,
        operations_first_token=operations,
        time_to_first_token_ms=best_first,
        share_of_compute=best_first / first_token_ms,
    )


def _cache_values(graph: ov.Model) -> int:
    """Keys and values that the cache holds of one token: (batch, heads, tokens, width) each."""
    shapes = [variable.get_info().data_shape for variable in graph.get_variables()]
    return sum(
        shape[1].get_length() * shape[3].get_length()
        for shape in shapes
        if len(shape) == 4 and shape[1].is_static and shape[3].is_static
    )


def _attention_width(graph: ov.Model) -> int:
    """Heads times their width, over all layers."""
    shapes = [
        node.input_value(0).get_partial_shape()
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "ScaledDotProductAttention"
    ]
    return sum(
        shape[1].get_length() * shape[3].get_length()
        for shape in shapes
        if len(shape) == 4 and shape[1].is_static and shape[3].is_static
    )
