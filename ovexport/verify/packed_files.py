"""Codes, scales and zero points of a 4-bit checkpoint, read out of its files in the proof's own way.

Written from the formats' documentation, sharing nothing with the code that converts. Nibbles are taken from bytes: an
int32 is four bytes, the lowest first, and each holds two values, the low one first.

    GPTQ                 qweight (input / 8, output), qzeros (groups, output / 8) less 1 in version 1, scales
    AWQ "gemm"           qweight (input, output / 8), qzeros (groups, output / 8), both in the order 0 2 4 6 1 3 5 7
    AutoRound            one of the two
    compressed-tensors   weight_packed (output, input / 8), weight_zero_point (output / 8, groups), weight_scale
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.storage.bounded import parse_json, read_bytes
from ovexport.storage.tensorfile import TensorFile

_CODES = re.compile(r"(.+)\.(qweight|weight_packed)")
_NIBBLE_OF_OUTPUT = [0, 4, 1, 5, 2, 6, 3, 7]
"""AWQ: which nibble of a word holds each of its eight outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayer:
    """A layer as its file has it.

    Attributes:
        codes: (output, input) uint8, 0 to 15, inputs in their own order.
        scale: (output, groups) float16.
        zero_point: (output, groups) uint8.
        group_of_input: (input,) int64.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float16]
    zero_point: NDArray[np.uint8]
    group_of_input: NDArray[np.int64]


Unpack = Callable[[Mapping[str, NDArray[Any]]], FileLayer]
"""From a layer's tensors, by what follows its name."""


def is_packed_folder(path: Path) -> bool:
    """Whether a folder is a model with codes in its files, and no checkpoint of ours."""
    if (path / "checkpoint.json").exists() or not (path / "config.json").is_file():
        return False
    return isinstance(_json(path / "config.json").get("quantization_config"), dict)


class PackedFiles:
    """The packed layers of a model's folder.

    Raises:
        ArtifactError: a file is missing or can't be read.
        UnsupportedModelError: its format is none that is known here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = _reader(folder, _json(folder / "config.json")["quantization_config"])
        self._tensors = {name: file for file in map(TensorFile, _weight_files(folder)) for name in file}
        self.layers = tuple(match[1] for name in self._tensors if (match := _CODES.fullmatch(name)))

    def layer(self, name: str) -> FileLayer:
        """A layer, by its name without ".weight".

        Raises:
            ArtifactError: a tensor of it is missing or has another shape than the others.
        """
        own = {key[len(name) + 1 :]: self._tensors[key][key] for key in self._tensors if key.startswith(f"{name}.")}
        try:
            layer = self._read(own)
            outputs, inputs = layer.codes.shape
            groups = layer.scale.shape[1]
            shapes = (layer.scale.shape, layer.zero_point.shape, layer.group_of_input.shape)
            if shapes != ((outputs, groups), (outputs, groups), (inputs,)) or inputs % groups:
                raise ValueError(f"scales, zero points and g_idx of {shapes} for codes of {layer.codes.shape}")
        except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise ArtifactError(
                f"{self._folder}: {name} can't be unpacked ({type(error).__name__}: {error}); copy the checkpoint again"
            ) from error
        return layer


def _reader(folder: Path, config: Mapping[str, Any]) -> Unpack:
    """What unpacks the layers of a configuration."""
    method = str(config.get("quant_method")).replace("_", "-").removeprefix("intel/")
    packing = str(config.get("packing_format") or config.get("backend") or "auto")
    if method == "gptq":
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise _unknown(folder, version)
        return partial(_gptq, 1 if version == "gptq" else 0)
    if method == "awq" or (method == "auto-round" and "awq" in packing):
        return _awq
    if method == "auto-round":
        less_one = packing == "auto" or ("gptq" in packing and "gptqmodel" not in packing)
        return partial(_gptq, 1 if less_one else 0)
    if method == "compressed-tensors":
        return _compressed
    raise _unknown(folder, method)


def _unknown(folder: Path, name: object) -> UnsupportedModelError:
    return UnsupportedModelError(f"{folder}: its codes are in the format {name!r:.60}, which the proof can't unpack")


def _gptq(less: int, own: Mapping[str, NDArray[Any]]) -> FileLayer:
    codes = _nibbles(own["qweight"]).transpose(1, 0, 2).reshape(own["qweight"].shape[1], -1)
    groups = len(own["scales"])
    zero_point = _nibbles(own["qzeros"]).reshape(groups, -1).T + np.uint8(less)
    return _layer(codes, own["scales"].T, zero_point, own.get("g_idx"))


def _awq(own: Mapping[str, NDArray[Any]]) -> FileLayer:
    codes, zero_point = (
        _nibbles(own[key])[..., _NIBBLE_OF_OUTPUT].reshape(len(own[key]), -1).T for key in ("qweight", "qzeros")
    )
    return _layer(codes, own["scales"].T, zero_point, None)


def _compressed(own: Mapping[str, NDArray[Any]]) -> FileLayer:
    outputs, inputs = own["weight_shape"].tolist()
    codes = _nibbles(own["weight_packed"]).reshape(outputs, -1)[:, :inputs]
    scale = own["weight_scale"]
    zero_point = np.full(scale.shape, 8, np.uint8)
    if "weight_zero_point" in own:
        packed = _nibbles(own["weight_zero_point"])  # (output / 8, groups, 8)
        zero_point = packed.transpose(0, 2, 1).reshape(-1, scale.shape[1])[:outputs]
    index = own.get("weight_g_idx")
    return _layer(codes, scale, zero_point, None if index is None or (index < 0).all() else index)


def _layer(
    codes: NDArray[np.uint8], scale: NDArray[Any], zero_point: NDArray[np.uint8], index: NDArray[Any] | None
) -> FileLayer:
    inputs = codes.shape[1]
    natural = np.arange(inputs) // max(1, inputs // scale.shape[1])
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float16)
    groups = natural if index is None else index.astype(np.int64)
    return FileLayer(codes=codes, scale=stored, zero_point=zero_point, group_of_input=groups)


def _nibbles(words: NDArray[Any]) -> NDArray[np.uint8]:
    """The eight values of each word, from the lowest bits, in a dimension of their own at the end."""
    if words.dtype.name != "int32":
        raise TypeError(f"codes in {words.dtype}, not in int32")
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8).reshape(*words.shape, 4)
    return np.stack((octets % 16, octets // 16), axis=-1).reshape(*words.shape, 8)


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    names = set(_json(folder / "model.safetensors.index.json").get("weight_map", {}).values())
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ArtifactError(f"{folder}: its index names files outside the folder; copy the checkpoint again")
    return [folder / name for name in sorted(names)]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: can't be read ({error}); copy the checkpoint again") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: is no JSON object; copy the checkpoint again")
    return values
