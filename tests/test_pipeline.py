import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, tiny_values
from filelock import FileLock

from ovexport import recipe
from ovexport.artifacts import MODELS, RunFolder
from ovexport.errors import ArtifactError, OvexportError, RecipeError, UnsupportedModelError, VerificationFailed
from ovexport.pipeline import services
from ovexport.recipe import Recipe
from ovexport.storage.files import files_in

LAYOUT = [
    "recipe.toml",
    "bf16/openvino_model.xml",
    "bf16/openvino_tokenizer.xml",
    "plain/openvino_model.bin",
    "int4/openvino_model.xml",
    "int4/openvino_model.bin",
    "int4/openvino_tokenizer.xml",
    "int4/openvino_detokenizer.xml",
    "int4/config.json",
    "int4/generation_config.json",
    "checkpoint/checkpoint.json",
    "checkpoint/adapters.safetensors",
    "verification.json",
    "evaluation.json",
    "benchmark.json",
    "evaluation/reference.csv",
    "evaluation/int4/target.csv",
    "evaluation/int4/metrics.csv",
    "report.html",
    "README.md",
    "logs/tuning.jsonl",
]


def redone(resolved: Recipe, folder: RunFolder) -> list[str]:
    """The stages that a resumed run does again."""
    stages: list[str] = []
    services.run(
        resolved, folder.path, resume=True, announce=lambda name, skipped: None if skipped else stages.append(name)
    )
    return stages


def changed(model: Path, section: str, **values) -> Recipe:
    sections = tiny_values(model)
    sections[section] |= values
    return recipe.parse(sections, base=REPOSITORY, origin="changed")


def test_a_run_leaves_what_the_interface_promises(finished_run: RunFolder) -> None:
    missing = [name for name in LAYOUT if not (finished_run.path / name).is_file()]
    assert not missing
    assert recipe.load(finished_run.recipe).compress.mode == "int4_asym"


