"""What a model's folder says of itself and names, checked before transformers acts on it.

A config.json can ask for more layers than there is time for and more memory than there is; an index of shards, and some
keys of the configurations, name files, which transformers joins to the folder's path and opens, wherever that leads.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import cached_file

from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.foreign import translated
from ovexport.recipe import ModelSpec
from ovexport.storage.bounded import LARGEST_NUMBER, LARGEST_SIZE, MOST_LAYERS, numbers, parse_json, read_bytes
from ovexport.wording import shortened

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
    "d_model",
    "ffn_dim",
)
_WITHOUT_END = "time_step_limit"
"""Mamba's bounds of a time step, of which the upper one is infinite in the checkpoints of many."""

_PLAIN_NAME = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")
_CODES_IN_WORDS = (".qweight", ".weight_packed")
"""Names of tensors that hold eight 4-bit codes in an entry."""

_PICKLES = {".bin", ".pt", ".pth"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_configuration(spec: ModelSpec) -> None:
    """Refuse configurations with numbers that no model has, and those that name files outside the folder.

    Raises:
        ArtifactError: one can't be read, or names a file elsewhere.
        UnsupportedModelError: a number is impossible.
    """
    config = _read(spec, "config.json")
    if config is None:
        return
    for name, number in numbers(config):
        if number == math.inf and name.endswith(_WITHOUT_END):
            continue
        if not math.isfinite(number) or (abs(number) > LARGEST_NUMBER and isinstance(number, int)):
            raise UnsupportedModelError(f"{spec.id}: config.json has {name}={number}; no model has that, mend it")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in (*_LAYERS, *_SIZES):
            _check_size(spec, name, part.get(name))
    weights = config.get("transformers_weights")
    if weights is not None:
        raise UnsupportedModelError(
            f"{spec.id}: config.json names its weights itself (transformers_weights={weights!r:.60}); name the file "
            f"{_SINGLE} and remove that key"
        )
    tokenizer = _read(spec, "tokenizer_config.json") or {}
    files = tokenizer.get("fast_tokenizer_files")
    if files is not None and not (isinstance(files, list) and all(map(_in_folder, files))):
        raise ArtifactError(f"{spec.id}: tokenizer_config.json names files outside the folder; remove them from it")


def _check_size(spec: ModelSpec, name: str, value: Any) -> None:
    most = MOST_LAYERS if name in _LAYERS else LARGEST_SIZE
    for number in value if isinstance(value, list) else [value]:
        if number is not None and (type(number) is not int or not 0 < number <= most):
            raise UnsupportedModelError(
                f"{spec.id}: config.json has {name}={shortened(repr(number), 40)}; it has to be a whole number from 1 "
                f"to {most:,}"
            )


def weight_files(spec: ModelSpec) -> list[Path]:
    """The model's safetensors files; none where it has none of the names that transformers looks for.

    Raises:
        ArtifactError: a file is missing, or the index of shards can't be read or names one that is no safetensors file
            in the folder itself.
    """
    single = _locate(spec, _SINGLE)
    if single is not None:
        return [single]
    index = _read(spec, _INDEX)
    if index is None:
        return []
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(index.get("metadata", {}), dict):
        raise ArtifactError(f"{spec.id}: {_INDEX} has no weight_map from tensors to files; copy the model again")
    for name in shards.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ArtifactError(
                f"{spec.id}: {_INDEX} names {shortened(repr(name), 80)}; it may name *.safetensors files that lie in "
                "the folder itself and nothing else"
            )
    files = {name: _locate(spec, name) for name in sorted(set(shards.values()))}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        raise ArtifactError(
            f"{spec.id}: lacks {len(missing)} of its {len(files)} files of weights, such as {missing[0]}; download or "
            "copy the model again"
        )
    return [path for path in files.values() if path is not None]


def quantization_config(spec: ModelSpec) -> Mapping[str, Any] | None:
    """What config.json says of codes that the weights are stored as; None where they are not.

    Raises:
        ArtifactError: it can't be read.
    """
    config = (_read(spec, "config.json") or {}).get("quantization_config")
    return config if isinstance(config, dict) else None


def check_weight_files(spec: ModelSpec, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse files of weights that hold fewer numbers than the model's configuration asks for, so that nothing is
    allocated for those that are not there.

    Args:
        shapes: of the model's parameters, each once.

    Raises:
        ArtifactError: a file is missing, or damaged: its tensors do not take the bytes that it has.
        UnsupportedModelError: there are too few.
    """
    files = weight_files(spec)
    if not files and Path(spec.id).is_dir():
        pickles = sorted(file.name for file in Path(spec.id).iterdir() if file.suffix in _PICKLES)
        instead = f" ({pickles[0]} is a pickle, which can run code)" if pickles else ""
        raise ArtifactError(
            f"{Path(spec.id) / _SINGLE}: not there, and weights are read from safetensors files alone{instead}; "
            "download or copy the model again"
        )
    needed, held = sum(map(math.prod, shapes)), 0
    for path in files:
        with translated(f"{spec.id}: {path.name}"), safe_open(path, framework="numpy") as file:  # type: ignore[no-untyped-call]
            held += sum(math.prod(file.get_slice(name).get_shape()) * _values_in(name) for name in file.keys())  # noqa: SIM118
    if files and needed > held:
        raise UnsupportedModelError(
            f"{spec.id}: config.json describes {needed:,} weights, and its files hold {held:,}; give the folder of the "
            "whole model, not quantized"
        )


def _values_in(name: str) -> int:
    """How many weights an entry of a tensor holds."""
    return 8 if name.endswith(_CODES_IN_WORDS) else 1


def _in_folder(name: object) -> bool:
    return isinstance(name, str) and "/" not in name and "\\" not in name and ".." not in name


def _read(spec: ModelSpec, name: str) -> Mapping[str, Any] | None:
    """A JSON file of the model's; None where it has none.

    Raises:
        ArtifactError: it can't be read, or is no object.
    """
    path = _locate(spec, name)
    if path is None:
        return None
    with translated(f"{spec.id}: {name}"):
        try:
            values = parse_json(read_bytes(path))
        except ValueError as error:
            raise ArtifactError(f"{spec.id}: {name} can't be read ({error}); copy the model again") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{spec.id}: {name} is no JSON object; copy the model again")
    return values


def _locate(spec: ModelSpec, name: str) -> Path | None:
    """A file of the model's folder, or of the hub's cache, where it is downloaded to first."""
    folder = Path(spec.id)
    if folder.is_dir():
        return folder / name if (folder / name).exists() else None
    cached = cached_file(
        spec.id,
        name,
        revision=spec.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if cached is None else Path(cached)
