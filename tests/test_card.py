"""The model card: what the hub reads of it, and that nothing in it is made up."""

from pathlib import Path

import pytest
import yaml
from conftest import STORIES
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from ovexport import recipe as recipes
from ovexport.artifacts import RunFolder
from ovexport.recipe import Recipe
from ovexport.report.card import model_card
from ovexport.report.table import Findings, read_findings


@pytest.fixture(scope="module")
def findings(finished_run: RunFolder) -> Findings:
    return read_findings(finished_run)


def changed(recipe: Recipe, **sections: dict) -> Recipe:
    """The recipe with other values in some sections."""
    parts = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=parts)


def read(recipe: Recipe, findings: Findings) -> ModelCard:
    return ModelCard(model_card(recipe, findings, {}))


def metadata(card: ModelCard) -> dict:
    """What stands between the two lines of dashes, as any YAML reader sees it."""
    return yaml.safe_load(card.content.split("---\n")[1])


def test_the_card_of_a_run_is_read_back_with_every_result(finished_run: RunFolder, findings: Findings) -> None:
    card = ModelCard.load(finished_run.path / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("openvino", "text-generation")
    assert {"openvino", "nncf", "int4"} <= set(data.tags)
    assert findings.evaluation is not None
    product = findings.evaluation.models["int4"]
    name, results = model_index_to_eval_results(metadata(card)["model-index"])
    assert name == "llama INT4 OpenVINO"
    assert {result.metric_type: result.metric_value for result in results} == {
        "perplexity": product.perplexity,
        "kl_divergence": product.kl_mean_nats,
        "similarity": product.similarity,
    }
    assert {result.task_type for result in results} == {"text-generation"}
    assert {result.dataset_name for result in results} == {f"{STORIES.name}, held-out documents"}
    assert results == data.eval_results


def test_nothing_of_this_machine_is_in_the_card(finished_run: RunFolder, tiny_recipe: Recipe) -> None:
    card = (finished_run.path / "README.md").read_text()
    assert tiny_recipe.model.id not in card
    assert str(STORIES.parent) not in card
    assert "the checkpoint in the folder llama" in card


def test_a_folder_is_no_base_model_and_a_hub_name_is(tiny_recipe: Recipe, findings: Findings) -> None:
    assert not {"base_model", "base_model_relation"} & set(metadata(read(tiny_recipe, findings)))
    card = read(changed(tiny_recipe, model={"id": "org/base", "revision": "v1"}), findings)
    assert metadata(card)["base_model"] == "org/base"
    assert metadata(card)["base_model_relation"] == "quantized"
    assert "Made from org/base at v1" in card.text


def test_the_licence_is_the_base_models_or_none(tiny_recipe: Recipe, findings: Findings, tmp_path: Path) -> None:
    base = changed(tiny_recipe, model={"id": str(tmp_path)})
    bare = read(base, findings)
    assert "license" not in metadata(bare)
    assert "No licence was found" in bare.text

    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert metadata(read(base, findings))["license"] == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: []\n---\n# Base\n")
    assert metadata(read(base, findings))["license"] == "mit"

    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Base\n")
    named = metadata(read(base, findings))
    assert (named["license"], named["license_name"]) == ("other", "own")
    assert "license_link" not in named


@pytest.mark.parametrize("text", ["no metadata", "---\n- a\n- b\n---\n", "---\n{: [\n---\n", "---\nlicense:\n---\n"])
def test_a_damaged_card_of_the_base_names_no_licence(
    tiny_recipe: Recipe, findings: Findings, tmp_path: Path, text: str
) -> None:
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "config.json").write_text("[]")
    assert "license" not in metadata(read(changed(tiny_recipe, model={"id": str(tmp_path)}), findings))


def test_results_name_the_data_of_the_recipe(tiny_recipe: Recipe, findings: Findings) -> None:
    hub = recipes.SourceSpec(hub="org/text", config="plain", split="test")
    recipe = changed(tiny_recipe, data={"train": hub, "test": hub}, evaluate={"prompts": "short"})
    card = read(recipe, findings)
    assert card.data.datasets == ["org/text"]
    by_metric = {result.metric_type: result for result in card.data.eval_results}
    text, prompts = by_metric["kl_divergence"], by_metric["similarity"]
    assert (text.dataset_type, text.dataset_config, text.dataset_split) == ("org/text", "plain", "test")
    assert prompts.dataset_name == "ovexport's short prompts"


