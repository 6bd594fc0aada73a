"""compress.engine = "ovexport" against "nncf": time and memory of compressing, time of a tuning step, and the loss.

python benchmarks/engines.py [--quick] [--json] [--save]

Both engines compress and tune the same random 33 M Llama on the same 8 sequences of 256 tokens, rank 64, group 64, in
float32, each in processes of its own, in turn. What differs is who compresses, and whose quantizers a step goes
through: loop, optimizer, teacher and validation are the same. Peak memory is the process's resident memory after
compressing, with libraries. The first two steps are dropped.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
from shapes import M33, save_random_llama

from ovexport.artifacts import PreparedData
from ovexport.recipe import CompressSpec, ModelSpec, TuneSpec
from ovexport.storage.tensorfile import write_tensors
from ovexport.versions import stack_versions

ENGINES = ("ovexport", "nncf")
SEQUENCES, LENGTH, RANK, GROUP_SIZE = 8, 256, 64, 64
STEPS, WARMUP, ROUNDS = 8, 2, 3


def main() -> None:
    """Both engines, in turn."""
    parser = command.parser(__doc__, "engines", "one round")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.folder)))
        return
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    with TemporaryDirectory() as folder:
        save_random_llama(Path(folder) / "model", M33)
        for _ in range(1 if options.quick else ROUNDS):
            for engine, found in runs.items():
                found.append(_worker(engine, Path(folder)))
    document = {"figures": runs, "ratios": ratios(runs), "conditions": _conditions(), "versions": stack_versions()}
    command.publish(document, "engines", options)


def _conditions() -> dict[str, Any]:
    import openvino as ov
    import torch

    return {
        "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "threads": torch.get_num_threads(),
        "sequences": SEQUENCES,
        "sequence_length": LENGTH,
        "rank": RANK,
        "group_size": GROUP_SIZE,
        "steps": STEPS - WARMUP,
    }


def _worker(engine: str, folder: Path) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--worker", engine, "--folder", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr.strip()[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(engine: str, folder: Path) -> dict[str, Any]:
    """Figures of one engine, in this process."""
    import torch

    from ovexport.compress import compress
    from ovexport.models.device import Compute
    from ovexport.progress import silent
    from ovexport.tune.trainer import make_trainer

    with TemporaryDirectory(dir=folder) as scratch:
        os.environ["OVEXPORT_CACHE"] = scratch
        data, model = PreparedData(Path(scratch)), ModelSpec(id=str(folder / "model"))
        vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        tokens = np.random.default_rng(0).integers(0, vocabulary, (SEQUENCES, LENGTH)).astype(np.int32)
        write_tensors({"train": tokens, "validation": tokens[:1]}, data.path / "tokens.safetensors")
        spec = CompressSpec(
            engine=engine, rounding="nearest", group_size=GROUP_SIZE, rank=RANK, calibration_sequences=1
        )
        began = time.perf_counter()
        start = compress(model, spec, data, 0, Path(scratch) / "start")
        compressing = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tune = TuneSpec(steps=STEPS, batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-4, precision="fp32")
        compute = Compute(torch.device("cpu"), torch.float32)
        trainer = make_trainer(start, model, tune, data, compute, silent)
        seconds, losses = [], []
        for index in range(STEPS):
            began = time.perf_counter()
            losses.append(trainer.step(index).loss_nats)
            seconds.append(time.perf_counter() - began)
    return {
        "compress_seconds": compressing,
        "peak_memory_bytes": peak,
        "step_seconds": float(np.median(seconds[WARMUP:])),
        "loss_nats": losses[-1],
    }


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Ours over NNCF's: the median and the range over every pair of processes."""
    found = {}
    for figure in runs["ovexport"][0]:
        pairs = [ours[figure] / theirs[figure] for ours in runs["ovexport"] for theirs in runs["nncf"]]
        found[figure] = {"median": float(np.median(pairs)), "range": [min(pairs), max(pairs)]}
    return found


if __name__ == "__main__":
    main()
