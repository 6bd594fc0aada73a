"""A downstream task, tuned for in five ways: the published table, for any model and task, in one run.

python benchmarks/downstream.py RECIPE [--set section.key=value]… [--seeds COUNT] [--quick] [--json] [--save]

The recipe is one with format = "fq_lora_nls". Every row is an IR that lm-evaluation-harness asks the same test
questions, in float32:

- BF16: the model as it is;
- BF16 + LoRA: PEFT's LoRA on it, merged (peft_lora.py);
- INT4 (LoRA, then PTQ): that one's IR, quantized by NNCF with AWQ + Scale Estimation + GPTQ;
- INT4 (QAT + LoRA): ours with one rank, the largest of the recipe's space; and the same with the loss on the answers
  alone, or on everything, whichever the recipe does not ask for, with the first seed only;
- INT4 (QAT + NLS): ours with the recipe's space, and the ranks that its search chose on the validation split.

Rows that are tuned have the same data, examples, order, steps and learning rate (but for --lora-learning-rate), the
same choice of the best step by validation, and one tuning for each seed. `answer_nll_nats` is the mean over the
questions of -log p(right answer | question). Differences are taken question by question, the questions taken as
independent; one whose 95 % interval holds 0 is a tie.
"""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import command
import numpy as np
import openvino as ov
import torch
from intervals import Samples, difference, interval, ratio
from peft_lora import tuned_with_peft
from ptq import post_training

from ovexport import recipe as recipes
from ovexport.artifacts import RunFolder, StageRecord
from ovexport.evaluate.tasks import Loaded, ask_model, loaded
from ovexport.models.device import Compute
from ovexport.models.student import TunedModel
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import ModelSpec, Recipe
from ovexport.reports import SearchReport, VerificationReport
from ovexport.storage.records import read_record
from ovexport.tasks import HarnessTask, TaskResult
from ovexport.trace.stage import trace
from ovexport.tune.trainer import make_trainer
from ovexport.versions import installed_version, stack_versions

SEEDS = 3
BASE, LORA, PTQ, FIXED, ELASTIC = (
    "BF16",
    "BF16 + LoRA",
    "INT4 (LoRA, then PTQ)",
    "INT4 (QAT + LoRA)",
    "INT4 (QAT + NLS)",
)
OTHER_LOSS = {"everything": "answer", "answer": "everything"}
FIGURES = ("acc", "acc_norm", "exact_match", "answer_nll_nats")
TIMED_STEPS = 30
WARMUP_STEPS = 3


def main() -> None:
    """Tune every row's models, then ask them."""
    parser = command.parser(__doc__, "downstream", "one seed, 10 steps, 8 configurations, 50 questions")
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    parser.add_argument("--lora-learning-rate", type=float, metavar="RATE", help="of PEFT's LoRA; else the recipe's")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="COUNT", help="tunings of each row")
    options = parser.parse_args()
    quick = ["search.evaluations=8", "task.test_examples=50"] if options.quick else []
    recipe = recipes.load(options.recipe, [*options.overrides, *quick])
    if options.quick:
        tune = recipe.tune.model_copy(update={"steps": 10, "epochs": None})
        recipe = recipe.model_copy(update={"tune": tune})
    rate = options.lora_learning_rate or recipe.tune.learning_rate
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):  # NNCF prints what it does
        seeds = tuple(range(1 if options.quick else options.seeds))
        document = Comparison(recipe, Path(scratch), seeds, rate).document()
    command.publish(document, "downstream", options, case=options.recipe.stem, recipe=options.recipe)


