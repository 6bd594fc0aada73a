"""ONNX: the same codes in DequantizeLinear nodes of opset 21, a decoder with its KV cache as inputs and outputs.

    4 bits:  DequantizeLinear(codes (input, output), scale, zero point; axis 0, blocks of the group size) → MatMul
    8 bits:  DequantizeLinear(codes (output, input), scale, zero point; axis 0) → Transpose → MatMul, or → Gather
    4-bit embeddings:  DequantizeLinear(codes (output, input), scale, zero point; axis 1, blocks) → Gather

A 4-bit embedding that is the head as well stands there twice, once in each layout: no runtime computes both from one.

Codes are UINT4, INT4, UINT8 or INT8, two 4-bit ones to a byte, the first in the low half. Scales are the float16 values
that ship, in float32, so that what a node gives is (code - zero point) · scale exactly. In these two layouts
onnxruntime 1.32 runs MatMulNBits on the codes and OpenVINO 2026.4 FullyConnected; 4-bit codes as (output, input) before
a Transpose are de-quantized by onnxruntime at every token.

Inputs and outputs are named as those of other ONNX decoders: input_ids, attention_mask, position_ids,
past_key_values.N.key and .value; logits, present.N.key and .value.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ovexport.artifacts import IR, PackedWeights
from ovexport.errors import MissingDependencyError, UnsupportedModelError
from ovexport.exporters.exporter import Exporter, exporters, write_beside
from ovexport.foreign import exhausted, said
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.recipe import ModelSpec
from ovexport.storage.files import atomic_folder
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.encoding import Encoding
from ovexport.weights.layer import LayerFormat

OPSET = 21
_ROWS, _LENGTH, _PAST = 2, 3, 5
"""Of the example that the network is traced with; any will do that differ from each other and from 1."""


@exporters.register("onnx")
class OnnxExporter(Exporter):
    """model.onnx, its weights in model.onnx.data."""

    def check(self, layers: Sequence[LayerFormat]) -> None:
        """As Exporter."""
        if importlib.util.find_spec("onnxscript") is None:
            raise MissingDependencyError('the format onnx needs onnxscript: pip install "ovexport[onnx]"')
        for layer in layers:
            if layer.encoding and layer.encoding.zero_points == "float16":
                raise UnsupportedModelError(
                    f"{layer.name}: its zero points are float16, and ONNX's are codes; use compress.mode = "
                    '"int4_asym", or leave the format onnx out'
                )
            if layer.adapter == "beside" and layer.rank:
                raise UnsupportedModelError(
                    f"{layer.name}: its adapter lies beside the codes, and ONNX holds codes only; leave the format "
                    "onnx out, or absorb the adapter in a run with model.adapter"
                )

    def export(self, model: ModelSpec, base: IR, packed: PackedWeights, out: Path) -> None:
        """As Exporter."""
        manifest, tensors = packed.manifest, packed.tensors
        self.check(manifest.layers)
        import onnx
        import onnx_ir

        network = load_model(model, dtype=torch.float32)
        for layer in manifest.layers:
            if layer.encoding is None and layer.name in manifest.replaced_weights:
                matrix_view(network, layer.name).write(torch.from_numpy(np.array(tensors.require(layer.name))))
        for norm in manifest.norms:
            network.get_parameter(norm.name).data.copy_(torch.from_numpy(np.array(tensors.require(norm.name))))
        program = _traced(network, model.id)
        for layer in manifest.layers:
            if layer.encoding is not None:
                _Replacement(program.model.graph, layer, layer.encoding, tensors).carry_out(_names(network, layer.name))
        _forget_the_machine(program.model.graph)
        with atomic_folder(out) as folder:
            path = folder / "model.onnx"
            onnx_ir.save(program.model, path, external_data="model.onnx.data")
            try:
                onnx.checker.check_model(path)
            except onnx.checker.ValidationError as error:
                raise UnsupportedModelError(
                    f"{model.id}: no valid ONNX ({said(error)}); leave the format out"
                ) from error
            write_beside(base, packed, folder)


class _Decoder(nn.Module):
    """The network with its KV cache as a list of tensors, each (batch, heads, length, head size)."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits, and keys and values of each layer with the new tokens behind the past ones."""
        cache = DynamicCache()
        for index in range(0, len(past), 2):
            cache.update(past[index], past[index + 1], index // 2)
        output = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *(part for layer in output.past_key_values.layers for part in (layer.keys, layer.values))


def _traced(network: PreTrainedModel, name: str) -> Any:
    """The program that torch's exporter makes of the network.

    Raises:
        UnsupportedModelError: it can't.
    """
    network.set_attn_implementation("eager")  # the others choose their kernel by values, which a graph can't hold
    past = [torch.zeros_like(part) for part in _cache_of(network)]
    names = [f"past_key_values.{index}.{part}" for index in range(len(past) // 2) for part in ("key", "value")]
    example = (
        torch.zeros(_ROWS, _LENGTH, dtype=torch.int64),
        torch.ones(_ROWS, _LENGTH + _PAST, dtype=torch.int64),
        (torch.arange(_LENGTH) + _PAST).expand(_ROWS, _LENGTH).clone(),
        past,
    )
    free = torch.export.Dim.DYNAMIC
    try:
        with warnings.catch_warnings(), _without_advice():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                _Decoder(network),
                example,
                dynamo=True,
                dynamic_shapes=(*({0: free, 1: free},) * 3, [{0: free, 2: free}] * len(past)),
                opset_version=OPSET,
                input_names=["input_ids", "attention_mask", "position_ids", *names],
                output_names=["logits", *(each.replace("past_key_values", "present") for each in names)],
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter and what it traces raise anything at all
        raise exhausted(error, name) or UnsupportedModelError(
            f"{name}: torch {torch.__version__} can't export {network.config.model_type} to ONNX ({said(error)}); "
            "leave the format out"
        ) from error


@contextmanager
def _without_advice() -> Iterator[None]:
    """Within, torch's exporter does not tell which packages it could have used too."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _cache_of(network: PreTrainedModel) -> list[Tensor]:
    """Keys and values of each layer after a few tokens."""
    ids = torch.zeros(_ROWS, _PAST, dtype=torch.int64)
    cache = network(input_ids=ids, use_cache=True).past_key_values
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def _forget_the_machine(graph: Any) -> None:
    """Drop what torch's exporter notes of each node: stack traces, with this machine's paths."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _names(network: nn.Module, layer: str) -> list[str]:
    """All names of a parameter in the traced program."""
    own = network.get_parameter(layer)
    shared = [name for name, value in network.named_parameters(remove_duplicate=False) if value is own]
    return [f"network.{name}" for name in shared]


class _Replacement:
    """Puts a layer's codes in the place of its floats."""

    def __init__(self, graph: Any, layer: LayerFormat, encoding: Encoding, tensors: TensorFile) -> None:
        self._graph = graph
        self._layer = layer
        self._encoding = encoding
        self._tensors = tensors
        self._stored: dict[bool, tuple[Any, ...]] = {}

    def carry_out(self, names: Sequence[str]) -> None:
        """Let every reader of the floats read codes.

        Args:
            names: those that the floats may have.

        Raises:
            UnsupportedModelError: they are not in the graph, or are read in an unknown way.
        """
        found = [name for name in names if name in self._graph.initializers]
        if not found:
            raise UnsupportedModelError(
                f"{self._layer.name}: not in the graph that torch exports; add it to compress.ignored, or leave the "
                "format onnx out"
            )
        for name in found:
            floats = self._graph.initializers[name]
            for use in list(floats.uses()):
                self._replace(use.node, use.idx)
            del self._graph.initializers[name]

    def _replace(self, node: Any, index: int) -> None:
        """A reader of the floats: a Gather, a Transpose before a MatMul, or a MatMul or Gemm of (input, output)."""
        wide, operation = self._encoding.bits == 8, node.op_type
        if operation == "Gather" and index == 0:
            node.replace_input_with(0, self._dequantized(node, transposed=False))
        elif operation == "Transpose" and self._feeds_products(node):
            if wide and not self._layer.transposed:
                node.replace_input_with(0, self._dequantized(node, transposed=False))
                return
            output = self._dequantized(node, transposed=True)
            for use in list(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, output)
            self._graph.remove(node, safe=True)
        elif operation in ("MatMul", "Gemm") and index == 1 and self._layer.transposed:
            node.replace_input_with(1, self._dequantized(node, transposed=True))
        else:
            raise UnsupportedModelError(
                f"{self._layer.name}: read by a {operation} in the graph that torch exports; add it to "
                "compress.ignored, or leave the format onnx out"
            )

    @staticmethod
    def _feeds_products(node: Any) -> bool:
        return all(use.node.op_type == "MatMul" and use.idx == 1 for use in node.outputs[0].uses())

    def _dequantized(self, before: Any, *, transposed: bool) -> Any:
        """The output of a new DequantizeLinear in front of a node.

        Args:
            transposed: as (input, output).
        """
        import onnx_ir

        layer = self._layer
        if transposed not in self._stored:
            self._stored[transposed] = tuple(self._initializers(transposed=transposed))
        stored = self._stored[transposed]
        blocks = layer.groups > 1
        axis = (0 if transposed else 1) if blocks else (1 if transposed else 0)
        attributes = {"axis": axis} | ({"block_size": layer.group_size} if blocks else {})
        node = onnx_ir.node("DequantizeLinear", inputs=list(stored), attributes=attributes)
        node.outputs[0].name = f"{layer.name}/dequantized/{before.name or before.outputs[0].name}"
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _initializers(self, *, transposed: bool) -> Iterator[Any]:
        """Codes, scale and, where there are any, zero points, put into the graph."""
        import onnx_ir

        layer, encoding = self._layer, self._encoding
        code_type = onnx_ir.DataType[f"{'' if encoding.signed else 'U'}INT{encoding.bits}"]
        codes = self._unpacked("codes", (layer.out_features, layer.in_features))
        scale = self._tensors.require(f"{layer.name}.scale").astype(np.float32).reshape(layer.out_features, -1)
        values = [("", codes, code_type), ("/scale", scale, onnx_ir.DataType.FLOAT)]
        if not encoding.symmetric:
            zero_point = self._unpacked("zero_point", (layer.out_features, layer.groups))
            values.append(("/zero_point", zero_point, code_type))
        for suffix, array, kind in values:
            oriented = array.T if transposed else array
            if suffix and layer.groups == 1:
                oriented = array.reshape(-1)
            name, shape = f"{layer.name}{'/turned' if self._stored else ''}{suffix}", onnx_ir.Shape(oriented.shape)
            if kind.bitwidth == 4:
                tensor: Any = onnx_ir.PackedTensor(encoding.pack(oriented), kind, shape=shape, name=name)
            else:
                tensor = onnx_ir.Tensor(np.ascontiguousarray(oriented), name=name)
            value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(kind), const_value=tensor)
            self._graph.register_initializer(value)
            yield value

    def _unpacked(self, part: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Codes or zero points one to a byte."""
        stored: NDArray[np.uint8] = np.array(self._tensors.require(f"{self._layer.name}.{part}")).view(np.uint8)
        if self._encoding.bits == 8:
            return stored.reshape(shape).view(self._encoding.code_dtype)
        pairs = np.stack((stored & 0x0F, stored >> 4), axis=-1).reshape(-1)[: int(np.prod(shape))].reshape(shape)
        return pairs.view(np.int8) if self._encoding.signed else pairs
