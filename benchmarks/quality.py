"""Accuracy by post-training quantization, by AutoRound, by the documented NNCF loop and by ovexport, on one test text.

python benchmarks/quality.py [RECIPE] [--set section.key=value]… [--auto-round PYTHON] [--work FOLDER] [--quick]
    [--json] [--save]

Every row is an IR, measured by the same code on the same tokens, in float32, against the BF16 IR:

- NNCF's post-training quantization on the OpenVINO model: AWQ, Scale Estimation, GPTQ and their combinations, on 128 of
  our calibration sequences, or all if there are fewer: as many as NNCF and AutoRound take by default; and rounding to
  nearest;
- AutoRound with 200 iterations, calibrated with the same sequences, in the recipe's group size.
  auto_round_folder.py makes its folder, and the IR has the folder's codes; embeddings and head, which AutoRound leaves
  in floating point, have 8 bits as in every row. auto-round requires other versions of packages than ours, so
  --auto-round names the interpreter of an environment that has it. Without the option there is no such row, nor where
  AutoRound can't pack every layer that has 4 bits in the other rows; the conditions say why;
- the documented NNCF loop in our own implementation (nncf_loop.py), with its defaults and the recipe's rank. It gets
  the seconds that our tuning took (its compression, hidden states and validation do not count), and its best checkpoint
  by validation is taken; the same with both our starting point and our learning rate ("both of ours");
- our own GPTQ, without tuning; our starting point, which is the recipe's; and our tuning of the recipe. If the recipe
  has a budget, all rows but the last two have its own format for all layers; so have two more rows, our starting point
  and our tuning without the budget.

Our starting point and our tuning are made with each seed: their figures are means over the seeds, and their intervals
are bootstraps over seeds and sequences. Every other row is made once, with the first seed. `recovered_gap` is
1 - KL / KL(rounding to nearest). With --work, intermediate results stay in a folder, and the same command resumes
there.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import auto_round_codes
import command
import numpy as np
import openvino as ov
import torch
from auto_round_folder import ITERATIONS
from intervals import difference, interval, ratio
from nncf_loop import LEARNING_RATE, NncfLoop, Settings
from numpy.typing import NDArray
from provenance import revision
from ptq import post_training
from rounded import NO_BUDGET, converted, rounded

from ovexport import recipe as recipes
from ovexport.artifacts import IR, Checkpoint, RunFolder, StageRecord
from ovexport.compress import evenly_spread
from ovexport.evaluate import load_encoder
from ovexport.evaluate.answers import PromptTokenizer, common_template, generate
from ovexport.evaluate.divergence import TokenFigures, compare, perplexity
from ovexport.evaluate.prompts import Prompts, choose_prompts
from ovexport.evaluate.similarity import Answers, compare_answers
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.readers import adopt
from ovexport.recipe import EvaluateSpec, Recipe
from ovexport.storage.files import write_text
from ovexport.storage.records import read_record
from ovexport.trace.stage import trace
from ovexport.versions import stack_versions

DEMO = Path(__file__).parent.parent / "pipelines" / "demo.toml"
SEEDS = (0, 1, 2)
PEERS_SEQUENCES = 128
OURS, START, ROUNDING = "ovexport, tuned", "ovexport, not tuned", "rounding to nearest"
OUR_GPTQ = "ovexport, GPTQ, not tuned"
ONE_FORMAT, ONE_FORMAT_START = "ovexport, one format, tuned", "ovexport, one format, not tuned"
THEIRS = "documented NNCF loop"
AUTO_ROUND = f"AutoRound, {ITERATIONS} iterations"

COMPARED = ("nll", "same_top1", "similarity")
"""Figures of which ours less each other row's is given, with an interval."""
LOOPS = {THEIRS: False, f"{THEIRS}, both of ours": True}
"""Whether the documented loop is given our starting point and our learning rate."""
PTQ = {
    ROUNDING: {},
    "AWQ": {"awq": True},
    "Scale Estimation": {"scale_estimation": True},
    "AWQ + Scale Estimation": {"awq": True, "scale_estimation": True},
    "GPTQ": {"gptq": True},
    "Scale Estimation + GPTQ": {"scale_estimation": True, "gptq": True},
    "AWQ + Scale Estimation + GPTQ": {"awq": True, "scale_estimation": True, "gptq": True},
}


