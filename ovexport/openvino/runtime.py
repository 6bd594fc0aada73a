"""The OpenVINO runtime: pinned settings, and what a compiled model says of itself. Needs openvino and NumPy only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.errors import RecipeError, UnsupportedModelError, last_line
from ovexport.foreign import exhausted

ACCURATE: Mapping[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
"""Settings under which nothing but the weights is approximate."""

PIECE_TOKENS = 32
"""Pieces in which text is read where the KV cache has to count: in one pass over a sequence it is never read back, and
its precision shows nowhere."""

_READ_BACK = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "KEY_CACHE_PRECISION",
    "VALUE_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "EXECUTION_MODE_HINT",
    "PERFORMANCE_HINT",
    "NUM_STREAMS",
    "INFERENCE_NUM_THREADS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedNode:
    """A node of the graph that is executed, copied to plain values.

    Attributes:
        layer_type: as the runtime names it, such as "FullyConnected".
        originals: friendly names of the IR's operations that it carries out.
        constant_inputs: element type and shape of each input that is a constant.
    """

    layer_type: str
    originals: tuple[str, ...]
    constant_inputs: tuple[tuple[str, tuple[int, ...]], ...]


class LogitsRunner:
    """A compiled graph that gives the logits of whole sequences.

    Args:
        name: of the IR, for messages.
        settings: of the runtime; by default those where only the weights are approximate.

    Attributes:
        vocabulary: how many logits a token has.
        properties: of the compiled model, as read back.

    Raises:
        UnsupportedModelError: it is no causal LM with the inputs that optimum-intel gives it, or can't be compiled.
    """

    def __init__(self, graph: ov.Model, name: str, settings: Mapping[str, Any] = ACCURATE) -> None:
        self._inputs = {name for port in graph.inputs for name in port.get_names()}
        outputs = {output for port in graph.outputs for output in port.names}
        if "input_ids" not in self._inputs or "logits" not in outputs:
            raise UnsupportedModelError(f"{name}: no causal LM, it lacks the input input_ids or the output logits")
        compiled = compile_for_cpu(graph, name, settings)
        self._request = compiled.create_infer_request()
        self._empty_cache = _empty_cache(graph)
        size = compiled.output("logits").get_partial_shape()[2]
        self.vocabulary = size.get_length() if size.is_static else self(np.zeros((1, 1), np.int64)).shape[2]
        self.properties = properties(compiled)
        self._past, self._rows = 0, 1

    def __call__(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (batch, length, vocabulary) float32 of tokens (batch, length), overwritten by the next call."""
        self._request.reset_state()
        for name, shape in self._empty_cache.items():
            self._request.set_tensor(name, ov.Tensor(np.zeros((len(tokens), *shape[1:]), np.float32)))
        return self._logits(tokens, past=0)

    def pieces(self, tokens: NDArray[np.int64], longest: int) -> Iterator[NDArray[np.float32]]:
        """Logits (batch, at most `longest`, vocabulary) of one piece of the tokens (batch, length) after the other.

        Each piece finds those before it in the KV cache, and overwrites their logits.
        """
        self._request.reset_state()
        for begin in range(0, tokens.shape[1], longest):
            yield self._logits(tokens[:, begin : begin + longest], past=begin)

    def begin(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As a call, with one row, which `extend` then goes on from; the logits are a copy."""
        logits = self(tokens).copy()
        self._past, self._rows = tokens.shape[1], 1
        return logits

    def extend(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (rows, length, vocabulary) of tokens (rows, length) behind those read since `begin`, which stand
        before every row; overwritten by the next call."""
        logits = self._logits(tokens, past=self._past, former=self._rows)
        self._past, self._rows = self._past + tokens.shape[1], len(tokens)
        return logits

    def _logits(self, tokens: NDArray[np.int64], *, past: int, former: int | None = None) -> NDArray[np.float32]:
        """Of tokens behind `past` others that the model's state holds, in so many `former` rows; the first of them
        stands before every row where their numbers differ."""
        rows, length = tokens.shape
        before = np.arange(rows) if former in (None, rows) else np.zeros(rows)
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones((rows, past + length), dtype=np.int64),
            "position_ids": np.tile(np.arange(past, past + length, dtype=np.int64), (rows, 1)),
            "beam_idx": before.astype(np.int32),
        }
        self._request.infer({name: value for name, value in given.items() if name in self._inputs})
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data
        return logits


def _empty_cache(graph: ov.Model) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder's KV cache before the first token, by input; none where the graph keeps it as its state,
    as an IR does."""
    shapes = {}
    for port in graph.inputs:
        name = next(iter(port.get_names()), "")
        if name.startswith("past_key_values."):
            shapes[name] = tuple(0 if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    return shapes


def compile_for_cpu(graph: ov.Model, name: str, settings: Mapping[str, Any]) -> ov.CompiledModel:
    """Compile a graph.

    Raises:
        UnsupportedModelError: the runtime refuses it.
    """
    try:
        return ov.Core().compile_model(graph, "CPU", dict(settings))
    except RuntimeError as error:
        raise exhausted(error, name) or UnsupportedModelError(
            f"{name}: the CPU runtime can't compile it ({last_line(error)})"
        ) from error


def check_device(device: str, core: ov.Core | None = None) -> None:
    """Refuse a device that OpenVINO does not list here.

    Raises:
        RecipeError: with the devices there are.
    """
    devices = (core or ov.Core()).available_devices
    if device.split(".", maxsplit=1)[0] not in {name.split(".")[0] for name in devices}:
        raise RecipeError(f"device={device}: not here; OpenVINO lists {', '.join(devices)}")


def properties(compiled: ov.CompiledModel) -> dict[str, str]:
    """The settings in force, read back from the compiled model."""
    supported = set(compiled.get_property("SUPPORTED_PROPERTIES"))
    return {name: _plain(compiled.get_property(name)) for name in _READ_BACK if name in supported}


def executed_nodes(compiled: ov.CompiledModel) -> list[ExecutedNode]:
    """The graph that is executed."""
    runtime = compiled.get_runtime_model()
    nodes = []
    for operation in runtime.get_ordered_ops():
        info = operation.get_rt_info()
        originals = str(info["originalLayersNames"].astype(str)) if "originalLayersNames" in info else ""
        layer_type = str(info["layerType"].astype(str)) if "layerType" in info else operation.get_type_name()
        constants = []
        for port in range(operation.get_input_size()):
            source = operation.input_value(port)
            shape = source.get_partial_shape()
            if _is_constant(source.get_node()) and shape.is_static:
                constants.append((str(source.get_element_type().to_string()), tuple(shape.to_shape())))
        nodes.append(
            ExecutedNode(layer_type=layer_type, originals=tuple(originals.split(",")), constant_inputs=tuple(constants))
        )
    return nodes


def _is_constant(node: Any) -> bool:
    info = node.get_rt_info()
    return "layerType" in info and str(info["layerType"].astype(str)) == "Const"


def _plain(value: Any) -> str:
    return value.to_string() if isinstance(value, ov.Type) else str(value).rpartition(".")[2] or str(value)
