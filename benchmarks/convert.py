"""Time and memory of compressing and converting, for ovexport, for NNCF with optimum-intel, and for optimum-cli.

python benchmarks/convert.py [--quick] [--json] [--save]

Each side runs in a process of its own, one after the other, round by round. The time of imports does not count.
`RssAnon` is how much anonymous memory grew since the work began; peak RSS is the process's largest. Ours and the
documented way start from a checkpoint of the same rank; optimum-cli quantizes without tuning.

What rounds with calibration text runs once, on 128 x 256 random tokens: ours with both sides' moments, from the model
to its IR, and NNCF's AWQ + Scale Estimation, from the BF16 IR to its own. So does the rounding of the largest matrices
of a 1.7 B model, without gathering moments.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
import openvino as ov
from process import measured
from ptq import post_training
from shapes import M30, M360, M1700, moved, save_random_llama

from ovexport.artifacts import IR, Checkpoint, PackedWeights, PreparedData
from ovexport.recipe import CompressSpec, ConvertSpec, ModelSpec
from ovexport.storage.tensorfile import write_tensors
from ovexport.versions import stack_versions

GROUP_SIZE, RANK = 64, 64
SEQUENCES, LENGTH = 128, 256
LARGEST_UP, LARGEST_DOWN = (f"two-sided rounding of {name}_proj of a 1.7 B model, ours" for name in ("up", "down"))
TWO_SIDED, AWQ = "two-sided rounding, to the IR, ours", "AWQ + Scale Estimation, to the IR, NNCF"
RATIOS = {
    "compress": ("compress, ours", "compress, NNCF"),
    "trace, strip and convert": (
        "trace, strip and convert, ours",
        "strip and export with baseline, NNCF + optimum",
    ),
    "whole export": ("trace, strip and convert, ours", "export without tuning, optimum-cli"),
    "rounding with text": (TWO_SIDED, AWQ),
}


def main() -> None:
    """Run every side in turn and show what each took."""
    parser = command.parser(__doc__, "convert", "a 30 M model instead of the 360 M one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker[0], Path(options.worker[1]))
        return
    shape = M30 if options.quick else M360
    with TemporaryDirectory() as folder:
        save_random_llama(Path(folder) / "model", shape)
        _worker("prepare", Path(folder))
        taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in [side for side in SIDES if number == 0 or side not in ONCE]:
                taken[side].append(_worker(side, Path(folder)))
    figures = {side: {key: [one[key] for one in found] for key in found[0]} for side, found in taken.items()}
    document = {
        "figures": figures,
        "ratios": _ratios(figures),
        "conditions": {
            "model": f"random Llama, {shape}",
            "group_size": GROUP_SIZE,
            "rank": RANK,
            "rounds": options.rounds,
            "calibration": [SEQUENCES, LENGTH],
            "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        },
        "versions": stack_versions(),
    }
    command.publish(document, "convert", options)


def _ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Ours over theirs, round by round: the median, and the range from the least to the largest."""
    ratios = {}
    for name, (ours, theirs) in RATIOS.items():
        for figure in ("seconds", "peak_rss_bytes"):
            values = np.divide(figures[ours][figure], figures[theirs][figure])
            ratios[f"{figure} {name}"] = {
                "median": float(np.median(values)),
                "range": [float(values.min()), float(values.max())],
            }
    return ratios


def _worker(side: str, folder: Path) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--worker", side, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _work(side: str, folder: Path) -> None:
    if side == "prepare":
        _prepare(folder)
        print("{}")
        return
    modules, work = SIDES[side]
    for module in modules:
        importlib.import_module(module)
    with measured() as figures:
        work(folder)
    print(json.dumps(figures))


def _model(folder: Path) -> ModelSpec:
    return ModelSpec(id=str(folder / "model"))


def _prepare(folder: Path) -> None:
    """What the sides start from: our checkpoint, the traced IR, and NNCF's checkpoint as its examples save it."""
    import nncf.torch
    import torch

    _compress(folder)
    moved(Checkpoint(folder / "compressed"), _model(folder), folder / "checkpoint")
    _trace(folder)
    (folder / "text").mkdir()
    tokens = np.random.default_rng(0).integers(2, 1000, (SEQUENCES, LENGTH)).astype(np.int32)
    write_tensors({"train": tokens}, folder / "text" / "tokens.safetensors")
    model = _compressed_by_nncf(folder)
    state = {"nncf_config": nncf.torch.get_config(model), "nncf_state_dict": _hook_state(model)}
    torch.save(state, folder / "nncf.pth")


def _hook_state(model: Any) -> dict[str, Any]:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    return dict(get_hook_storage(model).state_dict())


def _compress(folder: Path) -> None:
    from ovexport.compress import compress

    spec = CompressSpec(group_size=GROUP_SIZE, rank=RANK, rounding="nearest")
    compress(_model(folder), spec, PreparedData(folder), 0, folder / "compressed")


