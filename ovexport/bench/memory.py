"""Peak memory of loading and generating, in a process of its own: sampling beside a timed run would disturb it.

python -m ovexport.bench.memory < request as JSON
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ovexport.artifacts import IR
from ovexport.bench.loading import RuntimeAdapter, generate, load_pipeline
from ovexport.bench.rounds import prompts
from ovexport.errors import UnsupportedModelError
from ovexport.recipe import BenchSpec
from ovexport.reports import PeakMemory
from ovexport.storage.records import Record

_STATUS = Path("/proc/self/status")
_FORGET_PEAK = Path("/proc/self/clear_refs")
_EVERY_SECONDS = 0.005
_PEAK, _ANONYMOUS, _FILE = "VmHWM:", "RssAnon:", "RssFile:"


class Peaks(Record):
    """The most memory that loading and generating held."""

    load: PeakMemory
    generation: PeakMemory


def peak_memory(ir: IR, spec: BenchSpec, prompt: Sequence[int], adapter: RuntimeAdapter | None = None) -> Peaks | None:
    """Of a process that loads the IR and generates once, at the first point of the grid; None where /proc is missing.

    Raises:
        UnsupportedModelError: the IR can't be loaded.
    """
    if not _STATUS.exists():
        return None
    request = {
        "ir": str(ir.path),
        "spec": spec.model_dump(mode="json"),
        "tokens": list(prompt[: spec.prompt_tokens[0]]),
        "adapter": adapter and {"path": str(adapter.path), "mode": adapter.mode, "scale": adapter.scale},
    }
    command = [sys.executable, "-m", "ovexport.bench.memory"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UnsupportedModelError(f"{ir.path}: its memory can't be measured ({last})")
    return Peaks.model_validate_json(done.stdout.strip().splitlines()[-1])


class _Sampler:
    """Looks at the process's memory now and then, in a thread, until it is stopped."""

    def __init__(self) -> None:
        self._anonymous, self._file, self._peak = 0, 0, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        kilobytes = {
            fields[0]: int(fields[1])
            for line in _STATUS.read_text().splitlines()
            if (fields := line.split()) and fields[0] in (_PEAK, _ANONYMOUS, _FILE)
        }
        self._peak = max(self._peak, kilobytes[_PEAK])
        self._anonymous = max(self._anonymous, kilobytes[_ANONYMOUS])
        self._file = max(self._file, kilobytes[_FILE])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample while the block runs; the kernel's own peak is forgotten before."""
        _FORGET_PEAK.write_text("5")
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._thread.join()
        self._look()

    @property
    def peak(self) -> PeakMemory:
        """What was found."""
        return PeakMemory(
            peak_rss_bytes=1024 * self._peak,
            peak_anonymous_bytes=1024 * self._anonymous,
            peak_file_bytes=1024 * self._file,
        )


def _main() -> None:
    request = json.loads(sys.stdin.read())
    spec = BenchSpec.model_validate(request["spec"])
    wanted = request["adapter"]
    adapter = RuntimeAdapter(**wanted | {"path": Path(wanted["path"])}) if wanted else None
    point = spec.points[0]
    tokens = prompts(request["tokens"], point)
    loading, generating = _Sampler(), _Sampler()
    with loading.watching():
        pipeline = load_pipeline(IR(Path(request["ir"])), spec, point.attention_backend, adapter)
    with generating.watching():
        generate(pipeline, tokens, point.output_tokens)
    sys.stdout.write(Peaks(load=loading.peak, generation=generating.peak).model_dump_json() + "\n")


if __name__ == "__main__":
    _main()
