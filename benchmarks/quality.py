"""What tuning recovers: post-training quantization, the documented NNCF loop, and ours, on one test text.

python benchmarks/quality.py [RECIPE] [--set section.key=value]… [--quick] [--json] [--save]

Every row is an IR, measured by the same code on the same tokens, in float32, against the BF16 IR:

- NNCF's post-training quantization on the OpenVINO model: AWQ, Scale Estimation, GPTQ and their combinations, on as
  many calibration sequences as ours; and rounding to nearest;
- the documented NNCF loop (nncf_loop.py) with its defaults and the recipe's rank, given the seconds that our tuning
  took (its compression, hidden states and validation are not counted), its best checkpoint by validation;
- our starting point, and our tuning of the recipe.

The two tunings run with each seed; their figures are means over the seeds, and intervals are bootstrapped over seeds
and sequences. `recovered_gap` is 1 - KL / KL(rounding to nearest).
"""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
import openvino as ov
import torch
from intervals import interval, ratio
from nncf_loop import NncfLoop, Settings
from numpy.typing import NDArray
from ptq import post_training

from ovexport import pipeline
from ovexport import recipe as recipes
from ovexport.adopt import adopt
from ovexport.artifacts import IR, Checkpoint, RunFolder, StageRecord, read_record
from ovexport.compress import compress
from ovexport.convert import convert
from ovexport.evaluate import load_encoder
from ovexport.evaluate.answers import PromptTokenizer, common_template, generate
from ovexport.evaluate.divergence import TokenFigures, compare, perplexity
from ovexport.evaluate.prompts import Prompts, choose_prompts
from ovexport.evaluate.similarity import Answers, aggregate, compare_answers
from ovexport.graph import read_graph
from ovexport.progress import silent
from ovexport.recipe import EvaluateSpec, Recipe
from ovexport.runtime import LogitsRunner
from ovexport.strip import strip
from ovexport.versions import stack_versions

DEMO = Path(__file__).parent.parent / "pipelines" / "demo.toml"
SEEDS = (0, 1, 2)
OURS, THEIRS, START, ROUNDING = "ovexport, tuned", "documented NNCF loop", "ovexport, not tuned", "rounding to nearest"
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
    parser = command.parser(__doc__, "quality", "one seed, 20 steps, and GPTQ alone beside rounding to nearest")
    parser.add_argument("recipe", nargs="?", type=Path, default=DEMO, metavar="RECIPE")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    options = parser.parse_args()
    quick = ["tune.steps=20"] if options.quick else []
    recipe = recipes.load(options.recipe, [*options.overrides, *quick])
    seeds = SEEDS[:1] if options.quick else SEEDS
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):  # NNCF prints what it does
        document = measured(recipe, Path(scratch), seeds, quick=options.quick)
    command.publish(document, "quality", options, case=options.recipe.stem)


def measured(recipe: Recipe, scratch: Path, seeds: tuple[int, ...], *, quick: bool) -> dict[str, Any]:
    """The document: rows, ratios, conditions."""
    run = pipeline.run(recipe, scratch / "run", until="tune")
    base, tokens = run.ir("bf16"), run.data.tokens("train")
    made: dict[str, list[IR]] = {OURS: [], THEIRS: [], START: []}
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for seed in seeds:
        seeded = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"seed": seed})})
        folder = pipeline.run(seeded, scratch / "run", resume=True, until="tune")
        seconds[OURS].append(_stage_seconds(folder))
        made[OURS].append(_converted(folder.checkpoint, base, scratch / f"ours-{seed}"))
        if seed == seeds[0]:
            made[START].append(_converted(folder.compressed, base, scratch / "start"))
        used, checkpoint = _documented(recipe, folder, seed, seconds[OURS][-1], scratch / f"nncf-{seed}.pth")
        seconds[THEIRS].append(used)
        made[THEIRS].append(_adopted(checkpoint, recipe, base, scratch / f"theirs-{seed}"))
    chosen = {name: PTQ[name] for name in (ROUNDING, "GPTQ")} if quick else PTQ
    for name, flags in chosen.items():
        made[name] = [_post_training(name, flags, recipe, run, tokens, scratch)]
    rows, samples = _evaluated(base, made, recipe, run)
    return {
        "rows": rows,
        "ratios": {f"kl {OURS} / {other}": ratio(samples[OURS], samples[other]) for other in made if other != OURS},
        "seconds": seconds,
        "conditions": {
            "model": Path(recipe.model.id).name,
            "seeds": list(seeds),
            "compress": recipe.compress.model_dump(mode="json"),
            "tune": recipe.tune.model_dump(mode="json"),
            "train": Path(str(recipe.data.train.path)).name,
            "train_tokens": int(tokens.size),
            "test_sequences": len(run.data.tokens("test")),
            "sequence_length": recipe.data.sequence_length,
            "calibration_sequences": min(recipe.compress.calibration_sequences, len(tokens)),
            "encoder": recipe.evaluate.encoder,
            "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
            "threads": torch.get_num_threads(),
        },
        "versions": stack_versions(),
    }


