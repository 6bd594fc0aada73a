"""Written from the README's section "Write your own checker" alone: openvino and NumPy, nothing of ovexport."""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov

STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
CODES = {"int4_asym": ("u4", 0, 15), "int4_sym": ("i4", -8, 7), "int8_asym": ("u8", 0, 255)}


def tensor(name: str, *files: Path) -> np.ndarray:
    """A tensor of safetensors files, widened to float32; a bfloat16 is the upper half of one."""
    for data in (np.memmap(file, np.uint8, "r") for file in files):
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        if info := json.loads(data[8:start].tobytes()).get(name):
            begin, end = info["data_offsets"]
            raw = data[start + begin : start + end].view(STORED[info["dtype"]]).reshape(info["shape"])
            return (raw.astype(np.uint32) << 16).view(np.float32) if info["dtype"] == "BF16" else raw.astype(np.float32)
    raise KeyError(name)


def expected(layer: dict, weight: np.ndarray, file: Path) -> dict[tuple[str, str], np.ndarray]:
    """The values of the constants that the IR must hold for a layer, by their name and type."""
    name, active, (kind, low, high) = layer["name"], layer["active_rank"], CODES[layer["mode"]]
    symmetric = kind == "i4"
    weight = weight.T if layer["transposed"] else weight
    if layer["rank"] and active != 0:
        a, b = tensor(f"{name}.lora_A", file)[:active], tensor(f"{name}.lora_B", file)[:, :active]
        weight = weight + (b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32)
    span = tensor(f"{name}.scale", file) / 8 if symmetric else abs(tensor(f"{name}.input_range", file)) / high
    step = np.copysign(np.maximum(abs(span).astype(np.float16).astype(np.float32), 2**-24), span)
    zero_point = 0 if symmetric else np.clip(np.rint(-tensor(f"{name}.input_low", file) / step), low, high)
    codes = np.clip(np.rint(weight.reshape(len(step), -1, layer["group_size"]) / step) + zero_point, low, high)
    constants = {(name, kind): codes, (f"{name}/scale", "f16"): step}
    return constants if symmetric else constants | {(f"{name}/zero_point", kind): zero_point}


def main(ir: Path, checkpoint: Path, model: Path) -> int:
    """Compare every packed layer, print those that differ, and return the exit status."""
    ops = [op for op in ov.Core().read_model(ir / "openvino_model.xml").get_ops() if op.get_type_name() == "Constant"]
    constants = {(op.get_friendly_name(), op.get_element_type().get_type_name()): op for op in ops}
    record, adapters = json.loads((checkpoint / "checkpoint.json").read_text()), checkpoint / "adapters.safetensors"
    layers, mismatches = [layer for layer in record["layers"] if layer["mode"] in CODES], 0
    for name, layer in ((layer["name"], layer) for layer in layers):
        files = checkpoint.glob("weights.safetensors") if name in record["changed"] else model.glob("*.safetensors")
        want = expected(layer, tensor(name, *files), adapters)
        # Given a dtype, get_data unpacks the 4-bit constants, which `data` hands out two codes to a byte.
        held = {key: constants[key].get_data(dtype=np.float32).ravel() for key in want if key in constants}
        if wrong := [key for key in want if key not in held or not np.array_equal(held[key], want[key].ravel())]:
            print(f"{name} differs or is missing:", *wrong)
            mismatches += 1
    print(f"{len(layers)} layers, {mismatches} mismatches")
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))
