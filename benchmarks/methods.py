"""Ways to an INT4 model of a task, each with the same model, data and seconds of tuning.

python benchmarks/methods.py RECIPE [--set section.key=value]… [--seconds SECONDS] [--seeds COUNT] [--quick] [--json]
    [--save]

The recipe is one with format = "fq_lora_nls". Every row is an IR that lm-evaluation-harness asks the same test
questions, in float32:

- BF16: the model as it is; PTQ: that one quantized by NNCF with AWQ + Scale Estimation + GPTQ, untuned;
- LoRA, then PTQ: PEFT's LoRA on the float model, merged, and quantized like PTQ;
- FQ_LORA and FQ_LORA_NLS: ours, with the recipe's largest rank, and with ranks that a short search chose;
- QA-LoRA: adapters of group means, absorbed into zero points of float16, and into zero points that are 4-bit codes;
- LoftQ + runtime adapter: the adapter stays beside the codes and runs with them;
- LoftQ, absorbed: the same with half of the seconds, then merged and distilled through FQ_LORA for the other half.

A step of each method is timed first, and every tuning gets as many steps as fit into the seconds; the order of the
examples, the choice of the best step by validation and the seeds are the same. `answer_nll_nats` is the mean over the
questions of -log p(right answer | question). Bits per weight count codes, scales, zero points and a runtime adapter.
Time per output token is measured of the first seed's models, one after the other in each round, over PTQ's.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import command
import numpy as np
import openvino as ov
import torch
from intervals import Samples, difference, interval
from peft_lora import tuned_with_peft
from ptq import post_training

from ovexport import recipe as recipes
from ovexport.artifacts import IR, RunFolder
from ovexport.bench import bench
from ovexport.evaluate.tasks import ask_model, loaded
from ovexport.models.device import Compute
from ovexport.openvino.graph import read_graph, weights
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import BenchSpec, CompressSpec, ModelSpec, Recipe, TuneSpec
from ovexport.reports import VerificationReport
from ovexport.storage.records import read_record
from ovexport.tasks import HarnessTask, TaskResult
from ovexport.trace.stage import trace
from ovexport.tune.trainer import make_trainer
from ovexport.versions import stack_versions

SEEDS, SECONDS = 3, 45.0
BASE, PTQ, LORA = "BF16", "PTQ", "LoRA, then PTQ"
FQ, NLS = "FQ_LORA", "FQ_LORA_NLS"
FLOAT16, CODES = "QA-LoRA, float16 zero points", "QA-LoRA, u4 zero points"
BESIDE, ABSORBED = "LoftQ + runtime adapter", "LoftQ, absorbed"
ROWS = (BASE, PTQ, LORA, FQ, NLS, FLOAT16, CODES, BESIDE, ABSORBED)
PLAIN: dict[str, Any] = {"format": "fq_lora", "rank_space": None}
FORMATS: dict[str, dict[str, Any]] = {
    FQ: PLAIN,
    NLS: {},
    FLOAT16: PLAIN | {"method": "qalora", "mode": "int4_asym_f16zp"},
    CODES: PLAIN | {"method": "qalora"},
    BESIDE: PLAIN | {"method": "lora", "init": "loftq", "rounding": "nearest"},
}
RATES = {FLOAT16: 10 / 3, CODES: 10.0}
"""Learning rates over the recipe's, where it is another: QA-LoRA's are the best of 1e-3, 3e-3 and 1e-2, and of 3e-3,
1e-2 and 3e-2, by the validation split of story-endings after 60 steps on wikilm-16m."""
SEARCH = {"method": "heuristics", "evaluations": 9, "sample": 64, "finalists": 2}
FIGURES = ("acc", "answer_nll_nats")
WARMUP_STEPS, TIMED_STEPS = 2, 5
METHODS = {"awq": True, "scale_estimation": True, "gptq": True}


def main() -> None:
    """Tune every row's models, then ask and time them."""
    parser = command.parser(__doc__, "methods", "one seed, 3 seconds of tuning, 50 questions")
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of optimizer steps, for each row and seed")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="COUNT")
    options = parser.parse_args()
    quick = ["task.test_examples=50", "bench.sessions=5", "bench.pairs=5"] if options.quick else []
    recipe = recipes.load(options.recipe, [*options.overrides, *quick])
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):  # NNCF prints what it does
        comparison = Comparison(recipe, Path(scratch), 3.0 if options.quick else options.seconds)
        document = comparison.document(range(1 if options.quick else options.seeds))
    command.publish(document, "methods", options, case=options.recipe.stem, recipe=options.recipe)


