"""How fast the proof computes codes again on one core, and what memory it takes, by rank of the adapters.

python benchmarks/verify.py [--quick] [--json] [--save]

The speed is the bytes of codes, scales and zero points in the IR over the seconds of the arithmetic (one thread, files
in the page cache). Most of that time goes into the product of the adapters in float64, so it depends on their rank; the
twin has rank 0. The SHA-256 of the base weights, which identifies them, is timed separately.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import command
from process import measured

from ovexport.artifacts import IR, Checkpoint
from ovexport.openvino.graph import read_graph, weights
from ovexport.openvino.matrices import layer_matrices
from ovexport.progress import silent
from ovexport.verify.codes import arithmetic
from ovexport.versions import stack_versions

GROUP_SIZE = 64
RANKS = (0, 8, 32, 64)


def main() -> None:
    """Measure each rank in a process of its own."""
    parser = command.parser(__doc__, "verify", "a 30 M model instead of the 360 M one")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_measured(Path(options.worker))))
        return
    from shapes import M30, M360, convert_moved, save_random_llama

    from ovexport.recipe import CompressSpec, ModelSpec

    shape = M30 if options.quick else M360
    figures = {}
    with TemporaryDirectory() as folder:
        model = ModelSpec(id=str(save_random_llama(Path(folder) / "model", shape)))
        for rank in RANKS:
            spec = CompressSpec(group_size=GROUP_SIZE, rank=max(1, rank), rounding="nearest")
            scratch = Path(folder) / str(rank)
            scratch.mkdir()
            run = convert_moved(model, scratch, spec, active_rank=rank)
            figures[str(rank)] = _worker(run.path)
    document = {
        "figures": figures,
        "conditions": {"model": f"random Llama, {shape}", "group_size": GROUP_SIZE, "threads": 1},
        "versions": stack_versions(),
    }
    command.publish(document, "verify", options)


def _worker(run: Path) -> dict[str, float]:
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    arguments = [sys.executable, __file__, "--worker", str(run)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ | one_thread)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _measured(run: Path) -> dict[str, float]:
    """Memory of a first pass, which brings the files to memory, and the time of a second."""
    checkpoint = Checkpoint(run / "checkpoint")
    manifest = checkpoint.manifest
    product, base = read_graph(IR(run / "int4")), read_graph(IR(run / "bf16"))
    found = weights(product)
    matrices = layer_matrices(base, manifest)
    with measured() as digests:
        matrices = layer_matrices(base, manifest)
    with measured() as first:
        arithmetic(found, checkpoint, manifest, matrices, silent)
    with measured() as second:
        mismatches = arithmetic(found, checkpoint, manifest, matrices, silent)
    if any(one.codes or one.scales or one.zero_points for one in mismatches.values()):
        raise SystemExit("the product is not what was converted")
    size = sum(weight.byte_size for weight in found if weight.packed)
    return {
        "seconds": second["seconds"],
        "digest_seconds": digests["seconds"],
        "rss_anon_growth_bytes": first["rss_anon_growth_bytes"],
        "weight_bytes": size,
        "gigabytes_per_second": size / second["seconds"] / 1e9,
    }


if __name__ == "__main__":
    main()
