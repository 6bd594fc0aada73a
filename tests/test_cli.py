"""The commands as a user types them: exit codes, one-line errors, JSON, and no heavy import before it is needed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import ovexport, refused
from conftest import REPOSITORY, STORIES, tiny_values
from transformers import AutoModelForCausalLM, PretrainedConfig

from ovexport import recipe
from ovexport.artifacts import RunFolder

HEAVY = ("torch", "nncf", "openvino", "transformers", "optimum", "datasets", "matplotlib")
COMMANDS = ("run", "plan", "compress", "tune", "convert", "verify", "evaluate", "bench", "report", "gates", "doctor")


@pytest.fixture
def values(tiny_model: Path) -> dict:
    return tiny_values(tiny_model)


@pytest.fixture
def write(tmp_path: Path):
    """Write a recipe, valid or not, and return its path."""

    def write_sections(sections: dict) -> Path:
        import tomli_w

        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(sections))
        return path

    return write_sections


def test_help_tells_what_an_argument_is() -> None:
    assert "Folder of the IR to prove." in ovexport("verify", "--help").stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['ovexport', '--help']\n"
        "from ovexport.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("package", ["ovexport.verify", "ovexport.bench", "ovexport.convert"])
def test_what_runs_on_the_target_device_needs_no_torch(package: str) -> None:
    code = (
        f"import sys, {package}; "
        "print([name for name in ('torch', 'nncf', 'transformers', 'optimum') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = ovexport(command, "--help")
    assert done.returncode == 0
    assert f"Example: ovexport {command}" in done.stdout
    assert "--quiet" in done.stdout


@pytest.mark.slow
def test_a_run_prints_one_table_and_one_json_document(values: dict, write, tmp_path: Path) -> None:
    path = write(values)
    assert ", tuned 0\n" in ovexport("plan", path, "--set", "tune.steps=0").stdout
    done = ovexport("run", path, "--out", tmp_path / "out", "--set", "tune.steps=0")
    assert done.returncode == 0, done.stderr
    assert "KL from BF16, mean, nats" in done.stdout
    assert "0 codes differ from the checkpoint's" in done.stdout
    for text in (done.stdout, *((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))):
        assert "it took no step, or no step validated better than the starting point" in text
        assert "tuned" not in text.replace("not tuned", "")
    again = ovexport("run", path, "--out", tmp_path / "out", "--set", "tune.steps=0", "--resume", "--json")
    document = json.loads(again.stdout)
    assert document["verification"]["passed"] is True
    assert document["evaluation"]["models"]["int4"]["kl_mean_nats"] > 0
    assert (tmp_path / "out" / "logs" / "run.log").is_file()


def test_a_folder_where_a_recipe_belongs(tmp_path: Path) -> None:
    assert f"{tmp_path}: is a folder; give a TOML file" in refused(ovexport("plan", tmp_path), 2)


def test_a_plan_of_no_model_shows_the_problem_alone(tmp_path: Path) -> None:
    done = ovexport("plan", "--model", tmp_path / "none")
    assert (done.returncode, done.stdout) == (4, "")


def test_a_misspelt_command_is_answered_with_one_suggestion() -> None:
    assert ovexport("rnu").stderr.count("Did you mean") == 1


def test_an_unknown_recipe_key(values: dict, write, tmp_path: Path) -> None:
    values["compress"]["grop_size"] = 32
    line = refused(ovexport("run", write(values), "--out", tmp_path / "out"), 2)
    assert "compress.grop_size: no such key" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_model(values: dict, write, tmp_path: Path) -> None:
    values["model"]["id"] = str(tmp_path / "nowhere")
    assert "nowhere: no such folder" in refused(ovexport("run", write(values), "--out", tmp_path / "out"), 4)


def test_no_network_and_a_hub_name(values: dict, write, tmp_path: Path) -> None:
    values["model"]["id"] = "nobody/no-such-model"
    line = refused(ovexport("run", write(values), "--out", tmp_path / "out"), 4)
    assert "nobody/no-such-model: not a folder here, and could not be downloaded from the Hugging Face hub" in line


def test_a_folder_that_is_no_model(values: dict, write, tmp_path: Path) -> None:
    values["model"]["id"] = str(STORIES.parent)
    assert "no model, it has no config.json" in refused(ovexport("run", write(values), "--out", tmp_path / "out"), 5)


def test_a_corrupt_safetensors(values: dict, write, tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    values["model"]["id"] = str(broken)
    assert "corrupt weights" in refused(ovexport("run", write(values), "--out", tmp_path / "out"), 4)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(values: dict, write, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    values["model"]["id"] = str(broken)
    line = refused(ovexport("compress", write(values), "--out", tmp_path / "out"), 5)
    assert "model.layers.1.mlp.up_proj.weight: holds weights that are not finite" in line


def test_pickled_weights_are_not_loaded(values: dict, write, tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    pickled = shutil.copytree(tiny_model, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    values["model"]["id"] = str(pickled)
    assert "safetensors" in refused(ovexport("compress", write(values), "--out", tmp_path / "out"), 4)


def test_no_text(values: dict, write, tmp_path: Path) -> None:
    values["data"]["train"]["path"] = str(tmp_path / "none.txt")
    assert "none.txt: no such file" in refused(ovexport("run", write(values), "--out", tmp_path / "out"), 5)


def test_a_tokenizer_that_does_not_match(values: dict, write, tiny_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    values["model"]["id"] = str(other)
    line = refused(ovexport("run", write(values), "--out", tmp_path / "out"), 5)
    assert "token ids up to 2047, the model embeds 100" in line


def test_a_group_size_that_does_not_divide(values: dict, write, tmp_path: Path) -> None:
    values["compress"]["group_size"] = 48
    line = refused(ovexport("run", write(values), "--out", tmp_path / "out"), 2)
    assert "compress.group_size=48 does not divide in_features=64 of model.layers.0" in line


def test_a_rank_that_is_too_large_is_clamped_and_said(values: dict, write, tmp_path: Path) -> None:
    values["compress"]["rank"] = 4096
    done = ovexport("plan", write(values), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "rank 4096 clamped to 64" in done.stdout


def test_an_output_folder_of_another_run(values: dict, write, finished_run: RunFolder) -> None:
    line = refused(ovexport("run", write(values), "--out", finished_run.path), 4)
    assert "--overwrite to start over" in line


def test_several_problems_are_told_at_once_before_any_work(values: dict, write, tmp_path: Path) -> None:
    values["compress"]["group_size"] = 48
    values["data"]["train"]["path"] = str(tmp_path / "none.txt")
    values["evaluate"]["encoder"] = "nobody/no-such-encoder"
    done = ovexport("plan", write(values), "--out", tmp_path / "out")
    line = refused(done, 2)
    assert all(text in line for text in ("group_size=48", "none.txt", "nobody/no-such-encoder"))


def test_a_task_is_planned_without_text_of_its_own(values: dict, write, tmp_path: Path) -> None:
    values["compress"] |= {"format": "fq_lora_nls", "rank_space": [8, 4]}
    values["tune"]["objective"] = "task"
    assert "[task] with a name" in refused(ovexport("plan", write(values), "--out", tmp_path / "out"), 2)
    values["task"] = {"name": "openbookqa"}
    del values["data"]["train"]
    assert ovexport("plan", write(values), "--out", tmp_path / "out").returncode == 0
    values["task"] = {"name": "openbookqa", "train": "nowhere.jsonl"}
    assert "task.train=nowhere.jsonl: no such file" in refused(
        ovexport("run", write(values), "--out", tmp_path / "out"), 5
    )


KNOWN = {
    "smollm-1.7b-instruct-distill": (
        "LlamaConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        1_711_376_384,
    ),
    "qwen2.5-3b-instruct-nls": (
        "Qwen2Config",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        3_085_938_688,
    ),
}


def sparse_weights(config: PretrainedConfig, path: Path) -> None:
    """A safetensors file of a model's BF16 parameters, all zero: a header and a hole."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).named_parameters()
    header, end = {}, 0
    for name, parameter in parameters:
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", KNOWN)
def test_the_recipes_of_known_methods_can_be_planned(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the shapes of the models they name, with weights that take no room on the disk, and a disk that is large."""
    import transformers

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))

    kind, values, parameters = KNOWN[name]
    folder = tmp_path / "model"
    config = getattr(transformers, kind)(**values)
    config.save_pretrained(folder)
    sparse_weights(config, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, folder / file)
    done = ovexport(
        "plan", REPOSITORY / "pipelines" / f"{name}.toml", "--out", tmp_path / "out", "--json",
        "--set", f"model.id={folder}", "--set", "evaluate.encoder=offline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parameters"] == parameters
    assert {layer["group_size"] for layer in plan["layers"] if layer["mode"] == "int4_asym"} == {64}


def test_verify_takes_any_ir_and_exits_7_on_a_wrong_one(run_copy: RunFolder) -> None:
    done = ovexport("verify", run_copy.ir("bf16").path, "--json")
    assert json.loads(done.stdout)["summary"]["packed_int4"] == 0
    content = bytearray(run_copy.ir("int4").bin.read_bytes())
    content[len(content) // 2] ^= 1
    run_copy.ir("int4").bin.write_bytes(content)
    done = ovexport("verify", run_copy.ir("int4").path, "--checkpoint", run_copy.checkpoint.path, "--no-runtime")
    assert "verification failed" in refused(done, 7)
    assert "FAILED" in done.stdout


def test_bench_and_evaluate_take_any_two_irs(finished_run: RunFolder, tmp_path: Path) -> None:
    folders = [finished_run.ir(name).path for name in ("int4", "bf16")]
    short = ("--prompt-tokens", "8", "--output-tokens", "2", "--pairs", "5")
    done = ovexport("bench", folders[0], "--reference", folders[1], *short, "--json")
    assert "int4/bf16" in json.loads(done.stdout)["ratios"]
    done = ovexport(
        "evaluate", folders[0], "--reference", folders[1], "--data", STORIES, "--sequence-length", "32",
        "--sequences", "4", "--encoder", "offline", "--max-new-tokens", "4", "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"]["int4"]["kl_mean_nats"] > 0
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()


def test_a_fallback_is_said_on_the_way(values: dict, write, tmp_path: Path) -> None:
    values["compress"] |= {"group_size": 48, "fallback": "smaller_group"}
    done = ovexport("compress", write(values), "--out", tmp_path / "out")
    assert "and 11 more: group size 48 does not divide 64: group size 32" in done.stderr


def test_an_interrupted_command_exits_130_and_resumes(values: dict, write, tmp_path: Path) -> None:
    values["tune"] |= {"steps": 100_000, "save_every": 1}
    command = [sys.executable, "-m", "ovexport", "tune", str(write(values)), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    states = tmp_path / "out" / "tuning"
    for _ in range(1200):
        if any(states.glob("step-*/state.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted; --resume goes on" in stderr
    assert "Traceback" not in stderr
    assert "is saved; --resume goes on" in stderr
    assert max(json.loads(path.read_text())["step"] for path in states.glob("step-*/state.json")) >= 1
    again = ovexport("run", *command[4:], "--resume", "--until", "compress")
    assert "compress  (done before)" in again.stderr


def test_evaluate_never_writes_over_the_users_text(finished_run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(STORIES, tmp_path / "data" / "mine.jsonl")
    done = ovexport(
        "evaluate", finished_run.ir("int4").path, "--reference", finished_run.ir("bf16").path, "--quiet",
        "--data", tmp_path / "data" / "mine.jsonl", "--sequence-length", "32", "--sequences", "2",
        "--encoder", "offline", "--max-new-tokens", "2", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.jsonl"]


@pytest.mark.parametrize(
    ("override", "exit_code", "text"),
    [
        ("tune.seed=99999999999999999999", 2, "tune.seed"),
        ('compress.ignored=["*"]', 2, "leaves nothing to compress"),
        ("bench.device=NPU", 2, "OpenVINO lists CPU"),
        ("evaluate.encoder=/tmp", 4, "has no modules.json"),
    ],
)
def test_what_would_fail_late_is_told_by_plan(values: dict, write, tmp_path, override, exit_code, text) -> None:
    assert text in refused(ovexport("plan", write(values), "--out", tmp_path / "o", "--set", override), exit_code)


def test_report_is_rebuilt(run_copy: RunFolder) -> None:
    (run_copy.path / "report.html").unlink()
    assert ovexport("report", run_copy.path).returncode == 0
    assert (run_copy.path / "report.html").is_file()


def test_doctor_finds_this_installation_sound() -> None:
    done = ovexport("doctor", "--json")
    assert done.returncode == 0, done.stderr
    lines = {line["subject"]: line for line in json.loads(done.stdout)["lines"]}
    assert lines["openvino"]["fine"]
    assert "device CPU" in lines


def test_a_written_recipe_runs_as_it_is(finished_run: RunFolder) -> None:
    assert recipe.load(finished_run.recipe).tune.steps == 4
