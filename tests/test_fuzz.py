"""A thirtieth of the fuzz of benchmarks/fuzz.py: broken and hostile input ends in an exit code and a line."""

from pathlib import Path

import pytest
from conftest import STORIES, tiny_values
from fuzz_values import Material
from fuzzing import COUNTS, Worker, cases

from ovexport.artifacts import RunFolder

pytestmark = pytest.mark.cli


@pytest.mark.slow
def test_a_thirtieth_of_the_fuzz_ends_in_no_traceback_no_hang_and_no_crash(
    tiny_model: Path, finished_run: RunFolder, tmp_path: Path
) -> None:
    material = Material(model=tiny_model, run=finished_run.path, recipe=tiny_values(tiny_model), text=STORIES)
    failed = []
    with Worker() as worker:
        for case, folder in cases({kind: count // 30 for kind, count in COUNTS.items()}, 1, material, tmp_path):
            outcome = worker.run(case.arguments, folder)
            if not outcome.passed:
                failed.append(f"{case.kind} {case.number}: {outcome.end}: {case.arguments}\n{outcome.output[-2000:]}")
    assert not failed, "\n\n".join(failed)
