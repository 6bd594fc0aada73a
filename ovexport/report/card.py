"""README.md of a run: a model card as the hub reads it, with the product's figures as evaluation results."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import ovexport
from ovexport.prompt_sets import LANGUAGES
from ovexport.recipe import Recipe, SourceSpec
from ovexport.report.base_card import BaseMetadata, base_metadata
from ovexport.report.names import NOT_TUNED, PRODUCT
from ovexport.report.table import Findings, comparison
from ovexport.report.templating import environment
from ovexport.reports import EvaluationReport, ModelEvaluation
from ovexport.versions import stack_versions
from ovexport.wording import inert_markdown, model_named

_TASK = "text-generation"
_TAGS = ["openvino", "nncf", "int4", "ovexport"]
_FIGURES_OF_TASKS = {"acc": "accuracy", "acc_norm": "accuracy, normalized by length", "exact_match": "exact match"}


def model_card(recipe: Recipe, findings: Findings, digests: Mapping[str, str]) -> str:
    """The card's text.

    Licence and language are those that the base model's card or configuration names, as far as they are short plain
    text, and left out otherwise. A base model in a folder has no name that the hub knows, so the card has no
    `base_model` then.

    Args:
        digests: SHA-256 of the run's files, by path.
    """
    base = base_metadata(recipe.model)
    title, on_hub = Path(recipe.model.id).name, not Path(recipe.model.id).exists()
    models, rows = comparison(findings)
    base_name = recipe.model.id if on_hub else f"the checkpoint in the folder {title}"
    adapter = recipe.model.adapter and Path(recipe.model.adapter).name
    body = (
        environment(finalize=_inert)
        .get_template("card.md")
        .render(
            title=title,
            recipe=recipe,
            findings=findings,
            models=models,
            rows=rows,
            digests=digests,
            base=model_named(base_name, recipe.model.revision if on_hub else None, adapter),
            license=base.values.get("license"),
            left_out=base.left_out,
            made_with=findings.verification.versions if findings.verification else stack_versions(),
            not_tuned=NOT_TUNED,
            ovexport_version=ovexport.__version__,
        )
    )
    return str(ModelCard(f"---\n{_metadata(recipe, findings, base, on_hub=on_hub).to_yaml()}\n---\n\n{body}\n"))


def _metadata(recipe: Recipe, findings: Findings, base: BaseMetadata, *, on_hub: bool) -> ModelCardData:
    """What the hub reads of the card."""
    train = recipe.data.train
    return ModelCardData(
        **base.values,
        base_model=recipe.model.id if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="openvino",
        pipeline_tag=_TASK,
        tags=_TAGS,
        datasets=[train.hub] if train and train.hub else None,
        model_name=f"{Path(recipe.model.id).name} INT4 OpenVINO",
        eval_results=list(_results(recipe, findings.evaluation)) if findings.evaluation else None,
    )


def _inert(value: Any) -> Any:
    """A value as it goes into the card: text of names and files adds no Markdown of its own."""
    return inert_markdown(value) if isinstance(value, str) else value


def _results(recipe: Recipe, evaluation: EvaluationReport) -> Iterator[EvalResult]:
    """The product's figures; one that could not be measured is left out."""
    product = evaluation.models.get(PRODUCT)
    if product is None:
        return
    conditions = evaluation.conditions
    text = {key: conditions[key] for key in ("test_sequences", "sequence_length") if key in conditions}
    asked = {key: conditions[key] for key in ("encoder", "similarity_mode", "max_new_tokens") if key in conditions}
    held_out, prompts = _text_dataset(recipe), _prompts_dataset(recipe)
    figures = [
        (held_out, "perplexity", "perplexity per token", product.perplexity, text),
        (held_out, "kl_divergence", "mean KL from the base model, nats", product.kl_mean_nats, _kl(product) | text),
        (prompts, "similarity", "similarity of answers to the base model's", product.similarity, asked),
        *_task_figures(recipe, product),
    ]
    for dataset, metric, name, value, arguments in figures:
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type=_TASK,
                metric_type=metric,
                metric_name=name,
                metric_value=value,
                metric_args=arguments or None,
                **dataset,
            )


def _kl(product: ModelEvaluation) -> dict[str, Any]:
    return {"ci95": list(product.kl_mean_ci95)} if product.kl_mean_ci95 else {}


def _task_figures(
    recipe: Recipe, product: ModelEvaluation
) -> Iterator[tuple[dict[str, Any], str, str, float, dict[str, Any]]]:
    for task, reached in product.tasks.items():
        test = recipe.task.test if recipe.task and recipe.task.name == task else None
        dataset = {
            "dataset_type": _identifier(task),
            "dataset_name": f"{task} ({Path(test).name})" if test else task,
        }
        for metric, name in _FIGURES_OF_TASKS.items():
            if metric in reached:
                error = reached.get(f"{metric}_stderr")
                yield dataset, metric, name, reached[metric], {} if error is None else {"stderr": error}


def _text_dataset(recipe: Recipe) -> dict[str, Any]:
    """The text that perplexity and divergence were measured on."""
    source = recipe.data.test or recipe.data.train
    if source is None:
        name = recipe.task.name if recipe.task else ""
        return {"dataset_type": _identifier(f"{name}-text"), "dataset_name": f"{name}, its questions and answers"}
    held_out = "" if recipe.data.test else ", held-out documents"
    return _source_dataset(source, held_out)


def _prompts_dataset(recipe: Recipe) -> dict[str, Any]:
    """The prompts that the answers whose similarity was measured are to: beginnings of the test text without a name."""
    name = recipe.evaluate.prompts
    if name is None:
        return _text_dataset(recipe)
    if name in LANGUAGES:
        return {"dataset_type": f"ovexport-{name}-prompts", "dataset_name": f"ovexport's {name} prompts"}
    if Path(name).exists():
        return _file_dataset(name)
    return {"dataset_type": name, "dataset_name": name, "dataset_split": recipe.evaluate.prompts_split}


def _source_dataset(source: SourceSpec, part: str) -> dict[str, Any]:
    if source.hub is not None:
        return {
            "dataset_type": source.hub,
            "dataset_name": f"{source.hub}{part}",
            "dataset_config": source.config,
            "dataset_split": source.split,
        }
    return _file_dataset(str(source.path), part)


def _file_dataset(path: str, part: str = "") -> dict[str, Any]:
    name = Path(path).name
    return {"dataset_type": _identifier(name), "dataset_name": f"{name}{part}"}


def _identifier(name: str) -> str:
    """A name with the characters that a data set's name on the hub can have."""
    return re.sub(r"[^\w.-]+", "-", name)
