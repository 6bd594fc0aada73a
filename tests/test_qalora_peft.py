"""QA-LoRA adapters as PEFT writes them, on a 4-bit base: absorbed without loss, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ovexport, refused
from conftest import REPOSITORY
from packed_writers import KINDS, Written, write_packed
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.numpy import load_file, save_file

from ovexport.artifacts import IR, Checkpoint
from ovexport.errors import RecipeError
from ovexport.models.loading import load_model
from ovexport.models.student import TunedModel
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline.services import convert_checkpoint
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.verify import verify
from ovexport.verify.behaviour import relative_errors, rounding_limit

pytestmark = pytest.mark.families

SHARED = REPOSITORY.parent / "shared" / "models"
TOKENS = np.random.default_rng(0).integers(2, 100, (2, 40)).astype(np.int64)
GROUP = 32


def adapted(base: Path) -> PeftModel:
    """The base model de-quantized, in float32, with PEFT's QA-LoRA, which PEFT offers for GPTQ's own layers alone."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        use_qalora=True,
        qalora_group_size=GROUP,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        base_model_name_or_path=str(base),
    )
    network: Any = load_model(ModelSpec(id=str(base), dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "resolve_lora_variant", lambda self, **_: QALoraLinearVariant())
        model = get_peft_model(network, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2e-2)
    return model.eval()


def logits(model: PeftModel) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy())


@pytest.fixture(params=["GPTQ v1", "GPTQ v1 asymmetric"])
def base(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Written:
    return write_packed(
        tiny_model, tmp_path / "gptq", **(KINDS[request.param] | {"group_size": GROUP, "negative": False})
    )


def converted(base: Written, folder: Path, tmp_path: Path, **options: Any) -> IR:
    spec = ModelSpec(id=str(base.path))
    return convert_checkpoint(folder, spec, ConvertSpec(), tmp_path / "int4", keep=tmp_path / "proof", **options)


def absorbed_as_peft_computes(base: Written, tmp_path: Path, tolerance: float) -> None:
    model = adapted(base.path)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    with model.disable_adapter():
        without = logits(model)
    ir = converted(base, tmp_path / "adapter", tmp_path)
    actual = LogitsRunner(read_graph(ir), "int4")(TOKENS)
    spread = np.ptp(expected)
    assert np.abs(expected - without).max() > 10 * tolerance * spread  # the adapter does something
    assert np.abs(actual - expected).max() < tolerance * spread
    kept = tmp_path / "proof"
    absorbed = TunedModel(Checkpoint(kept / "checkpoint"), ModelSpec(id=str(base.path), dtype="float32"))
    limit = rounding_limit(weights(read_graph(ir)))
    for row, own in zip(TOKENS, actual, strict=True):
        assert relative_errors(own, absorbed.begin(row[None])[0]).max() < limit
    by_name = {weight.name: weight for weight in weights(read_graph(ir))}
    for module, truth in base.layers.items():
        weight = by_name[f"{module}.weight"]
        signed = 8 if weight.element_type == "i4" else 0
        assert np.array_equal(unpacked(weight.codes).reshape(truth.codes.shape).astype(int) + signed, truth.codes)
        assert np.array_equal(unpacked(weight.scale).reshape(truth.scale.shape), truth.scale)
    report = verify(ir, checkpoint=Checkpoint(kept / "checkpoint"), base=IR(kept / "bf16"))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.summary.code_mismatches == report.summary.scale_mismatches == 0
    assert report.summary.adapter_nodes == 0


def test_an_adapter_of_pefts_is_absorbed_and_the_base_keeps_its_codes(base: Written, tmp_path: Path) -> None:
    # what is left between the two is the rounding of the zero points to float16
    absorbed_as_peft_computes(base, tmp_path, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wikilm-16m", "babyllama-105"])
def test_an_adapter_of_a_real_model_is_absorbed(name: str, tmp_path: Path) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not here")
    gptq = write_packed(SHARED / name, tmp_path / "gptq", **(KINDS["GPTQ v1 asymmetric"] | {"group_size": GROUP}))
    absorbed_as_peft_computes(gptq, tmp_path, 2e-3)


def test_with_zero_points_as_codes_the_ir_has_the_bytes_of_any_other(base: Written, tmp_path: Path, caplog) -> None:
    adapted(base.path).save_pretrained(tmp_path / "adapter")
    ir = converted(base, tmp_path / "adapter", tmp_path, zero_points="codes")
    assert {weight.element_type for weight in weights(read_graph(ir)) if weight.packed} <= {"u4", "i4"}
    assert all(
        weight.zero_point.get_element_type().to_string() == "u4"
        for weight in weights(read_graph(ir))
        if weight.zero_point is not None
    )
    assert "of what the adapter adds" in caplog.text
    kept = tmp_path / "proof"
    assert verify(ir, checkpoint=Checkpoint(kept / "checkpoint"), base=IR(kept / "bf16")).passed


def test_zero_points_are_asked_for_where_an_adapter_goes_into_them_only(base: Written, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="goes with a QA-LoRA adapter"):
        convert_checkpoint(base.path, None, ConvertSpec(), tmp_path / "int4", zero_points="codes")


def settings(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = load_file(folder / "adapter_model.safetensors")
        change(values)
        save_file(values, folder / "adapter_model.safetensors")

    return apply


UP_A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (settings(qalora_group_size=16), 4, "adapts a layer of 64 x 64, and the base model's is 64 x 128"),
        (tensors(lambda values: values.update({UP_A: values[UP_A][:, :1].copy()})), 4, "adapts a layer of"),
        (tensors(lambda values: values.update({UP_A: values[UP_A][:2].copy()})), 4, "has rank 2 in lora_A"),
        (tensors(lambda values: values.pop(UP_A)), 4, "has a lora_B and no lora_A"),
        (
            tensors(
                lambda values: values.update(
                    {name.replace("layers.1", "layers.9"): values.pop(name) for name in list(values)}
                )
            ),
            4,
            "layers.9",
        ),
        (settings(use_dora=True), 5, "use_dora"),
    ],
    ids=["group size", "width", "rank", "half", "layer", "dora"],
)
def test_an_adapter_that_does_not_suit_the_base_is_one_line(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], None], code: int, message: str
) -> None:
    gptq = write_packed(tiny_model, tmp_path / "gptq", **(KINDS["GPTQ v1"] | {"group_size": GROUP}))
    adapted(gptq.path).save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter")
    assert message in refused(
        ovexport("convert", tmp_path / "adapter", "--model", gptq.path, "--out", tmp_path / "o"), code
    )


