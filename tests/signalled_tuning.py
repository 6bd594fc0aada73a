"""A tuning in a process of its own that gets a signal, forked from one that has imported everything and computed
nothing."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.progress import Progress
from ovexport.recipe import TuneSpec
from ovexport.tune import tune

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["ovexport.tune.loop", "transformers.models.llama.modeling_llama"])


def signalled(run: RunFolder, spec: TuneSpec, out: Path, number: int, *, seconds: float) -> int:
    """Exit status of a tuning of the run's model that gets a signal some time after its first step."""
    process = _PROCESSES.Process(target=_tune, args=(run.path, spec, out, number, seconds))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _tune(path: Path, spec: TuneSpec, out: Path, number: int, seconds: float) -> None:
    started: list[threading.Thread] = []

    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    def listener(moment: Progress) -> None:
        if moment.task == "tune" and not started:
            started.append(threading.Thread(target=send, daemon=True))
            started[0].start()

    run = RunFolder(path)
    model = recipe.load(run.recipe).model
    tune(run.compressed, model, spec, run.data, out / "tuned", logs=out / "logs", identity="a", listener=listener)
