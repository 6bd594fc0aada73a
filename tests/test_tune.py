import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_values

from ovexport import recipe
from ovexport.artifacts import Checkpoint, RunFolder
from ovexport.errors import TuningDivergedError
from ovexport.recipe import Recipe, TuneSpec
from ovexport.tune import tune, tuner


def tuned(run: RunFolder, model: Recipe, spec: TuneSpec, out: Path, **options) -> Checkpoint:
    folders = {"logs": out / "logs", "identity": "a"}
    return tune(run.compressed, model.model, spec, run.data, out / "checkpoint", **folders, **options)


def spec(**changes) -> TuneSpec:
    base = {"steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "validate_every": 2, "save_every": 2}
    return TuneSpec(**{**base, "learning_rate": 1e-3, **changes})


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: np.array(checkpoint.adapters[name]) for name in checkpoint.adapters}


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "logs" / "tuning.jsonl").read_text().splitlines()]


def test_tuning_lowers_the_divergence_and_moves_adapters_and_ranges(finished_run, tiny_recipe, tmp_path) -> None:
    checkpoint = tuned(finished_run, tiny_recipe, spec(steps=20, learning_rate=2e-3), tmp_path)
    lines = log(tmp_path)
    assert checkpoint.manifest.validation_kl_nats < 0.9 * lines[0]["validation_kl_nats"]
    before, after = tensors(finished_run.compressed), tensors(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    for part in ("lora_A", "lora_B", "input_low", "input_range"):
        assert not np.array_equal(before[f"{name}.{part}"], after[f"{name}.{part}"]), part
    embedding = "model.embed_tokens.weight.input_range"
    assert np.array_equal(before[embedding], after[embedding])
    assert {"loss_kl_nats", "tokens_per_s", "learning_rate"} <= set(lines[1])
    assert any(path.name.startswith("events") for path in (tmp_path / "logs").rglob("*"))


def test_no_steps_keep_the_starting_point(finished_run, tiny_recipe, tmp_path) -> None:
    checkpoint = tuned(finished_run, tiny_recipe, spec(steps=0), tmp_path)
    assert checkpoint.manifest.steps == 0
    assert checkpoint.manifest.digests == finished_run.compressed.manifest.digests


def test_a_killed_tuning_goes_on_to_the_very_same_end(finished_run, tiny_recipe, tmp_path) -> None:
    whole = tuned(finished_run, tiny_recipe, spec(), tmp_path / "whole")

    def kill(moment) -> None:
        if moment.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(), tmp_path / "killed", listener=kill)
    assert not (tmp_path / "killed" / "checkpoint").exists()
    seen: list[int] = []
    resumed = tuned(finished_run, tiny_recipe, spec(), tmp_path / "killed", listener=lambda m: seen.append(m.done))
    assert seen == [5, 6]
    assert resumed.manifest.digests == whole.manifest.digests
    for name, value in tensors(whole).items():
        assert np.array_equal(value, tensors(resumed)[name]), name
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(7))
    assert not (tmp_path / "killed" / "tuning").exists()


def test_the_state_of_another_tuning_is_not_taken_up(finished_run, tiny_recipe, tmp_path) -> None:
    def kill(moment) -> None:
        if moment.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=kill)
    state = json.loads((tmp_path / "tuning" / "state.json").read_text())
    (tmp_path / "tuning" / "state.json").write_text(json.dumps(state | {"identity": "another"}))
    seen: list[int] = []
    tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=lambda moment: seen.append(moment.done))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_damaged_state_is_left_and_tuning_begins_anew(finished_run, tiny_recipe, tmp_path) -> None:
    def kill(moment) -> None:
        if moment.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=kill)
    state = tmp_path / "tuning" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with (tmp_path / "logs" / "tuning.jsonl").open("a") as file:
        file.write('{"step": 3, "loss_')
    checkpoint = tuned(finished_run, tiny_recipe, spec(), tmp_path)
    assert checkpoint.manifest.digests == tuned(finished_run, tiny_recipe, spec(), tmp_path / "b").manifest.digests
    assert [line["step"] for line in log(tmp_path)] == list(range(7))


def test_a_loss_that_is_not_finite_keeps_the_best_checkpoint(finished_run, tiny_recipe, tmp_path, monkeypatch) -> None:
    true_logits = tuner._logits
    calls = {"count": 0}

    def spoiled(network, ids):
        calls["count"] += 1
        logits = true_logits(network, ids)
        return logits * float("nan") if calls["count"] > 20 and torch.is_grad_enabled() else logits

    monkeypatch.setattr(tuner, "_logits", spoiled)
    with pytest.raises(TuningDivergedError, match=r"at step \d+; the best checkpoint so far is kept, lower"):
        tuned(finished_run, tiny_recipe, spec(steps=50), tmp_path)
    kept = Checkpoint(tmp_path / "checkpoint")
    assert all(np.isfinite(value).all() for value in tensors(kept).values())
    assert kept.manifest.validation_kl_nats <= log(tmp_path)[0]["validation_kl_nats"]


def test_the_seed_decides_the_order_and_nothing_else_does(finished_run, tiny_recipe, tmp_path) -> None:
    first = tuned(finished_run, tiny_recipe, spec(steps=2), tmp_path / "a")
    again = tuned(finished_run, tiny_recipe, spec(steps=2), tmp_path / "b")
    other = tuned(finished_run, tiny_recipe, spec(steps=2, seed=1), tmp_path / "c")
    assert first.manifest.digests == again.manifest.digests
    assert log(tmp_path / "a")[1]["loss_kl_nats"] != log(tmp_path / "c")[1]["loss_kl_nats"]
    assert other.manifest.layers == first.manifest.layers


def test_bfloat16_arithmetic_and_epochs(finished_run, tiny_recipe, tmp_path) -> None:
    checkpoint = tuned(finished_run, tiny_recipe, spec(steps=None, epochs=1, precision="bf16"), tmp_path)
    assert len(log(tmp_path)) == 1 + 32 // 4
    assert checkpoint.manifest.validation_kl_nats is not None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_awq_and_scale_estimation_start_from_nncfs_ranges(mode, tiny_recipe, tmp_path) -> None:
    from ovexport import pipeline

    sections = tiny_values(Path(tiny_recipe.model.id))
    sections["compress"] |= {"awq": True, "scale_estimation": True, "mode": mode, "calibration_sequences": 8}
    sections["tune"] |= {"steps": 2}
    resolved = recipe.parse(sections, base=tmp_path, origin="awq")
    run = pipeline.run(resolved, tmp_path / "run", until="verify")
    manifest = run.compressed.manifest
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= set(manifest.changed)
    plain = shutil.copytree(run.compressed.path, tmp_path / "copy")
    assert Checkpoint(plain).weights.require(manifest.changed[0]).dtype == np.float32


def test_a_model_without_adapters_is_not_tuned(tiny_recipe, tmp_path) -> None:
    from ovexport import pipeline

    sections = tiny_values(Path(tiny_recipe.model.id))
    sections["compress"] |= {"group_size": 48, "fallback": "int8"}
    resolved = recipe.parse(sections, base=tmp_path, origin="int8")
    run = pipeline.run(resolved, tmp_path / "run", until="verify")
    assert run.checkpoint.manifest.steps == 0
    assert {layer.mode for layer in run.checkpoint.manifest.layers} == {"int8_asym"}
