"""Folders of 4-bit models, written after each format's documentation and sharing nothing with what reads them: words
are put together bit by bit from Python's own whole numbers."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
KINDS: dict[str, dict[str, Any]] = {
    "GPTQ v1": {"kind": "gptq gptq"},
    "GPTQ v1 asymmetric": {"kind": "gptq gptq", "symmetric": False},
    "GPTQ v2 asymmetric": {"kind": "gptq gptq_v2", "symmetric": False, "group_size": -1},
    "GPTQ act-order": {"kind": "gptq gptq", "act_order": True},
    "AWQ": {"kind": "awq", "symmetric": False},
    "AutoRound": {"kind": "auto-round auto_round:auto_gptq"},
    "AutoRound plain": {"kind": "auto-round auto_round", "symmetric": False},
    "AutoRound as AWQ": {"kind": "auto-round auto_round:auto_awq", "symmetric": False},
    "compressed-tensors": {"kind": "compressed-tensors", "scale_dtype": torch.bfloat16, "group_size": 16},
    "compressed-tensors asymmetric": {"kind": "compressed-tensors", "symmetric": False},
    "compressed-tensors act-order": {"kind": "compressed-tensors", "symmetric": False, "act_order": True},
    "compressed-tensors per channel": {"kind": "compressed-tensors", "group_size": -1},
}
LAYER = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a layer is: codes (output, input) from 0 to 15, scales and zero points (output, groups), and the group of
    each input."""

    codes: NDArray[np.int64]
    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    group: NDArray[np.int64]

    @property
    def weight(self) -> Tensor:
        """The de-quantized weight, float32."""
        values = (self.codes - self.zero_point[:, self.group]) * self.scale[:, self.group]
        return torch.from_numpy(values).float()


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder, and what its layers are by the name of the module."""

    path: Path
    layers: dict[str, Truth]

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of the de-quantized model in torch, in float32."""
        state = load_file(self.path / "model.safetensors")
        state = {name: value.float() for name, value in state.items() if value.is_floating_point()}
        state |= {f"{name}.weight": truth.weight for name, truth in self.layers.items()}
        config = json.loads((self.path / "config.json").read_text())
        del config["quantization_config"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"dtype": "float32"})).eval()
        missing, _ = model.load_state_dict(state, strict=False)
        assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
        with torch.no_grad():
            return np.asarray(model(input_ids=torch.from_numpy(tokens)).logits.numpy())


