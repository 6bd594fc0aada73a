"""One tuning step, ours and the documented NNCF loop's: tokens per second, peak memory, and the loss that both reach.

python benchmarks/tuning.py [--quick] [--json] [--save] [--device cuda]

Both sides have the same random model and the same 32 sequences of 256 tokens at every step, in microbatches of 2,
bfloat16, rank 64, and a constant learning rate of 1e-4 (a tenth of it for scales). Each side has processes of its own,
in turn; on a GPU one process of more steps. The first step is dropped: NNCF compiles its extension in it, and the
caches warm up. Peak memory is the process's resident memory with libraries; on a GPU it is the memory allocated there.
Both sides compute the teacher's hidden states before the steps. NNCF's adapters begin from the singular vectors of a
random matrix each, which takes minutes at this size; on a GPU a randomized SVD gives it those that it keeps.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np

from ovexport.bootstrap import too_few
from ovexport.versions import stack_versions

SEQUENCES, MICROBATCH, LENGTH = 32, 2, 256
RANK, GROUP_SIZE, LEARNING_RATE = 64, 64, 1e-4
STEPS = {"cpu": 4, "cuda": 21}
ROUNDS = {"cpu": 2, "cuda": 1}
RESAMPLES = 2000


def main() -> None:
    """Both sides of every shape, in turn."""
    parser = command.parser(__doc__, "tuning", "the 33 M shape alone, one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda measures a 1.7 B shape")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps({"ours": _ours, "theirs": _theirs}[options.worker](options.folder, options.device)))
        return
    from shapes import M33, M135, M1700, save_random_llama

    shapes = {"cuda": {"1.7 B": M1700}, "cpu": {"33 M": M33} | ({} if options.quick else {"135 M": M135})}
    figures: dict[str, Any] = {}
    for name, shape in shapes[options.device].items():
        with TemporaryDirectory() as folder:
            save_random_llama(Path(folder) / "model", shape)
            sides: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
            for _ in range(1 if options.quick else ROUNDS[options.device]):
                for side, runs in sides.items():
                    runs.append(_worker(side, Path(folder), options.device))
        figures[name] = sides
    document = {
        "figures": figures,
        "ratios": {
            f"{figure} {name}": ratio
            for name, sides in figures.items()
            for figure, ratio in ratios(sides["ours"], sides["theirs"]).items()
        },
        "conditions": _conditions(options.device, list(figures)),
        "versions": stack_versions(),
    }
    command.publish(document, "tuning", options, case=None if options.device == "cpu" else options.device)


def _conditions(device: str, shapes: list[str]) -> dict[str, Any]:
    import openvino as ov
    import torch

    return {
        "device_name": torch.cuda.get_device_name()
        if device == "cuda"
        else ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "threads": torch.get_num_threads(),
        "shapes": shapes,
        "sequences": SEQUENCES,
        "microbatch": MICROBATCH,
        "sequence_length": LENGTH,
        "rank": RANK,
        "group_size": GROUP_SIZE,
        "learning_rate": LEARNING_RATE,
        "timed_steps": STEPS[device] - 1,
    }


def _worker(side: str, folder: Path, device: str) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--worker", side, "--folder", str(folder), "--device", device]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr.strip()[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _tokens(folder: Path) -> Any:
    """The same sequences for both sides."""
    vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, (SEQUENCES, LENGTH)).astype(np.int32)


def _ours(folder: Path, device: str) -> dict[str, Any]:
    import os

    import torch

    from ovexport.artifacts import PreparedData
    from ovexport.compress import compress
    from ovexport.models.device import Compute
    from ovexport.progress import silent
    from ovexport.recipe import CompressSpec, ModelSpec, TuneSpec
    from ovexport.storage.tensorfile import write_tensors
    from ovexport.tune.trainer import make_trainer

    with TemporaryDirectory(dir=folder) as scratch:
        os.environ["OVEXPORT_CACHE"] = scratch
        data = PreparedData(Path(scratch))
        write_tensors({"train": _tokens(folder), "validation": _tokens(folder)[:1]}, data.path / "tokens.safetensors")
        model = ModelSpec(id=str(folder / "model"))
        spec = TuneSpec(
            steps=STEPS[device],
            batch_size=MICROBATCH,
            gradient_accumulation_steps=SEQUENCES // MICROBATCH,
            learning_rate=LEARNING_RATE,
            weight_decay=LEARNING_RATE,
            schedule="constant",
            warmup_fraction=0.0,
            max_gradient_norm=1e9,
            precision="bf16",
        )
        start = compress(
            model, CompressSpec(group_size=GROUP_SIZE, rank=RANK, rounding="nearest"), data, 0, Path(scratch) / "start"
        )
        compute = Compute(torch.device(device), torch.bfloat16)
        trainer = make_trainer(start, model, spec, data, compute, silent)
        return _timed(lambda index: trainer.step(index).loss_nats, device)


def _theirs(folder: Path, device: str) -> dict[str, Any]:
    import torch
    from nncf_loop import NncfLoop, Settings

    if device == "cuda":
        torch.linalg.svd = _FirstSingularVectors(torch.linalg.svd)
    tokens = torch.from_numpy(_tokens(folder)).long().to(device)
    settings = Settings(group_size=GROUP_SIZE, rank=RANK, batch_size=SEQUENCES, microbatch_size=MICROBATCH)
    loop = NncfLoop(folder / "model", tokens, tokens[:1], settings)
    steps = loop.steps()
    return _timed(lambda index: next(steps), device)


class _FirstSingularVectors:
    """U, S and Vh of a matrix as far as a rank goes, in place of torch.linalg.svd.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4 without power iterations.
    """

    def __init__(self, svd: Any) -> None:
        self._svd = svd

    def __call__(self, matrix: Any, full_matrices: bool) -> tuple[Any, Any, Any]:
        import torch

        basis, _ = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], RANK, device=matrix.device))
        left, values, right = self._svd(basis.T @ matrix, full_matrices=full_matrices)
        return basis @ left, values, right


def _timed(step: Any, device: str) -> dict[str, Any]:
    import torch

    seconds, losses = [], []
    for index in range(STEPS[device]):
        started = time.perf_counter()
        losses.append(step(index))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "losses": losses, "peak_memory_bytes": _peak(device)}


def _peak(device: str) -> int:
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ours over theirs.

    Of the speed, the ratio of the steps' medians with a 95 % interval by bootstrap over the steps, where they are
    enough; of memory and loss, the median and the range over every pair of processes.
    """
    generator = np.random.default_rng(0)

    def drawn(seconds: Any) -> Any:
        return np.median(seconds[generator.integers(0, len(seconds), (RESAMPLES, len(seconds)))], axis=1)

    mine, others = (np.concatenate([run["seconds"] for run in runs]) for runs in (ours, theirs))
    my_draws, other_draws = drawn(mine), drawn(others)
    enough = not too_few(min(len(mine), len(others)), "steps")
    ratios: dict[str, dict[str, Any]] = {
        "tokens_per_s": {
            "ratio_of_medians": float(np.median(others) / np.median(mine)),
            "ci95": np.percentile(other_draws / my_draws, [2.5, 97.5]).tolist() if enough else None,
        }
    }
    for name, values in (
        ("peak_memory", [[run["peak_memory_bytes"] for run in runs] for runs in (ours, theirs)]),
        ("final_loss", [[run["losses"][-1] for run in runs] for runs in (ours, theirs)]),
    ):
        pairs = [one / another for one in values[0] for another in values[1]]
        ratios[name] = {"median": float(np.median(pairs)), "range": [min(pairs), max(pairs)]}
    return ratios


if __name__ == "__main__":
    main()