def _stage_seconds(folder: RunFolder) -> float:
    return read_record(folder.stage_record("tune"), StageRecord).seconds


def _converted(checkpoint: Checkpoint, base: IR, out: Path) -> IR:
    return convert(base, strip(checkpoint, base, out / "packed"), out / "ir")


def _documented(recipe: Recipe, run: RunFolder, seed: int, seconds: float, path: Path) -> tuple[float, Path]:
    """The loop's seconds, and its best checkpoint by the divergence on the validation text."""
    tokens, validation = (torch.from_numpy(run.data.tokens(name)).long() for name in ("train", "validation"))
    rank = min(layer.rank for layer in run.compressed.manifest.layers if layer.rank)
    settings = Settings(group_size=recipe.compress.group_size, rank=rank, mode=recipe.compress.mode)
    loop = NncfLoop(Path(recipe.model.id), tokens, validation, settings, seed)
    best = [float("inf")]

    def keep() -> None:
        divergence = loop.validate()
        if divergence < best[0]:
            best[0] = divergence
            loop.save(path)

    return loop.tune_for(seconds, keep), path


def _adopted(path: Path, recipe: Recipe, base: IR, out: Path) -> IR:
    return _converted(adopt(path, recipe.model, out / "checkpoint"), base, out)


def _post_training(
    name: str, flags: Mapping[str, bool], recipe: Recipe, run: RunFolder, tokens: NDArray[np.int32], scratch: Path
) -> IR:
    """NNCF's post-training quantization of the BF16 IR; rounding to nearest is our own, which is NNCF's."""
    if not flags:
        plain = recipe.compress.model_copy(update={"awq": False, "scale_estimation": False, "gptq": False})
        checkpoint = compress(recipe.model, plain, run.data, 0, scratch / "nearest")
        return _converted(checkpoint, run.ir("bf16"), scratch / "rounded")
    return post_training(run.ir("bf16"), recipe.compress, tokens, scratch / name, **flags)


def _evaluated(
    base: IR, made: Mapping[str, list[IR]], recipe: Recipe, run: RunFolder
) -> tuple[dict[str, dict[str, Any]], dict[str, NDArray[np.float64]]]:
    """Rows, and per row the divergence of each seed and sequence, (seeds, sequences)."""
    spec, encoder = recipe.evaluate, load_encoder(recipe.evaluate.encoder)
    prompts = choose_prompts(run.data.test_documents, spec)
    expected = _said("bf16", base, prompts, spec)
    figures: dict[str, list[TokenFigures]] = {}
    reference: TokenFigures | None = None
    similarity: dict[str, float] = {}
    for name, models in made.items():
        figures[name] = []
        similarities = []
        for ir in models:
            runners = {"bf16": LogitsRunner(read_graph(base), "bf16"), "row": LogitsRunner(read_graph(ir), name)}
            found = compare(runners, "bf16", run.data.tokens("test"), spec.batch_size, silent)
            figures[name].append(found["row"])
            reference = found["bf16"]
            rows = compare_answers(expected, _said(name, ir, prompts, spec), encoder, spec.similarity_mode)
            similarities.append(float(aggregate(rows, spec.similarity_mode).similarity))
        similarity[name] = float(np.mean(similarities))
    assert reference is not None
    samples = {name: np.stack([one.joined("kl").mean(1) for one in found]) for name, found in figures.items()}
    rows = {}
    for name, found in figures.items():
        gap = ratio(samples[name], samples[ROUNDING])
        rows[name] = {
            "kl_mean_nats": float(samples[name].mean()),
            "kl_ci95": interval(samples[name]),
            "kl_by_seed": samples[name].mean(1).tolist(),
            "recovered_gap": 1 - gap["ratio_of_means"],
            "recovered_gap_ci95": gap["ci95"] and [1 - end for end in reversed(gap["ci95"])],
            "perplexity": float(np.mean([perplexity(one) for one in found])),
            "same_top1": float(np.mean([one.joined("same_top1").mean() for one in found])),
            "similarity": similarity[name],
        }
    rows["BF16"] = {"perplexity": perplexity(reference)}
    return rows, samples


def _said(name: str, ir: IR, prompts: Prompts, spec: EvaluateSpec) -> Answers:
    templated = common_template({name: PromptTokenizer(ir)}, spec.chat_template) is not None
    return generate(name, ir, prompts.texts, templated=templated, max_new_tokens=spec.max_new_tokens, listener=silent)


if __name__ == "__main__":
    main()
