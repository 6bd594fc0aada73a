"""Peak memory of loading and generating, in a process of its own: sampling beside a timed run would disturb it.

python -m ovexport.bench.memory < request as JSON
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ovexport.artifacts import IR
from ovexport.bench.loading import RuntimeAdapter, generate, load_pipeline
from ovexport.errors import UnsupportedModelError
from ovexport.recipe import BenchSpec

_STATUS = Path("/proc/self/status")


def peak_rss_bytes(ir: IR, spec: BenchSpec, prompt: Sequence[int], adapter: RuntimeAdapter | None = None) -> int | None:
    """Largest resident set of a process that loads the IR and generates once; None where /proc is missing.

    Raises:
        UnsupportedModelError: the IR can't be loaded.
    """
    if not _STATUS.exists():
        return None
    request = {
        "ir": str(ir.path),
        "spec": spec.model_dump(mode="json"),
        "tokens": list(prompt[: spec.prompt_tokens]),
        "adapter": adapter and {"path": str(adapter.path), "mode": adapter.mode, "scale": adapter.scale},
    }
    command = [sys.executable, "-m", "ovexport.bench.memory"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load it ({last})")
    return int(done.stdout.strip().splitlines()[-1])


def _main() -> None:
    import numpy as np

    request = json.loads(sys.stdin.read())
    spec = BenchSpec.model_validate(request["spec"])
    wanted = request["adapter"]
    adapter = RuntimeAdapter(**wanted | {"path": Path(wanted["path"])}) if wanted else None
    pipeline = load_pipeline(IR(Path(request["ir"])), spec, adapter)
    generate(pipeline, np.asarray(request["tokens"], dtype=np.int64).reshape(1, -1), spec.output_tokens)
    peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    sys.stdout.write(f"{int(peak.split()[1]) * 1024}\n")


if __name__ == "__main__":
    _main()
