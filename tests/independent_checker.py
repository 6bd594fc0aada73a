"""Written from "Write your own checker" in ovexport/verify/README.md alone: openvino and NumPy, nothing of ovexport."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov

STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
CODES = {
    "int4_asym": ("u4", 0, 15),
    "int4_asym_f16zp": ("u4", 0, 15),
    "int4_sym": ("i4", -8, 7),
    "int8_asym": ("u8", 0, 255),
    "int8_sym": ("i8", -128, 127),
}


def tensor(name: str, *files: Path) -> np.ndarray:
    """A tensor of safetensors files, floats widened to float32; a bfloat16 is the upper half of one."""
    for data in (np.memmap(file, np.uint8, "r") for file in files):
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if info := json.loads(data[8:start].tobytes()).get(name):
            begin, end = info["data_offsets"]
            raw = data[start + begin : start + end].view(STORED[info["dtype"]]).reshape(info["shape"])
            if info["dtype"] == "I64":
                return raw
            return (raw.astype(np.uint32) << 16).view(np.float32) if info["dtype"] == "BF16" else raw.astype(np.float32)
    raise KeyError(name)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of float32 values, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def by_nncf(layer: dict, weight: np.ndarray, file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, zero point (0 where symmetric) and codes of a layer with NNCF's arithmetic."""
    name, active, (kind, low, high) = layer["name"], layer["active_rank"], CODES[layer["mode"]]
    if layer["rank"]:
        a, b = tensor(f"{name}.lora_A", file)[:active], tensor(f"{name}.lora_B", file)[:, :active]
        product = bfloat16((b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32))
        product.ravel()[tensor(f"{name}.product_positions", file)] = tensor(f"{name}.product_values", file)
        weight = weight + product
    start, span = tensor(f"{name}.input_low", file), tensor(f"{name}.input_range", file)
    steps, symmetric = np.float32(high - low), low < 0
    inverse = steps * (np.float32(1) / span) if kind in ("u4", "i4") else steps / span
    position = np.clip(weight.reshape(len(span), -1, layer["group_size"]), start, start + span) - start
    value = np.rint(position * inverse - np.rint(-start * inverse)) / inverse
    step = tensor(f"{name}.scale", file) / np.float32(-low) if symmetric else span / steps
    step = np.where(abs(step) < np.float32(2**-23), np.float32(2**-23), step)
    zero_point = np.zeros((), np.float32) if symmetric else np.clip(-np.rint(start / step), low, high)
    return step.astype(np.float16), zero_point, np.clip(np.rint(value / step + zero_point), low, high)


def by_ovexport(layer: dict, weight: np.ndarray, file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, zero point (0 where symmetric) and codes of any other layer."""
    name, active, (_, low, high) = layer["name"], layer["active_rank"], CODES[layer["mode"]]
    if layer["rank"] and active != 0 and layer["adapter"] == "lora":
        a, b = tensor(f"{name}.lora_A", file)[:active], tensor(f"{name}.lora_B", file)[:, :active]
        weight = weight + (b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32)
    span = tensor(f"{name}.scale", file) / -low if low < 0 else abs(tensor(f"{name}.input_range", file)) / high
    step = np.copysign(np.maximum(abs(span).astype(np.float16).astype(np.float32), 2**-24), span)
    zero_point = (
        np.zeros((), np.float32) if low < 0 else np.clip(np.rint(-tensor(f"{name}.input_low", file) / step), low, high)
    )
    codes = np.clip(np.rint(weight.reshape(len(step), -1, layer["group_size"]) / step) + zero_point, low, high)
    return step, zero_point, codes


def expected(layer: dict, weight: np.ndarray, file: Path) -> dict[tuple[str, str], np.ndarray]:
    """The values of the constants that the IR must hold for a layer, by their name and type."""
    name, (kind, low, _) = layer["name"], CODES[layer["mode"]]
    rule = by_nncf if layer.get("arithmetic") == "nncf" else by_ovexport
    step, zero_point, codes = rule(layer, weight.T if layer["transposed"] else weight, file)
    constants = {(name, kind): codes, (f"{name}/scale", "f16"): step}
    if low >= 0:
        float16 = layer["mode"] == "int4_asym_f16zp"
        shipped = shifted(layer, step, zero_point, file) if layer["adapter"] == "qalora" else zero_point
        shipped = shipped.astype(np.float16) if float16 else np.clip(np.rint(shipped), 0, 15 if kind == "u4" else 255)
        constants[f"{name}/zero_point", "f16" if float16 else kind] = shipped
    return constants


def shifted(layer: dict, step: np.ndarray, zero_point: np.ndarray, file: Path) -> np.ndarray:
    """Zero points with the adapter in them, not rounded to their type yet."""
    if layer["rank"] == 0:
        return zero_point
    a, b = (tensor(f"{layer['name']}.lora_{of}", file).astype(np.float64) for of in "AB")
    added = (b @ a * layer["adapter_factor"])[..., None]
    return np.clip((zero_point - added / step.astype(np.float64)).astype(np.float32), -65504, 65504)


def adapter_differs(layer: dict, adapters: Path, ir: Path) -> bool:
    """Whether an adapter beside the codes is not the checkpoint's."""
    name, file = layer["name"], ir / "adapter" / "adapter_model.safetensors"
    up = (tensor(f"{name}.lora_B", adapters).astype(np.float64) * layer["adapter_factor"]).astype(np.float32)
    want = {"A": tensor(f"{name}.lora_A", adapters), "B": up} if up.any() else {}
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return any(not np.array_equal(tensor(f"{module}.lora_{of}.weight", file), one) for of, one in want.items())


def main(ir: Path, checkpoint: Path, model: Path) -> int:
    """Compare every packed layer and tuned norm, print those that differ, and return the exit status."""
    ops = [op for op in ov.Core().read_model(ir / "openvino_model.xml").get_ops() if op.get_type_name() == "Constant"]
    constants = {(op.get_friendly_name(), op.get_element_type().get_type_name()): op for op in ops}
    record, adapters = json.loads((checkpoint / "checkpoint.json").read_text()), checkpoint / "adapters.safetensors"
    layers, mismatches = [layer for layer in record["layers"] if layer["mode"] in CODES], 0
    for name, layer in ((layer["name"], layer) for layer in layers):
        files = (
            checkpoint.glob("weights.safetensors")
            if name in record["replaced_weights"]
            else model.glob("*.safetensors")
        )
        want = expected(layer, tensor(name, *files), adapters)
        # Given a dtype, get_data unpacks the 4-bit constants, which `data` hands out two codes to a byte.
        held = {key: constants[key].get_data(dtype=np.float32).ravel() for key in want if key in constants}
        if wrong := [key for key in want if key not in held or not np.array_equal(held[key], want[key].ravel())]:
            print(f"{name} differs or is missing:", *wrong)
            mismatches += 1
        if layer.get("adapter") == "beside" and layer["rank"] and adapter_differs(layer, adapters, ir):
            print(f"the adapter of {name} differs")
            mismatches += 1
    for norm in record.get("norms", ()):
        values, node = tensor(norm["name"], adapters) + np.float32(norm["added"]), constants.get((norm["name"], "f32"))
        if node is None or not np.array_equal(node.get_data().ravel(), values.ravel()):
            print(f"{norm['name']} differs or is missing")
            mismatches += 1
    print(f"{len(layers)} layers, {mismatches} mismatches")
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))
