"""README.md of a run: a model card as the hub reads it, with the product's figures as evaluation results."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from yaml import YAMLError

import ovexport
from ovexport.prompt_sets import LANGUAGES
from ovexport.recipe import ModelSpec, Recipe, SourceSpec
from ovexport.report.names import NOT_TUNED, PRODUCT
from ovexport.report.table import Findings, comparison
from ovexport.report.templating import environment
from ovexport.reports import EvaluationReport, ModelEvaluation
from ovexport.versions import stack_versions

_TASK = "text-generation"
_TAGS = ["openvino", "nncf", "int4", "ovexport"]
_FIGURES_OF_TASKS = {"acc": "accuracy", "acc_norm": "accuracy, normalized by length", "exact_match": "exact match"}
_FROM_BASE = ("license", "license_name", "license_link", "language")


def model_card(recipe: Recipe, findings: Findings, digests: Mapping[str, str]) -> str:
    """The card's text.

    Licence and language are those that the base model's own card or configuration names, and left out where neither
    does. A base model in a folder has no name that the hub knows, so the card has no `base_model` then.

    Args:
        digests: SHA-256 of the run's files, by path.
    """
    title = Path(recipe.model.id).name
    base = _base_metadata(recipe.model)
    on_hub = not Path(recipe.model.id).exists()
    train = recipe.data.train
    data = ModelCardData(
        **base,
        base_model=recipe.model.id if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="openvino",
        pipeline_tag=_TASK,
        tags=_TAGS,
        datasets=[train.hub] if train and train.hub else None,
        model_name=f"{title} INT4 OpenVINO",
        eval_results=list(_results(recipe, findings.evaluation)) if findings.evaluation else None,
    )
    models, rows = comparison(findings)
    revision = f" at {recipe.model.revision}" if recipe.model.revision else ""
    body = (
        environment()
        .get_template("card.md")
        .render(
            title=title,
            recipe=recipe,
            findings=findings,
            models=models,
            rows=rows,
            digests=digests,
            base=f"{recipe.model.id}{revision}" if on_hub else f"the checkpoint in the folder {title}",
            license=base.get("license"),
            made_with=findings.verification.versions if findings.verification else stack_versions(),
            not_tuned=NOT_TUNED,
            ovexport_version=ovexport.__version__,
        )
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


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


def _base_metadata(model: ModelSpec) -> dict[str, Any]:
    """Licence and language as the base model's card names them; its configuration's licence where the card has none."""
    found = {key: value for key, value in _card_of(model).items() if key in _FROM_BASE and value}
    if "license" not in found:
        stated = _configuration_of(model).get("license")
        return found | ({"license": stated} if isinstance(stated, str) and stated else {})
    link = found.get("license_link")
    if isinstance(link, str) and "://" not in link:
        del found["license_link"]
        if not Path(model.id).exists():
            found["license_link"] = hf_hub_url(model.id, link, revision=model.revision)
    return found


def _card_of(model: ModelSpec) -> dict[str, Any]:
    """The metadata of the base model's card; nothing where it has no card that can be read."""
    text = _text_of(model, "README.md")
    if not text.startswith("---"):
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, YAMLError):
        return {}


def _configuration_of(model: ModelSpec) -> dict[str, Any]:
    try:
        return dict(json.loads(_text_of(model, "config.json")))
    except (ValueError, TypeError):
        return {}


def _text_of(model: ModelSpec, name: str) -> str:
    """A file of the base model, from its folder or from the hub; empty where it can't be had."""
    folder = Path(model.id)
    try:
        path = folder / name if folder.is_dir() else Path(hf_hub_download(model.id, name, revision=model.revision))
        return path.read_text(encoding="utf-8")
    except (HfHubHTTPError, HFValidationError, OSError, UnicodeDecodeError):
        return ""
