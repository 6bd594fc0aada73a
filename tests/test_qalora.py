"""QA-LoRA: an adapter of group means, absorbed into zero points."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, tiny_values
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.errors import RecipeError
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.pipeline import services
from ovexport.recipe import CompressSpec
from ovexport.reports import VerificationReport
from ovexport.storage.records import read_record
from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.verify.arithmetic import ExpectedCodes, expected_grid
from ovexport.weights.adapters import QaLoraQuantizer
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.policy import RecipePolicy
from ovexport.weights.quantizer import FakeQuantizer

MODES = ["int4_asym", "int4_asym_f16zp"]
OUTPUTS, INPUTS, GROUP, RANK = 24, 32, 8, 3


def layer_format(mode: str, factor: float = 0.75) -> LayerFormat:
    return LayerFormat(
        name="w",
        kind="linear",
        mode=mode,
        out_features=OUTPUTS,
        in_features=INPUTS,
        group_size=GROUP,
        rank=RANK,
        adapter="qalora",
        adapter_factor=factor,
    )


def tuned(mode: str, weight: torch.Tensor, scale: float = 0.02) -> QaLoraQuantizer:
    generator = torch.Generator().manual_seed(0)
    quantizer = QaLoraQuantizer(layer_format(mode))
    quantizer.initialize(weight, generator)
    with torch.no_grad():
        quantizer.lora_B.copy_(torch.randn(OUTPUTS, RANK, generator=generator) * scale)
    return quantizer


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("mode", MODES)
def test_codes_and_scales_stay_the_bases_and_the_zero_points_alone_move(mode: str, weight: torch.Tensor) -> None:
    base = FakeQuantizer(layer_format(mode).model_copy(update={"adapter": "lora", "rank": 0}))
    base.initialize(weight, torch.Generator())
    before, after = base.quantize(weight), tuned(mode, weight, scale=0.2).quantize(weight)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scale, after.scale)
    assert before.zero_point is not None
    assert after.zero_point is not None
    assert before.zero_point.dtype == after.zero_point.dtype
    assert (before.zero_point != after.zero_point).float().mean() > 0.3


def test_the_float16_form_computes_what_the_base_and_the_adapter_compute(weight: torch.Tensor) -> None:
    quantizer = tuned("int4_asym_f16zp", weight)
    inputs = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(2))
    base = FakeQuantizer(layer_format("int4_asym").model_copy(update={"adapter": "lora", "rank": 0}))
    base.initialize(weight, torch.Generator())
    together = inputs @ base(weight).T + quantizer.adapter_output(inputs)
    absorbed = inputs @ quantizer(weight).T
    apart = (inputs @ base(weight).T - absorbed).abs().max()
    assert apart > 1e-2  # the adapter does something
    # float16 keeps 11 bits of a zero point of 8 to 16
    assert (together - absorbed).abs().max() < 2e-3 * apart + 2**-8 * float(quantizer.grid()[0].max()) * INPUTS


def test_the_adapter_is_the_one_of_peft(weight: torch.Tensor) -> None:
    alpha = 6.0
    quantizer = tuned("int4_asym_f16zp", weight)
    groups = INPUTS // GROUP
    quantizer.layer = layer_format("int4_asym_f16zp", alpha / RANK * groups / GROUP)
    module: Any = nn.Linear(INPUTS, OUTPUTS, bias=False)
    down, up = nn.Linear(groups, RANK, bias=False), nn.Linear(RANK, OUTPUTS, bias=False)
    down.weight, up.weight = quantizer.lora_A, quantizer.lora_B
    module.lora_A, module.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
    module.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
    module.scaling, module.qalora_group_size = {"default": alpha / RANK}, {"default": GROUP}
    inputs = torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(2))
    expected = QALoraLinearVariant.forward(module, "default", inputs, torch.zeros(2, 7, OUTPUTS))
    assert torch.allclose(quantizer.adapter_output(inputs), expected, rtol=1e-5, atol=1e-6)


def test_the_recipes_factor_is_pefts(weight: torch.Tensor) -> None:
    matrix = WeightMatrix(name="w.weight", kind="linear", out_features=OUTPUTS, in_features=INPUTS)
    spec = CompressSpec(group_size=GROUP, method="qalora", rank=2, alpha=6.0)
    layer = RecipePolicy(spec, (matrix,))(matrix)
    assert (layer.adapter, layer.rank, layer.adapter_factor) == ("qalora", 2, 6.0 / 2 * (INPUTS // GROUP) / GROUP)


def test_a_rank_above_the_number_of_groups_is_clamped_and_said() -> None:
    matrix = WeightMatrix(name="w.weight", kind="linear", out_features=OUTPUTS, in_features=INPUTS)
    layer = RecipePolicy(CompressSpec(group_size=GROUP, method="qalora", rank=64), (matrix,))(matrix)
    assert layer.rank == INPUTS // GROUP
    assert layer.note == "rank 64 clamped to 4"


@pytest.mark.parametrize("mode", MODES)
def test_the_proof_computes_the_same_zero_points_and_codes(mode: str, weight: torch.Tensor, tmp_path: Path) -> None:
    quantizer = tuned(mode, weight, scale=0.2)
    write_tensors({f"w.{key}": value.numpy() for key, value in quantizer.stored().items()}, tmp_path / "a.safetensors")
    adapters = TensorFile(tmp_path / "a.safetensors")
    codes, grid = quantizer.quantize(weight), expected_grid(quantizer.layer, adapters)
    assert codes.zero_point is not None
    assert np.array_equal(codes.scale[..., 0].numpy(), grid.scale)
    assert grid.zero_point is not None
    assert codes.zero_point.numpy().dtype == grid.zero_point.dtype
    assert np.array_equal(codes.zero_point[..., 0].numpy(), grid.zero_point)
    rows = ExpectedCodes(quantizer.layer, adapters).rows(weight.numpy().copy(), slice(0, OUTPUTS))
    assert np.array_equal(codes.codes.numpy(), rows)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_adapter_with_rounding_passed_straight_through(
    mode: str, weight: torch.Tensor
) -> None:
    quantizer = tuned(mode, weight, scale=0.2).double()
    incoming = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    down, up = (one.detach().clone().requires_grad_() for one in (quantizer.lora_A, quantizer.lora_B))
    step, zero_point = (value.double() for value in quantizer.grid())
    shifted = zero_point[..., 0] - 0.75 * (up @ down) / step[..., 0]
    if mode == "int4_asym":
        shifted = shifted.clamp(0, 15)
    whole = -(shifted * step[..., 0])[..., None].expand(OUTPUTS, INPUTS // GROUP, GROUP).reshape(OUTPUTS, INPUTS)
    whole.backward(incoming)
    found = quantizer.gradients(weight, incoming)
    assert set(found) == {"lora_A", "lora_B"}
    assert torch.allclose(found["lora_A"], down.grad)
    assert torch.allclose(found["lora_B"], up.grad)


@pytest.fixture(scope="module", params=MODES)
def qalora_run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    values = tiny_values(tiny_model)
    values["compress"] |= {"group_size": 16, "rank": 4, "alpha": 8.0, "method": "qalora", "mode": request.param}
    values["tune"] |= {"learning_rate": 0.003, "steps": 12, "validate_every": 4}
    parsed = recipe.parse(values, base=REPOSITORY, origin="qalora")
    return services.run(parsed, tmp_path_factory.mktemp("qalora") / request.param, until="verify")


@pytest.mark.run
def test_a_tuned_run_is_proven_and_ships_the_base_codes(qalora_run: RunFolder) -> None:
    report = read_record(qalora_run.path / "verification.json", VerificationReport)
    assert report.passed
    summary = report.summary
    assert (summary.code_mismatches, summary.scale_mismatches, summary.zero_point_mismatches) == (0, 0, 0)
    assert summary.adapter_nodes == 0
    assert qalora_run.checkpoint.manifest.steps
    plain, product = (
        {one.name: one for one in weights(read_graph(qalora_run.ir(name))) if one.bits == 4}
        for name in ("plain", "int4")
    )
    moved = 0
    for name, one in product.items():
        assert np.array_equal(unpacked(one.codes), unpacked(plain[name].codes))
        assert np.array_equal(unpacked(one.scale), unpacked(plain[name].scale))
        moved += int((unpacked(one.zero_point) != unpacked(plain[name].zero_point)).sum())
    assert moved


@pytest.mark.run
def test_a_checker_written_from_the_manual_alone_agrees(
    qalora_run: RunFolder, tiny_model: Path, tmp_path: Path
) -> None:
    checker: list[str | Path] = [sys.executable, "-W", "error", Path(__file__).parent / "independent_checker.py"]
    arguments = [qalora_run.ir("int4").path, qalora_run.checkpoint.path, tiny_model]
    done = subprocess.run([*checker, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    changed = shutil.copytree(qalora_run.checkpoint.path, tmp_path / "changed")
    manifest = json.loads((changed / "checkpoint.json").read_text())
    for layer in manifest["layers"]:
        layer["adapter_factor"] *= 1.5
    (changed / "checkpoint.json").write_text(json.dumps(manifest))
    done = subprocess.run([*checker, arguments[0], changed, tiny_model], capture_output=True, text=True, check=False)
    assert done.returncode == 1


@pytest.mark.run
def test_a_killed_tuning_with_dropout_goes_on_to_the_same_adapters(tiny_model: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_model)
    values["compress"] |= {"group_size": 16, "rank": 4, "method": "qalora"}
    values["tune"] |= {"adapter_dropout": 0.2, "gradient_checkpointing": True, "save_every": 1}
    parsed = recipe.parse(values, base=REPOSITORY, origin="qalora")
    whole = services.run(parsed, tmp_path / "whole", until="tune").tuned.files

    def stop(progress: object) -> None:
        if getattr(progress, "task", "") == "tune" and getattr(progress, "done", 0) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        services.run(parsed, tmp_path / "killed", until="tune", listener=stop)
    assert services.run(parsed, tmp_path / "killed", until="tune", resume=True).tuned.files == whole


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"method": "qalora", "mode": "int4_sym"}, 'mode="int4_sym" has no zero points'),
        ({"mode": "int4_asym_f16zp"}, 'goes with method = "qalora"'),
        ({"alpha": 4.0}, 'alpha=4 goes with method = "qalora"'),
        ({"method": "qalora", "format": "fq_lora_nls", "rank_space": [4, 2]}, 'is of method = "fq_lora"'),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tiny_model: Path, compress: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.parse(tiny_values(tiny_model) | {"compress": compress}, base=REPOSITORY, origin="bad")


def test_dropout_without_such_an_adapter_is_refused(tiny_model: Path) -> None:
    values = tiny_values(tiny_model)
    values["tune"] |= {"adapter_dropout": 0.1}
    with pytest.raises(RecipeError, match="adapter_dropout goes with"):
        recipe.parse(values, base=REPOSITORY, origin="bad")
