"""Divergence against size: our mixed formats and NNCF's mixed precision at the same bytes, and one format for all.

python benchmarks/frontier.py [RECIPE] [--set section.key=value]… [--work FOLDER] [--quick] [--json] [--save]

Sizes are those of the packed matrices: uniform groups of 128 and of 64, and four between groups of 128 everywhere and 8
bits everywhere. At each size:

- ours: a budget of that size (`compress.size_mb`), rounded on both sides; what formats cost is measured once, for all
  sizes;
- NNCF: on the OpenVINO model, `ratio` with each of its sensitivity metrics, the smallest share of 4-bit weights that
  stays within the size, GPTQ on; the recipe's group size, or 128 where that is too large. The metrics and GPTQ get as
  much calibration text as ours. At the sizes of one format it has 4 bits everywhere, whatever the metric.

At the sizes of one format, ours and the one format are also tuned, by the recipe's `[tune]`, unless it has no steps.

Every IR is measured by the same code on the same tokens, in float32, against the BF16 IR. Ratios are ours over theirs,
with bootstrap intervals over sequences.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import command
import numpy as np
import openvino as ov
from intervals import interval, ratio
from numpy.typing import NDArray
from provenance import revision
from ptq import mixed_precision, packed_bytes
from rounded import NO_BUDGET, converted

from ovexport import recipe as recipes
from ovexport.artifacts import IR, RunFolder, StageRecord
from ovexport.evaluate.divergence import compare
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import CompressSpec, Recipe
from ovexport.storage.files import write_text
from ovexport.storage.records import read_record
from ovexport.versions import stack_versions

DEMO = Path(__file__).parent.parent / "pipelines" / "demo.toml"
SHARES = (0.1, 0.3, 0.5, 0.7)
"""Of the way from groups of 128 everywhere to 8 bits everywhere."""
METRICS = (
    "WEIGHT_QUANTIZATION_ERROR",
    "HESSIAN_INPUT_ACTIVATION",
    "MEAN_ACTIVATION_VARIANCE",
    "MAX_ACTIVATION_VARIANCE",
    "MEAN_ACTIVATION_MAGNITUDE",
)

OURS, ONE_FORMAT = "ours", "one format"
TUNED = {OURS: "ours, tuned", ONE_FORMAT: "one format, tuned"}


def main() -> None:
    """Make every IR, then measure them."""
    parser = command.parser(__doc__, "frontier", "one size, 16 calibration sequences")
    parser.add_argument("recipe", nargs="?", type=Path, default=DEMO, metavar="RECIPE")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep what is made there, and go on from it")
    options = parser.parse_args()
    quick = ["compress.calibration_sequences=16"] if options.quick else []
    recipe = recipes.load(options.recipe, [*options.overrides, "compress.rounding=two_sided", *quick])
    folder = nullcontext(options.work) if options.work else TemporaryDirectory()
    with folder as scratch, redirect_stdout(sys.stderr):  # NNCF prints what it does
        document = measured(recipe, Path(scratch), quick=options.quick)
    command.publish(document, "frontier", options, case=options.recipe.stem, recipe=options.recipe)


def measured(recipe: Recipe, scratch: Path, *, quick: bool) -> dict[str, Any]:
    """The document: a row for each IR, ratios, conditions."""
    maker = Maker(recipe, scratch)
    group_sizes = {f"group size {size}": size for size in ((64,) if quick else (128, 64))}
    uniform = {name: maker.uniform(size) for name, size in group_sizes.items()}
    sizes = {name: packed_bytes(ir) for name, ir in uniform.items()}
    if not quick:
        smallest, largest = sizes["group size 128"], packed_bytes(maker.eight_bits())
        sizes |= {f"{share:.0%} of the way": int(smallest + share * (largest - smallest)) for share in SHARES}
    samples: dict[str, NDArray[np.float64]] = {}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    for name, limit in sizes.items():
        made = {OURS: maker.mixed(limit)}
        if name not in uniform:
            made |= {f"NNCF, {metric}": maker.nncf(limit, metric) for metric in METRICS}
        else:
            made |= {"NNCF, 4 bits everywhere": maker.nncf(limit, METRICS[0]), ONE_FORMAT: uniform[name]}
            if recipe.tune.steps and not quick:
                made |= {TUNED[OURS]: maker.mixed(limit, tuned=True)}
                made |= {TUNED[ONE_FORMAT]: maker.uniform(group_sizes[name], tuned=True)}
        for who, ir in made.items():
            if ir is None:
                continue
            samples[who] = maker.divergence(ir)
            rows.append(
                {
                    "size": name,
                    "limit_bytes": limit,
                    "made_by": who,
                    "weight_bytes": packed_bytes(ir),
                    "kl_mean_nats": float(samples[who].mean()),
                    "kl_ci95": interval(samples[who]),
                }
            )
            ours = TUNED[OURS] if who in TUNED.values() else OURS
            if who != ours:
                ratios[f"kl {ours} / {who}, {name}"] = ratio(samples[ours], samples[who])
    return {
        "rows": rows,
        "ratios": ratios,
        "conditions": {
            "model": Path(recipe.model.id).name,
            "compress": recipe.compress.model_dump(mode="json"),
            "tune": recipe.tune.model_dump(mode="json"),
            "made_at": sorted(maker.revisions),
            "tuning_seconds": maker.tuning_seconds,
            "test_sequences": len(maker.run.data.tokens("test")),
            "sequence_length": recipe.data.sequence_length,
            "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        },
        "versions": stack_versions(),
    }


class Maker:
    """Makes the IRs of one model, each once, and measures them.

    Attributes:
        run: of the recipe, compressed in one way after the other.
        revisions: of git, at which the IRs were made.
        tuning_seconds: that each tuning took.
    """

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        self._recipe = recipe
        self._scratch = scratch
        self._costs = scratch / "costs.json"
        self.revisions: set[str] = set()
        self.tuning_seconds: dict[str, float] = {}
        self.run = self._up_to("trace")

    def uniform(self, group_size: int, *, tuned: bool = False) -> IR:
        """One group size for all Linear layers, rounded on both sides."""
        return self._ours(f"uniform-{group_size}", tuned=tuned, group_size=group_size)

    def eight_bits(self) -> IR:
        """8 bits for all layers."""
        return self._ours("eight-bits", layers=({"pattern": "*", "mode": "int8_asym"},))

    def mixed(self, limit: int, *, tuned: bool = False) -> IR:
        """Our formats within a limit of bytes."""
        costs = {"sensitivities": str(self._costs)} if self._costs.is_file() else {}
        made = self._ours(f"mixed-{limit}", tuned=tuned, size_mb=limit / 1e6, **costs)
        if not costs:
            shutil.copyfile(self.run.sensitivities, self._costs)
        return made

    def nncf(self, limit: int, metric: str) -> IR | None:
        """NNCF's formats within a limit of bytes; None where not even 4 bits for all layers are."""
        for group_size in (self._recipe.compress.group_size, 128):
            spec = self._recipe.compress.model_copy(update={"group_size": group_size})
            make = partial(self._mixed_precision, spec, limit, metric)
            found = self._once(f"nncf-{limit}-{metric}-{group_size}", make)
            if found is not None:
                return found
        return None

    def _mixed_precision(self, spec: CompressSpec, limit: int, metric: str, out: Path) -> tuple[IR | None, None]:
        return mixed_precision(self.run.ir("bf16"), spec, self.run.data.tokens("train"), out, limit, metric), None

    def divergence(self, ir: IR) -> NDArray[np.float64]:
        """KL from the BF16 IR of each test sequence, in nats per token, (1, sequences)."""
        runners = {
            "bf16": LogitsRunner(read_graph(self.run.ir("bf16")), "bf16"),
            "row": LogitsRunner(read_graph(ir), "row"),
        }
        tokens = self.run.data.tokens("test")
        found = compare(runners, "bf16", tokens, self._recipe.evaluate.batch_size, silent)
        return np.asarray(found["row"].joined("kl").mean(1)[None])

    def _ours(self, name: str, *, tuned: bool = False, **compress: Any) -> IR:
        """The IR of what the run makes of the recipe with these `[compress]` keys."""

        def make(out: Path) -> tuple[IR, float | None]:
            run = self._up_to("search" if tuned else "compress", **compress)
            seconds = read_record(run.stage_record("tune"), StageRecord).seconds if tuned else None
            return converted(run.checkpoint if tuned else run.compressed, run.ir("bf16"), out), seconds

        found = self._once(f"{name}-tuned" if tuned else name, make)
        assert found is not None
        return found

    def _once(self, name: str, make: Callable[[Path], tuple[IR | None, float | None]]) -> IR | None:
        """What `make` makes in a folder, now or before; None where it makes nothing."""
        note = self._scratch / f"{name}.json"
        if not note.is_file():
            made, seconds = make(self._scratch / name)
            place = made and made.path.relative_to(self._scratch).as_posix()
            write_text(json.dumps({"ir": place, "seconds": seconds, "revision": revision()}), note)
        known = json.loads(note.read_text(encoding="utf-8"))
        self.revisions.add(known["revision"])
        if known["seconds"] is not None:
            self.tuning_seconds[name] = known["seconds"]
        return known["ir"] and IR(self._scratch / known["ir"])

    def _up_to(self, stage: Literal["trace", "compress", "search"], **compress: Any) -> RunFolder:
        spec = type(self._recipe.compress)(**(self._recipe.compress.model_dump() | NO_BUDGET | compress))
        recipe = self._recipe.model_copy(update={"compress": spec})
        folder = self._scratch / "run"
        return services.run(recipe, folder, resume=folder.is_dir(), until=stage)


if __name__ == "__main__":
    main()
