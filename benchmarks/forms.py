"""A LoRA in two forms, beside the codes and absorbed in them: what the one costs in time and the other in accuracy.

python benchmarks/forms.py RECIPE ABSORBED [--set section.key=value]… [--quick] [--json] [--save]

RECIPE has compress.method = "lora", with LoftQ or without. Its product, codes and tuned adapter, is the reference.
ABSORBED is a recipe with compress.method = "fq_lora": it is carried out on the reference's weights, codes and adapter
merged, in the place of its own model. `--set` changes both. Rows:

- beside, static and dynamic: the reference with openvino_genai.Adapter in MODE_STATIC and MODE_DYNAMIC;
- rounded: the merged weights in 4 bits, rounded as ABSORBED asks for, not tuned;
- absorbed: the same, distilled.

The divergence is that from the reference on the test text of RECIPE, in float32; latency is interleaved in one run.
"""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command

from ovexport import recipe as recipes
from ovexport.artifacts import IR, RunFolder
from ovexport.bench import RuntimeAdapter, bench
from ovexport.evaluate import divergence
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import Recipe
from ovexport.versions import stack_versions

STATIC, DYNAMIC, ROUNDED, ABSORBED = "beside, static", "beside, dynamic", "rounded", "absorbed"


def main() -> None:
    """Make both forms, and measure them."""
    parser = command.parser(__doc__, "forms", "8 tuning steps, 5 sessions of the latency")
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("absorbed", type=Path, metavar="ABSORBED")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    options = parser.parse_args()
    first, second = (_load(path, options.overrides, options.quick) for path in (options.recipe, options.absorbed))
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        document = measure(first, second, Path(scratch))
    command.publish(document, "forms", options, case=options.recipe.stem, recipe=options.recipe)


def _load(path: Path, overrides: list[str], quick: bool) -> Recipe:
    recipe = recipes.load(path, [*overrides, *(["bench.sessions=5", "bench.pairs=5"] if quick else [])])
    steps = {"steps": 8, "epochs": None, "probe_learning_rates": ()}
    return recipe.model_copy(update={"tune": recipe.tune.model_copy(update=steps)}) if quick else recipe


def measure(recipe: Recipe, absorbed: Recipe, scratch: Path) -> dict[str, Any]:
    """Everything that was measured, with its conditions."""
    beside = services.run(recipe, scratch / "beside", until="verify")
    folder = scratch / "peft"
    services.write_peft_folder(beside.checkpoint.path, recipe.model, folder)
    merged = recipe.model.model_copy(
        update={"id": str(folder), "adapter": str(folder / "loftq_init"), "revision": None, "dtype": "auto"}
    )
    tuned = services.run(absorbed.model_copy(update={"model": merged}), scratch / "absorbed", until="verify")
    product = beside.ir("int4")
    models = {STATIC: product, DYNAMIC: product, ROUNDED: tuned.ir("plain"), ABSORBED: tuned.ir("int4")}
    report = bench(
        models,
        recipe.bench,
        beside.data.tokens("test").reshape(-1).tolist(),
        adapters={DYNAMIC: RuntimeAdapter(path=product.adapter_tensors, mode="dynamic")},
    )
    return {
        "divergence": _divergence({name: models[name] for name in (STATIC, ROUNDED, ABSORBED)}, beside, recipe),
        "latency": report.model_dump(mode="json"),
        "conditions": {
            "compress": {"beside": recipe.compress.model_dump(mode="json"), "absorbed": absorbed.compress.model_dump()},
            "steps": {"beside": beside.checkpoint.manifest.steps, "absorbed": tuned.checkpoint.manifest.steps},
        },
        "versions": stack_versions(),
    }


def _divergence(models: Mapping[str, IR], run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """By form, how far it is from the reference on the run's test text."""
    tokens = run.data.tokens("test")
    runners = {name: LogitsRunner(running_graph(ir), name) for name, ir in models.items()}
    figures = divergence.compare(runners, STATIC, tokens, recipe.evaluate.batch_size, silent)
    shape = (len(tokens), tokens.shape[1] - 1)
    resampling = divergence.Resampling.of(run.data.token_documents, shape, recipe.evaluate.seed)
    return {
        name: divergence.summarize(figures[name], figures[STATIC], resampling)[0].model_dump(mode="json")
        for name in models
        if name != STATIC
    }


if __name__ == "__main__":
    main()