class Comparison:
    """The rows of the table, made in a scratch folder."""

    def __init__(self, recipe: Recipe, scratch: Path, seeds: tuple[int, ...], lora_learning_rate: float) -> None:
        self.recipe = recipe
        self.seeds = seeds
        self._scratch = scratch
        self._lora_learning_rate = lora_learning_rate
        self._rank = max(recipe.compress.rank_space or (recipe.compress.rank,))
        self._other = f"{FIXED}, loss on the {OTHER_LOSS[recipe.tune.loss_on]}"
        tuned = (LORA, PTQ, self._other, FIXED, ELASTIC)
        self._seconds: dict[str, list[float]] = {name: [] for name in (*tuned, "search")}
        self._results: dict[str, list[TaskResult]] = {name: [] for name in (BASE, *tuned)}
        self._searches: list[SearchReport] = []
        self._mismatches = 0
        self._torch_differs = 0

    def document(self) -> dict[str, Any]:
        """Everything that was measured, with its conditions."""
        began = perf_counter()
        for seed in self.seeds:
            run = self._elastic(seed)
            if seed == self.seeds[0]:
                self._ask(BASE, loaded(run.ir("bf16")), run)
            self._fixed(seed)
            self._lora(seed, run)
        recipe, conditions = self.recipe, self._asked_with(run)
        samples = {name: self._samples(name) for name in self._results}
        first = f"{FIXED}, first seed"
        compared = samples | {first: {figure: values[:1] for figure, values in samples[FIXED].items()}}
        pairs = [(FIXED, PTQ), (ELASTIC, PTQ), (ELASTIC, FIXED), (self._other, first)]
        pairs += [(row, BASE) for row in (LORA, PTQ, FIXED, ELASTIC)]
        return {
            "rows": {name: self._row(name, figures) for name, figures in samples.items()},
            "ratios": {
                f"answer_nll {name} / {BASE}": ratio(found["answer_nll_nats"], samples[BASE]["answer_nll_nats"])
                for name, found in samples.items()
                if name != BASE and "answer_nll_nats" in found
            }
            | {"step_time NLS / LoRA": self._step_ratio(run)},
            "differences": {
                f"{ours} - {theirs}": {
                    figure: difference(compared[ours][figure], compared[theirs][figure]) for figure in samples[ours]
                }
                for ours, theirs in pairs
            },
            "searches": [
                {"chosen": report.chosen, "scores": [score.model_dump() for score in report.scores]}
                for report in self._searches
            ],
            "code_mismatches": self._mismatches,
            "questions_torch_answers_otherwise": self._torch_differs,
            "seconds": self._seconds | {"all": [perf_counter() - began]},
            "conditions": {
                "model": Path(recipe.model.id).name,
                "task": recipe.task.name if recipe.task else None,
                "examples": run.data.manifest.examples,
                "seeds": list(self.seeds),
                "compress": recipe.compress.model_dump(mode="json"),
                "tune": recipe.tune.model_dump(mode="json"),
                "search": recipe.search.model_dump(mode="json"),
                "sequence_length": recipe.data.sequence_length,
                "lora_learning_rate": self._lora_learning_rate,
                "lora_rank": self._rank,
                "lm_eval": installed_version("lm-eval"),
                "peft": installed_version("peft"),
                **conditions,
                "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
                "threads": torch.get_num_threads(),
            },
            "versions": stack_versions(),
        }

    def _seeded(self, seed: int) -> Recipe:
        tune = self.recipe.tune.model_copy(update={"seed": seed})
        search = self.recipe.search.model_copy(update={"seed": seed})
        return self.recipe.model_copy(update={"tune": tune, "search": search})

    def _elastic(self, seed: int) -> RunFolder:
        run = services.run(self._seeded(seed), self._scratch / "elastic", resume=True, until="verify")
        report = read_record(run.search, SearchReport)
        self._searches.append(report)
        searched = sum(score.seconds for score in report.scores)
        self._seconds["search"].append(searched)
        self._seconds[ELASTIC].append(_stage_seconds(run))
        proof = read_record(run.path / "verification.json", VerificationReport).summary
        self._mismatches += sum(
            count or 0 for count in (proof.code_mismatches, proof.scale_mismatches, proof.zero_point_mismatches)
        )
        found = self._ask(ELASTIC, loaded(run.ir("int4")), run)
        if seed == self.seeds[0]:
            torch_model = self._ask_once(lambda: TunedModel(run.checkpoint, self.recipe.model), run)
            pairs = zip(torch_model.items, found.items, strict=True)
            self._torch_differs = sum(_verdicts(ours) != _verdicts(theirs) for ours, theirs in pairs)
        return run

    def _fixed(self, seed: int) -> None:
        seeded = self._seeded(seed)
        update = {"format": "fq_lora", "rank": self._rank, "rank_space": None}
        plain = seeded.model_copy(update={"compress": seeded.compress.model_copy(update=update)})
        other = plain.tune.model_copy(update={"loss_on": OTHER_LOSS[plain.tune.loss_on]})
        rows = {FIXED: plain} | (
            {self._other: plain.model_copy(update={"tune": other})} if seed == self.seeds[0] else {}
        )
        for row, each in rows.items():
            run = services.run(each, self._scratch / "fixed", resume=True, until="convert")
            self._seconds[row].append(_stage_seconds(run))
            self._ask(row, loaded(run.ir("int4")), run)

    def _lora(self, seed: int, run: RunFolder) -> None:
        began = perf_counter()
        spec = self._seeded(seed).tune.model_copy(update={"learning_rate": self._lora_learning_rate})
        folder = self._scratch / f"lora-{seed}"
        merged, _ = tuned_with_peft(self.recipe.model, spec, run.data, self._rank, folder / "merged")
        self._seconds[LORA].append(perf_counter() - began)
        base = trace(ModelSpec(id=str(merged)), self.recipe.convert, folder / "bf16")
        self._ask(LORA, loaded(base), run)
        began = perf_counter()
        tokens = run.data.tokens("train")
        methods = {"awq": True, "scale_estimation": True, "gptq": True}
        quantized = post_training(base, self.recipe.compress, tokens, folder / "ptq", **methods)
        self._seconds[PTQ].append(perf_counter() - began)
        self._ask(PTQ, loaded(quantized), run)

    def _ask(self, row: str, load: Loaded, run: RunFolder) -> TaskResult:
        result = self._ask_once(load, run)
        self._results[row].append(result)
        print(row, {name: round(value, 4) for name, value in result.figures.items()}, file=sys.stderr, flush=True)
        return result

    def _ask_once(self, load: Loaded, run: RunFolder) -> TaskResult:
        return ask_model(self._task(run), "row", load, self.recipe.model)

    def _task(self, run: RunFolder) -> HarnessTask:
        assert self.recipe.task is not None
        return HarnessTask(self.recipe.task, run.data.task_rows)

    def _asked_with(self, run: RunFolder) -> dict[str, Any]:
        task = self._task(run)
        return {"metric": task.metric, "num_fewshot": task.num_fewshot, "test": len(self._results[BASE][0].items)}

    def _samples(self, row: str) -> dict[str, Samples]:
        """Per figure (seeds, questions)."""
        results = self._results[row]
        figures = [name for name in results[0].items[0] if name in FIGURES]
        return {
            name: np.array([[item[name] for item in result.items] for result in results], dtype=np.float64)
            for name in figures
        }

    def _row(self, row: str, samples: Mapping[str, Samples]) -> dict[str, Any]:
        return {
            name: {
                "mean": float(values.mean()),
                "ci95": interval(values),
                "standard_error": float(values.mean(0).std(ddof=1) / values.shape[1] ** 0.5),
                "by_seed": values.mean(1).tolist(),
            }
            for name, values in samples.items()
        }

    def _step_ratio(self, run: RunFolder) -> dict[str, Any]:
        """Time of a step with ranks drawn at random over that with the largest ones, on the same batches in turn."""
        spec = self.recipe.tune.model_copy(update={"steps": WARMUP_STEPS + TIMED_STEPS, "epochs": None})
        fixed = RunFolder(self._scratch / "fixed")
        compute = Compute.of("cpu", spec.precision)
        elastic, plain = (
            make_trainer(folder.compressed, self.recipe.model, spec, folder.data, compute, silent)
            for folder in (run, fixed)
        )
        seconds: dict[int, list[float]] = {0: [], 1: []}
        for index in range(WARMUP_STEPS + TIMED_STEPS):
            for which, trainer in ((0, elastic), (1, plain))[:: 1 if index % 2 else -1]:
                began = perf_counter()
                trainer.step(index)
                seconds[which].append(perf_counter() - began)
        ours, theirs = (np.array(seconds[which][WARMUP_STEPS:]) for which in (0, 1))
        generator = np.random.default_rng(0)
        ratios = ours / theirs
        drawn = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
        return {"median": float(median(ratios)), "ci95": np.percentile(drawn, [2.5, 97.5]).tolist()}


def _stage_seconds(run: RunFolder) -> float:
    return read_record(run.stage_record("tune"), StageRecord).seconds


def _verdicts(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item[name] for name in ("acc", "acc_norm", "exact_match") if name in item}


if __name__ == "__main__":
    main()