class Comparison:
    """The rows of the table, made in a scratch folder."""

    def __init__(self, recipe: Recipe, scratch: Path, seconds: float) -> None:
        self.recipe = recipe.model_copy(update={"search": recipe.search.model_copy(update=SEARCH)})
        self._scratch = scratch
        self._seconds = seconds
        self._rank = max(recipe.compress.rank_space or (recipe.compress.rank,))
        self._step_seconds: dict[str, float] = {}
        self._tuning: dict[str, list[float]] = {row: [] for row in ROWS}
        self._steps: dict[str, list[int]] = {row: [] for row in ROWS}
        self._results: dict[str, list[TaskResult]] = {row: [] for row in ROWS}
        self._products: dict[str, IR] = {}
        self._mismatches = 0

    def document(self, seeds: range) -> dict[str, Any]:
        """Everything that was measured, with its conditions."""
        began = perf_counter()
        for seed in seeds:
            for row in FORMATS:
                self._tuned(row, seed)
            self._absorbed(seed)
            self._lora(seed)
        samples = {row: self._samples(row) for row in ROWS}
        return {
            "rows": {row: self._row(row, figures) for row, figures in samples.items()},
            "differences": {
                f"{row} - {FQ}": {name: difference(samples[row][name], samples[FQ][name]) for name in FIGURES}
                for row in ROWS
                if row != FQ
            },
            "latency": self._latency(self.recipe.bench, self._products),
            "forms": self._forms(),
            "code_mismatches": self._mismatches,
            "seconds": perf_counter() - began,
            "conditions": self._conditions(seeds),
            "versions": stack_versions(),
        }

    def _of(self, row: str, seed: int, seconds: float) -> Recipe:
        """The recipe of a row, with the steps that fit into the seconds."""
        recipe = self.recipe
        compress = CompressSpec(**(recipe.compress.model_dump() | {"rank": self._rank} | FORMATS[row]))
        rate = recipe.tune.learning_rate * RATES.get(row, 1.0)
        tune = recipe.tune.model_copy(update={"seed": seed, "learning_rate": rate})
        seeded = recipe.model_copy(update={"compress": compress, "tune": tune})
        return self._with_steps(row, seeded, seconds)

    def _with_steps(self, row: str, recipe: Recipe, seconds: float) -> Recipe:
        if row not in self._step_seconds:
            run = services.run(recipe, self._scratch / "timed", overwrite=True, until="compress")
            self._step_seconds[row] = _step_seconds(run, recipe)
        steps = max(2, round(seconds / self._step_seconds[row]))
        return recipe.model_copy(update={"tune": _with_steps(recipe.tune, steps)})

    def _tuned(self, row: str, seed: int) -> None:
        recipe = self._of(row, seed, self._seconds)
        run = self._run(recipe, row, seed)
        if seed == 0 and row == FQ:
            self._keep_task(run)
            self._ask(BASE, run.ir("bf16"))
            tokens = run.data.tokens("train")
            quantized = post_training(run.ir("bf16"), recipe.compress, tokens, self._scratch / "ptq", **METHODS)
            self._ask(PTQ, quantized)
        self._count(row, recipe, self._step_seconds[row])
        self._ask(row, run.ir("int4"))

    def _run(self, recipe: Recipe, row: str, seed: int) -> RunFolder:
        """A proven run."""
        run = services.run(recipe, self._scratch / f"{row}-{seed}", until="verify")
        summary = read_record(run.path / "verification.json", VerificationReport).summary
        counts = (summary.code_mismatches, summary.scale_mismatches, summary.zero_point_mismatches)
        self._mismatches += sum(count or 0 for count in counts)
        return run

    def _absorbed(self, seed: int) -> None:
        first = self._of(BESIDE, seed, self._seconds / 2)
        run = services.run(first, self._scratch / f"half-{seed}", until="tune")
        folder = self._scratch / f"peft-{seed}"
        services.write_peft_folder(run.tuned.path, first.model, folder)
        merged = ModelSpec(id=str(folder), adapter=str(folder / "loftq_init"))
        seeded = self._of(FQ, seed, self._seconds / 2)
        tune = seeded.tune.model_copy(update={"objective": "distillation"})
        recipe = self._with_steps(
            ABSORBED, seeded.model_copy(update={"model": merged, "tune": tune}), self._seconds / 2
        )
        found = self._run(recipe, ABSORBED, seed)
        self._tuning[ABSORBED].append(
            first.tune.steps * self._step_seconds[BESIDE] + recipe.tune.steps * self._step_seconds[ABSORBED]
        )
        self._steps[ABSORBED].append((first.tune.steps or 0) + (recipe.tune.steps or 0))
        self._ask(ABSORBED, found.ir("int4"))

    def _lora(self, seed: int) -> None:
        tune = self.recipe.tune.model_copy(update={"seed": seed})
        of = partial(tuned_with_peft, self.recipe.model, data=self._data, rank=self._rank)
        if LORA not in self._step_seconds:
            self._step_seconds[LORA] = _difference_of_two(
                lambda steps: of(_with_steps(tune, steps), out=self._scratch / f"timed-{steps}")
            )
        steps = max(2, round(self._seconds / self._step_seconds[LORA]))
        folder = self._scratch / f"lora-{seed}"
        merged, _ = of(_with_steps(tune, steps), out=folder / "merged")
        base = trace(ModelSpec(id=str(merged)), self.recipe.convert, folder / "bf16")
        tokens = self._data.tokens("train")
        compress = CompressSpec(**(self.recipe.compress.model_dump() | PLAIN | {"rank": self._rank}))
        quantized = post_training(base, compress, tokens, folder / "ptq", **METHODS)
        self._tuning[LORA].append(steps * self._step_seconds[LORA])
        self._steps[LORA].append(steps)
        self._ask(LORA, quantized)

    def _keep_task(self, run: RunFolder) -> None:
        assert self.recipe.task is not None
        self._data = run.data
        self._task = HarnessTask(self.recipe.task, run.data.task_rows)

    def _count(self, row: str, recipe: Recipe, step_seconds: float) -> None:
        steps = recipe.tune.steps or 0
        self._tuning[row].append(steps * step_seconds)
        self._steps[row].append(steps)

    def _ask(self, row: str, ir: IR) -> None:
        self._products.setdefault(row, ir)
        result = ask_model(self._task, "row", loaded(ir), self.recipe.model)
        self._results[row].append(result)
        print(row, {name: round(result.figures[name], 4) for name in FIGURES}, file=sys.stderr, flush=True)

    def _samples(self, row: str) -> dict[str, Samples]:
        """Per figure (seeds, questions)."""
        results = self._results[row]
        return {
            name: np.array([[item[name] for item in result.items] for result in results], dtype=np.float64)
            for name in FIGURES
        }

    def _row(self, row: str, samples: Mapping[str, Samples]) -> dict[str, Any]:
        figures = {
            name: {"mean": float(values.mean()), "ci95": interval(values), "by_seed": values.mean(1).tolist()}
            for name, values in samples.items()
        }
        return figures | {
            "bits_per_weight": bits_per_weight(self._products[row]),
            "tuning_seconds": self._tuning[row],
            "steps": self._steps[row],
        }

    def _latency(self, spec: BenchSpec, products: Mapping[str, IR]) -> dict[str, Any]:
        """Time per output token of each, and its ratio to the second's, which is PTQ's."""
        prompt = self._data.tokens("test").reshape(-1).tolist()
        report = bench(products, spec, prompt)
        return {
            "time_per_output_token_ms": {
                name: model.time_per_output_token_ms.model_dump(mode="json") for name, model in report.models.items()
            },
            "ratios": {name: ratio.time_per_output_token.model_dump() for name, ratio in report.ratios.items()},
            "conditions": report.model_dump(mode="json")["conditions"],
        }

    def _forms(self) -> dict[str, Any]:
        """The two forms of QA-LoRA against each other, by precision of inference; None where the CPU has it not."""
        both = {name: self._products[name] for name in (CODES, FLOAT16)}
        capable = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        spec = self.recipe.bench.model_copy(update={"memory": False, "limits": False})
        return {
            precision: self._latency(spec.model_copy(update={"inference_precision": precision}), both)
            if precision == "f32" or capable
            else None
            for precision in ("f32", "bf16")
        }

    def _conditions(self, seeds: range) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "model": Path(recipe.model.id).name,
            "task": recipe.task.name if recipe.task else None,
            "test": len(self._results[BASE][0].items),
            "seeds": list(seeds),
            "seconds": self._seconds,
            "step_seconds": self._step_seconds,
            "compress": recipe.compress.model_dump(mode="json"),
            "rank": self._rank,
            "tune": recipe.tune.model_dump(mode="json"),
            "rates": RATES,
            "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
            "threads": torch.get_num_threads(),
        }


