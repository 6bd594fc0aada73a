"""What measuring the divergence of two models costs beyond their forward passes: time and memory.

python benchmarks/divergence.py [--quick] [--json] [--save]

Random weights in the shape of SmolLM2-360M (vocabulary of 49,152). Both sides run in turn, pair by pair, on the same
sequences: `ovexport.evaluate.divergence.compare` of BF16 and INT4, and the forward passes of the two models alone.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
from process import measured
from shapes import M30, M360, Shape, build_run

from ovexport.bench.rounds import ratio
from ovexport.evaluate.divergence import compare
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.progress import silent
from ovexport.recipe import CompressSpec
from ovexport.versions import stack_versions

SEQUENCES, LENGTH, BATCH, PAIRS = 6, 256, 2, 7
LONGER = 4


def main() -> None:
    """Build the two models, measure, and print a table or a JSON document."""
    options = command.parser(__doc__, "divergence", "a 30 M model instead of the 360 M one").parse_args()
    shape = M30 if options.quick else M360
    with TemporaryDirectory(prefix="ovexport-") as scratch:
        run = build_run(Path(scratch), shape, CompressSpec(rounding="nearest"))
        runners = {name: LogitsRunner(read_graph(run.ir(name)), name) for name in ("bf16", "int4")}
        document = _measured(runners, shape)
    command.publish(document, "divergence", options)


def _measured(runners: dict[str, LogitsRunner], shape: Shape) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(3, shape.vocabulary, (LONGER * SEQUENCES, LENGTH)).astype(np.int32)
    short = tokens[:SEQUENCES]
    seconds: dict[str, list[float]] = {"compare": [], "forward": []}
    for pair in range(PAIRS + 1):
        begun = time.perf_counter()
        for runner in runners.values():
            runner(short.astype(np.int64))
        between = time.perf_counter()
        compare(runners, "bf16", short, BATCH, silent)
        ended = time.perf_counter()
        if pair:
            seconds["forward"].append(between - begun)
            seconds["compare"].append(ended - between)
    growth = {}
    for count in (SEQUENCES, LONGER * SEQUENCES):
        with measured() as figures:
            compare(runners, "bf16", tokens[:count], BATCH, silent)
        growth[str(count * LENGTH)] = figures["rss_anon_growth_bytes"]
    return {
        "ratios": {
            "time of the divergence over the forward passes'": ratio(
                [[one] for one in seconds["compare"]], [[one] for one in seconds["forward"]], seed=0
            ).model_dump(mode="json")
        },
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "rss_anon_growth_bytes": growth,
        "conditions": {
            "vocabulary": shape.vocabulary,
            "layers": shape.layers,
            "hidden_size": shape.hidden_size,
            "tokens": SEQUENCES * LENGTH,
            "pairs": PAIRS,
        },
        "versions": stack_versions(),
    }


if __name__ == "__main__":
    main()