def test_every_ir_of_a_run_carries_the_same_runtime_options(finished_run: RunFolder) -> None:
    import openvino as ov

    for name in MODELS:
        graph = ov.Core().read_model(finished_run.ir(name).xml)
        assert graph.get_rt_info(["runtime_options", "KV_CACHE_PRECISION"]).astype(str) == "u8"
        assert not graph.has_rt_info(["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])


def test_a_finished_run_is_not_done_again(run_copy: RunFolder, tiny_recipe: Recipe) -> None:
    assert redone(tiny_recipe, run_copy) == []


def test_an_edit_of_bench_invalidates_no_checkpoint(run_copy: RunFolder, tiny_model: Path) -> None:
    assert redone(changed(tiny_model, "bench", output_tokens=5), run_copy) == ["bench", "report"]


def test_an_edit_of_tune_redoes_what_follows_from_it(run_copy: RunFolder, tiny_model: Path) -> None:
    again = redone(changed(tiny_model, "tune", steps=1), run_copy)
    assert again == ["tune", "search", "strip", "convert", "verify", "evaluate", "bench", "report"]


def test_a_file_changed_behind_the_runs_back_is_made_again(run_copy: RunFolder, tiny_recipe: Recipe) -> None:
    path = run_copy.ir("int4").bin
    path.write_bytes(path.read_bytes()[:-1])
    assert redone(tiny_recipe, run_copy)[0] == "convert"


def test_an_interrupted_run_is_taken_up_where_it_stopped(
    finished_run: RunFolder, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    def interrupt(stage: str, skipped: bool) -> None:
        if stage == "compress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        services.run(tiny_recipe, tmp_path / "run", announce=interrupt)
    stages: list[str] = []
    services.run(
        tiny_recipe,
        tmp_path / "run",
        resume=True,
        until="convert",
        announce=lambda name, skipped: None if skipped else stages.append(name),
    )
    assert stages == ["compress", "tune", "search", "strip", "convert"]
    for name in MODELS:
        one, other = finished_run.ir(name), RunFolder(tmp_path / "run").ir(name)
        assert (one.xml.read_bytes(), one.bin.read_bytes()) == (other.xml.read_bytes(), other.bin.read_bytes())


def test_an_output_folder_of_another_run_is_refused(run_copy: RunFolder, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds a run; --resume to go on with it, --overwrite"):
        services.run(tiny_recipe, run_copy.path)
    text = run_copy.recipe.read_text().replace(tiny_recipe.model.id, "/another/model")
    run_copy.recipe.write_text(text)
    with pytest.raises(ArtifactError, match="a run of another model, /another/model"):
        services.run(tiny_recipe, run_copy.path, resume=True)
    assert (run_copy.path / "verification.json").is_file()


def test_overwriting_removes_the_run_and_nothing_else(run_copy: RunFolder, tiny_recipe: Recipe) -> None:
    (run_copy.path / "my-notes.txt").write_text("mine")
    services.run(tiny_recipe, run_copy.path, overwrite=True, until="prepare")
    assert (run_copy.path / "my-notes.txt").read_text() == "mine"
    assert not (run_copy.path / "int4").exists()


def test_a_folder_that_is_no_run_is_never_touched(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="files that are no run's"):
        services.run(tiny_recipe, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


def test_a_project_with_a_recipe_of_its_own_is_no_run(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe.dump(tiny_recipe))
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ArtifactError, match="files that are no run's"):
            services.run(tiny_recipe, tmp_path, **options)
    assert (tmp_path / "recipe.toml").is_file()


def test_nothing_is_removed_for_a_recipe_that_can_not_run(run_copy: RunFolder, tiny_model: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        services.run(changed(tiny_model, "model", id="/nowhere/at/all"), run_copy.path, overwrite=True)
    assert run_copy.ir("int4").bin.is_file()


def test_a_damaged_recipe_of_a_run_says_what_to_do(run_copy: RunFolder, tiny_recipe: Recipe) -> None:
    run_copy.recipe.write_text("[model\n")
    with pytest.raises(ArtifactError, match="--overwrite to start over"):
        services.run(tiny_recipe, run_copy.path, resume=True)


def test_a_second_process_on_one_run_is_refused(run_copy: RunFolder, tiny_recipe: Recipe) -> None:
    with FileLock(run_copy.path / ".lock"), pytest.raises(ArtifactError, match="another ovexport works on it"):
        services.run(tiny_recipe, run_copy.path, resume=True)
    assert redone(tiny_recipe, run_copy) == []


def test_an_unknown_stage_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--until polish: no such stage; they are prepare, trace"):
        services.run(tiny_recipe, tmp_path / "run", until="polish")


def test_too_small_a_disk_is_refused_before_work_starts(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ArtifactError, match=r"1 kB free on the disk, and the run needs about [\d.]+ MB"):
        services.run(tiny_recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_verification_is_written_down_and_raised(
    run_copy: RunFolder, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovexport import convert as stage

    monkeypatch.setattr(stage, "decompression", _with_one_layer_off(stage.decompression))
    (run_copy.path / "stages" / "convert.json").unlink()
    with pytest.raises(
        VerificationFailed,
        match=r"checks failed; first: as the checkpoint recorded it, .*0\.mlp\.down_proj\.weight codes",
    ):
        services.run(tiny_recipe, run_copy.path, resume=True)
    report = json.loads((run_copy.path / "verification.json").read_text())
    assert report["passed"] is False
    assert not (run_copy.path / "stages" / "verify.json").exists()


def _with_one_layer_off(original):
    """A converter with a defect: one layer's codes are all one step off."""

    def defective(layer, tensors, result_type):
        if layer.name.endswith("0.mlp.down_proj.weight"):
            shifted = {name: tensors[name] for name in tensors if name.startswith(layer.name)}
            shifted[f"{layer.name}.codes"] = shifted[f"{layer.name}.codes"] ^ 1
            tensors = type("Shifted", (), {"require": lambda self, name: shifted[name]})()
        return original(layer, tensors, result_type)

    return defective


def test_a_checkpoint_converts_to_the_very_product_of_the_run(finished_run: RunFolder, tiny_recipe, tmp_path) -> None:
    out, keep = tmp_path / "converted", tmp_path / "kept"
    out.mkdir()
    ir = services.convert_checkpoint(
        finished_run.checkpoint.path, tiny_recipe.model, tiny_recipe.convert, out, keep=keep
    )
    made, files = finished_run.ir("int4").path, files_in(ir.path)
    assert [file.relative_to(ir.path) for file in files] == [file.relative_to(made) for file in files_in(made)]
    for file in files:
        assert file.read_bytes() == (made / file.relative_to(ir.path)).read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "kept"]
    assert [path.name for path in keep.iterdir()] == ["bf16"]


def test_a_checkpoint_that_the_runtime_computes_wrongly_is_refused_before_work(
    run_copy: RunFolder, tiny_recipe
) -> None:
    path = run_copy.checkpoint.path / "checkpoint.json"
    manifest = json.loads(path.read_text())
    layer = next(layer for layer in manifest["layers"] if layer["mode"] == "int4_asym")
    layer |= {"in_features": 96, "group_size": 48}
    path.write_text(json.dumps(manifest))
    out = run_copy.path / "converted"
    with pytest.raises(UnsupportedModelError, match=f"group size 48 in {layer['name'].removesuffix('.weight')}"):
        services.convert_checkpoint(run_copy.checkpoint.path, tiny_recipe.model, tiny_recipe.convert, out)
    assert not out.exists()


def test_optimum_intel_loads_the_product(finished_run: RunFolder) -> None:
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    folder = str(finished_run.ir("int4").path)
    model = OVModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_what_a_later_stage_lacks_does_not_stop_an_earlier_one(tiny_recipe: Recipe, tmp_path: Path) -> None:
    evaluate = tiny_recipe.evaluate.model_copy(update={"encoder": str(tmp_path / "no-encoder")})
    without = tiny_recipe.model_copy(update={"evaluate": evaluate})
    assert services.run(without, tmp_path / "run", until="prepare").data.path.is_dir()
    with pytest.raises(OvexportError, match="no-encoder"):
        services.run(without, tmp_path / "other", until="evaluate")
