"""What plan promises: every problem ahead, the same ones that run refuses before any work."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from command_line import ovexport
from conftest import COMMON, REPOSITORY, STORIES, save_tiny_model, tiny_values
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ovexport import evaluate, recipe
from ovexport.artifacts import RunFolder
from ovexport.compress import operations
from ovexport.errors import ArtifactError, DataError, OvexportError
from ovexport.pipeline import services
from ovexport.pipeline.outlook import look_at
from ovexport.pipeline.plan import plan_model
from ovexport.recipe import CompressSpec, EvaluateSpec, ModelSpec, Recipe, section

pytestmark = pytest.mark.run


def parsed(values: dict) -> Recipe:
    return recipe.parse(values, base=REPOSITORY, origin="tiny")


def refused(values: dict, out: Path) -> str:
    """What plan says and run refuses, with the same words, before it has written anything."""
    plan = services.plan(parsed(values), out)
    assert plan.problems
    with pytest.raises(OvexportError) as caught:
        services.run(parsed(values), out)
    assert str(caught.value) == "; ".join(plan.problems)
    assert caught.value.exit_code == plan.exit_code
    assert not out.exists()
    return str(caught.value)


@pytest.fixture
def values(tiny_model: Path) -> dict:
    return tiny_values(tiny_model)


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_sound_recipe_has_no_problem(values: dict, tmp_path: Path) -> None:
    plan = services.plan(parsed(values), tmp_path / "out")
    assert (plan.problems, plan.warnings, plan.unsuitable, plan.exit_code) == ((), (), (), 0)


def test_what_rounds_with_text_takes_time_by_the_arithmetic_that_it_needs(values: dict, tmp_path: Path) -> None:
    def needed(**compress: object) -> float:
        spec = section(CompressSpec, rank=4, group_size=32, **compress)
        return operations(look_at(parsed(values).model, spec).layers, spec, 1000, 2000)

    assert needed(rounding="nearest") == 0
    assert 0 < needed(rounding="gptq") < needed(rounding="two_sided") < needed(bits_per_weight=6)
    values["compress"]["rounding"] = "two_sided"
    assert services.plan(parsed(values), tmp_path / "out").compressing_seconds > 0


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "train_sequences", 10**6, "106,541 tokens in 493 documents, and 64,000,000 are needed, for 1000000"),
        ("data", "sequence_length", 100_000, "at least, for 4 sequences of 100000"),
        ("data", "sequence_length", 256, "sequence_length=256: the model reads 128 tokens at most; lower it to 128"),
        ("evaluate", "max_new_tokens", 120, "prompt has 12 tokens, and the model reads 128 at most; lower it to 117"),
        ("bench", "prompt_tokens", 126, "the model reads 128 tokens at most; lower bench.prompt_tokens to 125"),
        ("bench", "output_tokens", 200, "the model reads 128 tokens at most; lower bench.output_tokens below 128"),
        ("bench", "prompt_tokens", 600, "bench.prompt_tokens=600: the test text has 512 tokens; lower it"),
        ("evaluate", "prompts", "nowhere.txt", "nowhere.txt: "),
    ],
)  # fmt: skip
def test_lengths_and_texts_that_a_run_can_not_do(values, tmp_path, section, key, value, message) -> None:
    values[section][key] = value
    assert message in refused(values, tmp_path / "out")


def test_a_model_with_few_positions_is_told_of_all_that_it_can_not_read(values: dict, tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=2048, n_embd=64, n_layer=2, n_head=4, n_positions=96, bos_token_id=0, eos_token_id=1
    )
    values["model"]["id"] = str(save_tiny_model(tmp_path / "gpt2", config))
    values["data"]["sequence_length"] = 128
    values["bench"] = {}
    del values["evaluate"]["max_new_tokens"]
    values["compress"]["awq"] = True
    said = refused(values, tmp_path / "out")
    for text in ("sequence_length=128", "max_new_tokens=128", "prompt_tokens=128, bench.output_tokens=64", "a Conv1D"):
        assert text in said


def quantized(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))


def without_a_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def with_tensors(model: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def with_another_name(model: Path) -> None:
    with_tensors(model, lambda tensors: tensors.update(norm=tensors.pop("model.norm.weight")))


def with_another_shape(model: Path) -> None:
    with_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(128)}))


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (quantized, "is quantized already (quantization_config of config.json, quant_method hqq)"),
        (without_a_shard, "lacks 1 of its 2 files of weights, such as model-00002-of-00002.safetensors"),
        (cut_short, "corrupt weights"),
        (without_weights, "model.safetensors: not there"),
        (with_another_name, "lacks 1 weights, such as model.norm.weight"),
        (
            with_another_shape,
            "1 weights have another shape than config.json says, such as model.norm.weight: [128], not [64]",
        ),
    ],
)
def test_checkpoints_that_a_run_can_not_load(
    values, own_model, tmp_path, caplog, monkeypatch, damage: Callable, message: str
) -> None:
    damage(own_model)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    values["model"]["id"] = str(own_model)
    assert message in refused(values, tmp_path / "out")
    assert "LOAD REPORT" not in caplog.text


def test_an_encoder_without_weights(values: dict, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "modules.json").write_text(
        json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}])
    )
    values["evaluate"]["encoder"] = str(encoder)
    assert "has no weights; download or copy the encoder again" in refused(values, tmp_path / "out")


def test_a_tasks_rows_are_read_by_plan(values: dict, tmp_path: Path) -> None:
    rows = [{"query": f"{number} is", "choices": ["even", "odd"], "gold": number % 2} for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["task"] = {"name": "parity", "train": str(path)}
    assert services.plan(parsed(values), tmp_path / "out").problems == ()
    path.write_text(path.read_text() + json.dumps({"query": "so", "choices": ["even", "odd"], "gold": 2}) + "\n")
    assert "row 41: gold=2 is out of range" in refused(values, tmp_path / "out")
    rows[3]["choices"] = ["even", "odd " * 100]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "its answer has" in refused(values, tmp_path / "out")


def test_what_is_on_the_hub_is_said_not_to_be_looked_at(values: dict, tmp_path: Path) -> None:
    values["data"]["train"] = {"hub": "roneneldan/TinyStories"}
    plan = services.plan(parsed(values), tmp_path / "out")
    assert plan.problems == ()
    assert plan.warnings == ("data.train: roneneldan/TinyStories is on the hub, and is read when the run starts",)


def test_validation_and_test_shrink_to_the_text_that_is_there(values: dict, tmp_path: Path) -> None:
    values["data"] |= {"validation_sequences": 5000, "test_sequences": 6000}
    plan = services.plan(parsed(values), tmp_path / "out")
    assert plan.problems == ()
    run = services.run(parsed(values), tmp_path / "out", until="prepare")
    sequences = run.data.manifest.sequences
    assert plan.warnings == (
        f"data.test: its text makes {sequences['test']} sequences of 64, not 6000; {sequences['test']} are used",
        f"data.validation: its text makes {sequences['validation']} sequences of 64, not 5000; "
        f"{sequences['validation']} are used",
    )


def test_one_unsuitable_layer_marks_itself_alone(tmp_path: Path) -> None:
    mixtral = save_tiny_model(tmp_path / "mixtral", transformers.MixtralConfig(**COMMON, num_local_experts=2))
    plan = plan_model(ModelSpec(id=str(mixtral)), CompressSpec(group_size=32))
    assert all("experts" in name for name in plan.unsuitable)
    assert len(plan.unsuitable) == 4
    assert "mixtures of experts and convolutions can't be done" in plan.problems[0]
    attention = [layer for layer in plan.layers if "self_attn" in layer.name]
    assert len(attention) == 8
    assert {layer.mode for layer in attention} == {"int4_asym"}
    assert plan.exit_code == 5


def test_a_group_size_that_does_not_divide_marks_the_layers_it_is_about(tiny_model: Path) -> None:
    plan = plan_model(ModelSpec(id=str(tiny_model)), CompressSpec(group_size=128))
    assert {name.split(".")[-2] for name in plan.unsuitable} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }
    modes = {layer.mode for layer in plan.layers if layer.name.endswith("down_proj.weight")}
    assert modes == {"int4_asym"}


def test_blocks_that_are_alike_are_one_row(values: dict, tmp_path: Path) -> None:
    import tomli_w

    values["compress"]["ignored"] = ["model.layers.1.mlp.up_proj"]
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(values))
    done = ovexport("plan", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "model.layers.0–1.mlp.down_proj × 2" in done.stdout
    assert "model.layers.0.mlp.up_proj " in done.stdout
    assert "model.layers.1.mlp.up_proj " in done.stdout


def test_a_failed_first_stage_is_no_run(values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovexport import prepare as stage

    original, out = stage.prepare, tmp_path / "out"

    def fails(*_: object, **__: object) -> None:
        raise DataError("the text is gone")

    monkeypatch.setattr(stage, "prepare", fails)
    with pytest.raises(DataError):
        services.run(parsed(values), out, until="prepare")
    assert not out.exists()
    monkeypatch.setattr(stage, "prepare", original)
    assert services.run(parsed(values), out, until="prepare").data.exists
    (out / "mine.txt").write_text("mine")
    monkeypatch.setattr(stage, "prepare", fails)
    for _ in range(2):
        with pytest.raises(DataError):
            services.run(parsed(values), out, overwrite=True, until="prepare")
    assert (out / "mine.txt").read_text() == "mine"


def test_a_run_killed_in_its_first_stage_is_begun_anew_by_the_same_command(values: dict, tmp_path: Path) -> None:
    out = RunFolder(tmp_path / "out")
    out.stages.mkdir(parents=True)
    out.recipe.write_text("[model")
    (out.path / ".lock").touch()
    (out.path / ".data.partial").mkdir()
    (out.stages / ".prepare.json.partial").write_text("{")
    services.run(parsed(values), out.path, until="prepare")
    assert not (out.path / ".data.partial").exists()


def test_a_folder_with_stages_of_the_users_is_never_touched(values: dict, tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ArtifactError, match="holds a run"):
        services.run(parsed(values), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert STORIES.is_file()


def test_the_token_that_begins_a_prompt_counts_where_the_model_has_no_chat_template() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    spec = EvaluateSpec(encoder="offline", prompt_words=8, max_new_tokens=24)
    documents = [" ".join(["word"] * 40)]
    (found,) = evaluate.check(spec, own, documents, 31)
    assert "the longest prompt has 9 tokens, and the model reads 31 at most; lower it to 23" in str(found)
    assert not list(evaluate.check(spec, own, documents, 32))
