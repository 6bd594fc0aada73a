import json
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import COMMON, save_tiny_model, tiny_values
from safetensors import SafetensorError
from signalled_tuning import signalled
from torch.func import functional_call

from ovexport import recipe
from ovexport.artifacts import Checkpoint, RunFolder
from ovexport.errors import ArtifactError, TuningDivergedError, UnsupportedModelError
from ovexport.models.device import Compute
from ovexport.objectives import distillation as distillation_module
from ovexport.objectives.loss import distillation
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import Recipe, TuneSpec
from ovexport.storage.tensorfile import write_tensors
from ovexport.tune import store, trainer, tune
from ovexport.tune.trainer import Trainer, make_trainer


def tuned(run: RunFolder, model: Recipe, spec: TuneSpec, out: Path, **options) -> Checkpoint:
    folders = {"logs": out / "logs", "identity": "a"}
    return tune(run.compressed, model.model, spec, run.data, out / "tuned", **folders, **options)


def made_trainer(run: RunFolder, model: Recipe, spec: TuneSpec) -> Trainer:
    compute = Compute.of("cpu", spec.precision)
    return make_trainer(run.compressed, model.model, spec, run.data, compute, silent)


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
    assert checkpoint.manifest.validation.value < 0.9 * lines[0]["validation_kl_nats"]
    before, after = tensors(finished_run.compressed), tensors(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    for part in ("lora_A", "lora_B", "input_low", "input_range"):
        assert not np.array_equal(before[f"{name}.{part}"], after[f"{name}.{part}"]), part
    embedding = "model.embed_tokens.weight.input_range"
    assert np.array_equal(before[embedding], after[embedding])
    assert {"loss_nats", "tokens_per_s", "learning_rate_adapters"} <= set(lines[1])
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
    assert not (tmp_path / "killed" / "tuned").exists()
    seen: list[int] = []
    resumed = tuned(finished_run, tiny_recipe, spec(), tmp_path / "killed", listener=lambda m: seen.append(m.done))
    assert seen == [5, 6]
    assert resumed.manifest.digests == whole.manifest.digests
    for name, value in tensors(whole).items():
        assert np.array_equal(value, tensors(resumed)[name]), name
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(7))


def stopped_at(step: int):
    """A listener that raises after a step, as a kill between two steps would."""

    def stop(moment) -> None:
        if moment.task == "tune" and moment.done == step:
            raise KeyboardInterrupt

    return stop


def test_the_state_of_another_tuning_is_not_taken_up(finished_run, tiny_recipe, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=stopped_at(3))
    path = tmp_path / "tuning" / "step-00000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": "another"}))
    seen: list[int] = []
    tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=lambda moment: seen.append(moment.done))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_the_last_two_states_and_the_best_are_kept(finished_run, tiny_recipe, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(steps=20), tmp_path, listener=stopped_at(15))
    names = sorted(path.name for path in (tmp_path / "tuning").iterdir())
    assert [name for name in names if name.startswith("step-")] == ["step-00000012", "step-00000014"]
    states = [json.loads((tmp_path / "tuning" / name / "state.json").read_text()) for name in names[-2:]]
    assert {f"best-{state['best_step']:08d}" for state in states} == set(names[:-2])


