"""What the command line asks for: a run, its plan, and single steps of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovexport import recipe as recipes
from ovexport.artifacts import IR, PreparedData, RunFolder
from ovexport.checking import Finding
from ovexport.errors import ArtifactError, RecipeError
from ovexport.pipeline import engine
from ovexport.pipeline.stages import STAGES, judge_and_report
from ovexport.progress import Listener, silent
from ovexport.recipe import (
    BenchSpec,
    ConvertSpec,
    DataSpec,
    EvaluateSpec,
    ModelSpec,
    Recipe,
    SourceSpec,
    TaskSpec,
)
from ovexport.reports import EvaluationReport, GateReport
from ovexport.storage.files import existing_parent, make_folder, require_free
from ovexport.storage.records import read_record, write_record
from ovexport.storage.scratch import move_folder, scratch_folder

if TYPE_CHECKING:
    from ovexport.pipeline.plan import Plan
    from ovexport.readers import ZeroPoints
    from ovexport.tasks import HarnessTask

_PROMPT_TOKENS = 16
"""Of the text that shows whether an adapter is applied; any will do."""


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
    from ovexport.gates.judging import require_passed as require_gates

    folder = engine.run(
        STAGES,
        recipe,
        out,
        check=partial(_findings, recipe, out, until),
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
    from ovexport.pipeline.outlook import Outlook, findings
    from ovexport.pipeline.plan import plan_run

    outlook = Outlook(recipe, out)
    return plan_run(outlook, list(findings(STAGES, outlook)))


def _findings(recipe: Recipe, out: Path, until: str | None) -> Iterator[Finding]:
    """What stands against the stages up to the last one that is asked for."""
    from ovexport.pipeline.outlook import Outlook, findings

    names = [stage.name for stage in STAGES]
    last = names.index(until) + 1 if until in names else len(STAGES)
    return findings(STAGES[:last], Outlook(recipe, out))


def convert_checkpoint(
    path: Path,
    model: ModelSpec | None,
    spec: ConvertSpec,
    out: Path,
    *,
    ranks: Sequence[int] | None = None,
    zero_points: "ZeroPoints | None" = None,
    keep: Path | None = None,
    product: str = "openvino",
) -> IR:
    """Trace the base model, absorb the checkpoint's adapters and write the INT4 IR, or another format.

    Adapters that no code absorbs, as PEFT's, lie in the IR's folder, for openvino-genai to add while the model runs.

    Args:
        path: a checkpoint that one of the readers recognizes.
        model: the base model; None where the checkpoint is a model of its own.
        ranks: of elastic adapters whose checkpoint leaves them open, as an FQ_LORA_NLS file of NNCF's does.
        zero_points: their type, of a checkpoint that is absorbed into them; "float16" when None.
        keep: takes what verify can compare the IR with: `bf16`, the traced IR, and `checkpoint`, if it is not one of
            ours already.
        product: the format of what `out` takes, by its exporter's name.

    Raises:
        RecipeError, PlugInError: `ranks` or `zero_points` does not suit it, `out` and `keep` lie in each other, or a
            reader fails.
        ArtifactError: no reader recognizes the checkpoint, it is corrupt or of another base model, or `out` or `keep`
            holds something.
        MissingDependencyError: the format needs a package that is not installed.
        UnsupportedModelError: the model can't be traced or written in the format, the runtime computes a group size
            wrongly, or openvino-genai does not apply the adapter.
    """
    from ovexport.exporters import exporters
    from ovexport.readers import base_model, read_checkpoint
    from ovexport.strip import strip
    from ovexport.trace.stage import trace

    out, keep = out.resolve(), keep.resolve() if keep else None
    _require_free(out, keep)
    model = base_model(path, model)
    with scratch_folder(existing_parent(out.parent)) as scratch:
        kept = scratch / "kept"
        checkpoint = read_checkpoint(path, model, kept / "checkpoint", ranks=ranks, zero_points=zero_points)
        exporter = exporters.load(product, "--format").thing()
        exporter.check(checkpoint.manifest.layers)
        base = trace(model, spec, kept / "bf16")
        exporter.export(model, base, strip(checkpoint, base, scratch / "packed"), scratch / "product")
        _require_applied(IR(scratch / "product"))
        base.index_file.unlink()  # verify, for which `keep` is, does not read it
        for made, wanted in ((kept, keep), (scratch / "product", out)):
            if wanted:
                move_folder(made, wanted)
    return IR(out)


def write_peft_folder(path: Path, model: ModelSpec | None, out: Path) -> None:
    """Write a checkpoint in the layout of PEFT's LoftQ examples: a float model with the codes' values, its tokenizer,
    and in `loftq_init` the adapter.

    Args:
        path: a checkpoint of ours whose adapters are not absorbed.

    Raises:
        ArtifactError: it is no checkpoint, is corrupt or of another base model, or `out` holds something.
        RecipeError: its adapters are absorbed, or no base model is given.
    """
    from ovexport.models.peft_folder import write_peft_folder
    from ovexport.readers import base_model, read_checkpoint

    _require_free(out.resolve(), None)
    model = base_model(path, model)
    with scratch_folder(existing_parent(out.parent)) as scratch:
        checkpoint = read_checkpoint(path, model, scratch / "checkpoint")
        write_peft_folder(checkpoint, model, scratch / "folder")
        move_folder(scratch / "folder", out.resolve())


def write_nncf_file(path: Path, model: ModelSpec | None, out: Path) -> None:
    """Write a checkpoint as NNCF's examples save theirs, with torch.save; see `ovexport.to_nncf`.

    Args:
        path: a checkpoint that one of the readers recognizes.

    Raises:
        ArtifactError: it is no checkpoint, is corrupt or of another base model, or `out` is there already.
        RecipeError: no base model is given.
        UnsupportedModelError: a layer has a format that NNCF's formats have not, or norms were tuned.
    """
    import torch

    from ovexport.readers import base_model, read_checkpoint
    from ovexport.readers.nncf_out import to_nncf

    if out.exists():
        raise ArtifactError(f"{out}: is there already; choose another --out")
    model = base_model(path, model)
    with scratch_folder(existing_parent(out.resolve().parent)) as scratch:
        content = to_nncf(read_checkpoint(path, model, scratch / "checkpoint"), model)
        torch.save(content, scratch / "file")
        out.parent.mkdir(parents=True, exist_ok=True)
        (scratch / "file").replace(out)


def _require_applied(product: IR) -> None:
    """Refuse a product with an adapter that openvino-genai would leave out."""
    from ovexport.bench import own_adapter, require_applied

    adapter = own_adapter(product)
    if adapter is not None:
        require_applied(product, adapter, BenchSpec(), range(_PROMPT_TOKENS))


def _require_free(out: Path, keep: Path | None) -> None:
    """Refuse folders that hold something, or lie in each other."""
    if keep and (out == keep or out in keep.parents or keep in out.parents):
        raise RecipeError(f"--keep {keep}: --out and --keep lie in each other; give two folders side by side")
    for option, folder in (("--out", out), ("--keep", keep)):
        if folder:
            require_free(folder, option)


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
    from ovexport.models.student import TunedModel
    from ovexport.tasks import HarnessTask

    if not folder.recipe.is_file():
        raise ArtifactError(f"{folder.path}: no run, it has no recipe.toml; give the folder that ovexport run wrote")
    recipe, manifest = recipes.load(folder.recipe), folder.checkpoint.manifest
    space = manifest.elastic_ranks
    given = space.chosen(ranks, "--ranks")
    if recipe.task is None:
        raise RecipeError(f"{folder.recipe}: has no section [task], whose validation questions could be asked")
    used = {layer.name: layer.used_rank for layer in manifest.layers}
    configurations = {"chosen": tuple(used[names[0]] for names in space.layers), "given": given}
    rows = folder.data.task_rows
    task = HarnessTask(recipe.task, {"train": rows["train"], "test": rows["validation"]})
    answers = {}
    for which, configuration in configurations.items():
        load = partial(TunedModel, folder.checkpoint, recipe.model, space.by_layer(configuration))
        figures = ask_model(task, which, load, recipe.model, listener).figures
        answers[which] = {"ranks": configuration, "figures": figures}
    return answers


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
        OvexportError: as the stage evaluate does, or there is nothing to compare with.
    """
    from ovexport.evaluate import evaluate, load_encoder, read_ground_truth

    if reference is None and ground_truth is None:
        raise RecipeError("nothing to compare with; give --reference, an IR, or --ground-truth, a csv of its answers")
    if spec.isolate and (reference is None or data is None):
        raise RecipeError("evaluate.isolate: needs a reference and text; give --reference and --data, or leave it out")
    models = _by_folder([ir for ir in (reference, candidate) if ir])
    make_folder(out)
    name = reference.path.absolute().name if reference else None
    truth = read_ground_truth(ground_truth) if ground_truth else None
    asked, encoder = [_asked(task) for task in tasks], load_encoder(spec.encoder)
    report = evaluate(models, name, data, spec, encoder, out, ground_truth=truth, tasks=asked, listener=listener)
    write_record(report, out / "evaluation.json")
    return report


def _by_folder(irs: Sequence[IR]) -> dict[str, IR]:
    """Reference and candidate by the names of their folders."""
    models = {ir.path.absolute().name: ir.require() for ir in irs}
    if len(models) < len(irs):
        raise RecipeError(f"candidate and reference are both named {next(iter(models))}; rename one folder")
    return models


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
    return judge_and_report(folder, recipes.with_gates(recipes.load(folder.recipe), gates))
