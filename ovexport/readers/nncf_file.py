"""What is in a checkpoint file of NNCF's examples: a pickle that torch.save wrote, read without running any of it.

No class that the file names is imported: a quantizer is known by its name, or the file is refused.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from ovexport.errors import ArtifactError
from ovexport.foreign import exhausted
from ovexport.models.architecture import parameter_of_hook
from ovexport.storage.records import Record

CURE = "give the file that the example's save_checkpoint wrote"
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)

Positive = Annotated[int, Field(gt=0)]
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerClass:
    """What a class of quantizers is; `elastic` ones have adapters of which the first ranks can be used alone."""

    symmetric: bool
    adapter: bool = False
    elastic: bool = False

    @property
    def bits(self) -> int:
        """Of its codes: with adapters 4, without (embeddings and output embeddings) 8."""
        return 4 if self.adapter else 8

    @property
    def ranges(self) -> tuple[str, ...]:
        """The parameters that set scale and zero point."""
        return ("scale",) if self.symmetric else ("input_low", "input_range")

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the file holds of such a quantizer."""
        sign = ("signed_tensor",) if self.symmetric else ()
        adapters = ("lora_A", "lora_B") if self.adapter else ()
        return ("_num_bits", "enabled", *sign, *self.ranges, *adapters)


_CLASSES = {
    "AsymmetricQuantizer": QuantizerClass(symmetric=False),
    "SymmetricQuantizer": QuantizerClass(symmetric=True),
    "AsymmetricLoraQuantizer": QuantizerClass(symmetric=False, adapter=True),
    "SymmetricLoraQuantizer": QuantizerClass(symmetric=True, adapter=True),
    "AsymmetricLoraNLSQuantizer": QuantizerClass(symmetric=False, adapter=True, elastic=True),
    "SymmetricLoraNLSQuantizer": QuantizerClass(symmetric=True, adapter=True, elastic=True),
}
_MODULE_PATHS = ("nncf.torch.quantization.layers", "")  # files of older versions have no path


class _RangeSpec(Record):
    """Of NNCF's PTQuantizerSpec, with what can be represented."""

    num_bits: int
    mode: str
    signedness_to_force: Literal[True] | None
    narrow_range: Literal[False]
    half_range: Literal[False]
    scale_shape: tuple[Positive, ...]
    logarithm_scale: bool
    is_quantized_on_export: bool = False


class _AdapterSpec(Record):
    """Of NNCF's PTLoraSpec; `active_lora_rank` is the largest rank in every file, whatever was active."""

    lora_rank: Positive
    active_lora_rank: Positive | None = None
    orig_weight_shape: tuple[Positive, Positive]
    weight_shape: tuple[int, ...]


class _Command(Record):
    """One entry of `compression_state`."""

    hook_names_in_model: list[str]
    module_path: str = ""
    module_cls_name: str
    module_config: dict[str, Any]


class _Config(Record):
    """What nncf.torch.get_config gives."""

    compression_state: list[_Command] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredQuantizer:
    """A quantizer of the file.

    Attributes:
        parameter: that it is on, as the file names it.
        rank: of its adapter; 0 without one.
        tensors: by name; ranges have the shape (output, groups, 1) or (output, 1).
    """

    parameter: str
    quantizer_class: QuantizerClass
    rank: int
    tensors: Mapping[str, Tensor]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of its ranges."""
        return tuple(self.tensors[self.quantizer_class.ranges[0]].shape)


def read_file(path: Path) -> dict[str, Any]:
    """The file's content, nothing of it executed.

    Raises:
        ArtifactError: it can't be read, needs more than tensors and NNCF's one enumeration, or has other parts.
    """
    from nncf.common.quantization.structs import QuantizationScheme

    def member(owner: Any, name: object) -> Any:
        """What stands for `getattr`, which Python 3.11.2 writes for a member of an enumeration."""
        if owner is not QuantizationScheme or name not in owner.__members__:
            raise ValueError("GLOBAL getattr")
        return owner[name]

    _check_archive(path)
    try:
        with torch.serialization.safe_globals([QuantizationScheme, (member, "builtins.getattr")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes torch raise anything at all
        ours = exhausted(error, str(path))
        if ours is not None:
            raise ours from error
        refused = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to run the pickle
        what = f"refers to {refused[1]}" if refused else "holds more than tensors"
        raise ArtifactError(f"{path}: {what}, which no checkpoint needs; nothing of it was run; {CURE}") from error
    required = {"nncf_state_dict", "nncf_config"}
    if not isinstance(content, dict) or not required <= set(content) <= required | {"model_state"}:
        parts = ", ".join(sorted(map(str, content))[:5]) if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"{path}: holds {parts or 'nothing'}, not nncf_state_dict and nncf_config; {CURE}")
    return content


def _check_archive(path: Path) -> None:
    """Compare the checksums that torch.save wrote, which torch.load does not.

    Raises:
        ArtifactError: the file is no archive of torch.save's, truncated or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
            damaged = None if packed else archive.testzip()
    except Exception as error:  # a damaged archive makes zipfile raise many kinds
        raise ArtifactError(
            f"{path}: not a checkpoint file of NNCF's examples, or truncated ({error}); {CURE}"
        ) from error
    if packed:
        raise ArtifactError(f"{path}: holds the compressed part {packed[0]}, which torch.save writes none of; {CURE}")
    if damaged is not None:
        raise ArtifactError(f"{path}: damaged, the checksum of its {damaged} is wrong; copy it again")