def test_groups_that_are_smaller_than_the_bases_can_not_be_absorbed(tiny_model: Path, tmp_path: Path) -> None:
    gptq = write_packed(tiny_model, tmp_path / "gptq", **(KINDS["GPTQ v1"] | {"group_size": 2 * GROUP}))
    adapted(gptq.path).save_pretrained(tmp_path / "adapter")
    line = refused(ovexport("convert", tmp_path / "adapter", "--model", gptq.path, "--out", tmp_path / "o"), 5)
    assert f"qalora_group_size={GROUP}, and the base model has a zero point for every {2 * GROUP} inputs" in line


def test_negative_scales_can_not_have_zero_points(tiny_model: Path, tmp_path: Path) -> None:
    gptq = write_packed(tiny_model, tmp_path / "gptq", **(KINDS["GPTQ v1"] | {"group_size": GROUP}))
    adapted(gptq.path).save_pretrained(tmp_path / "adapter")
    line = refused(ovexport("convert", tmp_path / "adapter", "--model", gptq.path, "--out", tmp_path / "o"), 5)
    assert "has negative scales, which a format with zero points can't have" in line


def test_a_base_without_codes_and_an_adapter_in_a_recipe_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    gptq = write_packed(tiny_model, tmp_path / "gptq", **(KINDS["GPTQ v1"] | {"group_size": GROUP}))
    adapted(gptq.path).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(gptq.path)
    line = refused(ovexport("convert", tmp_path / "adapter", "--model", tiny_model, "--out", tmp_path / "o"), 5)
    assert "holds no 4-bit codes" in line
    line = refused(ovexport("plan", "--model", tiny_model, "--adapter", tmp_path / "adapter"), 5)
    assert "a QA-LoRA adapter" in line


def test_a_plain_adapter_is_not_merged_with_codes(tiny_model: Path, tmp_path: Path) -> None:
    gptq = write_packed(tiny_model, tmp_path / "gptq", **(KINDS["GPTQ v1"] | {"group_size": GROUP}))
    network: Any = load_model(ModelSpec(id=str(tiny_model), dtype="float32"))
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    line = refused(ovexport("plan", "--model", gptq.path, "--adapter", tmp_path / "adapter"), 5)
    assert "its weights are 4-bit codes, which merging" in line