def round_to_nearest(
    weight: Tensor,
    group_size: int,
    dtype: torch.dtype,
    *,
    symmetric: bool,
    negative: bool,
    shuffled: np.random.Generator | None,
) -> Truth:
    """A layer's codes.

    Args:
        dtype: that scales are stored in.
        negative: symmetric scales are negative where the largest entry is positive, as AutoRound has them; GPTQ's are
            not.
        shuffled: draws the group of each input; groups follow each other when None.
    """
    values = weight.double().numpy()
    inputs = values.shape[1]
    size = inputs if group_size == -1 else group_size
    group = np.arange(inputs) // size
    if shuffled is not None:
        group = shuffled.permutation(group)
    scale = np.empty((len(values), inputs // size))
    zero_point = np.full(scale.shape, 8)
    for index in range(scale.shape[1]):
        low, high = values[:, group == index].min(1), values[:, group == index].max(1)
        if symmetric:
            scale[:, index] = np.where(high > -low, -high if negative else high, -low) / 8
        else:
            low, high = np.minimum(low, -1e-4), np.maximum(high, 1e-4)
            scale[:, index] = (high - low) / 15
            zero_point[:, index] = np.clip(np.round(-low / scale[:, index]), 1, 15)
    scale = torch.from_numpy(scale).to(dtype).double().numpy()
    codes = np.clip(np.round(values / scale[:, group]) + zero_point[:, group], 0, 15).astype(np.int64)
    return Truth(codes=codes, scale=scale, zero_point=zero_point, group=group)


def words(values: NDArray[np.int64], order: Sequence[int] = range(8)) -> Tensor:
    """Rows of 4-bit values, eight to an int32: the word's nibble k is value `order[k]` of its eight."""
    rows = []
    for row in values.tolist():
        padded = row + [0] * (-len(row) % 8)
        packed = [sum(padded[at + order[k]] << 4 * k for k in range(8)) for at in range(0, len(padded), 8)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(truth: Truth, *, version: int, act_order: bool = False) -> dict[str, Tensor]:
    """GPTQ: words run down the inputs; zero points run along the outputs, one less in version 1."""
    tensors = {
        "qweight": words(truth.codes).T,
        "qzeros": words(truth.zero_point.T - (1 if version == 1 else 0)),
        "scales": torch.from_numpy(truth.scale.T).half(),
    }
    return tensors | ({"g_idx": torch.from_numpy(truth.group).int()} if act_order else {})


def awq(truth: Truth) -> dict[str, Tensor]:
    """AWQ's gemm: words run along the outputs, interleaved."""
    return {
        "qweight": words(truth.codes.T, AWQ_ORDER),
        "qzeros": words(truth.zero_point.T, AWQ_ORDER),
        "scales": torch.from_numpy(truth.scale.T).half(),
    }


def compressed(truth: Truth, *, symmetric: bool, act_order: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized: words run along the inputs, those of zero points down the outputs."""
    tensors = {
        "weight_packed": words(truth.codes),
        "weight_scale": torch.from_numpy(truth.scale).to(dtype),
        "weight_shape": torch.tensor(truth.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(truth.zero_point.T).T
    return tensors | ({"weight_g_idx": torch.from_numpy(truth.group).int()} if act_order else {})


def configuration(kind: str, group_size: int, *, symmetric: bool, act_order: bool) -> dict[str, Any]:
    """The `quantization_config` of a kind of folder."""
    common = {"bits": 4, "group_size": group_size, "sym": symmetric}
    method, _, variant = kind.partition(" ")
    match method:
        case "gptq":
            return common | {"quant_method": method, "checkpoint_format": variant, "desc_act": act_order}
        case "awq":
            return common | {"quant_method": method, "zero_point": True, "version": "gemm"}
        case "auto-round":
            return common | {"quant_method": method, "packing_format": variant, "data_type": "int"}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    if group_size == -1:
        weights |= {"strategy": "channel", "group_size": None}
    weights["actorder"] = "group" if act_order else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packer(kind: str, *, symmetric: bool, act_order: bool, dtype: torch.dtype) -> Callable[[Truth], dict[str, Tensor]]:
    """What packs a layer of a kind of folder."""
    if kind.startswith("compressed"):
        return lambda truth: compressed(truth, symmetric=symmetric, act_order=act_order, dtype=dtype)
    if "awq" in kind:
        return awq
    less_one = kind in ("gptq gptq", "auto-round auto_round:auto_gptq")
    return lambda truth: gptq(truth, version=1 if less_one else 2, act_order=act_order)


def write_packed(
    model: Path,
    out: Path,
    kind: str,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    negative: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    packed: tuple[str, ...] = ("_proj.weight",),
    left: Sequence[str] = (),
) -> Written:
    """A model's weights packed to 4 bits whose names end in one of `packed` and have no part of `left` in them.

    Args:
        kind: the method and, after a space, its variant: "gptq gptq_v2", "awq", "auto-round auto_round:auto_gptq",
            "compressed-tensors".
    """
    shutil.copytree(model, out)
    state = load_file(out / "model.safetensors")
    pack = packer(kind, symmetric=symmetric, act_order=act_order, dtype=scale_dtype)
    generators = {True: lambda: np.random.default_rng(0), False: lambda: None}
    layers = {}
    for name in [name for name in state if name.endswith(packed) and not any(part in name for part in left)]:
        weight = state.pop(name)
        module = name.removesuffix(".weight")
        truth = round_to_nearest(
            weight, group_size, scale_dtype, symmetric=symmetric, negative=negative, shuffled=generators[act_order]()
        )
        layers[module] = truth
        state |= {f"{module}.{key}": value.contiguous() for key, value in pack(truth).items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = configuration(kind, group_size, symmetric=symmetric, act_order=act_order)
    (out / "config.json").write_text(json.dumps(config))
    return Written(path=out, layers=layers)


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """The folder with a change of its tensors and its config.json."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def configured(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, config: config["quantization_config"].update(values)


def with_tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda tensors, _: tensors.update({f"{LAYER}.{key}": change(tensors[f"{LAYER}.{key}"])})


def without(key: str) -> Callable[..., None]:
    return lambda tensors, _: tensors.pop(f"{LAYER}.{key}")


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = value
        return tensor

    return fill