def test_a_damaged_state_is_left_for_the_one_before_it(finished_run, tiny_recipe, tmp_path) -> None:
    whole = tuned(finished_run, tiny_recipe, spec(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=stopped_at(5))
    state = tmp_path / "tuning" / "step-00000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with (tmp_path / "logs" / "tuning.jsonl").open("a") as file:
        file.write('{"step": 3, "loss_')
    seen: list[int] = []
    checkpoint = tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=lambda moment: seen.append(moment.done))
    assert seen == [3, 4, 5, 6]
    assert checkpoint.manifest.digests == whole.manifest.digests
    assert [line["step"] for line in log(tmp_path)] == list(range(7))


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_where_it_would_have(finished_run, tiny_recipe, tmp_path) -> None:
    steps = spec(steps=200)
    whole = tuned(finished_run, tiny_recipe, steps, tmp_path / "whole")
    moments = np.random.default_rng(0)
    for _ in range(10):
        seconds = float(moments.uniform(0, 0.15))
        assert signalled(finished_run, steps, tmp_path, signal.SIGKILL, seconds=seconds) == -signal.SIGKILL
    last = tuned(finished_run, tiny_recipe, steps, tmp_path)
    for name in ("adapters.safetensors", "reference.safetensors"):
        assert (last.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert last.manifest == whole.manifest


def test_ctrl_c_ends_the_step_that_is_under_way_and_saves_it(finished_run, tiny_recipe, tmp_path) -> None:
    steps = spec(steps=100, save_every=1000)
    whole = tuned(finished_run, tiny_recipe, steps, tmp_path / "whole")
    assert signalled(finished_run, steps, tmp_path, signal.SIGINT, seconds=0.1) == 1  # multiprocessing's code for it
    (state,) = (tmp_path / "tuning").glob("step-*")
    seen: list[int] = []
    again = tuned(finished_run, tiny_recipe, steps, tmp_path, listener=lambda moment: seen.append(moment.done))
    assert seen[0] == int(state.name.removeprefix("step-")) + 1
    assert again.manifest == whole.manifest


def test_a_full_disk_leaves_what_was_saved(finished_run, tiny_recipe, tmp_path, monkeypatch) -> None:
    whole = tuned(finished_run, tiny_recipe, spec(), tmp_path / "whole")
    write, calls = write_tensors, {"count": 0}

    def full(tensors, path) -> None:
        calls["count"] += 1
        if calls["count"] == 4:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        write(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_tensors", full)
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(ArtifactError, match="no space left on the disk; free some, then --resume"):
            tuned(finished_run, tiny_recipe, spec(), tmp_path)
    seen: list[int] = []
    again = tuned(finished_run, tiny_recipe, spec(), tmp_path, listener=lambda moment: seen.append(moment.done))
    assert seen[0] == 3
    assert again.manifest.digests == whole.manifest.digests


def spoiled(monkeypatch, steps: range) -> None:
    """Losses of these steps are not finite."""
    true_loss, calls = distillation, {"count": 0}

    def loss(*arguments, **options):
        calls["count"] += 1
        value = true_loss(*arguments, **options)
        return value * float("nan") if (calls["count"] - 1) // 2 in steps else value

    monkeypatch.setattr(distillation_module, "distillation", loss)


def test_a_step_that_is_not_finite_is_skipped(finished_run, tiny_recipe, tmp_path, monkeypatch) -> None:
    spoiled(monkeypatch, range(1, 3))
    checkpoint = tuned(finished_run, tiny_recipe, spec(), tmp_path)
    assert ["loss_nats" in line for line in log(tmp_path)] == [False, True, False, False, True, True, True]
    assert all(np.isfinite(value).all() for value in tensors(checkpoint).values())


def test_too_many_such_steps_end_it_and_the_best_checkpoint_is_named(
    finished_run, tiny_recipe, tmp_path, monkeypatch
) -> None:
    spoiled(monkeypatch, range(5, 100))
    with pytest.raises(
        TuningDivergedError,
        match=r"3 consecutive steps, up to step 8, had a non-finite loss .* the best one, of step \d+, is in",
    ):
        tuned(finished_run, tiny_recipe, spec(steps=50, most_skipped_steps=2), tmp_path)
    kept = Checkpoint(tmp_path / "tuned")
    assert all(np.isfinite(value).all() for value in tensors(kept).values())
    assert kept.manifest.validation.value <= log(tmp_path)[0]["validation_kl_nats"]


def test_the_seed_decides_the_order_and_nothing_else_does(finished_run, tiny_recipe, tmp_path) -> None:
    first = tuned(finished_run, tiny_recipe, spec(steps=2), tmp_path / "a")
    again = tuned(finished_run, tiny_recipe, spec(steps=2), tmp_path / "b")
    other = tuned(finished_run, tiny_recipe, spec(steps=2, seed=1), tmp_path / "c")
    assert first.manifest.digests == again.manifest.digests
    assert log(tmp_path / "a")[1]["loss_nats"] != log(tmp_path / "c")[1]["loss_nats"]
    assert other.manifest.layers == first.manifest.layers


def test_bfloat16_arithmetic_and_epochs(finished_run, tiny_recipe, tmp_path) -> None:
    checkpoint = tuned(finished_run, tiny_recipe, spec(steps=None, epochs=1, precision="bf16"), tmp_path)
    assert len(log(tmp_path)) == 1 + 32 // 4
    assert checkpoint.manifest.validation is not None


def test_moving_averages_are_what_is_validated_and_kept(finished_run, tiny_recipe, tmp_path) -> None:
    averaged = tuned(finished_run, tiny_recipe, spec(ema_decay=0.9), tmp_path / "averaged")
    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, spec(ema_decay=0.9), tmp_path / "killed", listener=stopped_at(5))
    assert tuned(finished_run, tiny_recipe, spec(ema_decay=0.9), tmp_path / "killed").manifest == averaged.manifest
    assert averaged.manifest.digests != tuned(finished_run, tiny_recipe, spec(), tmp_path / "last").manifest.digests


def test_patience_ends_a_tuning_that_gets_no_better(finished_run, tiny_recipe, tmp_path) -> None:
    tuned(finished_run, tiny_recipe, spec(steps=40, learning_rate=1.0, patience=2), tmp_path)
    assert log(tmp_path)[-1]["step"] < 40


def test_the_probe_chooses_the_rate_that_tunes_and_the_choice_is_resumed(finished_run, tiny_recipe, tmp_path) -> None:
    probing = spec(probe_learning_rates=(10.0, 1e-3), probe_steps=50)
    whole = tuned(finished_run, tiny_recipe, probing, tmp_path / "whole")
    fixed = tuned(finished_run, tiny_recipe, spec(learning_rate=1e-3), tmp_path / "fixed")
    assert whole.manifest.digests == fixed.manifest.digests
    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe, probing, tmp_path / "killed", listener=stopped_at(5))
    assert tuned(finished_run, tiny_recipe, probing, tmp_path / "killed").manifest == whole.manifest


