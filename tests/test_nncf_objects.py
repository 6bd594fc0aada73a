"""Models that NNCF compressed, in memory, and checkpoints of ours as NNCF's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, tiny_values
from nncf_files import EXAMPLE_INPUT, RANK, Example, Packed, differences, nncf_codes, our_codes, stripped_codes

import ovexport
from ovexport import recipe
from ovexport.artifacts import IR, RunFolder
from ovexport.errors import ArtifactError, RecipeError, UnsupportedModelError
from ovexport.models.loading import load_model
from ovexport.openvino.graph import nibbles
from ovexport.pipeline import services
from ovexport.readers import read_checkpoint
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.verify import verify

pytestmark = pytest.mark.families


def compressed(model: Path, mode: str, form: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    import nncf

    return nncf.compress_weights(
        load_model(ModelSpec(id=str(model)), dtype=dtype),
        mode=nncf.CompressWeightsMode(mode),
        group_size=32,
        dataset=nncf.Dataset([EXAMPLE_INPUT]),
        compression_format=nncf.CompressionFormat[form],
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=RANK),
    )


def tune(model: Any, steps: int = 3) -> None:
    """A loop of somebody's own: next tokens of random text."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    model.requires_grad_(False)
    tuned = []
    for _, module in get_hook_storage(model).named_hooks():
        if hasattr(module, "lora_A"):
            module.enable_gradients()
            tuned += list(module.get_trainable_params().values())
    optimizer = torch.optim.SGD(tuned, lr=0.5)
    ids = torch.randint(2, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "form"), [("int4_asym", "FQ_LORA"), ("int4_sym", "FQ_LORA"), ("int4_asym", "FQ_LORA_NLS")]
)
def test_a_model_that_was_tuned_in_memory_keeps_the_codes_that_nncf_strips(
    tiny_model: Path, tmp_path: Path, mode: str, form: str
) -> None:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    model = compressed(tiny_model, mode, form, torch.float32)
    with torch.compiler.set_stance("force_eager"):
        tune(model)
    for _, module in get_hook_storage(model).named_hooks():
        if form == "FQ_LORA_NLS" and hasattr(module, "set_active_rank"):
            module.set_active_rank(RANK // 2)
    checkpoint = ovexport.adopt(model, tmp_path / "tuned")
    ranks = {layer.active_rank for layer in checkpoint.manifest.layers if layer.rank}
    assert ranks == ({RANK // 2} if form == "FQ_LORA_NLS" else {None})
    assert differences(our_codes(checkpoint, ModelSpec(id=str(tiny_model))), stripped_codes(model)) == {}


def test_an_adopted_model_converts_and_is_proven(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = ovexport.adopt(compressed(tiny_model, "int4_asym", "FQ_LORA"), tmp_path / "tuned")
    spec = ModelSpec(id=str(tiny_model))
    ir = services.convert_checkpoint(checkpoint.path, spec, ConvertSpec(), tmp_path / "int4", keep=tmp_path / "proof")
    assert verify(ir, checkpoint=checkpoint, base=IR(tmp_path / "proof" / "bf16")).passed


def test_a_model_that_can_not_be_adopted_is_refused_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    plain = load_model(ModelSpec(id=str(tiny_model)))
    with pytest.raises(UnsupportedModelError, match="has no quantizers of NNCF's that can be tuned"):
        ovexport.adopt(plain, tmp_path / "tuned")
    import nncf

    inference = nncf.compress_weights(
        load_model(ModelSpec(id=str(tiny_model))),
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=32,
        dataset=nncf.Dataset([EXAMPLE_INPUT]),
    )
    with pytest.raises(UnsupportedModelError, match="has no quantizers of NNCF's that can be tuned"):
        ovexport.adopt(inference, tmp_path / "tuned")
    model = compressed(tiny_model, "int4_asym", "FQ_LORA")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ArtifactError, match="holds something already; choose another out"):
        ovexport.adopt(model, tmp_path / "full")
    model.config._name_or_path = ""
    with pytest.raises(RecipeError, match="base: missing"):
        ovexport.adopt(model, tmp_path / "tuned")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2)
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight: changed in the model"):
        ovexport.adopt(model, tmp_path / "tuned", base=tiny_model)
    assert not (tmp_path / "tuned").exists()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, ovexport; print({'torch', 'openvino', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "set()"


def strip_packs(run: RunFolder) -> Packed:
    """What the stage strip packed, one to a byte."""
    tensors, packed = run.packed("int4").tensors, {}
    for layer in run.checkpoint.manifest.packed:
        encoding = layer.require_encoding()
        parts = {
            part: tensors[f"{layer.name}.{part}"]
            for part in ("codes", "scale", "zero_point")
            if f"{layer.name}.{part}" in tensors
        }
        for part in parts.keys() - {"scale"}:
            values = nibbles(parts[part].reshape(-1)) if encoding.bits == 4 else parts[part].reshape(-1)
            parts[part] = ((values ^ 8).astype(np.int16) - 8) if layer.mode == "int4_sym" else values.astype(np.int16)
        parts["scale"] = np.maximum(np.abs(parts["scale"]), 2.0**-23) * np.sign(
            parts["scale"]
        )  # the padding's row of 0
        packed[layer.name] = parts
    return packed


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"mode": "int4_asym"},
        {"mode": "int4_sym"},
        {"method": "qalora", "rank": 2},
        {"layers": [{"pattern": "*embed*", "mode": "int4_asym"}]},
    ],
    ids=str,
)
def test_a_tuned_checkpoint_of_ours_has_the_same_codes_in_nncf(tiny_model: Path, tmp_path: Path, keys: dict) -> None:
    values = tiny_values(tiny_model)
    values["compress"] |= keys
    values["tune"] |= {"learning_rate": 5e-3}
    run = services.run(recipe.parse(values, base=REPOSITORY, origin="out"), tmp_path / "run", until="strip")
    torch.save(ovexport.to_nncf(run.tuned.path, tiny_model), tmp_path / "nncf.pth")
    found = nncf_codes(tmp_path / "nncf.pth", ModelSpec(id=str(tiny_model)))
    assert differences(strip_packs(run), found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_a_checkpoint_that_nncf_tuned_goes_back(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "files").mkdir()
    spec = ModelSpec(id=str(tiny_model))
    file = Example(tiny_model, tmp_path / "files")(mode)
    checkpoint = read_checkpoint(file, spec, tmp_path / "tuned")
    torch.save(ovexport.to_nncf(checkpoint, tiny_model), tmp_path / "back.pth")
    assert differences(our_codes(checkpoint, spec), nncf_codes(tmp_path / "back.pth", spec)) == {}