def bits_per_weight(ir: IR) -> float:
    """Bits of codes, scales, zero points and a runtime adapter for each entry of the weight matrices."""
    matrices = weights(read_graph(ir))
    beside = ir.adapter_tensors.stat().st_size if ir.adapter else 0
    return 8 * (sum(one.byte_size for one in matrices) + beside) / sum(one.elements for one in matrices)


def _with_steps(spec: TuneSpec, steps: int) -> TuneSpec:
    every = max(1, steps // 2)
    update = {"steps": steps, "epochs": None, "validate_every": every, "save_every": steps, "probe_learning_rates": ()}
    return spec.model_copy(update=update)


def _step_seconds(run: RunFolder, recipe: Recipe) -> float:
    """The median time of a tuning step."""
    spec = _with_steps(recipe.tune, WARMUP_STEPS + TIMED_STEPS)
    compute = Compute.of("cpu", spec.precision)
    trainer = make_trainer(run.compressed, recipe.model, spec, run.data, compute, silent)
    seconds = []
    for index in range(WARMUP_STEPS + TIMED_STEPS):
        began = perf_counter()
        trainer.step(index)
        seconds.append(perf_counter() - began)
    return float(np.median(seconds[WARMUP_STEPS:]))


def _difference_of_two(tune: Callable[[int], Any]) -> float:
    """Seconds of a step of a loop that has none by itself: what more steps take longer."""
    seconds = {}
    for steps in (2, 2 + TIMED_STEPS):
        began = perf_counter()
        tune(steps)
        seconds[steps] = perf_counter() - began
    return max(1e-3, (seconds[2 + TIMED_STEPS] - seconds[2]) / TIMED_STEPS)


if __name__ == "__main__":
    main()
