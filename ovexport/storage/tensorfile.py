"""Tensors on disk as safetensors, read and written with NumPy alone, so that the target device needs no torch.

The format: eight bytes, little endian, the length of a JSON header; the header, {name: {dtype, shape, data_offsets}};
the data. Source: the safetensors format description.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ovexport.errors import ArtifactError
from ovexport.storage.bounded import LARGEST_HEADER_BYTES, LARGEST_NUMBER, MOST_DIMENSIONS, parse_json
from ovexport.wording import shortened

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "BOOL": "?"}
_WRITTEN_AS = _DTYPES | {"BF16": "<u2"}  # NumPy has no bfloat16: its bits are written


class TensorFile(Mapping[str, NDArray[Any]]):
    """The tensors of a safetensors file, memory-mapped: a tensor is read when it is asked for.

    bfloat16, which NumPy lacks, comes as float32, which holds each of its values exactly.

    Raises:
        ArtifactError: the file is missing, truncated or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, LARGEST_HEADER_BYTES):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = parse_json(file.read(length), largest=LARGEST_HEADER_BYTES)
            header.pop("__metadata__", None)
            ends = [_checked_end(name, entry) for name, entry in header.items()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{path}: not a readable safetensors file ({error}); make it again") from error
        self._header: dict[str, dict[str, Any]] = header
        if any(8 + length + end > size for end in ends):
            raise ArtifactError(f"{path}: truncated, {size} bytes; copy it again or make it again")
        self._data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if size > 8 + length else np.empty(0)

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        raw = self._data[begin:end]
        if entry["dtype"] == "BF16":
            widened = raw.view("<u2").astype(np.uint32) << 16
            return widened.view(np.float32).reshape(entry["shape"])
        return raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def require(self, name: str) -> NDArray[Any]:
        """The tensor of that name.

        Raises:
            ArtifactError: the file has no such tensor.
        """
        if name not in self._header:
            raise ArtifactError(f"{self._path}: holds no tensor {name}; it is of another run, make it again")
        return self[name]


def write_tensors(tensors: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write the tensors, sorted by name so that equal tensors give equal files."""
    save_file({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, path)


def _checked_end(name: str, entry: Mapping[str, Any]) -> int:
    """Where a tensor's bytes end.

    Raises:
        ValueError: they are not as many as its dtype and shape take.
    """
    begin, end = entry["data_offsets"]
    numbers = (begin, end, *entry["shape"])
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{name}: offsets {entry['data_offsets']} and shape {entry['shape']}")
    if len(entry["shape"]) > MOST_DIMENSIONS or math.prod(max(1, length) for length in entry["shape"]) > LARGEST_NUMBER:
        raise ValueError(f"{name}: shape {shortened(str(entry['shape']))}")
    width = 2 if entry["dtype"] == "BF16" else np.dtype(_DTYPES[entry["dtype"]]).itemsize
    if end - begin != width * math.prod(entry["shape"]):
        raise ValueError(f"{name}: {end - begin} bytes for {entry['dtype']} {entry['shape']}")
    return int(end)


class TensorWriter:
    """A safetensors file written tensor by tensor, so that no more than one has to be in memory.

    Args:
        layout: dtype (as the format names it: "U8", "F16", …) and shape of each tensor to come; bfloat16 ("BF16")
            comes as its bits, uint16.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        widths = {name: np.dtype(_WRITTEN_AS[dtype]).itemsize for name, (dtype, _) in layout.items()}
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name in sorted(layout, key=lambda name: (-widths[name], name)):  # the widest first: all are aligned
            dtype, shape = layout[name]
            begin, end = end, end + widths[name] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 64)
        self._header = header
        self._start = 8 + len(encoded)
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.truncate(self._start + end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor.

        Raises:
            ValueError: it is not of the dtype and shape that the layout gave it.
        """
        entry = self._header[name]
        if values.dtype != np.dtype(_WRITTEN_AS[entry["dtype"]]) or list(values.shape) != entry["shape"]:
            raise ValueError(f"{name}: {values.dtype} {values.shape} where the layout has {entry}")
        self._file.seek(self._start + entry["data_offsets"][0])
        self._file.write(np.ascontiguousarray(values).data)
