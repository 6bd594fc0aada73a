"""What the command line does with broken and hostile input, made from a seed.

python benchmarks/fuzz.py [--quick] [--json] [--save] [--seed N] [--kind KIND]

Each case is a mutation of a valid recipe, command line, model, text or IR, given to the command line in a process that
may compute for 30 seconds and use 12 GiB. It passes if the command ends with a documented exit code other than 1 and
without a traceback. The generators are in tests/fuzzing.py and the modules beside it; the tests run a thirtieth
of the cases.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import conftest  # noqa: E402
from fuzz_values import Material  # noqa: E402
from fuzzing import COUNTS, TIME_LIMIT_S, Worker, cases  # noqa: E402

from ovexport import recipe  # noqa: E402
from ovexport.pipeline import services  # noqa: E402
from ovexport.versions import stack_versions  # noqa: E402

QUICK_SHARE = 10


def main() -> None:
    """Run the cases and say how they ended."""
    parser = command.parser(__doc__, "fuzz", "a tenth of the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(COUNTS), help="this kind alone")
    options = parser.parse_args()
    share = QUICK_SHARE if options.quick else 1
    counts = {kind: count // share for kind, count in COUNTS.items() if options.kind in (None, kind)}
    with TemporaryDirectory() as folder:
        found = fuzz(counts, options.seed, material(Path(folder) / "material"), Path(folder) / "cases")
    document = {
        "kinds": found,
        "conditions": {"seed": options.seed, "time_limit_s": TIME_LIMIT_S},
        "versions": stack_versions(),
    }
    command.publish(document, "fuzz", options)
    if any(kind["tracebacks"] or kind["hangs"] or kind["crashes"] for kind in found.values()):
        sys.exit(1)


def material(folder: Path) -> Material:
    """A tiny model, and a run of it."""
    from transformers import LlamaConfig

    config = LlamaConfig(**conftest.COMMON, tie_word_embeddings=True, initializer_range=0.1)
    model = conftest.save_tiny_model(folder / "llama", config)
    sections = conftest.tiny_values(model)
    sound = recipe.parse(sections, base=conftest.REPOSITORY, origin="fuzz")
    run = services.run(sound, folder / "run", until="convert")
    return Material(model=model, run=run.path, recipe=sections, text=conftest.STORIES)


def fuzz(counts: dict[str, int], seed: int, sound: Material, room: Path) -> dict[str, dict[str, Any]]:
    """How the cases of each kind ended; what failed is told on stderr."""
    found = {kind: {"cases": 0, "tracebacks": 0, "hangs": 0, "crashes": 0, "exit_codes": Counter()} for kind in counts}
    with Worker() as worker:
        for case, folder in cases(counts, seed, sound, room):
            outcome = worker.run(case.arguments, folder)
            entry: dict[str, Any] = found[case.kind]
            entry["cases"] += 1
            entry["tracebacks"] += outcome.traceback
            entry["hangs"] += outcome.end == "hang"
            entry["crashes"] += outcome.end == "crash"
            entry["exit_codes"][str(outcome.end)] += 1
            if not outcome.passed:
                what = json.dumps(case.arguments)[:500]
                print(f"{case.kind} {case.number}: {outcome.end}: {what}\n{outcome.output[-3000:]}", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
