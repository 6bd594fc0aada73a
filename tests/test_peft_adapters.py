"""LoRA adapters that PEFT saved: read without PEFT, merged with a model, or left beside its INT4 IR."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from command_line import ovexport, refused
from conftest import COMMON, REPOSITORY, save_tiny_model, tiny_values
from packed_writers import KINDS, write_packed
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from ovexport import recipe
from ovexport.artifacts import IR, Checkpoint, PeftAdapter
from ovexport.errors import ArtifactError
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.models.peft_folder import load_backbone
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.openvino.runtime import ACCURATE, LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.pipeline import services
from ovexport.pipeline.inputs import model_files
from ovexport.recipe import ConvertSpec, ModelSpec

TOKENS = torch.tensor([[5, 17, 300, 42, 7, 99, 1200, 8]])
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = GPT2Config(
    vocab_size=2048,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=128,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=1,
)
SCALINGS = {
    "alpha over rank": PLAIN,
    "rank-stabilized": PLAIN | {"use_rslora": True},
    "patterns": PLAIN
    | {
        "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 3, "q_proj": 16},
    },
    "a regular expression of modules": PLAIN | {"target_modules": r".*\.layers\.1\..*(gate|up)_proj"},
    "some blocks": PLAIN | {"layers_to_transform": [1], "layers_pattern": "layers"},
}


def base_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(model: Path, folder: Path, **config: object) -> Path:
    """A LoRA of PEFT's that was tuned, as far as its weights tell."""
    torch.manual_seed(1)
    adapted = get_peft_model(base_of(model), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float().numpy()


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
    return save_tiny_model(
        tmp_path_factory.mktemp("tiny") / "gpt2", GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    )


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody may write to it."""
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "plain", **PLAIN)


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """The adapter, to be damaged."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.mark.parametrize("config", SCALINGS.values(), ids=SCALINGS)
def test_a_model_with_an_adapter_is_what_peft_merges(tiny_model: Path, tmp_path: Path, config: dict) -> None:
    folder = save_adapter(tiny_model, tmp_path / "adapter", **config)
    expected = PeftModel.from_pretrained(base_of(tiny_model), folder).merge_and_unload()
    merged = load_model(ModelSpec(id=str(tiny_model), adapter=str(folder), dtype="float32"))
    assert not np.array_equal(logits(base_of(tiny_model)), logits(merged))
    np.testing.assert_allclose(logits(merged), logits(expected), atol=2e-5)


def test_a_conv1d_is_adapted_as_peft_does(gpt2: Path, tmp_path: Path) -> None:
    folder = save_adapter(gpt2, tmp_path / "adapter", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = PeftModel.from_pretrained(base_of(gpt2), folder).merge_and_unload()
    merged = load_model(ModelSpec(id=str(gpt2), adapter=str(folder), dtype="float32"))
    np.testing.assert_allclose(logits(merged), logits(expected), atol=2e-5)


def test_a_merged_weight_is_rounded_to_the_models_type_once(tiny_model: Path, adapter: Path) -> None:
    own, merged = (load_model(ModelSpec(id=str(tiny_model), adapter=given)) for given in (None, str(adapter)))
    layer = PeftAdapter.read(adapter).layers[0]
    weights = [matrix_view(network, f"{layer.module}.weight").read() for network in (own, merged)]
    exact = weights[0].double().numpy() + layer.factor * layer.lora_B.astype(float) @ layer.lora_A.astype(float)
    assert weights[1].dtype == torch.bfloat16
    assert torch.equal(weights[1], torch.from_numpy(exact.astype(np.float32)).bfloat16())


@pytest.mark.parametrize("config", SCALINGS.values(), ids=SCALINGS)
def test_what_is_written_means_the_same_to_peft_with_every_factor_one(
    tiny_model: Path, tmp_path: Path, config: dict
) -> None:
    folder = save_adapter(tiny_model, tmp_path / "adapter", **config)
    PeftAdapter.read(folder).write(tmp_path / "written")
    expected, written = (
        PeftModel.from_pretrained(base_of(tiny_model), each) for each in (folder, tmp_path / "written")
    )
    scalings = {
        factor for module in written.modules() if isinstance(module, LoraLayer) for factor in module.scaling.values()
    }
    assert scalings == {1.0}
    np.testing.assert_allclose(logits(written), logits(expected), atol=2e-5)


def test_a_changed_adapter_is_another_model_to_the_stages(tiny_model: Path, copy: Path) -> None:
    values = tiny_values(tiny_model) | {"model": {"id": str(tiny_model), "adapter": "adapter"}}
    parsed = recipe.parse(values, base=copy.parent, origin="test")
    assert parsed.model.adapter == str(copy)
    before = model_files(parsed)
    edit(copy, lora_alpha=9)
    changed = {name for name, digest in model_files(parsed).items() if before[name] != digest}
    assert changed == {"adapter: adapter_config.json"}


class Intruder:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self._trace,)


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Intruder(folder.parent / "executed")))


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path)

    return damage


