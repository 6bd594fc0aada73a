"""Does a run that was killed and resumed end with the files of an uninterrupted one? Kills in every stage.

python benchmarks/kills.py [--stage STAGE]… [--kills 20] [--seed 0] [--quick] [--json] [--save]

A tiny random model goes through all stages once, uninterrupted. A trial begins where a stage begins: with the results
of earlier stages and nothing else. The stage runs in a process of its own, which gets SIGKILL at a random moment. It is
resumed with --resume and killed again, four times in all; then it is resumed once more and may finish. Every file of
the stage is compared with that of the uninterrupted run, byte by byte. In reports, fields that hold a measured time,
rate or amount of memory are left out, by name (MEASURED_FIELDS).

The processes are forked from one that has imported everything and computed nothing, so a trial needs no start-up time.
They leave out the checks before any work, which write nothing and would take longer than most stages.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from select import select
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import command
from shapes import REPOSITORY, TINY, save_random_llama

from ovexport import recipe
from ovexport.artifacts import RunFolder, StageRecord
from ovexport.pipeline import engine, services
from ovexport.pipeline.stage import Stage
from ovexport.pipeline.stages import STAGES
from ovexport.recipe import Recipe
from ovexport.storage.files import files_in
from ovexport.storage.records import read_record
from ovexport.versions import stack_versions

KILLS_PER_TRIAL = 4
QUICK_KILLS = 2
MEASURED_FIELDS = re.compile(
    r".*_ms|.*tokens_per_s|.*_per_s|.*seconds|ratios|machine|limit|peak_rss_bytes|load_memory|generation_memory|began|ended"
)
PRELOADED = (
    "ovexport.pipeline.plan",
    "ovexport.trace",
    "ovexport.convert",
    "ovexport.verify",
    "ovexport.report",
    "optimum.exporters.openvino.convert",
    "sentence_transformers",
    "torch.utils.tensorboard",
)
VALUES: dict[str, Any] = {
    "data": {
        "train": {"path": "models/stories/stories.jsonl"},
        "sequence_length": 64,
        "train_sequences": 32,
        "validation_sequences": 4,
        "test_sequences": 8,
    },
    "compress": {"group_size": 32, "rank": 8, "rounding": "gptq", "calibration_sequences": 8},
    "tune": {"steps": 24, "batch_size": 2, "validate_every": 4, "save_every": 3, "learning_rate": 1e-3},
    "evaluate": {"encoder": "offline", "prompt_count": 4, "prompt_words": 8, "max_new_tokens": 16, "isolate": True},
    "bench": {"prompt_tokens": 16, "output_tokens": 8, "pairs": 6, "sessions": 3, "precision": 0.0, "limits": False},
}


@dataclass(slots=True, kw_only=True)
class Count:
    """Of a stage: kills, resumed runs, those that ended in the same files, and what differed in the others."""

    kills: int = 0
    trials: int = 0
    same: int = 0
    differing: list[str] = field(default_factory=list)


def main() -> None:
    """Kill, resume, compare, and say how often the files were the same."""
    parser = command.parser(__doc__, "kills", f"{QUICK_KILLS} kills in each stage")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", action="append", choices=names, help="this stage alone; may be repeated")
    parser.add_argument("--kills", type=int, default=20, help="in each stage (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = QUICK_KILLS if options.quick else options.kills
    for module in PRELOADED:
        import_module(module)
    with TemporaryDirectory() as folder:
        counts = count(Path(folder), options.stage or names, kills, random.Random(options.seed))
    document = {
        "counts": {name: asdict(value) for name, value in counts.items()},
        "conditions": {"seed": options.seed, "kills_per_trial": KILLS_PER_TRIAL, "recipe": VALUES},
        "versions": stack_versions(),
    }
    command.publish(document, "kills", options)
    if any(value.same < value.trials or value.kills < kills for value in counts.values()):
        sys.exit(1)


def count(folder: Path, stages: Sequence[str], kills: int, generator: random.Random) -> dict[str, Count]:
    """Carry out the trials of some stages."""
    os.environ["OVEXPORT_CACHE"] = str(folder / "cache")
    model = folder / "model"
    _let_go(_forked(lambda _: save_random_llama(model, TINY)))
    resolved = recipe.parse({"model": {"id": str(model)}, **VALUES}, base=REPOSITORY, origin="kills")
    whole = RunFolder(folder / "whole")
    asked = [stage for stage in STAGES if stage.name in stages]
    _let_go(_forked(lambda _: services.run(resolved, whole.path, until=asked[-1].name)))
    counts: dict[str, Count] = {}
    for stage in asked:
        counts[stage.name] = killed = Count()
        while killed.kills < kills:
            trial = RunFolder(folder / "trial")
            _begin(whole, trial, stage)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for _ in range(min(KILLS_PER_TRIAL, kills - killed.kills)):
                killed.kills += kill(trial, resolved, stage, _seconds(whole, stage), generator)
            _let_go(_forked(partial(resume, trial, resolved, stage)))
            found = differences(whole, trial, stage)
            killed.trials += 1
            killed.same += not found
            killed.differing += found
            shutil.rmtree(trial.path)
        print(f"{stage.name}: {killed}", file=sys.stderr)
    return counts


def resume(run: RunFolder, resolved: Recipe, stage: Stage, begun: Callable[[], None] = lambda: None) -> None:
    """Go on with a run up to a stage; `begun` is called when that stage begins."""

    def announce(name: str, skipped: bool) -> None:
        if name == stage.name and not skipped:
            begun()

    with patch.object(engine, "require_runnable"):
        services.run(resolved, run.path, resume=True, until=stage.name, announce=announce)


def kill(run: RunFolder, resolved: Recipe, stage: Stage, seconds: float, generator: random.Random) -> bool:
    """Run a stage and kill it at a random moment of so many seconds from its beginning.

    Returns:
        Whether it was killed; not so where it was done before that moment.
    """
    process = _forked(lambda begun: resume(run, resolved, stage, begun))
    if not process.wait_for_begin():
        _let_go(process)
        return False
    time.sleep(generator.uniform(0, seconds))
    os.kill(process.pid, signal.SIGKILL)
    status = os.waitpid(process.pid, 0)[1]
    return os.WIFSIGNALED(status)


def differences(whole: RunFolder, trial: RunFolder, stage: Stage) -> list[str]:
    """The stage's files that are not those of the uninterrupted run, and what else lies in the trial's folder."""
    expected, found = (
        {
            file.relative_to(run.path).as_posix(): file
            for output in stage.outputs
            for file in files_in(run.path / output)
            if file.is_file()
        }
        for run in (whole, trial)
    )
    differing = sorted(set(expected) ^ set(found))
    differing += [
        name for name in expected if name in found and _comparable(expected[name]) != _comparable(found[name])
    ]
    differing += sorted({path.name for path in trial.path.iterdir()} - {path.name for path in whole.path.iterdir()})
    return differing + [str(left) for left in trial.path.rglob(".*") if left != trial.path / ".lock"]


def _comparable(file: Path) -> Any:
    """A file's bytes; of a report all fields but the measured ones."""
    content = file.read_bytes()
    return _without_measured(json.loads(content)) if file.name in ("benchmark.json", "search.json") else content


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(inner) for key, inner in value.items() if not MEASURED_FIELDS.fullmatch(key)}
    return [_without_measured(inner) for inner in value] if isinstance(value, list) else value