def main() -> None:
    """Make every row's IRs, then measure them."""
    parser = command.parser(__doc__, "quality", "one seed, 20 steps, of NNCF's methods GPTQ alone, no AutoRound")
    parser.add_argument("recipe", nargs="?", type=Path, default=DEMO, metavar="RECIPE")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    parser.add_argument(
        "--auto-round", type=Path, metavar="PYTHON", help="the interpreter of an environment that has auto-round"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep what is made there, and go on from it")
    options = parser.parse_args()
    auto_round = None if options.quick else options.auto_round
    if auto_round:
        auto_round_codes.require_installed(auto_round)
    quick = ["tune.steps=20"] if options.quick else []
    recipe = recipes.load(options.recipe, [*options.overrides, *quick])
    seeds = SEEDS[:1] if options.quick else SEEDS
    folder = nullcontext(options.work) if options.work else TemporaryDirectory()
    with folder as scratch, redirect_stdout(sys.stderr):  # NNCF prints what it does
        document = measured(recipe, Path(scratch), seeds, auto_round, quick=options.quick)
    command.publish(document, "quality", options, case=options.recipe.stem, recipe=options.recipe)


def measured(
    recipe: Recipe, scratch: Path, seeds: tuple[int, ...], auto_round: Path | None, *, quick: bool
) -> dict[str, Any]:
    """The document: rows, ratios, conditions.

    Args:
        auto_round: an interpreter that has auto-round; None where there is none.
    """
    maker = Maker(recipe, scratch)
    made: dict[str, list[IR]] = {}
    seconds: dict[str, list[float]] = {}
    made[OURS], made[START], seconds[OURS] = maker.ours(seeds)
    if recipe.compress.budget:
        made[ONE_FORMAT], made[ONE_FORMAT_START], seconds[ONE_FORMAT] = maker.one_format(seeds[:1])
    for name, ours in LOOPS.items():
        made[name], seconds[name] = maker.documented(name, seeds[0], seconds[OURS][0], ours=ours)
    run = maker.run
    about_auto_round = maker.against_auto_round(auto_round, seeds[0])
    if not about_auto_round:
        made[AUTO_ROUND], about_auto_round = maker.auto_round(auto_round, seeds[0])
        seconds[AUTO_ROUND] = [about_auto_round["seconds"]]
    made[OUR_GPTQ] = [rounded("gptq", recipe, run, scratch)]
    base, tokens = run.ir("bf16"), run.data.tokens("train")
    chosen = {name: PTQ[name] for name in (ROUNDING, "GPTQ")} if quick else PTQ
    for name, flags in chosen.items():
        made[name] = [_post_training(name, flags, maker.uniform, run, tokens, scratch)]
    rows, samples = _evaluated(base, made, recipe, run)
    others = [name for name in made if name != OURS]
    return {
        "rows": rows,
        "ratios": {f"kl {OURS} / {other}": ratio(samples["kl"][OURS], samples["kl"][other]) for other in others},
        "differences": {
            f"{figure} {OURS} - {other}": difference(samples[figure][OURS], samples[figure][other])
            for figure in COMPARED
            for other in others
        },
        "seconds": seconds,
        "conditions": {
            "tuned_at": sorted(maker.revisions),
            "model": Path(recipe.model.id).name,
            "seeds": list(seeds),
            "compress": recipe.compress.model_dump(mode="json"),
            "tune": recipe.tune.model_dump(mode="json"),
            "train": Path(str(recipe.data.train.path)).name,
            "train_tokens": int(tokens.size),
            "test_sequences": len(run.data.tokens("test")),
            "sequence_length": recipe.data.sequence_length,
            "calibration_sequences": min(recipe.compress.calibration_sequences, len(tokens)),
            "auto_round": about_auto_round,
            "encoder": recipe.evaluate.encoder,
            "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
            "threads": torch.get_num_threads(),
        },
        "versions": stack_versions(),
    }


class Maker:
    """Makes the rows that are tuned, each once.

    Attributes:
        run: the recipe's run, up to the tuning of the last seed.
        uniform: the recipe without a budget.
        revisions: of git, at which each row was tuned.
    """

    def __init__(self, recipe: Recipe, scratch: Path) -> None:
        self._recipe = recipe
        self._scratch = scratch
        self.uniform = recipe.model_copy(update={"compress": recipe.compress.model_copy(update=NO_BUDGET)})
        self.revisions: set[str] = set()
        self.run = services.run(recipe, scratch / "run", resume=(scratch / "run").is_dir(), until="trace")

    def ours(self, seeds: tuple[int, ...]) -> tuple[list[IR], list[IR], list[float]]:
        """The IR of our tuning for each seed, that of its starting point, and the seconds that the tuning took."""
        return self._tuned(self._recipe, "ours", self.run.path, seeds)

    def one_format(self, seeds: tuple[int, ...]) -> tuple[list[IR], list[IR], list[float]]:
        """The same without the recipe's budget."""
        return self._tuned(self.uniform, "one-format", self._scratch / "one-format", seeds)

    def _tuned(
        self, recipe: Recipe, name: str, path: Path, seeds: tuple[int, ...]
    ) -> tuple[list[IR], list[IR], list[float]]:
        def tuned(seed: int, folder: Path) -> float:
            seeded = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"seed": seed})})
            run = services.run(seeded, path, resume=path.is_dir(), until="search")
            shutil.copytree(run.checkpoint.path, folder / "checkpoint")
            shutil.copytree(run.compressed.path, folder / "start")
            return read_record(run.stage_record("tune"), StageRecord).seconds

        folders = [self._once(f"{name}-{seed}", partial(tuned, seed)) for seed in seeds]
        made, starts = (
            [self._converted(Checkpoint(folder / of), f"{folder.name}-{of}-ir") for folder, _ in folders]
            for of in ("checkpoint", "start")
        )
        return made, starts, [seconds for _, seconds in folders]

    def _uniform_start(self, seed: int) -> Checkpoint:
        """Our starting point with one format for all layers."""
        name = "one-format" if self._recipe.compress.budget else "ours"
        return Checkpoint(self._scratch / f"{name}-{seed}" / "start")

    def documented(self, name: str, seed: int, allowed: float, *, ours: bool) -> tuple[list[IR], list[float]]:
        """The IR of the loop's best checkpoint within its seconds, and the seconds that it took.

        Args:
            ours: give it our starting point with this seed, and our learning rate.
        """
        short = name.replace(",", "").replace(" ", "-")
        folder, seconds = self._once(
            f"{short}-{seed}", lambda folder: self._loop(seed, allowed, folder / "nncf.pth", ours=ours)
        )
        return [self._adopted(folder / "nncf.pth", folder.name)], [seconds]

    def against_auto_round(self, python: Path | None, seed: int) -> dict[str, Any]:
        """Why the row of AutoRound is left out; nothing where it is not."""
        if python is None:
            return {"left_out": "no interpreter was given that has it"}
        reason = auto_round_codes.reason_against(self._uniform_start(seed).manifest.layers)
        return {"left_out": reason} if reason else {}

    def auto_round(self, python: Path, seed: int) -> tuple[list[IR], dict[str, Any]]:
        """The IR of AutoRound's codes, and what auto_round_folder.py notes of them."""
        recipe, run = self._recipe, self.run
        layers = self._uniform_start(seed).manifest.layers
        tokens = evenly_spread(run.data.tokens("train"), calibration_of_peers(recipe))
        out, _ = self._once(
            f"auto-round-{seed}",
            lambda out: auto_round_codes.make_folder(python, recipe.model, layers, tokens, seed, out),
        )
        folder = auto_round_codes.folder_of(out)
        checkpoint = auto_round_codes.checkpoint_of(folder, self.uniform.compress, run.data, layers, out / "checkpoint")
        base = trace(folder, recipe.convert, out / "traced")
        return [converted(checkpoint, base, self._scratch / f"{out.name}-ir")], auto_round_codes.note(out)

    def _once(self, name: str, make: Callable[[Path], float]) -> tuple[Path, float]:
        """A folder that `make` filled, now or before, and the seconds that it counted."""
        done = self._scratch / name
        if not (done / "made.json").is_file():
            shutil.rmtree(done, ignore_errors=True)
            done.mkdir()
            note = {"seconds": make(done), "revision": revision()}
            write_text(json.dumps(note), done / "made.json")
        note = json.loads((done / "made.json").read_text(encoding="utf-8"))
        self.revisions.add(note["revision"])
        return done, note["seconds"]

    def _loop(self, seed: int, allowed: float, path: Path, *, ours: bool) -> float:
        """The seconds that the loop used; it leaves its best checkpoint by the divergence on the validation text."""
        recipe, run = self._recipe, self.run
        start = self._uniform_start(seed)
        tokens, validation = (torch.from_numpy(run.data.tokens(name)).long() for name in ("train", "validation"))
        settings = Settings(
            group_size=recipe.compress.group_size,
            rank=min(layer.rank for layer in start.manifest.layers if layer.rank),
            mode=recipe.compress.mode,
            learning_rate=recipe.tune.learning_rate if ours else LEARNING_RATE,
        )
        tuning = NncfLoop(Path(recipe.model.id), tokens, validation, settings, seed, start if ours else None)
        best = [float("inf")]

        def keep() -> None:
            divergence = tuning.validate()
            if divergence < best[0]:
                best[0] = divergence
                tuning.save(path)

        if ours:
            keep()  # what it begins from is good already, and may be better than what it comes to
        return tuning.tune_for(allowed, keep)

    def _adopted(self, path: Path, name: str) -> IR:
        out = self._scratch / f"{name}-adopted"
        shutil.rmtree(out, ignore_errors=True)
        return self._converted(adopt(path, self._recipe.model, out), f"{name}-ir")

    def _converted(self, checkpoint: Checkpoint, name: str) -> IR:
        return converted(checkpoint, self.run.ir("bf16"), self._scratch / name)