def keys(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **values)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILT = {
    "a pickle": (as_pickle, 4, "a pickle, which is never loaded"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), 4, "adapter_config.json: missing"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), 4, "can't be read"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), 4, "adapter_model.safetensors"),
    "an empty file": (tensors(dict.clear), 4, "holds no tensor"),
    "half a pair": (tensors(lambda held: held.pop(f"{LAYER}.lora_B.weight")), 4, "lora_A and no lora_B"),
    "another rank": (keys(r=3), 4, "has rank 4 in lora_A and 4 in lora_B, and adapter_config.json says 3"),
    "a rank of nothing": (keys(r=0), 4, "r: Input should be greater than or equal to 1"),
    "no scale": (keys(lora_alpha=float("nan")), 4, "lora_alpha: Input should be a finite number"),
    "a scale too large": (keys(lora_alpha=1e300), 4, "times 2.5e+299, lora_alpha over the rank, is more than float32"),
    "no number": (
        tensors(lambda held: held.update({f"{LAYER}.lora_A.weight": np.full((4, 64), np.nan, np.float32)})),
        4,
        "not finite",
    ),
    "codes": (
        tensors(lambda held: held.update({f"{LAYER}.lora_A.weight": np.ones((4, 64), np.int8)})),
        5,
        "no matrix of real numbers",
    ),
    "an embedding": (
        tensors(lambda held: held.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 8))})),
        5,
        "holds base_model.model.model.embed_tokens.lora_embedding_A",
    ),
    "another method": (keys(peft_type="IA3"), 5, "peft_type is IA3"),
    "DoRA": (keys(use_dora=True), 5, "use_dora=true is not read"),
    "QA-LoRA": (keys(use_qalora=True), 5, "a QA-LoRA adapter, which changes the z"),
    "whole modules": (keys(modules_to_save=["lm_head"]), 5, 'modules_to_save=["lm_head"] is not read'),
    "biases": (keys(bias="lora_only"), 5, "bias='lora_only'"),
    "another base": (keys(init_lora_weights="pissa"), 5, "init_lora_weights='pissa' changed the base model's weights"),
    "a key to come": (keys(use_tomorrow={"a": 1}), 5, 'use_tomorrow={"a": 1} is not read'),
    "a pattern without end": (keys(alpha_pattern={"(a*)*b": 1}), 5, "the pattern '(a*)*b' is not read"),
    "no pattern": (keys(rank_pattern={"(": 1}), 5, "the pattern '(' is not read"),
    "tied weights": (
        tensors(
            lambda held: held.update(
                {
                    "base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32),
                    "base_model.model.lm_head.lora_B.weight": np.ones((2048, 4), np.float32),
                }
            )
        ),
        5,
        "adapts lm_head, whose weights are the embedding's too",
    ),
}


@pytest.mark.parametrize(("damage", "code", "told"), SPOILT.values(), ids=SPOILT)
def test_a_folder_that_is_no_plain_lora_is_refused_in_one_line(
    tiny_model: Path, copy: Path, damage: Callable[[Path], None], code: int, told: str
) -> None:
    damage(copy)
    line = refused(ovexport("plan", "--model", tiny_model, "--adapter", copy), code)
    assert told in line
    assert not (copy.parent / "executed").exists()


def of_another_model(folder: Path, **sizes: int) -> Path:
    config = LlamaConfig(**COMMON | sizes, tie_word_embeddings=True)
    model = save_tiny_model(folder / "other", config)
    return save_adapter(model, folder / "of another", **PLAIN)


def test_an_adapter_of_a_deeper_model_names_its_layer_and_both_models(tiny_model: Path, tmp_path: Path) -> None:
    other = of_another_model(tmp_path, num_hidden_layers=3)
    line = refused(ovexport("convert", other, "--model", tiny_model, "--out", tmp_path / "out"), 4)
    assert f"3 of its 9 layers are not in {tiny_model}, such as model.layers.2.mlp.down_proj" in line
    assert f"give the model that it was trained on, {tmp_path / 'other'}" in line
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_wider_model_names_both_shapes(tiny_model: Path, tmp_path: Path) -> None:
    other = of_another_model(tmp_path, intermediate_size=192)
    line = refused(ovexport("convert", other, "--model", tiny_model, "--out", tmp_path / "out"), 4)
    assert f"model.layers.0.mlp.down_proj has 64 outputs and 192 inputs, and in {tiny_model} 64 and 128" in line


def test_a_run_refuses_an_adapter_before_any_work(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    edit(copy, r=3)
    values = tiny_values(tiny_model) | {"model": {"id": str(tiny_model), "adapter": str(copy)}}
    with pytest.raises(ArtifactError, match=r"adapter_config\.json says 3"):
        services.run(recipe.parse(values, base=REPOSITORY, origin="test"), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.run
def test_a_run_takes_the_merged_model_for_the_uncompressed_one(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_model) | {"model": {"id": str(tiny_model), "adapter": str(adapter)}}
    folder = services.run(recipe.parse(values, base=REPOSITORY, origin="test"), tmp_path / "run", until="verify")
    merged = load_model(ModelSpec(id=str(tiny_model), adapter=str(adapter))).float()
    traced = LogitsRunner(read_graph(folder.ir("bf16")), "bf16")(TOKENS.numpy())
    np.testing.assert_allclose(traced, logits(merged), atol=1e-4)
    assert folder.ir("int4").manifest.adapter == str(adapter)
    assert f"with the adapter {adapter}" in folder.checkpoint.manifest.model


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


def test_an_adapter_that_was_never_trained_is_refused(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    tensors(lambda held: held.update({name: 0 * value for name, value in held.items() if "lora_B" in name}))(copy)
    line = refused(ovexport("convert", copy, "--model", tiny_model, "--out", tmp_path / "out"), 5)
    assert "every lora_B times its factor is 0" in line
    assert not (tmp_path / "out").exists()


def test_ranks_go_with_no_adapter(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    line = refused(ovexport("convert", adapter, "--model", tiny_model, "--out", tmp_path / "out", "--ranks", "4"), 2)
    assert re.search(r"--ranks: .* is a folder with a LoRA adapter, which has its ranks in it", line)


def test_plan_takes_an_adapter_with_a_model_only(adapter: Path) -> None:
    recipe_file = REPOSITORY / "pipelines" / "demo.toml"
    assert "--adapter goes with --model" in refused(ovexport("plan", recipe_file, "--adapter", adapter), 2)


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