def _begin(whole: RunFolder, trial: RunFolder, stage: Stage) -> None:
    """A copy of the whole run as it was when the stage began."""
    shutil.copytree(whole.path, trial.path)
    for later in STAGES[STAGES.index(stage) :]:
        trial.stage_record(later.name).unlink(missing_ok=True)
        for output in later.outputs:
            path = trial.path / output
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not any(trial.stages.iterdir()):
        shutil.rmtree(trial.path)


def _seconds(whole: RunFolder, stage: Stage) -> float:
    return read_record(whole.stage_record(stage.name), StageRecord).seconds


@dataclass(frozen=True, slots=True)
class _Process:
    """A forked process, and what it says when its stage begins."""

    pid: int
    said: int

    def wait_for_begin(self) -> bool:
        """Whether the stage began; not so where the process ended before."""
        select([self.said], [], [])
        return os.read(self.said, 1) == b"b"


def _forked(work: Callable[[Callable[[], None]], object]) -> _Process:
    """Do the work in a process of its own; it is given what it calls when its stage begins."""
    said, say = os.pipe()
    pid = os.fork()
    if pid:
        os.close(say)
        return _Process(pid, said)
    try:
        work(lambda: os.write(say, b"b") and None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _let_go(process: _Process) -> None:
    """Wait for a process that is not killed.

    Raises:
        RuntimeError: it failed.
    """
    status = os.waitpid(process.pid, 0)[1]
    os.close(process.said)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"a run that was not killed ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
