"""4-bit folders that are damaged, hostile or of another kind end in one line, and nothing of them is executed."""

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ovexport, refused
from packed_writers import KINDS, LAYER, Written, changed, configured, filled, with_tensor, without, write_packed

from ovexport.errors import OvexportError
from ovexport.models.loading import load_model, open_packed
from ovexport.pipeline.plan import plan_model
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.verify.packed_files import PackedFiles

pytestmark = pytest.mark.families


@pytest.fixture
def written(tiny_model: Path, tmp_path: Path) -> Callable[..., Written]:
    """Writes a folder of the tiny model."""

    def write(name: str = "GPTQ v1", **options: Any) -> Written:
        return write_packed(tiny_model, tmp_path / "packed", **(KINDS[name] | options))

    return write


DAMAGED: dict[str, tuple[str, Callable[..., None], int, str]] = {
    "another group size": (
        "GPTQ v1", configured(group_size=64), 4, r"has 4 scales .* config\.json has the group size 64"),
    "no scales": ("GPTQ v1", without("scales"), 4, "has no scales"),
    "no codes": ("AWQ", without("qweight"), 4, "belongs to no layer with qweight"),
    "no zero points": ("AWQ", without("qzeros"), 4, "has no qzeros"),
    "a group out of range": (
        "GPTQ act-order", with_tensor("g_idx", lambda index: index * 2), 4, r"names group \d+ of 4"),
    "a negative group": ("GPTQ act-order", with_tensor("g_idx", lambda index: index - 1), 4, "names group -1 of 4"),
    "groups of many sizes": ("GPTQ act-order", with_tensor("g_idx", lambda index: index // 2), 4, "of one size"),
    "no act-order where there has to be one": ("GPTQ act-order", without("g_idx"), 4, "has no g_idx"),
    "no order of a group": ("compressed-tensors act-order", without("weight_g_idx"), 4, "has no weight_g_idx"),
    "a scale of 0": ("AWQ", with_tensor("scales", filled(0.0)), 4, "has a scale of 0"),
    "a scale that is infinite": ("GPTQ v1", with_tensor("scales", filled(float("inf"))), 4, "not finite"),
    "a scale that float16 can't hold": (
        "compressed-tensors", with_tensor("weight_scale", filled(1e30)), 5, "float16 can't hold"),
    "a negative scale beside zero points": ("AWQ", with_tensor("scales", filled(-1.0)), 5, "negative scales"),
    "codes that are too few": ("GPTQ v1", with_tensor("qweight", lambda words: words[:-1]), 4, "codes of a matrix"),
    "codes in one dimension": ("GPTQ v1", with_tensor("qweight", lambda words: words[0]), 4, "not two dimensions"),
    "codes of another type": ("GPTQ v1", with_tensor("qweight", lambda words: words.float()), 4, "has to be int32"),
    "scales in one dimension": (
        "compressed-tensors", with_tensor("weight_scale", lambda scale: scale[0]), 4, "has to be"),
    "another shape": (
        "compressed-tensors", with_tensor("weight_shape", lambda shape: shape.flip(0)), 4, "by its weight_shape"),
    "8 bits": ("GPTQ v1", with_tensor("qweight", lambda words: words.repeat(2, 1)), 5, "has 8 bits"),
    "8 bits by its configuration": ("AWQ", configured(bits=8), 5, "has bits=8, and only 4 can be read"),
    "a kernel's layout": ("AWQ", configured(version="gemv"), 5, "has version='gemv'"),
    "marlin": ("GPTQ v1", configured(checkpoint_format="marlin"), 5, "has checkpoint_format='marlin'"),
    "version 2 under the name of 1": (
        "GPTQ v2 asymmetric", configured(checkpoint_format="gptq", sym=True), 4, "has a zero point of"),
    "quantized activations": ("AutoRound", configured(act_bits=8), 5, "has act_bits=8"),
    "an unknown packing": ("AutoRound", configured(packing_format="auto_round:mlx"), 5, "has packing_format="),
    "an unknown method": ("AWQ", configured(quant_method="hqq"), 5, "quant_method hqq"),
    "a quantized KV cache": ("compressed-tensors", configured(kv_cache_scheme={"num_bits": 8}), 5, "kv_cache_scheme"),
    "floats of 8 bits": ("compressed-tensors", configured(format="float-quantized"), 5, "has format='float-quantized'"),
    "a tensor that no layer has": (
        "AWQ", lambda tensors, _: tensors.update({f"{LAYER}.rotation": torch.ones(2)}), 5, "has no such tensor"),
    "a layer that the model has not": (
        "AWQ", lambda tensors, config: config.update(num_hidden_layers=1), 5, "which is no weight matrix of the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_is_damaged_or_of_another_kind_is_one_line_of_plan_and_of_convert(
    case: str, written, tmp_path: Path
) -> None:
    name, damage, exit_code, text = DAMAGED[case]
    folder = changed(written(name).path, damage)
    for command in (("plan", "--model", folder), ("convert", folder, "--out", tmp_path / "int4")):
        line = refused(ovexport(*command), exit_code)
        assert re.search(text, line), line
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_folder_with_pickles_alone_is_refused_and_nothing_is_executed(name: str, written, tmp_path: Path) -> None:
    folder = written().path
    (folder / "model.safetensors").unlink()

    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model.norm.weight": Hostile()}, folder / name)
    line = refused(ovexport("convert", folder, "--out", tmp_path / "int4"), 4)
    assert f"{name} is a pickle" in line
    assert not (tmp_path / "executed").exists()


def test_the_base_model_is_asked_for_where_it_is_needed_and_nowhere_else(written, tiny_model: Path, tmp_path) -> None:
    folder = written().path
    line = refused(ovexport("convert", folder, "--model", tiny_model, "--out", tmp_path / "int4"), 2)
    assert "a model of its own; leave --model out" in line
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "checkpoint.json").write_text("{}")
    assert "--model: missing" in refused(ovexport("convert", tmp_path / "tuned", "--out", tmp_path / "int4"), 2)


@pytest.mark.slow
def test_random_damage_ends_in_a_line_or_in_the_codes_that_the_proof_reads_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    generator = random.Random(0)
    outcomes: Counter[str] = Counter()
    for number in range(60):
        folder = tmp_path / str(number)
        name = generator.choice(list(KINDS))
        changed(write_packed(tiny_model, folder, **KINDS[name]).path, partial(damage_at_random, generator))
        model = ModelSpec(id=str(folder))
        planned = plan_model(model, CompressSpec(fallback="smaller_group"))
        try:
            load_model(model)
            packed = open_packed(model)
        except OvexportError:
            outcomes["refused"] += 1
            assert planned.problems
            continue
        outcomes["loaded"] += 1
        assert not planned.problems
        proof = PackedFiles(folder)
        for layer in packed.layers:
            own, grid = proof.layer(layer.removesuffix(".weight")), packed.grid(layer)
            assert np.array_equal(packed.codes(layer), own.codes)
            assert np.array_equal(grid.scale, own.scale)
            assert np.array_equal(grid.zero_point, own.zero_point)
    assert min(outcomes["refused"], outcomes["loaded"]) > 10


def damage_at_random(generator: random.Random, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Another value of the configuration or another tensor of a layer."""
    values = [None, 0, -1, 3, 8, 64, 1e30, "x", "gptq", "auto_round", [1], {"a": {"group_size": 2}}, True, False]
    settings = config["quantization_config"]
    if generator.random() < 0.5:
        settings[generator.choice([*settings, "extra_config", "act_bits", "backend", "sparsity_config"])] = (
            generator.choice(values)
        )
    name = generator.choice([name for name in tensors if LAYER in name])
    own = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: own.flatten()[: generator.randrange(own.numel())],
        lambda: own[None],
        lambda: own.to(generator.choice([torch.float32, torch.int64, torch.uint8, torch.bool])),
        lambda: torch.full_like(own, generator.choice([0, -1, 1, 100])),
        lambda: own.flip(0),
    ]
    tensors[name] = generator.choice(changes)()