def test_the_log_tells_what_became_of_codes_scales_and_zero_points(finished_run, tiny_recipe, tmp_path) -> None:
    tuned(finished_run, tiny_recipe, spec(steps=20, learning_rate=2e-3), tmp_path)
    last = log(tmp_path)[-1]
    assert 0 < last["codes_moved"] < 0.5
    assert 0 < last["scales_moved"] <= 1
    assert last["learning_rate_scales"] == pytest.approx(last["learning_rate_adapters"] / 10)
    assert last["peak_memory_bytes"] > 1e6


@pytest.mark.run
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_left_in_floating_point_pass_the_proof_after_bfloat16(tmp_path, checkpointing) -> None:
    config = transformers.Starcoder2Config(**COMMON, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5)
    values = tiny_values(save_tiny_model(tmp_path / "model", config, torch.float32))
    values["compress"] |= {"ignored": ["*c_proj", "*q_proj"]}
    values["tune"] |= {"precision": "bf16", "gradient_checkpointing": checkpointing}
    services.run(recipe.parse(values, base=tmp_path, origin="float"), tmp_path / "run", until="verify")


def test_checkpointed_gradients_are_the_same_gradients(finished_run, tiny_recipe, tmp_path) -> None:
    plain = tuned(finished_run, tiny_recipe, spec(precision="fp32"), tmp_path / "a")
    again = tuned(finished_run, tiny_recipe, spec(precision="fp32", gradient_checkpointing=True), tmp_path / "b")
    assert plain.manifest.digests == again.manifest.digests


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_says_the_same_from_the_cache_and_live(finished_run, tiny_recipe, tmp_path, precision) -> None:
    cached = tuned(finished_run, tiny_recipe, spec(precision=precision), tmp_path / "a")
    live = tuned(finished_run, tiny_recipe, spec(precision=precision, teacher_cache_gb=0.0), tmp_path / "b")
    first, second = log(tmp_path / "a")[1]["loss_nats"], log(tmp_path / "b")[1]["loss_nats"]
    assert first == pytest.approx(second, rel=1e-3)
    assert cached.manifest.validation.value == pytest.approx(live.manifest.validation.value, rel=0.02)


