"""Models whose weights are 4-bit codes already keep each code, whoever packed them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ovexport
from conftest import COMMON, REPOSITORY, STORIES, save_tiny_model, tiny_values
from packed_writers import KINDS, LAYER, Written, changed, gptq, round_to_nearest, with_tensor, write_packed
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, Qwen2Config

from ovexport import recipe
from ovexport.artifacts import IR, Checkpoint
from ovexport.models.loading import load_model, open_packed
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline import services
from ovexport.pipeline.services import convert_checkpoint
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.verify import verify
from ovexport.verify.packed_files import PackedFiles

pytestmark = pytest.mark.families

WIKILM = REPOSITORY.parent / "shared" / "models" / "wikilm-16m"
WHOLE_WAY = ["GPTQ v1", "GPTQ act-order", "AWQ", "AutoRound", "compressed-tensors asymmetric"]


@pytest.fixture
def written(tiny_model: Path, tmp_path: Path) -> Callable[..., Written]:
    """Writes a folder of the tiny model."""

    def write(name: str = "GPTQ v1", **options: Any) -> Written:
        return write_packed(tiny_model, tmp_path / "packed", **(KINDS[name] | options))

    return write


@pytest.mark.parametrize("name", KINDS)
def test_codes_scales_and_zero_points_are_read_as_they_were_written(name: str, written) -> None:
    folder = written(name)
    packed = open_packed(ModelSpec(id=str(folder.path)))
    assert packed is not None
    assert {layer.removesuffix(".weight") for layer in packed.layers} == set(folder.layers)
    proof = PackedFiles(folder.path)
    for module, truth in folder.layers.items():
        grid, own = packed.grid(f"{module}.weight"), proof.layer(module)
        assert np.array_equal(packed.codes(f"{module}.weight"), truth.codes)
        assert np.array_equal(grid.scale, truth.scale)
        assert np.array_equal(grid.zero_point, truth.zero_point)
        assert (grid.order is not None) == KINDS[name].get("act_order", False)
        for mine, expected in (
            (own.codes, truth.codes),
            (own.scale, truth.scale),
            (own.zero_point, truth.zero_point),
            (own.group_of_input, truth.group),
        ):
            assert np.array_equal(mine, expected)


@pytest.mark.parametrize("name", WHOLE_WAY)
def test_a_folder_converts_with_its_own_codes_and_the_logits_of_the_dequantized_model(
    name: str, written, tmp_path: Path
) -> None:
    converted_as_written(written(name, left=["layers.1.mlp.up_proj"]), tmp_path, floats=2)


@pytest.mark.slow
@pytest.mark.skipif(not WIKILM.is_dir(), reason=f"{WIKILM} is not here")
@pytest.mark.parametrize("name", WHOLE_WAY)
def test_a_model_of_16_million_parameters_converts_with_its_own_codes(name: str, tmp_path: Path) -> None:
    converted_as_written(write_packed(WIKILM, tmp_path / "packed", **KINDS[name]), tmp_path)


def converted_as_written(folder: Written, tmp_path: Path, floats: int = 1) -> None:
    """Convert a folder and compare the product with what was written, with the proof's help and without.

    Args:
        floats: matrices that stay in floating point, the head that is the embedding among them.
    """
    ir = convert_checkpoint(folder.path, None, ConvertSpec(), tmp_path / "int4", keep=tmp_path / "proof")
    by_name = {weight.name: weight for weight in weights(read_graph(ir))}
    for module, truth in folder.layers.items():
        weight = by_name[f"{module}.weight"]
        order = np.argsort(truth.group, kind="stable")
        symmetric = bool((truth.zero_point == 8).all())
        codes = unpacked(weight.codes).reshape(truth.codes.shape).astype(int) + (8 if symmetric else 0)
        assert np.array_equal(codes, truth.codes[:, order])
        assert np.array_equal(unpacked(weight.scale).reshape(truth.scale.shape), truth.scale)
        if not symmetric:
            assert np.array_equal(unpacked(weight.zero_point).reshape(truth.scale.shape), truth.zero_point)

    tokens = np.random.default_rng(0).integers(2, 2000, (2, 48)).astype(np.int64)
    expected = folder.logits(tokens)
    actual = LogitsRunner(read_graph(ir), "int4")(tokens)
    assert np.abs(actual - expected).max() < 1e-5 * np.ptp(expected)

    against_file = verify(ir, packed=folder.path)
    against_kept = verify(
        ir, checkpoint=Checkpoint(tmp_path / "proof" / "checkpoint"), base=IR(tmp_path / "proof" / "bf16")
    )
    for report in (against_file, against_kept):
        assert report.passed, [check for check in report.checks if not check.passed]
        assert report.summary.code_mismatches == 0
        assert report.summary.packed_int4 == len(folder.layers)
    assert len([check for check in against_file.checks if check.name == "codes as in the file"]) == len(folder.layers)
    assert against_kept.summary.float == floats


def test_a_model_in_shards_and_its_plan_are_read(written, tmp_path: Path) -> None:
    folder = written("GPTQ act-order", left=["layers.1.mlp.up_proj"])
    tensors = load_file(folder.path / "model.safetensors")
    (folder.path / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, own in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in own}, folder.path / f"part-{number}.safetensors")
        index |= dict.fromkeys(own, f"part-{number}.safetensors")
    (folder.path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    planned = ovexport("plan", "--model", folder.path)

    assert planned.returncode == 0, planned.stderr
    assert "GPTQ, 4 bits, group size 32, symmetric, act-order: 13 of 14 layers" in planned.stdout
    assert set(PackedFiles(folder.path).layers) == set(folder.layers)
    assert load_model(ModelSpec(id=str(folder.path))).dtype == torch.bfloat16


def test_tuning_starts_from_the_codes_of_the_folder(written, tmp_path: Path) -> None:
    folder = written("compressed-tensors act-order", left=["layers.1.mlp.up_proj"])
    for split, count in (("train", 24), ("validation", 12), ("test", 6)):
        rows = [
            {"query": f"In the {split} story {n} is", "choices": ["a cat", "two frogs"], "gold": 0}
            for n in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = tiny_values(folder.path)
    sections["compress"] |= {"mode": "int4_sym", "group_size": 64}
    sections["data"] = {"sequence_length": 32, "validation_sequences": 1, "test_sequences": 2}
    sections["task"] = {"name": "mine", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    sections["tune"] |= {"objective": "task", "steps": 6, "learning_rate": 2e-2, "scale_learning_rate": 1e-2}
    run = services.run(recipe.parse(sections, base=tmp_path, origin="packed"), tmp_path / "run", until="verify")

    assert verify(run.ir("plain"), packed=folder.path).passed
    layers = {layer.name.removesuffix(".weight"): layer for layer in run.checkpoint.manifest.layers}
    assert {layers[name].mode for name in folder.layers} == {"int4_asym"}
    assert {(layers[name].group_size, layers[name].rank) for name in folder.layers} == {(32, 8)}
    assert layers["model.layers.1.mlp.up_proj"].group_size == 64
    assert run.checkpoint.manifest.steps > 0
    tuned = verify(run.ir("int4"), packed=folder.path)
    assert not tuned.passed
    assert tuned.summary.code_mismatches > 0
    assert tuned.summary.scale_mismatches > 0


def test_a_teacher_that_is_the_student_is_told_of_before_tuning(written, tmp_path: Path) -> None:
    sections = tiny_values(written().path)
    planned = services.plan(recipe.parse(sections, base=REPOSITORY, origin="packed"), tmp_path / "run")
    assert planned.exit_code == 0
    assert any("the teacher is the 4-bit model itself" in warning for warning in planned.warnings)


@pytest.mark.parametrize("key", ["awq", "scale_estimation"])
def test_a_starting_point_with_other_codes_is_refused_before_any_work(key: str, written, tmp_path: Path) -> None:
    sections = tiny_values(written().path)
    sections["compress"][key] = True
    planned = services.plan(recipe.parse(sections, base=REPOSITORY, origin="packed"), tmp_path / "run")
    assert planned.exit_code == 2
    assert any(f"compress.{key}=True: the model's weights are 4-bit codes already" in one for one in planned.problems)


@pytest.mark.parametrize("name", ["GPTQ act-order", "AWQ"])
def test_a_model_with_biases_and_a_packed_head_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", Qwen2Config(**COMMON, tie_word_embeddings=False))
    packed = ("_proj.weight", "lm_head.weight")
    folder = write_packed(model, tmp_path / "packed", packed=packed, **KINDS[name])
    converted_as_written(folder, tmp_path, floats=0)
    sections = tiny_values(folder.path)
    sections["tune"]["steps"] = 2 if name == "AWQ" else 0  # tuning computes logits from the head's weight alone
    run = services.run(recipe.parse(sections, base=REPOSITORY, origin="packed"), tmp_path / "run", until="verify")
    assert verify(run.ir("plain"), packed=folder.path).passed


def test_the_transposed_layers_of_gpt2_and_a_head_are_read(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=2048, n_embd=64, n_layer=1, n_head=4, n_positions=64, tie_word_embeddings=False)
    model = save_tiny_model(tmp_path / "model", config)
    expected = load_model(ModelSpec(id=str(model)))
    folder = tmp_path / "packed"
    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors")
    truths = {}
    for name in ("transformer.h.0.mlp.c_fc", "lm_head"):
        weight = state.pop(f"{name}.weight")
        oriented = weight.T if name != "lm_head" else weight
        truths[name] = round_to_nearest(oriented, 32, torch.float16, symmetric=False, negative=True, shuffled=None)
        state |= {f"{name}.{key}": value.contiguous() for key, value in gptq(truths[name], version=1).items()}
    save_file(state, folder / "model.safetensors")
    changed(folder, lambda _, values: values.update(quantization_config={"quant_method": "gptq"} | BITS))

    loaded = load_model(ModelSpec(id=str(folder)))

    for name, truth in truths.items():
        weight = loaded.get_submodule(name).weight
        assert weight.shape == expected.get_submodule(name).weight.shape
        assert torch.equal(weight if name == "lm_head" else weight.T, truth.weight.to(torch.bfloat16))


BITS = {"bits": 4, "group_size": 32}


def test_one_other_code_scale_zero_point_or_order_of_the_file_is_found_and_named(written, tmp_path: Path) -> None:
    folder = written("compressed-tensors act-order").path
    ir = convert_checkpoint(folder, None, ConvertSpec(), tmp_path / "int4")
    one_off = {
        "codes as in the file": with_tensor(
            "weight_packed", lambda words: words ^ (torch.arange(128) == 3).int()[: words.shape[1]]
        ),
        "scales as in the file": with_tensor("weight_scale", lambda scale: scale * 2),
        "zero points as in the file": with_tensor("weight_zero_point", lambda words: words ^ 1),
        "inputs in the file's order": with_tensor("weight_g_idx", lambda index: index.roll(1)),
    }
    for check, damage in one_off.items():
        other = changed(Path(shutil.copytree(folder, tmp_path / check)), damage)
        failed = [one for one in verify(ir, packed=other, runtime=False).checks if not one.passed]
        assert check in {one.name for one in failed}
        assert {one.subject for one in failed} == {f"{LAYER}.weight"}


def test_scales_that_float16_has_to_round_are_told_of(written) -> None:
    folder = changed(
        written("compressed-tensors").path,
        lambda tensors, _: tensors.update(
            {name: value.float() * 1.0001 for name, value in tensors.items() if name.endswith("_scale")}
        ),
    )
    packed = open_packed(ModelSpec(id=str(folder)))
    assert re.search(r"scales rounded to float16 by at most [0-9.]+e-0[45] of themselves", packed.describe())


def test_a_folder_that_auto_round_wrote_converts_with_its_own_codes(tiny_model: Path, tmp_path: Path) -> None:
    auto_round = pytest.importorskip("auto_round")
    rows = [json.loads(line) for line in STORIES.read_text().splitlines()[:64]]
    text = [
        {"text": " ".join(str(value) for row in rows[begin : begin + 8] for value in row.values())}
        for begin in range(0, 64, 8)
    ]
    (tmp_path / "text.json").write_text(json.dumps(text))
    tuned = auto_round.AutoRound(
        str(tiny_model), scheme="W4A16", group_size=32, iters=2, nsamples=4, seqlen=32, batch_size=2,
        dataset=str(tmp_path / "text.json"), device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    tuned.quantize_and_save(str(tmp_path / "written"), format="auto_round")
    folder = next((tmp_path / "written").rglob("config.json")).parent
    ir = convert_checkpoint(folder, None, ConvertSpec(), tmp_path / "int4")
    report = verify(ir, packed=folder)
    assert report.passed
    assert report.summary.packed_int4 == 14
    assert report.summary.code_mismatches == 0
