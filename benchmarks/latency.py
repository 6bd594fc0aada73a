"""What absorbing the adapters saves at inference: latency and memory of a Llama in five forms, interleaved in one run.

python benchmarks/latency.py             random weights in the shape of SmolLM2-360M; about 6 minutes on 2 cores
python benchmarks/latency.py --quick     a shape of 30 M parameters; 2 to 4 minutes
python benchmarks/latency.py --json      one JSON document on stdout instead of the table
python benchmarks/latency.py --save      write it to benchmarks/results/latency.json too

    bf16      the traced model
    plain     INT4, round to nearest
    int4      INT4 with the adapters absorbed: our product, the graph and the sizes of plain
    dynamic   plain with the same adapters added while it runs (openvino_genai.Adapter, MODE_DYNAMIC)
    static    the same in MODE_STATIC

MODE_FUSE, openvino-genai's third way, throws on 4-bit weights. That a runtime adapter reaches every layer is proven
before it is timed (ovexport.bench.adapters). Latency does not depend on the values of weights, so random ones do.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from shapes import M30, M360, REPOSITORY, Shape, moved, save_random_llama

from ovexport.artifacts import IR, PreparedData, write_text
from ovexport.bench import RuntimeAdapter, bench, save_adapter
from ovexport.compress import compress
from ovexport.convert import convert
from ovexport.progress import Progress
from ovexport.recipe import BenchSpec, CompressSpec, ConvertSpec, ModelSpec
from ovexport.reports import BenchmarkReport, LatencyRatios
from ovexport.strip import strip
from ovexport.trace import trace

SAVED = REPOSITORY / "benchmarks" / "results" / "latency.json"
FIGURES = ("time_to_first_token", "time_per_output_token")
FULL = BenchSpec(output_tokens=32, sessions=12, pairs=24)
QUICK = BenchSpec(output_tokens=32, sessions=24, pairs=96)


def build(folder: Path, shape: Shape, spec: CompressSpec) -> tuple[dict[str, IR], Path]:
    """The IRs bf16, plain and int4, and the file with the adapters that int4 absorbed."""
    model = ModelSpec(id=str(save_random_llama(folder / "model", shape)))
    bf16 = trace(model, ConvertSpec(), folder / "bf16")
    start = compress(model, spec, PreparedData(folder / "no-data"), 0, folder / "compressed")
    checkpoints = {"plain": start, "int4": moved(start, model, folder / "checkpoint")}
    packed = {name: strip(checkpoint, bf16, folder / "packed" / name) for name, checkpoint in checkpoints.items()}
    irs = {name: convert(bf16, weights, folder / name) for name, weights in packed.items()}
    return {"bf16": bf16, **irs}, save_adapter(checkpoints["int4"], folder / "adapter.safetensors")


def measure(shape: Shape, bench_spec: BenchSpec, compress_spec: CompressSpec) -> BenchmarkReport:
    """Build the models in a temporary folder and time them."""
    with TemporaryDirectory(prefix="ovexport-") as scratch:
        models, file = build(Path(scratch), shape, compress_spec)
        adapters = {
            "dynamic": RuntimeAdapter(path=file, mode="dynamic"),
            "static": RuntimeAdapter(path=file, mode="static"),
        }
        candidates = {"bf16": models["bf16"], "dynamic": models["plain"], "static": models["plain"]}
        candidates |= {"plain": models["plain"], "int4": models["int4"]}
        prompt = np.random.default_rng(0).integers(3, 1000, bench_spec.prompt_tokens).tolist()
        return bench(candidates, bench_spec, prompt, adapters=adapters, listener=_tell)


def document(report: BenchmarkReport, shape: Shape, spec: CompressSpec) -> dict[str, Any]:
    """The report with its ratios named by figure, ours over theirs."""
    values = report.model_dump(mode="json")
    ratios = {
        f"{figure} {name}": getattr(ratio, figure).model_dump(mode="json")
        for name, ratio in _ours_over_theirs(report).items()
        for figure in FIGURES
    }
    sizes = {name: getattr(shape, name) for name in Shape.__slots__}
    compression = {"mode": spec.mode, "group_size": spec.group_size, "rank": spec.rank}
    return values | {"ratios": ratios, "conditions": values["conditions"] | {"shape": sizes, "compress": compression}}


def _ours_over_theirs(report: BenchmarkReport) -> dict[str, LatencyRatios]:
    """The ratios with our product above the line, and the twin's over BF16."""
    return {name: ratio for name, ratio in report.ratios.items() if name.startswith("int4/") or name == "plain/bf16"}


def table(report: BenchmarkReport) -> str:
    """A line per model, then a line per ratio."""
    lines = [f"{'':10}{'TTFT, ms':>10}{'TPOT, ms':>10}{'load, ms':>10}{'weights, MB':>13}{'peak, MB':>10}"]
    for name, one in report.models.items():
        peak = "-" if one.peak_rss_bytes is None else f"{one.peak_rss_bytes / 1e6:.0f}"
        lines.append(
            f"{name:10}{one.time_to_first_token_ms.median:>10.2f}{one.time_per_output_token_ms.median:>10.3f}"
            f"{one.load_time_ms:>10.0f}{one.weight_bytes / 1e6:>13.1f}{peak:>10}"
        )
    lines += ["", f"{'':16}{'TTFT (95 %)':>24}{'TPOT (95 %)':>24}"]
    for name, ratio in _ours_over_theirs(report).items():
        both = (getattr(ratio, figure) for figure in FIGURES)
        cells = (f"{one.median:.3f} ({one.ci95[0]:.3f}-{one.ci95[1]:.3f})" for one in both)
        lines.append(f"{name:16}" + "".join(f"{cell:>24}" for cell in cells))
    conditions = report.conditions
    return "\n".join([*lines, "", f"{conditions['pairs']} rounds in {conditions['sessions']} sessions"])


def _tell(progress: Progress) -> None:
    print(f"\r{progress.task} {progress.done}/{progress.total}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print a table or a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, under 10 minutes on 2 cores")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--save", action="store_true", help=f"write it to {SAVED.relative_to(REPOSITORY)} too")
    options = parser.parse_args()
    shape, spec = (M30, QUICK) if options.quick else (M360, FULL)
    compress_spec = CompressSpec()
    report = measure(shape, spec, compress_spec)
    print(file=sys.stderr)
    text = json.dumps(document(report, shape, compress_spec), indent=2)
    if options.save:
        write_text(text + "\n", SAVED)
    print(text if options.json else table(report))


if __name__ == "__main__":
    main()
