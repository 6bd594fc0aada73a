"""Peak memory of loading and generating, in a process of its own: sampling beside a timed run would disturb it.

python -m ovexport.bench.memory IR DEVICE OUTPUT_TOKENS PRECISION BACKEND < token ids as JSON
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovexport.artifacts import IR
from ovexport.errors import UnsupportedModelError
from ovexport.recipe import BenchSpec

_STATUS = Path("/proc/self/status")


def peak_rss_bytes(ir: IR, settings: Mapping[str, Any], spec: BenchSpec, prompt: Sequence[int]) -> int | None:
    """Largest resident set of a process that loads the IR and generates once; None where /proc is missing.

    Raises:
        UnsupportedModelError: the IR can't be loaded.
    """
    if not _STATUS.exists():
        return None
    plain = {key: value for key, value in settings.items() if isinstance(value, str)}
    command = [sys.executable, "-m", "ovexport.bench.memory", str(ir.path), spec.device, str(spec.output_tokens)]
    request = json.dumps({"tokens": list(prompt[: spec.prompt_tokens]), "settings": plain})
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load it ({last})")
    return int(done.stdout.strip().splitlines()[-1])


def _main() -> None:
    import numpy as np
    import openvino as ov
    import openvino_genai

    folder, device, output_tokens = sys.argv[1:4]
    request = json.loads(sys.stdin.read())
    tokens = np.asarray(request["tokens"], dtype=np.int64).reshape(1, -1)
    pipeline = openvino_genai.LLMPipeline(folder, device, **request["settings"])
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = int(output_tokens)
    config.ignore_eos = True
    pipeline.generate(openvino_genai.TokenizedInputs(ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens))), config)
    peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    sys.stdout.write(f"{int(peak.split()[1]) * 1024}\n")


if __name__ == "__main__":
    _main()
