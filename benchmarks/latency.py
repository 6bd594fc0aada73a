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

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
from shapes import M30, M360, Shape, build_run

from ovexport.bench import RuntimeAdapter, bench, save_adapter
from ovexport.progress import Progress
from ovexport.recipe import BenchSpec, CompressSpec
from ovexport.reports import BenchmarkReport, LatencyRatios

FIGURES = ("time_to_first_token", "time_per_output_token")
FULL = BenchSpec(output_tokens=32, sessions=12, pairs=24, time_limit_s=3600)
QUICK = BenchSpec(output_tokens=32, sessions=24, pairs=96, time_limit_s=240)


def measure(shape: Shape, bench_spec: BenchSpec, compress_spec: CompressSpec) -> BenchmarkReport:
    """Build the models in a temporary folder and time them."""
    with TemporaryDirectory(prefix="ovexport-") as scratch:
        run = build_run(Path(scratch), shape, compress_spec)
        file = save_adapter(run.checkpoint, Path(scratch) / "adapter.safetensors")
        adapters = {
            "dynamic": RuntimeAdapter(path=file, mode="dynamic"),
            "static": RuntimeAdapter(path=file, mode="static"),
        }
        sources = {"bf16": "bf16", "dynamic": "plain", "static": "plain", "plain": "plain", "int4": "int4"}
        candidates = {name: run.ir(source) for name, source in sources.items()}
        prompt = np.random.default_rng(0).integers(3, 1000, max(bench_spec.prompt_tokens)).tolist()
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


def _tell(progress: Progress) -> None:
    print(f"\r{progress.task} {progress.done}/{progress.total}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print a table or a JSON document."""
    parser = command.parser(__doc__, "latency", "a 30 M model instead of the 360 M one")
    options = parser.parse_args()
    shape, spec = (M30, QUICK) if options.quick else (M360, FULL)
    compress_spec = CompressSpec(rounding="nearest")
    report = measure(shape, spec, compress_spec)
    print(file=sys.stderr)
    measured = document(report, shape, compress_spec)
    command.publish(measured, "latency", options)


if __name__ == "__main__":
    main()
