"""What runtime settings are worth: `ovexport bench --search` on INT4 weights in the shape of SmolLM2-360M.

python benchmarks/settings.py [--quick] [--json] [--save]

Every trial is timed in turn with a default LLMPipeline of the same folder, pair by pair. The weights are random, so the
divergences compare the settings with each other; they do not say what a setting costs a trained model.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import command
import numpy as np
from shapes import M30, M360, build_run

from ovexport.bench import search_settings
from ovexport.bench.text import packaged_text
from ovexport.progress import Progress
from ovexport.recipe import BenchSpec, CompressSpec

KL_LIMIT_NATS = 0.01
TEXT_SEQUENCES = 4


def main() -> None:
    """Search, and print a table or a JSON document."""
    options = command.parser(__doc__, "settings", "a 30 M model instead of the 360 M one").parse_args()
    shape = M30 if options.quick else M360
    spec = BenchSpec(output_tokens=32)
    prompt = np.random.default_rng(0).integers(3, 1000, 128).tolist()
    with TemporaryDirectory(prefix="ovexport-") as scratch:
        ir = build_run(Path(scratch), shape, CompressSpec(rounding="nearest")).ir("int4")
        tokens = packaged_text(ir, TEXT_SEQUENCES)
        report = search_settings(ir, spec, prompt, tokens, kl_limit_nats=KL_LIMIT_NATS, listener=_tell)
    print(file=sys.stderr)
    values = report.model_dump(mode="json")
    gains = {"chosen": report.gain, "written": report.written_gain}
    ratios = {
        f"time_per_output_token {name} over the defaults'": gain.model_dump(mode="json")
        for name, gain in gains.items()
        if gain
    }
    sizes = {"layers": shape.layers, "hidden_size": shape.hidden_size}
    conditions = values["conditions"] | {"shape": sizes, "mode": CompressSpec().mode}
    command.publish(values | {"ratios": ratios, "conditions": conditions}, "settings", options)


def _tell(progress: Progress) -> None:
    print(f"\r{progress.task}: {progress.done}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