def _round_on_both_sides(folder: Path) -> None:
    from ovexport.compress import compress

    spec = CompressSpec(group_size=GROUP_SIZE, rank=RANK, calibration_sequences=SEQUENCES)
    checkpoint = compress(_model(folder), spec, PreparedData(folder / "text"), 0, folder / "two-sided")
    _packed_and_converted(checkpoint, folder, "two-sided")


def _quantize_by_awq(folder: Path) -> None:
    spec = CompressSpec(group_size=GROUP_SIZE, calibration_sequences=SEQUENCES)
    tokens = PreparedData(folder / "text").tokens("train")
    post_training(IR(folder / "bf16"), spec, tokens, folder / "awq", awq=True, scale_estimation=True)


def _round_matrix(out_features: int, in_features: int) -> None:
    """Round a matrix of random weights with random moments, as the stage does with each."""
    import torch

    from ovexport.compress.moments import Moments
    from ovexport.compress.successive import Curvature, Grid, refined
    from ovexport.weights.adapters import make_quantizer
    from ovexport.weights.layer import WeightMatrix
    from ovexport.weights.policy import format_layer

    torch.manual_seed(0)
    matrix = WeightMatrix(name="matrix", kind="linear", out_features=out_features, in_features=in_features)
    quantizer = make_quantizer(format_layer(matrix, "int4_asym", group_size=GROUP_SIZE))
    weight = torch.randn(out_features, in_features)
    quantizer.fit_grid(weight)
    sides = (torch.randn(2 * size, size) for size in (in_features, out_features))
    inputs, outputs = (values.T @ values / len(values) for values in sides)
    refined(weight, Grid.of(quantizer), Curvature.of(Moments(inputs, outputs), "matrix"))


def _trace(folder: Path) -> None:
    from ovexport.trace.stage import trace

    trace(_model(folder), ConvertSpec(), folder / "bf16")


def _strip_and_convert(folder: Path) -> None:
    _packed_and_converted(Checkpoint(folder / "checkpoint"), folder, "int4")


def _packed_and_converted(checkpoint: Checkpoint, folder: Path, name: str) -> None:
    from ovexport.convert import convert
    from ovexport.strip import strip

    packed: PackedWeights = strip(checkpoint, IR(folder / "bf16"), folder / f"{name}-packed")
    convert(IR(folder / "bf16"), packed, folder / name)


def _trace_strip_and_convert(folder: Path) -> None:
    _trace(folder)
    _strip_and_convert(folder)


def _compressed_by_nncf(folder: Path) -> Any:
    import nncf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        dataset=nncf.Dataset([_example()]),
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=RANK),
    )


def _example() -> dict[str, Any]:
    import torch

    return {"input_ids": torch.arange(16).reshape(1, 16)}


def _export_as_documented(folder: Path) -> None:
    """NNCF's checkpoint loaded, stripped and exported; and the BF16 baseline, which ours has from its trace."""
    import nncf
    import nncf.torch
    import torch
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from optimum.exporters.openvino.convert import export_from_model
    from transformers import AutoModelForCausalLM

    with torch.serialization.safe_globals([QuantizationScheme]):
        state = torch.load(folder / "nncf.pth", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = nncf.torch.load_from_config(model, state["nncf_config"])
    get_hook_storage(model).load_state_dict(state["nncf_state_dict"])
    model = nncf.strip(model, do_copy=False, strip_format=nncf.StripFormat.DQ, example_input=_example())
    export_from_model(model, folder / "documented", device="cpu")
    del model
    baseline = AutoModelForCausalLM.from_pretrained(folder / "model")
    export_from_model(baseline, folder / "baseline", device="cpu", patch_16bit_model=True)


def _export_by_cli(folder: Path) -> None:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(bits=4, sym=False, group_size=GROUP_SIZE, ratio=1.0)
    main_export(
        str(folder / "model"),
        folder / "cli",
        task="text-generation-with-past",
        ov_config=OVConfig(quantization_config=quantization),
    )


_OURS = ("ovexport.compress", "ovexport.trace", "ovexport.strip", "ovexport.convert")
_THEIRS = ("nncf.torch", "optimum.exporters.openvino.convert", "transformers")
SIDES: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "compress, ours": (_OURS, _compress),
    "compress, NNCF": (_THEIRS, _compressed_by_nncf),
    "strip and convert, ours": (_OURS, _strip_and_convert),
    "trace, strip and convert, ours": (_OURS, _trace_strip_and_convert),
    "strip and export with baseline, NNCF + optimum": (_THEIRS, _export_as_documented),
    "export without tuning, optimum-cli": (("optimum.intel", *_THEIRS), _export_by_cli),
    TWO_SIDED: (_OURS, _round_on_both_sides),
    AWQ: (("nncf", "openvino"), _quantize_by_awq),
    LARGEST_UP: (_OURS, lambda _: _round_matrix(M1700.intermediate_size, M1700.hidden_size)),
    LARGEST_DOWN: (_OURS, lambda _: _round_matrix(M1700.hidden_size, M1700.intermediate_size)),
}
ONCE = (TWO_SIDED, AWQ, LARGEST_UP, LARGEST_DOWN)


if __name__ == "__main__":
    main()
