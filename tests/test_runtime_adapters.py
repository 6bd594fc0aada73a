"""LoRA adapters beside an INT4 IR: what openvino-genai says with them, and the proof of the two."""

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from command_line import ovexport, refused
from conftest import COMMON, save_tiny_model
from packed_writers import KINDS, write_packed
from peft import LoraConfig, PeftModel, get_peft_model
from peft_folders import GPT2, PLAIN, TOKENS, logits, save_adapter
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from ovexport.artifacts import IR, Checkpoint
from ovexport.models.loading import load_model
from ovexport.models.peft_folder import load_backbone
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.openvino.runtime import ACCURATE, LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.pipeline import services
from ovexport.recipe import ConvertSpec, ModelSpec


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody may write to it."""
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "plain", **PLAIN)


@pytest.fixture(scope="module")
def product(tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `out` and `kept`, of the tiny model with the adapter beside it; nobody may write to it."""
    folder = tmp_path_factory.mktemp("product")
    done = ovexport(
        "convert", adapter, "--model", tiny_model, "--out", folder / "out", "--keep", folder / "kept", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == str(folder / "out" / "adapter" / "adapter_model.safetensors")
    return folder


def continued(model: torch.nn.Module, count: int) -> list[int]:
    tokens = TOKENS
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, TOKENS.shape[1] :].tolist()


def generated(ir: Path, adapter: Path | None, count: int) -> list[int]:
    added = {} if adapter is None else {"adapters": openvino_genai.AdapterConfig(openvino_genai.Adapter(str(adapter)))}
    pipeline = openvino_genai.LLMPipeline(str(ir), "CPU", ATTENTION_BACKEND="SDPA", **ACCURATE, **added)
    config = openvino_genai.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True)
    config.do_sample = False
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(TOKENS.numpy()), ov.Tensor(np.ones_like(TOKENS.numpy())))
    return list(pipeline.generate(inputs, config).tokens[0])


@pytest.mark.cli
def test_openvino_genai_with_the_adapter_says_what_peft_says_with_the_adapter_on_the_codes(
    tiny_model: Path, adapter: Path, product: Path
) -> None:
    network = load_backbone(Checkpoint(product / "kept" / "checkpoint"), ModelSpec(id=str(tiny_model)))
    alone, count = continued(network, 24), 24
    expected = continued(PeftModel.from_pretrained(network, adapter), count)
    written = continued(PeftModel.from_pretrained(network, product / "out" / "adapter"), count)
    assert alone != expected == written
    assert generated(product / "out", None, count) == alone
    assert generated(product / "out", product / "out" / "adapter" / "adapter_model.safetensors", count) == expected


@pytest.mark.cli
def test_the_codes_beside_an_adapter_are_proven_as_ever(product: Path) -> None:
    kept = product / "kept"
    done = ovexport("verify", product / "out", "--checkpoint", kept / "checkpoint", "--base", kept / "bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 codes, 0 scales and 0 zero points differ" in done.stdout


@pytest.mark.cli
def test_an_adapter_that_was_changed_after_convert_is_found(product: Path, tmp_path: Path) -> None:
    ir = IR(Path(shutil.copytree(product / "out", tmp_path / "ir")))
    data = bytearray(ir.adapter_tensors.read_bytes())
    data[-1] ^= 1
    ir.adapter_tensors.write_bytes(data)
    done = ovexport("verify", ir.path, "--json")
    failed = [check for check in json.loads(done.stdout)["checks"] if not check["passed"]]
    assert (done.returncode, [check["detail"] for check in failed]) == (7, ["adapter/adapter_model.safetensors"])


def test_an_adapter_that_was_never_trained_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    untrained = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    values = load_file(untrained / "adapter_model.safetensors")
    zeroed = {name: 0 * value if "lora_B" in name else value for name, value in values.items()}
    save_file(zeroed, untrained / "adapter_model.safetensors")
    line = refused(ovexport("convert", untrained, "--model", tiny_model, "--out", tmp_path / "out"), 5)
    assert "every lora_B times its factor is 0" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.families
def test_the_codes_of_a_model_in_4_bits_stay_under_an_adapter_that_was_trained_on_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = write_packed(tiny_model, tmp_path / "gptq", **KINDS["GPTQ v1 asymmetric"], group_size=32)
    network = load_model(ModelSpec(id=str(base.path), dtype="float32"))
    adapted = get_peft_model(network, LoraConfig(**PLAIN))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    spec, kept = ModelSpec(id=str(base.path)), tmp_path / "kept"
    product = services.convert_checkpoint(tmp_path / "adapter", spec, ConvertSpec(), tmp_path / "int4", keep=kept)
    held = {one.name: unpacked(one.codes) for one in weights(read_graph(product)) if one.bits == 4}
    assert len(held) == len(base.layers) == 14
    for name, truth in base.layers.items():
        assert np.array_equal(held[f"{name}.weight"].reshape(truth.codes.shape), truth.codes)
    actual = LogitsRunner(running_graph(product), "int4")(TOKENS.numpy())
    np.testing.assert_allclose(actual, logits(adapted), atol=1e-4)


ELSEWHERE = {
    "Conv1D": (GPT2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "a head of its own": (
        LlamaConfig(**COMMON, tie_word_embeddings=False, initializer_range=0.1),
        {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    ),
}


@pytest.mark.families
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_the_runtime_adds_an_adapter_wherever_its_layer_is(kind: str, tmp_path: Path) -> None:
    config, lora = ELSEWHERE[kind]
    model = save_tiny_model(tmp_path / "model", config)
    folder = save_adapter(model, tmp_path / "adapter", **lora)
    spec, kept = ModelSpec(id=str(model)), tmp_path / "kept"
    product = services.convert_checkpoint(folder, spec, ConvertSpec(), tmp_path / "int4", keep=kept)
    backbone = load_backbone(Checkpoint(kept / "checkpoint"), spec)
    together = PeftModel.from_pretrained(backbone, product.path / "adapter")
    actual = LogitsRunner(running_graph(product), "int4")(TOKENS.numpy())
    np.testing.assert_allclose(actual, logits(together), atol=2e-4)
    assert generated(product.path, product.adapter_tensors, 12) == continued(together, 12)
