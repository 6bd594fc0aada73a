"""What a resumed run does again: what its result depends on, and nothing else; and what a kill leaves behind."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, STORIES, tiny_values
from filelock import FileLock
from pydantic import BaseModel

from ovexport import recipe, versions
from ovexport.artifacts import RunFolder
from ovexport.errors import ArtifactError
from ovexport.pipeline import services, stage
from ovexport.pipeline.stages import STAGES
from ovexport.recipe import Recipe, SourceSpec, TaskSpec
from ovexport.storage.scratch import clear_scratch, scratch_folder

READ_BY = {
    "model": {"prepare", "trace", "compress", "tune", "search", "evaluate"},
    "data": {"prepare"},
    "task": {"prepare", "evaluate"},
    "compress": {"compress"},
    "tune": {"tune", "search"},
    "search": {"search"},
    "convert": {"trace"},
    "verify": {"verify"},
    "evaluate": {"evaluate"},
    "bench": {"bench"},
}
OTHERWISE = {
    "tune.seed": {"compress", "tune", "search"},
    "convert.formats": {"convert", "verify"},
    "tune.save_every": set(),
    "tune.most_skipped_steps": set(),
    "tune.gradient_checkpointing": set(),
    "tune.teacher_cache_gb": set(),
    "task.metric": {"evaluate"},
    "task.num_fewshot": {"evaluate"},
    "task.stop": {"evaluate"},
    "task.max_new_tokens": {"evaluate"},
}


SOURCES = {("data", "train"), ("data", "validation"), ("data", "test")}


class Everything(dict):
    """Results of all stages, alike."""

    def __missing__(self, name: str) -> str:
        return name


def digests(resolved: Recipe) -> dict[str, str]:
    return {one.name: stage.stage_digest(one, resolved, Everything()) for one in STAGES}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]} - {"report"}


def redone(resolved: Recipe, folder: RunFolder, until: str | None = None) -> list[str]:
    stages: list[str] = []
    services.run(
        resolved,
        folder.path,
        resume=True,
        until=until,
        announce=lambda name, skipped: None if skipped else stages.append(name),
    )
    return stages


@pytest.fixture
def elastic_recipe(tiny_recipe: Recipe) -> Recipe:
    """With a value in every section; it is digested, not run."""
    task = TaskSpec(name="parity", train=str(STORIES))
    compress = tiny_recipe.compress.model_copy(update={"format": "fq_lora_nls", "rank_space": (8, 4)})
    return tiny_recipe.model_copy(update={"task": task, "compress": compress})


def test_every_key_of_a_recipe_makes_stale_what_reads_it_and_nothing_else(elastic_recipe: Recipe) -> None:
    before = digests(elastic_recipe)
    for name in Recipe.model_fields:
        section = getattr(elastic_recipe, name)
        if not isinstance(section, BaseModel):
            continue
        for key in type(section).model_fields:
            value = SourceSpec(path="another.txt") if (name, key) in SOURCES else "another"
            other = elastic_recipe.model_copy(update={name: section.model_copy(update={key: value})})
            expected = OTHERWISE.get(f"{name}.{key}", READ_BY[name])
            assert changed(before, digests(other)) == expected, f"{name}.{key}"


def test_a_run_of_another_version_is_refused_in_one_line(run_copy: RunFolder, tiny_recipe: Recipe) -> None:
    record = run_copy.stage_record("tune")
    values = json.loads(record.read_text())
    del values["format_version"]
    record.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"a run of another version of ovexport, .*--overwrite to start over"):
        redone(tiny_recipe, run_copy)
    assert json.loads(record.read_text()) == values


def test_a_report_shows_the_whole_recipe_and_is_made_again_with_it(tiny_recipe: Recipe) -> None:
    tune = tiny_recipe.tune.model_copy(update={"save_every": 7})
    before, after = (digests(one)["report"] for one in (tiny_recipe, tiny_recipe.model_copy(update={"tune": tune})))
    assert before != after


def test_the_contents_of_prompts_and_encoder_make_figures_stale(tiny_recipe: Recipe, tmp_path: Path) -> None:
    prompts, encoder = tmp_path / "prompts.txt", tmp_path / "encoder"
    encoder.mkdir()
    evaluate = tiny_recipe.evaluate.model_copy(update={"prompts": str(prompts), "encoder": str(encoder)})
    resolved = tiny_recipe.model_copy(update={"evaluate": evaluate})
    prompts.write_text("Once upon a time\n")
    (encoder / "model.safetensors").write_bytes(b"one")
    first = digests(resolved)
    prompts.write_text("Twice upon a time\n")
    second = digests(resolved)
    (encoder / "model.safetensors").write_bytes(b"another")
    third = digests(resolved)
    assert changed(first, second) == changed(second, third) == {"evaluate"}


def test_of_a_models_folder_what_is_loaded_counts_and_what_is_said_of_it_does_not(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_recipe.model.id, tmp_path / "model"))
    resolved = tiny_recipe.model_copy(update={"model": tiny_recipe.model.model_copy(update={"id": str(folder)})})
    before = digests(resolved)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "log").write_text("hidden")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("LICENSE", "license.txt", "NOTICE", "logo.PNG"):
        (folder / name).write_text("said of it")
    after = digests(resolved)
    assert changed(before, after) == set()
    assert before["report"] != after["report"]
    config = folder / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 2}))
    assert changed(after, digests(resolved)) == READ_BY["model"]


def test_a_text_that_was_moved_is_read_again_and_tuned_on_no_more(
    run_copy: RunFolder, tiny_model: Path, tmp_path: Path
) -> None:
    values = tiny_values(tiny_model)
    values["data"]["train"]["path"] = str(shutil.copy(STORIES, tmp_path / "moved.jsonl"))
    values["tune"] |= {"save_every": 1, "teacher_cache_gb": 1.0}
    moved = recipe.parse(values, base=REPOSITORY, origin="moved")
    assert redone(moved, run_copy) == ["prepare", "report"]


def test_figures_of_other_versions_are_measured_again_and_what_was_made_is_kept_and_said(
    run_copy: RunFolder, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _install(monkeypatch, "openvino")
    assert redone(tiny_recipe, run_copy, until="verify") == ["verify"]
    said = [record.getMessage() for record in caplog.records if "  made with openvino 2" in record.getMessage()]
    assert len(said) == 2  # trace and convert
    assert all("(9.9 is installed), and kept; --overwrite makes it again" in line for line in said)


def test_the_encoders_library_makes_figures_stale(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(tiny_recipe)
    _install(monkeypatch, "sentence-transformers")
    assert changed(before, digests(tiny_recipe)) == {"evaluate"}


def _install(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    """Let another version of a library seem to be installed."""
    installed = versions.installed_version

    def found(name: str) -> str | None:
        return "9.9" if name == distribution else installed(name)

    for module in (versions, stage):
        monkeypatch.setattr(module, "installed_version", found)


def test_what_kills_left_beside_a_run_and_in_it_is_cleared_by_the_next_start(
    run_copy: RunFolder, tiny_recipe: Recipe
) -> None:
    parent = run_copy.path.parent
    dead = _killed_in_a_scratch_folder(parent)
    users = parent / ".ovexport-notes"
    users.mkdir()
    (users / "mine.txt").write_text("mine")
    left = [
        run_copy.path / ".int4.partial",
        run_copy.path / ".bf16.replaced",
        run_copy.path / "packed" / ".int4.partial",
    ]
    for folder in left:
        folder.mkdir()
    (run_copy.path / "stages" / ".tune.json.partial").write_text("{")
    (run_copy.path / "mine.partial").write_text("mine")
    with scratch_folder(parent) as alive:
        (alive / "work").write_text("in progress")
        assert redone(tiny_recipe, run_copy) == []
        assert (alive / "work").is_file()
    assert not alive.exists()
    assert not dead.exists()
    assert not any(folder.exists() for folder in left)
    assert not (run_copy.path / "stages" / ".tune.json.partial").exists()
    assert (run_copy.path / "mine.partial").is_file()
    assert (users / "mine.txt").is_file()


def _killed_in_a_scratch_folder(parent: Path) -> Path:
    code = (
        "import os, signal, sys; from pathlib import Path; from ovexport.storage.scratch import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])) as path:\n"
        "    print(path, flush=True); (path / 'bf16').mkdir(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, parent], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    dead = Path(done.stdout.strip())
    assert (dead / "bf16").is_dir()
    return dead


def test_a_scratch_folder_in_use_and_a_link_to_one_are_left(tmp_path: Path) -> None:
    used, elsewhere = tmp_path / ".ovexport-used", tmp_path / "elsewhere"
    for folder in (used, elsewhere):
        folder.mkdir()
        (folder / "ovexport.lock").touch()
    (tmp_path / ".ovexport-link").symlink_to(elsewhere)
    with FileLock(used / "ovexport.lock"):
        clear_scratch(tmp_path)
    assert used.is_dir()
    clear_scratch(tmp_path)
    assert not used.exists()
    assert elsewhere.is_dir()


@pytest.mark.run
@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_in_the_same_files() -> None:
    command = [sys.executable, "kills.py", "--kills", "2", "--seed", "3", "--json"]
    for name in ("prepare", "evaluate"):
        command += ["--stage", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY / "benchmarks")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["counts"]
    for name, count in counts.items():
        assert (name, count["kills"], count["same"]) == (name, 2, count["trials"])
