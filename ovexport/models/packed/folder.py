"""A model's folder that holds weights as 4-bit codes: what its layers are, and their codes as the file has them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models.packed.format import Layout, PackedFormat, Shape, Tensors
from ovexport.models.packed.grid import PackedGrid
from ovexport.registry import Registered
from ovexport.storage.digests import bytes_digest
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.layer import CodeDigest, LayerFormat, OwnFormat, WeightMatrix

_FLOATS = ("float16", "float32")
_INDICES = ("int32", "int64")
_WORDS = ("int32",)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the tensors of a layer lie: the whole name of each, by what follows the layer's."""

    matrix: WeightMatrix
    tensors: dict[str, str]
    groups: int


class PackedFolder:
    """The weights of a folder whose `quantization_config` a format recognizes.

    Args:
        origin: the model's name, for messages.
        files: its safetensors files.
        matrices: the weight matrices of the model that config.json describes.

    Attributes:
        title: the format's name.

    Raises:
        ArtifactError: a tensor is missing, or has another shape or type than the format and the model give it.
        UnsupportedModelError: it is a variant that can't be read, or packs what is no weight matrix of the model.
    """

    def __init__(
        self,
        origin: str,
        config: Mapping[str, Any],
        registered: Registered[type[PackedFormat]],
        files: Sequence[Path],
        matrices: Sequence[WeightMatrix],
    ) -> None:
        self.origin = origin
        with registered.guarded():
            packed_format = registered.thing()
            self.title = packed_format.title
            try:
                self._layout: Layout = packed_format.layout(config)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(
                    f"{origin}: its quantization_config ({self.title}) {error}; give the model that it was made "
                    "from, or another 4-bit checkpoint of it"
                ) from None
            self._stated_sizes = packed_format.group_sizes(config)
        self._files = {name: file for file in map(TensorFile, files) for name in file}
        self._linears = sum(1 for matrix in matrices if matrix.kind != "embedding")
        by_name = {matrix.name: matrix for matrix in matrices}
        layers = [name.removesuffix(self._suffix) for name in self._files if name.endswith(self._suffix)]
        if not layers:
            raise ArtifactError(
                f"{origin}: is {self.title} by its config.json, and its files hold no {self._suffix[1:]}; copy it again"
            )
        self._places = {f"{layer}.weight": self._place(layer, by_name.get(f"{layer}.weight")) for layer in layers}
        self._check_rest()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the matrices that are packed."""
        return tuple(self._places)

    @property
    def _suffix(self) -> str:
        return f".{self._layout.codes_name}"

    def group_size(self, name: str) -> int:
        """Inputs of a layer that share a scale."""
        place = self._places[name]
        return place.matrix.in_features // place.groups

    def grid(self, name: str) -> PackedGrid:
        """A layer's scales, zero points and order of inputs.

        Raises:
            ArtifactError, UnsupportedModelError: they can't be what they are for.
        """
        place = self._places[name]
        return self._layout.grid(f"{self.origin}: {name}", self._tensors(place), _shape(place.matrix))

    def codes(self, name: str, order: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """A layer's codes, (output, input), 0 to 15.

        Args:
            order: the inputs in the order that they are to have; their own when None.
        """
        place = self._places[name]
        codes = self._layout.codes(self._tensors(place), _shape(place.matrix))
        return np.ascontiguousarray(codes if order is None else codes[:, order])

    def marked(self, matrices: Iterable[WeightMatrix]) -> tuple[WeightMatrix, ...]:
        """The model's matrices, with the format that the folder holds them in.

        Raises:
            ArtifactError, UnsupportedModelError: as `grid`.
        """
        return tuple(replace(each, own=self._own_format(each.name)) for each in matrices)

    def require_codes(self, layers: Iterable[LayerFormat], digests: Mapping[str, CodeDigest]) -> None:
        """Prove that codes which were computed from the weights are those of the file.

        Args:
            layers: the formats of the matrices; those that the file does not hold as codes are left out.
            digests: of the computed codes, by layer.

        Raises:
            ArtifactError: a layer has other codes.
        """
        for layer in layers:
            name = layer.name
            if name not in self._places or layer.encoding is None:
                continue
            codes: NDArray[Any] = self.codes(name, self.grid(name).order)
            codes = codes.view(np.int8) - np.int8(8) if layer.encoding.signed else codes
            if bytes_digest(codes) != digests[name].codes:
                raise ArtifactError(f"{self.origin}: {name} was given other codes than the file has; copy it again")

    def is_transposed(self, name: str) -> bool:
        """Whether the model's parameter is (input, output)."""
        return self._places[name].matrix.transposed

    def floats(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every tensor that is no part of a packed weight, by its name."""
        parts = {tensor for place in self._places.values() for key, tensor in place.tensors.items() if key != "bias"}
        return ((name, file[name]) for name, file in self._files.items() if name not in parts)

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the model's tensors that the folder holds, packed or not, by their names."""
        shapes: dict[str, Shape] = {name: values.shape for name, values in self.floats()}
        for name, place in self._places.items():
            shape = _shape(place.matrix)
            shapes[name] = shape[::-1] if place.matrix.transposed else shape
        return shapes

    def describe(self) -> str:
        """What the folder is, in a line: "GPTQ, 4 bits, group size 128, symmetric, act-order: 210 of 211 layers".

        Raises:
            ArtifactError, UnsupportedModelError: a layer's scales, zero points or order can't be what they are for.
        """
        grids = [self.grid(name) for name in self._places]
        sizes = Counter(self.group_size(name) for name in self._places)
        symmetric = sum(grid.symmetric for grid in grids)
        parts = [self.title, "4 bits", f"group size {' and '.join(str(size) for size, _ in sizes.most_common())}"]
        mixed = "symmetric and asymmetric"
        parts.append({len(grids): "symmetric", 0: "asymmetric"}.get(symmetric, mixed))
        if any(grid.order is not None for grid in grids):
            parts.append("act-order")
        rounding = max(grid.rounding for grid in grids)
        if rounding:
            parts.append(f"scales rounded to float16 by at most {rounding:.1e} of themselves")
        return f"{', '.join(parts)}: {len(grids)} of {self._linears} layers"

    def _own_format(self, name: str) -> OwnFormat | None:
        """The format of a matrix in the folder; its note says where the codes are from."""
        if name not in self._places:
            return None
        grid = self.grid(name)
        order = "" if grid.order is None else ", inputs reordered (act-order)"
        rounded = f", scales rounded to float16 by at most {grid.rounding:.1e} of themselves" if grid.rounding else ""
        note = f"{self.title}'s codes{order}{rounded}"
        return OwnFormat(mode=grid.mode, group_size=self.group_size(name), note=note)

    def _tensors(self, place: _Place) -> Tensors:
        return {key: self._files[name][name] for key, name in place.tensors.items()}

    def _place(self, layer: str, matrix: WeightMatrix | None) -> _Place:
        """The layer's tensors, of the right names, shapes and types."""
        if matrix is None or matrix.problem:
            raise UnsupportedModelError(
                f"{self.origin}: packs {layer}, which is no weight matrix of the model that can be compressed; give "
                "the model that it was made from"
            )
        tensors = {name[len(layer) + 1 :]: name for name in self._files if name.startswith(f"{layer}.")}
        held = {key: self._files[name][name] for key, name in tensors.items()}
        where = f"{self.origin}: {layer}"
        self._check_bits(where, held[self._layout.codes_name].shape, _shape(matrix))
        missing = [key for key in self._layout.required(8, 8, 1) if key not in held]
        if missing:
            raise ArtifactError(f"{where}: has no {missing[0]}; the checkpoint is incomplete, copy it again")
        groups = self._groups(where, held, matrix.in_features)
        required = self._layout.required(*_shape(matrix), groups)
        expected = required | self._layout.optional(*_shape(matrix), groups)
        for key, values in held.items():
            _check_tensor(f"{where}.{key}", values, expected.get(key), self.title)
        return _Place(matrix, tensors, groups)

    def _check_bits(self, where: str, codes: Shape, shape: tuple[int, int]) -> None:
        """Refuse codes of another width, or of another matrix."""
        if len(codes) != 2:
            raise ArtifactError(f"{where}: its codes have the shape {codes}, and not two dimensions; copy it again")
        least, most = self._layout.matrix_shapes(codes)
        if all(low <= length <= high for low, length, high in zip(least, shape, most, strict=True)):
            return
        bits = 4 * most[0] * most[1] / (shape[0] * shape[1])
        if bits in (2, 3, 8):
            raise UnsupportedModelError(
                f"{where}: has {bits:.0f} bits, and only 4 can be read; give a checkpoint with 4 bits throughout"
            )
        raise ArtifactError(
            f"{where}: has codes of a matrix {list(most)}, and the model's is {list(shape)}; give the folder of the "
            "whole model"
        )

    def _groups(self, where: str, held: Tensors, inputs: int) -> int:
        """The layer's groups, where they are those that config.json tells of."""
        groups = self._layout.groups(held) if all(values.ndim for values in held.values()) else 0
        stated = {inputs if size == -1 else size for size in self._stated_sizes}
        if groups < 1 or inputs % groups or inputs // groups not in stated:
            sizes = " or ".join(map(str, sorted(stated))) or "none"
            raise ArtifactError(
                f"{where}: has {groups} scales for each output and {inputs} inputs, and config.json has the group size "
                f"{sizes}; the checkpoint is damaged, make or copy it again"
            )
        return groups

    def _check_rest(self) -> None:
        """Refuse parts of a packed weight that belong to none."""
        known = {name for place in self._places.values() for name in place.tensors.values()}
        keys = (*self._layout.required(8, 8, 1), *self._layout.optional(8, 8, 1))
        parts = [f".{key}" for key in keys if key != "bias"]
        for name in self._files:
            if name not in known and name.endswith(tuple(parts)):
                raise ArtifactError(
                    f"{self.origin}: {name} belongs to no layer with {self._suffix[1:]}; the checkpoint is incomplete, "
                    "copy it again"
                )


def _shape(matrix: WeightMatrix) -> tuple[int, int]:
    return matrix.out_features, matrix.in_features


def _check_tensor(where: str, values: NDArray[Any], expected: Shape | None, title: str) -> None:
    """Refuse a tensor that a layer of the format has not, or not of this shape or type.

    Raises:
        ArtifactError: its shape or type is another one.
        UnsupportedModelError: such a layer has no such tensor.
    """
    if expected is None:
        raise UnsupportedModelError(
            f"{where}: a layer of {title} has no such tensor that could be converted; give a plain 4-bit checkpoint"
        )
    key = where.rpartition(".")[2]
    types = _FLOATS if "scale" in key or key == "bias" else _INDICES if key.endswith(("idx", "shape")) else _WORDS
    if values.shape != expected or values.dtype.name not in types:
        raise ArtifactError(
            f"{where}: is {values.dtype} {values.shape}, and has to be {types[0]} {expected}; the checkpoint is "
            f"damaged, or of a version of {title} that can't be read"
        )
