"""What a block of work costs its process: time and memory, read from /proc."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_SECONDS = 0.005


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds of the block, the process's peak RSS, and by how much RssAnon rose over its start at most.

    The dictionary is filled when the block ends.
    """
    figures: dict[str, float] = {}
    start, ended, highest = _status("RssAnon"), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            highest[0] = max(highest[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        yield figures
    finally:
        figures["seconds"] = time.perf_counter() - began
        ended.set()
        watcher.join()
    figures["peak_rss_bytes"] = _status("VmHWM")
    figures["rss_anon_growth_bytes"] = max(0, highest[0] - start)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
