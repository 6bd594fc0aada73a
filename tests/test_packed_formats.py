"""Models whose weights are 4-bit codes already keep each code, whoever packed them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from packed_writers import Written, write_packed

from ovexport.artifacts import IR, Checkpoint
from ovexport.models.loading import open_packed
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline.services import convert_checkpoint
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.verify import verify
from ovexport.verify.packed_files import PackedFiles

pytestmark = pytest.mark.families

WIKILM = REPOSITORY.parent / "shared" / "models" / "wikilm-16m"
KINDS: dict[str, dict[str, Any]] = {
    "GPTQ v1": {"kind": "gptq gptq"},
    "GPTQ v1 asymmetric": {"kind": "gptq gptq", "symmetric": False},
    "GPTQ v2 asymmetric": {"kind": "gptq gptq_v2", "symmetric": False, "group_size": -1},
    "GPTQ act-order": {"kind": "gptq gptq", "act_order": True},
    "AWQ": {"kind": "awq", "symmetric": False},
    "AutoRound": {"kind": "auto-round auto_round:auto_gptq"},
    "AutoRound plain": {"kind": "auto-round auto_round", "symmetric": False},
    "AutoRound as AWQ": {"kind": "auto-round auto_round:auto_awq", "symmetric": False},
    "compressed-tensors": {"kind": "compressed-tensors", "scale_dtype": torch.bfloat16, "group_size": 16},
    "compressed-tensors asymmetric": {"kind": "compressed-tensors", "symmetric": False},
    "compressed-tensors act-order": {"kind": "compressed-tensors", "symmetric": False, "act_order": True},
    "compressed-tensors per channel": {"kind": "compressed-tensors", "group_size": -1},
}
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
    converted_as_written(written(name, left=["layers.1.mlp.up_proj"]), tmp_path, left=1)


@pytest.mark.slow
@pytest.mark.skipif(not WIKILM.is_dir(), reason=f"{WIKILM} is not here")
@pytest.mark.parametrize("name", WHOLE_WAY)
def test_a_model_of_16_million_parameters_converts_with_its_own_codes(name: str, tmp_path: Path) -> None:
    converted_as_written(write_packed(WIKILM, tmp_path / "packed", **KINDS[name]), tmp_path)


def converted_as_written(folder: Written, tmp_path: Path, left: int = 0) -> None:
    """Convert a folder and compare the product with what was written, with the proof's help and without."""
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
    assert against_kept.summary.float == left + 1