def test_tasks_are_results_with_their_errors_and_what_was_not_measured_is_none(
    tiny_recipe: Recipe, findings: Findings
) -> None:
    assert findings.evaluation is not None
    product = findings.evaluation.models["int4"].model_copy(
        update={
            "similarity": None,
            "kl_mean_nats": float("nan"),
            "tasks": {"hellaswag": {"acc": 0.25, "acc_norm": 0.5, "acc_norm_stderr": 0.05, "items": 8.0}},
        }
    )
    evaluation = findings.evaluation.model_copy(update={"models": {"int4": product}})
    results = read(tiny_recipe, Findings(None, evaluation, None)).data.eval_results
    assert {result.metric_type for result in results} == {"perplexity", "acc", "acc_norm"}
    of_task = [result for result in results if result.dataset_name == "hellaswag"]
    assert {result.metric_type: result.metric_value for result in of_task} == {"acc": 0.25, "acc_norm": 0.5}
    assert of_task[1].metric_args == {"stderr": 0.05}


def test_a_run_without_an_evaluation_has_a_card_without_results(tiny_recipe: Recipe, findings: Findings) -> None:
    card = read(tiny_recipe, Findings(findings.verification, None, None))
    assert "model-index" not in metadata(card)
    assert "## Proof" in card.text


@pytest.mark.parametrize(
    "value",
    [
        "<script>alert(1)</script>",
        "2020-01-01",
        "1.0",
        "3",
        "[mit, [apache-2.0]]",
        "{name: mit}",
        "'[MIT](javascript:alert(1))'",
        "|\n  mit\n  # A title of its own",
        "!!python/object/apply:os.system [touch, here]",
        "9" * 6000,
        "x" * 1_000_000,
        "&a [&b [&c [mit]], *b, *b]",
        "[" * 5000,
        "'\\e[31mmit'",
        "12:30:45",
    ],
    ids=lambda value: value[:20],
)
def test_what_a_card_of_the_base_says_is_data(
    tiny_recipe: Recipe, findings: Findings, tmp_path: Path, value: str
) -> None:
    base = changed(tiny_recipe, model={"id": str(tmp_path)})
    bare = model_card(base, findings, {})
    for key in ("license", "language", "license_name", "license_link"):
        (tmp_path / "README.md").write_text(f"---\ntags: [a]\n{key}: {value}\n---\n# Base\n")
        card = model_card(base, findings, {})
        assert key not in metadata(ModelCard(card))
        note = f"What the base model's card gives for {key} is no short plain text and was left out; look there.\n"
        assert card.replace(note, "") == bare


def test_short_plain_metadata_of_the_base_is_kept(tiny_recipe: Recipe, findings: Findings, tmp_path: Path) -> None:
    text = "---\nlicense: [mit, cc-by-4.0]\nlanguage: [en, zh-Hans]\nlicense_link: https://a.org/x\n---\n"
    (tmp_path / "README.md").write_text(f"\ufeff{text}", encoding="utf-8")
    kept = metadata(read(changed(tiny_recipe, model={"id": str(tmp_path)}), findings))
    assert (kept["license"], kept["language"]) == (["mit", "cc-by-4.0"], ["en", "zh-Hans"])
    assert kept["license_link"] == "https://a.org/x"


def test_names_add_no_markup_to_the_card(tiny_recipe: Recipe, findings: Findings, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>\n# PROVEN ![x](http://elsewhere)"
    card = read(changed(tiny_recipe, model={"id": str(tmp_path / name)}), findings)
    assert "<img" not in card.text
    assert "](http" not in card.text
    assert "\n# PROVEN" not in card.text


def test_the_card_says_that_norms_were_tuned(tiny_recipe: Recipe, findings: Findings) -> None:
    said = "The weights of its normalization layers were tuned as well."
    assert findings.tuned
    assert said in read(changed(tiny_recipe, tune={"norms": True}), findings).content
    assert said not in read(tiny_recipe, findings).content