def calibration_of_peers(recipe: Recipe) -> int:
    """Sequences that NNCF's methods and AutoRound are calibrated with."""
    return min(recipe.compress.calibration_sequences, PEERS_SEQUENCES)


def _post_training(
    name: str, flags: Mapping[str, bool], recipe: Recipe, run: RunFolder, tokens: NDArray[np.int32], scratch: Path
) -> IR:
    """NNCF's post-training quantization of the BF16 IR; rounding to nearest is our own, which is NNCF's."""
    if not flags:
        return rounded("nearest", recipe, run, scratch)
    shutil.rmtree(scratch / name, ignore_errors=True)
    spec = recipe.compress.model_copy(update={"calibration_sequences": calibration_of_peers(recipe)})
    return post_training(run.ir("bf16"), spec, tokens, scratch / name, **flags)


def _evaluated(
    base: IR, made: Mapping[str, list[IR]], recipe: Recipe, run: RunFolder
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, NDArray[np.float64]]]]:
    """Rows, and per figure and row what each seed has on each sequence or prompt, (seeds, sequences or prompts)."""
    spec, encoder = recipe.evaluate, load_encoder(recipe.evaluate.encoder)
    prompts = choose_prompts(run.data.test_documents, spec)
    expected = _said("bf16", base, prompts, spec)
    figures: dict[str, list[TokenFigures]] = {}
    reference: TokenFigures | None = None
    similarity: dict[str, NDArray[np.float64]] = {}
    for name, models in made.items():
        figures[name] = []
        similarities = []
        for ir in models:
            runners = {"bf16": LogitsRunner(read_graph(base), "bf16"), "row": LogitsRunner(read_graph(ir), name)}
            found = compare(runners, "bf16", run.data.tokens("test"), spec.batch_size, silent)
            figures[name].append(found["row"])
            reference = found["bf16"]
            answers = compare_answers(expected, _said(name, ir, prompts, spec), encoder, spec.similarity_mode)
            similarities.append([answer.similarity for answer in answers])
        similarity[name] = np.array(similarities)
    assert reference is not None
    of_tokens = {
        figure: {name: np.stack([one.joined(figure).mean(1) for one in seeds]) for name, seeds in figures.items()}
        for figure in ("kl", "nll", "same_top1")
    }
    kl = of_tokens["kl"]
    rows: dict[str, dict[str, Any]] = {}
    for name, seeds in figures.items():
        gap = ratio(kl[name], kl[ROUNDING])
        rows[name] = {
            "kl_mean_nats": float(kl[name].mean()),
            "kl_ci95": interval(kl[name]),
            "kl_by_seed": kl[name].mean(1).tolist(),
            "recovered_gap": 1 - gap["ratio_of_means"],
            "recovered_gap_ci95": gap["ci95"] and [1 - end for end in reversed(gap["ci95"])],
            "perplexity": float(np.mean([perplexity(one) for one in seeds])),
            "same_top1": float(np.mean([one.joined("same_top1").mean() for one in seeds])),
            "similarity": float(similarity[name].mean()),
        }
    rows["BF16"] = {"perplexity": perplexity(reference)}
    return rows, of_tokens | {"similarity": similarity}


def _said(name: str, ir: IR, prompts: Prompts, spec: EvaluateSpec) -> Answers:
    templated = common_template({name: PromptTokenizer(ir)}, spec.chat_template) is not None
    return generate(name, ir, prompts.texts, templated=templated, max_new_tokens=spec.max_new_tokens, listener=silent)


if __name__ == "__main__":
    main()