def test_the_teachers_states_are_computed_once_and_a_damaged_file_again(
    finished_run, tiny_recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("OVEXPORT_CACHE", str(tmp_path / "cache"))
    tasks: list[str] = []

    def note(moment) -> None:
        tasks.append(moment.task)

    whole = tuned(finished_run, tiny_recipe, spec(), tmp_path / "a", listener=note)
    assert "teacher" in tasks
    tasks.clear()
    tuned(finished_run, tiny_recipe, spec(), tmp_path / "b", listener=note)
    assert "teacher" not in tasks
    (states,) = (tmp_path / "cache").glob("*/hidden_states.safetensors")
    states.write_bytes(states.read_bytes()[:-1])
    again = tuned(finished_run, tiny_recipe, spec(), tmp_path / "c", listener=note)
    assert "teacher" in tasks
    assert again.manifest.digests == whole.manifest.digests


def test_the_cache_makes_room_by_what_was_used_longest_ago(finished_run, tiny_recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OVEXPORT_CACHE", str(tmp_path / "cache"))
    small = {"steps": 1, "teacher_cache_gb": 2.5 * 4 * 64 * 64 * 2 / 1e9}
    for seed in range(4):
        tuned(finished_run, tiny_recipe, spec(seed=seed, **small), tmp_path / str(seed))
    assert len(list((tmp_path / "cache").glob("*/teacher.json"))) == 2


def test_a_cache_that_can_not_be_written_is_done_without(finished_run, tiny_recipe, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("OVEXPORT_CACHE", str(tmp_path / "file"))
    assert tuned(finished_run, tiny_recipe, spec(), tmp_path).manifest.steps >= 0


def test_a_model_whose_logits_are_made_otherwise_is_refused_before_any_step(
    finished_run, tiny_recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(trainer, "gives_logits", lambda *_: False)
    with pytest.raises(
        UnsupportedModelError, match=r"llama: tuning needs logits = lm_head.* set tune.steps = 0 to convert"
    ):
        tuned(finished_run, tiny_recipe, spec(), tmp_path)
    assert tuned(finished_run, tiny_recipe, spec(steps=0), tmp_path).manifest.validation is None


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_awq_and_scale_estimation_start_from_nncfs_ranges(mode, tiny_recipe, tmp_path) -> None:
    sections = tiny_values(Path(tiny_recipe.model.id))
    sections["compress"] |= {"awq": True, "scale_estimation": True, "mode": mode, "calibration_sequences": 8}
    sections["tune"] |= {"steps": 2}
    resolved = recipe.parse(sections, base=tmp_path, origin="awq")
    run = services.run(resolved, tmp_path / "run", until="verify")
    manifest = run.compressed.manifest
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= set(
        manifest.replaced_weights
    )
    plain = shutil.copytree(run.compressed.path, tmp_path / "copy")
    assert Checkpoint(plain).weights.require(manifest.replaced_weights[0]).dtype == np.float32


@pytest.mark.run
def test_a_model_without_adapters_is_not_tuned(tiny_recipe, tmp_path) -> None:
    sections = tiny_values(Path(tiny_recipe.model.id))
    sections["compress"] |= {"group_size": 48, "fallback": "int8"}
    resolved = recipe.parse(sections, base=tmp_path, origin="int8")
    run = services.run(resolved, tmp_path / "run", until="verify")
    assert run.checkpoint.manifest.steps == 0
    assert {layer.mode for layer in run.checkpoint.manifest.layers} == {"int8_asym"}


def test_quantizing_once_a_step_is_quantizing_for_every_microbatch(finished_run, tiny_recipe, tmp_path) -> None:
    """Fifty steps of ours against autograd through the quantizers in every microbatch, in float32."""
    options = spec(steps=50, precision="fp32", schedule="constant", warmup_fraction=0.0, learning_rate=1e-4)
    ours, naive = (made_trainer(finished_run, tiny_recipe, options) for _ in range(2))
    student, optimizer = naive.student, naive.optimizer.adamw
    objective = naive.objective
    tokens = 2 * objective.tokens(range(options.batch_size))
    for index in range(50):
        loss = ours.step(index).loss_nats
        total = 0.0
        for sequences in naive.sampler.microbatches(index):
            weights = {name: quantizer(student.base_weights[name]) for name, quantizer in student.quantizers.items()}
            quantized = SimpleNamespace(base_model=partial(call, student.network.base_model, without_prefix(weights)))
            part = objective.loss(quantized, student.head, sequences, tokens)
            part.backward()
            total += float(part)
        torch.nn.utils.clip_grad_norm_(student.trained.values(), options.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(total, rel=2e-4), index
    for key, value in ours.student.trained.items():
        difference = (value - student.trained[key]).abs()
        assert float(difference.mean()) < 1e-2 * 50 * options.learning_rate, key


def call(model: torch.nn.Module, weights: dict[str, torch.Tensor], **inputs: object) -> object:
    """What a model with other weights gives."""
    return functional_call(model, weights, kwargs=inputs)


def without_prefix(weights: dict) -> dict:
    return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
