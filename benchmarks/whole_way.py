"""A recipe from start to end, its reports kept as a result: the tables of the demo and of the models.

python benchmarks/whole_way.py RECIPE [--set section.key=value]… [--other-text FILE [--last COUNT]] [--save]

Beside the run, the model rounded to nearest is measured by the same code: "recovered" is the share of its divergence
that the tuned model does not have.

--other-text also measures the divergence of the same three models on a second text; --last takes only the last COUNT of
its documents. --save writes the reports to benchmarks/results/RECIPE, where tables.py finds them.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli_w
from intervals import ratio
from provenance import provenance
from rounded import rounded
from tables import RESULTS, whole_way_table

from ovexport import recipe as recipes
from ovexport.artifacts import MODELS, RunFolder, StageRecord
from ovexport.evaluate import evaluate, load_encoder
from ovexport.evaluate.divergence import compare
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline import services
from ovexport.prepare import read_documents
from ovexport.progress import silent
from ovexport.recipe import Recipe, SourceSpec
from ovexport.report.table import read_findings
from ovexport.storage.files import write_text
from ovexport.storage.records import read_record, write_record

REPORTS = ("verification.json", "evaluation.json", "benchmark.json")
OTHER_TEXT, NEAREST = "other_text.json", "nearest.json"


def main() -> None:
    """Carry out the recipe, measure the other text, keep the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    parser.add_argument("--other-text", type=Path, metavar="FILE")
    parser.add_argument("--last", type=int, metavar="COUNT")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/RECIPE too")
    options = parser.parse_args()
    recipe = recipes.load(options.recipe, options.overrides)
    with TemporaryDirectory() as scratch:
        run = services.run(recipe, Path(scratch) / "run")
        if not read_findings(run).tuned:
            sys.exit(f"{options.recipe}: tuning found nothing better than its start; the tables are of tuned models")
        result = (RESULTS if options.save else Path(scratch)) / options.recipe.stem
        keep(run, recipe, result)
        _measure_nearest(run, recipe, Path(scratch), result / NEAREST)
        if options.other_text:
            _measure_other_text(run, recipe, options.other_text, options.last, Path(scratch), result / OTHER_TEXT)
        origin = provenance(Path(sys.argv[0]), options.recipe)
        write_text(json.dumps({"provenance": origin}, indent=2) + "\n", result / "provenance.json")
        print(whole_way_table(result))


def keep(run: RunFolder, recipe: Recipe, result: Path) -> None:
    """Copy a run's reports, its recipe and the seconds of its stages, without the folder that the model lies in."""
    result.mkdir(parents=True, exist_ok=True)
    folder = f"{Path(recipe.model.id).parent}/"
    for report in REPORTS:
        text = (run.path / report).read_text(encoding="utf-8")
        write_text(text.replace(folder, "") if Path(recipe.model.id).is_absolute() else text, result / report)
    samples = result / "benchmark.json"
    samples.write_text(json.dumps(json.loads(samples.read_text())) + "\n")
    write_text(_without_folders(recipe), result / "recipe.toml")
    records = [read_record(path, StageRecord) for path in sorted(run.stages.glob("*.json"))]
    write_text(
        json.dumps({record.stage: record.seconds for record in records}, indent=2) + "\n", result / "seconds.json"
    )


def _without_folders(resolved: Recipe) -> str:
    """The recipe with the names of model and text in place of where they lay on this machine."""
    values = resolved.model_dump(mode="json", exclude_none=True)
    values["model"]["id"] = Path(resolved.model.id).name
    for source in (values["data"][name] for name in ("train", "validation", "test") if name in values["data"]):
        source["path"] = Path(source["path"]).name
    return tomli_w.dumps(values)


def _measure_nearest(run: RunFolder, recipe: Recipe, scratch: Path, result: Path) -> None:
    """Divergence of the model rounded to nearest, on the run's test text, and what the tuned one has less."""
    models = {name: run.ir(name) for name in ("bf16", "int4")} | {"nearest": rounded("nearest", recipe, run, scratch)}
    runners = {name: LogitsRunner(read_graph(ir), name) for name, ir in models.items()}
    found = compare(runners, "bf16", run.data.tokens("test"), recipe.evaluate.batch_size, silent)
    divergences = {name: found[name].joined("kl") for name in ("int4", "nearest")}
    left = ratio(divergences["int4"].mean(1)[None], divergences["nearest"].mean(1)[None])
    nearest = divergences["nearest"]
    figures = {
        "kl_mean_nats": float(nearest.mean()),
        "kl_standard_error_nats": float(nearest.std(ddof=1) / nearest.size**0.5),
        "recovered_gap": 1 - left["ratio_of_means"],
        "recovered_gap_ci95": left["ci95"] and [1 - end for end in reversed(left["ci95"])],
    }
    write_text(json.dumps(figures, indent=2) + "\n", result)


def _measure_other_text(
    run: RunFolder, recipe: Recipe, text: Path, last: int | None, scratch: Path, result: Path
) -> None:
    """Divergence and similarity on the documents of another text, as an EvaluationReport."""
    documents = read_documents(SourceSpec(path=str(text))).texts[-last if last else 0 :]
    chosen = scratch / text.with_suffix(".jsonl").name
    chosen.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    sizes = recipe.data.model_copy(update={"test_sequences": None})
    data = services.prepare_test(run.ir("bf16"), SourceSpec(path=str(chosen)), sizes, scratch / "other")
    spec = recipe.evaluate.model_copy(update={"isolate": False, "prompts": None})
    models = {name: run.ir(name) for name in MODELS}
    report = evaluate(models, "bf16", data, spec, load_encoder(spec.encoder), scratch / "answers")
    conditions = report.conditions | {"text": text.name, "documents": len(documents)}
    write_record(report.model_copy(update={"conditions": conditions}), result)


if __name__ == "__main__":
    main()