def stored_quantizers(origin: str, content: Mapping[str, Any]) -> tuple[StoredQuantizer, ...]:
    """Every quantizer of the file, checked, in its order.

    Raises:
        ArtifactError: one is of an unknown class, incomplete or inconsistent.
    """
    config = _checked(origin, "nncf_config", _Config, content["nncf_config"])
    stored, left = [], dense_tensors(origin, "nncf_state_dict", content["nncf_state_dict"])
    for command in config.compression_state:
        quantizer_class = _CLASSES.get(command.module_cls_name)
        if quantizer_class is None or command.module_path not in _MODULE_PATHS:
            raise ArtifactError(
                f"{origin}: holds a {command.module_path}.{command.module_cls_name} on "
                f"{', '.join(command.hook_names_in_model)}; only weight quantizers can be adopted: "
                "tune without AWQ where it adds a multiplication, and without quantized activations"
            )
        for hook in command.hook_names_in_model:
            if not re.fullmatch(r"post_hooks\.[^.]+__0\.0", hook):
                raise ArtifactError(f"{origin}: quantizes {hook}, which is no weight; only weights can be adopted")
            tensors = {name: left.pop(f"{hook}.{name}") for name in quantizer_class.tensors if f"{hook}.{name}" in left}
            stored.append(_stored(origin, parameter_of_hook(hook), quantizer_class, command.module_config, tensors))
    if left:
        raise ArtifactError(f"{origin}: holds a tensor {next(iter(left))} that its nncf_config does not have; {CURE}")
    return tuple(stored)


def _stored(
    origin: str,
    parameter: str,
    quantizer_class: QuantizerClass,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> StoredQuantizer:
    """A quantizer, once its tensors are those that its configuration tells of."""
    missing = [name for name in quantizer_class.tensors if name not in tensors]
    if missing:
        raise ArtifactError(f"{origin}: has no {missing[0]} of {parameter}; the file is incomplete, copy it again")
    spec = _checked(origin, parameter, _RangeSpec, config.get("qspec") if quantizer_class.adapter else config)
    adapter = _checked(origin, parameter, _AdapterSpec, config.get("lspec")) if quantizer_class.adapter else None
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(quantizer_class.ranges, spec.scale_shape)
    if adapter is not None:
        rows, columns = adapter.orig_weight_shape
        shapes |= {"lora_A": (adapter.lora_rank, columns), "lora_B": (rows, adapter.lora_rank)}
    flags = {"_num_bits": spec.num_bits, "enabled": 1, "signed_tensor": 1}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (1,))
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{origin}: {name} of {parameter} has the shape {tuple(tensor.shape)}, not {shape}")
        if name in flags and tensor.item() != flags[name]:
            raise ArtifactError(
                f"{origin}: {name} of {parameter} is {tensor.item()}, and only {flags[name]} can be done"
            )
    if spec.num_bits != quantizer_class.bits:
        adapter_words = "with" if quantizer_class.adapter else "without"
        raise ArtifactError(
            f"{origin}: {parameter} has {spec.num_bits} bits {adapter_words} an adapter; only 4 bits with one and 8 "
            "without can be adopted"
        )
    return StoredQuantizer(
        parameter=parameter,
        quantizer_class=quantizer_class,
        rank=0 if adapter is None else adapter.lora_rank,
        tensors=dict(tensors),
    )


def _checked(origin: str, what: str, record_type: type[AnyRecord], value: Any) -> AnyRecord:
    try:
        return record_type.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (what, *first["loc"])))
        raise ArtifactError(f"{origin}: {place}: {first['msg']}, not {first['input']!r:.60}; {CURE}") from error


def dense_tensors(origin: str, what: str, value: Any) -> dict[str, Tensor]:
    """A state dict's dense, finite tensors by name."""
    if not isinstance(value, dict):
        raise ArtifactError(f"{origin}: its {what} is a {type(value).__name__}, not tensors by name; {CURE}")
    for name, tensor in value.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not dense or tensor.dtype not in _DTYPES:
            raise ArtifactError(f"{origin}: {name!r:.60} in its {what} is no dense tensor of numbers; {CURE}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ArtifactError(
                f"{origin}: {name} has the shape {tuple(tensor.shape)} and {tensor.untyped_storage().nbytes()} bytes, "
                f"which are too few for it; {CURE}"
            )
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{origin}: {name} holds numbers that are not finite; give a sound checkpoint")
    return dict(value)
