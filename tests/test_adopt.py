"""Checkpoint files that NNCF itself wrote, as its examples do, become checkpoints of ours with NNCF's codes."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, save_tiny_model
from test_cli import ovexport, refused
from transformers import GPT2Config, LlamaConfig

from ovexport.adopt import adopt
from ovexport.adopt.file import dense_tensors, read_file
from ovexport.artifacts import Checkpoint
from ovexport.errors import ArtifactError, RecipeError, UnsupportedModelError
from ovexport.model import load_model, matrix, parameter_of_hook
from ovexport.pipeline import convert_checkpoint
from ovexport.quantization import load_quantizer
from ovexport.recipe import ConvertSpec, ModelSpec

RANK = 8
EXAMPLE_INPUT = {"input_ids": torch.arange(16).reshape(1, 16)}
FORMATS = ["FQ_LORA", "FQ_LORA_NLS"]


@dataclass(frozen=True)
class Example:
    """Makes an example's checkpoint file of the tiny model: compressed by NNCF, "tuned" at random, saved."""

    base: Path
    folder: Path

    def __call__(self, mode: str = "int4_asym", form: str = "FQ_LORA", *, model_state: bool = False, **options) -> Path:
        import nncf
        import nncf.torch
        from nncf.torch.function_hook.wrapper import get_hook_storage

        model = nncf.compress_weights(
            load_model(ModelSpec(id=str(self.base)), dtype=torch.bfloat16),
            mode=nncf.CompressWeightsMode(mode),
            group_size=32,
            dataset=nncf.Dataset([EXAMPLE_INPUT]),
            compression_format=nncf.CompressionFormat[form],
            advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=RANK),
            **options,
        )
        generator = torch.Generator().manual_seed(0)
        for module in get_hook_storage(model).modules():
            if not hasattr(module, "lora_A"):
                continue
            for name, parameter in module.get_trainable_params().items():
                noise = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    if name.startswith("lora"):
                        parameter.copy_(noise * (0.01 if name == "lora_B" else 0.5))
                    else:
                        parameter.mul_(1 + 0.02 * noise)
        hook_storage = get_hook_storage(model)
        content = {"nncf_state_dict": hook_storage.state_dict(), "nncf_config": nncf.torch.get_config(model)}
        if model_state:
            content["model_state"] = model.state_dict()
        path = self.folder / f"{mode}-{form}-{len(list(self.folder.iterdir()))}.pth"
        torch.save(content, path)
        return path


@pytest.fixture(scope="module")
def example(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(tiny_model, tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def lora(example: Example) -> Path:
    return example()


@pytest.fixture(scope="module")
def elastic(example: Example) -> Path:
    return example(form="FQ_LORA_NLS")


@pytest.fixture
def spec(tiny_model: Path) -> ModelSpec:
    return ModelSpec(id=str(tiny_model))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Path, Callable[[dict], None]], Path]:
    """A copy of a file with an edit of its content."""

    def edit(path: Path, change: Callable[[dict], None]) -> Path:
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, tmp_path / "edited.pth")
        return tmp_path / "edited.pth"

    return edit


def our_codes(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, np.ndarray]:
    """The codes of each packed layer, (output, input), unsigned."""
    network = load_model(spec)
    codes = {}
    for layer in checkpoint.manifest.packed:
        weight = matrix(network, layer.name, transposed=False)
        if layer.name in checkpoint.manifest.changed:
            weight = torch.from_numpy(np.array(checkpoint.weights.require(layer.name)))
        quantized = load_quantizer(layer, checkpoint.adapters).quantize(weight)
        assert quantized.digest() == checkpoint.manifest.digests[layer.name]
        codes[layer.name] = quantized.codes.numpy().astype(np.int32) + (8 if layer.mode == "int4_sym" else 0)
    return codes


def nncf_codes(path: Path, spec: ModelSpec, ranks: list[int] | None) -> dict[str, np.ndarray]:
    """The same by NNCF: the example's load_checkpoint and export, up to its packed weights."""
    import nncf
    import nncf.torch
    from nncf.torch.function_hook.wrapper import get_hook_storage

    content = torch.load(path, weights_only=False)
    network = load_model(spec, dtype=torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    model = nncf.torch.load_from_config(network, content["nncf_config"])
    if "model_state" in content:
        model.load_state_dict(content["model_state"])
    get_hook_storage(model).load_state_dict(content["nncf_state_dict"])
    for name, module in get_hook_storage(model).named_hooks():
        if ranks and hasattr(module, "set_active_rank"):
            module.set_active_rank(ranks[int(name.split("layers:")[1].split(":")[0])])
    with torch.compiler.set_stance("force_eager"):
        model = nncf.strip(model, do_copy=False, strip_format=nncf.StripFormat.DQ, example_input=EXAMPLE_INPUT)
    codes = {}
    for hook, module in get_hook_storage(model).named_hooks():
        name = parameter_of_hook(hook)
        stored = model.get_parameter(name).detach().contiguous().view(torch.uint8).reshape(-1)
        if "INT4" in type(module).__name__:
            stored = torch.stack((stored & 15, stored >> 4), dim=-1).reshape(-1)
        codes[name] = stored.numpy().astype(np.int32).reshape(shapes[name])
    return codes


def differing(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean(left != right))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
@pytest.mark.parametrize("form", FORMATS)
def test_codes_are_those_of_nncfs_own_export(example: Example, spec: ModelSpec, tmp_path: Path, mode, form) -> None:
    path = example(mode, form)
    ranks = [6, 3] if form == "FQ_LORA_NLS" else None
    checkpoint = adopt(path, spec, tmp_path / "checkpoint", ranks=ranks)
    ours, theirs = our_codes(checkpoint, spec), nncf_codes(path, spec, ranks)
    assert ours.keys() == theirs.keys()
    assert {layer.mode for layer in checkpoint.manifest.layers} == {mode, "int8_asym"}
    for layer in checkpoint.manifest.layers:
        assert np.abs(ours[layer.name] - theirs[layer.name]).max() <= 1, layer.name
    # NNCF sums B·A in bfloat16 and rounds with a float32 scale that ships as float16: a value between two codes may
    # fall to the other side, the more often the finer the codes.
    linear = [layer.name for layer in checkpoint.manifest.layers if layer.mode == mode]
    joined = [np.concatenate([codes[name].reshape(-1) for name in linear]) for codes in (ours, theirs)]
    assert differing(*joined) < 0.002
    assert differing(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"]) < 0.01


@pytest.mark.slow
def test_the_largest_rank_gives_other_codes_than_the_chosen_ones(elastic, spec, tmp_path, caplog) -> None:
    ranks = [4, 2]
    whole = our_codes(adopt(elastic, spec, tmp_path / "whole"), spec)
    assert "does not tell which ranks were chosen" in caplog.text
    chosen = our_codes(adopt(elastic, spec, tmp_path / "chosen", ranks=ranks), spec)
    theirs = nncf_codes(elastic, spec, ranks)
    for name in (name for name in theirs if "layers" in name):
        assert differing(chosen[name], theirs[name]) < 0.005, name
        assert differing(whole[name], theirs[name]) > 0.05, name


def test_ranks_are_told_by_block_or_once_for_all(elastic: Path, spec: ModelSpec, tmp_path: Path) -> None:
    by_block = adopt(elastic, spec, tmp_path / "by-block", ranks=[6, 3]).manifest
    assert {(".1." in layer.name, layer.rank, layer.active_rank) for layer in by_block.layers if layer.rank} == {
        (False, RANK, 6),
        (True, RANK, 3),
    }
    for_all = adopt(elastic, spec, tmp_path / "for-all", ranks=[5]).manifest
    assert {layer.used_rank for layer in for_all.layers if layer.rank} == {5}


@pytest.mark.parametrize(
    ("form", "ranks", "text"),
    [
        ("FQ_LORA", [4], "no FQ_LORA_NLS checkpoint"),
        ("FQ_LORA_NLS", [4, 4, 4], "3 numbers, and"),
        ("FQ_LORA_NLS", [], "0 numbers, and"),
        ("FQ_LORA_NLS", [9], "9 for model.layers.0."),
        ("FQ_LORA_NLS", [4, 0], "0 for model.layers.1."),
    ],
)
def test_wrong_ranks(lora: Path, elastic: Path, spec: ModelSpec, tmp_path: Path, form, ranks, text) -> None:
    with pytest.raises(RecipeError, match=text):
        adopt(lora if form == "FQ_LORA" else elastic, spec, tmp_path / "checkpoint", ranks=ranks)


@pytest.mark.slow
def test_the_way_to_a_verified_ir(elastic: Path, spec: ModelSpec, tmp_path: Path) -> None:
    product, proof = tmp_path / "int4", tmp_path / "proof"
    ends = ("--model", spec.id, "--out", product, "--keep", proof)
    done = ovexport("convert", elastic, *ends, "--ranks", "6 3", "--quiet")
    assert done.returncode == 0, done.stderr
    proven = ovexport("verify", product, "--checkpoint", proof / "checkpoint", "--json")
    assert proven.returncode == 0, proven.stderr
    assert json.loads(proven.stdout)["summary"]["code_mismatches"] == 0
    adopt(elastic, spec, tmp_path / "whole")
    whole = ovexport("verify", product, "--checkpoint", tmp_path / "whole", "--base", proof / "bf16", "--no-runtime")
    assert "verification failed" in refused(whole, 7)
    inside = ovexport("convert", elastic, "--model", spec.id, "--out", tmp_path / "a", "--keep", tmp_path / "a" / "b")
    assert "lie in each other" in refused(inside, 2)
    assert "holds something already; choose another --keep" in refused(
        ovexport("convert", elastic, "--model", spec.id, "--out", tmp_path / "other", "--keep", proof), 4
    )


@pytest.mark.slow
def test_ranks_on_the_command_line(elastic: Path, tiny_model: Path, tmp_path: Path) -> None:
    ends = ("--model", tiny_model, "--out", tmp_path / "out")
    assert "not whole numbers" in refused(ovexport("convert", elastic, *ends, "--ranks", "6,many"), 2)
    assert "3 numbers" in refused(ovexport("convert", elastic, *ends, "--ranks", "6,3, 2"), 2)
    assert not (tmp_path / "out").exists()


def test_ranks_are_not_for_a_checkpoint_of_ours(lora: Path, spec: ModelSpec, tmp_path: Path) -> None:
    ours = adopt(lora, spec, tmp_path / "checkpoint")
    with pytest.raises(RecipeError, match="has its ranks in its manifest"):
        convert_checkpoint(ours, spec, ConvertSpec(), tmp_path / "out", ranks=[4])


def test_layers_without_a_quantizer_stay_as_they_are(example: Example, spec: ModelSpec, tmp_path: Path) -> None:
    import nncf

    path = example(ignored_scope=nncf.IgnoredScope(patterns=[".*up_proj/.*"]))
    checkpoint = adopt(path, spec, tmp_path / "checkpoint")
    floats = [layer.name for layer in checkpoint.manifest.layers if layer.mode == "float"]
    assert floats == [f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1)]
    assert not checkpoint.manifest.changed


@pytest.mark.slow
def test_int8_sym_is_what_the_fake_quantizer_computes(example: Example, spec: ModelSpec, tmp_path: Path) -> None:
    """NNCF's export of it has another scale than its own fake quantizer, with which the layers behind were tuned."""
    import nncf
    import nncf.torch
    from nncf.torch.function_hook.wrapper import get_hook_storage

    path = example("int4_sym", backup_mode=nncf.BackupMode.INT8_SYM)
    name, content = "model.embed_tokens.weight", torch.load(path, weights_only=False)
    model = nncf.torch.load_from_config(load_model(spec, dtype=torch.float32), content["nncf_config"])
    get_hook_storage(model).load_state_dict(content["nncf_state_dict"])
    quantizer = next(module for hook, module in get_hook_storage(model).named_hooks() if "embed_tokens" in hook)
    with torch.no_grad():
        expected = quantizer.quantize(model.get_parameter(name)) / (quantizer.scale.abs() / 127)
    codes = our_codes(adopt(path, spec, tmp_path / "checkpoint"), spec)[name]
    assert differing(codes, expected.round().int().numpy() + 128) < 0.01


@pytest.fixture(scope="module")
def awq(example: Example) -> Path:
    """AWQ moves factors from one layer's weights to another's, so the file has to hold the weights too."""
    return example(model_state=True, awq=True)


@pytest.mark.slow
def test_weights_in_the_file_take_the_place_of_the_base_models(awq: Path, spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = adopt(awq, spec, tmp_path / "checkpoint")
    changed = {f"model.layers.{block}.mlp.{name}_proj.weight" for block in (0, 1) for name in ("up", "down")}
    assert set(checkpoint.manifest.changed) == changed
    ours, theirs = our_codes(checkpoint, spec), nncf_codes(awq, spec, None)
    for name in changed:
        assert differing(ours[name], theirs[name]) < 0.005, name


def test_without_them_the_codes_are_others(awq: Path, spec: ModelSpec, edited, tmp_path: Path) -> None:
    path = edited(awq, lambda content: content.pop("model_state"))
    left, right = (adopt(one, spec, tmp_path / one.stem).manifest for one in (awq, path))
    assert {name for name in left.digests if left.digests[name] != right.digests[name]} == set(left.changed)


def test_unchanged_weights_in_the_file_are_the_base_models(example: Example, spec: ModelSpec, tmp_path: Path) -> None:
    assert adopt(example(model_state=True), spec, tmp_path / "checkpoint").manifest.changed == ()


def test_changed_norms_are_refused(awq: Path, spec: ModelSpec, edited, tmp_path: Path) -> None:
    path = edited(awq, lambda content: content["model_state"]["model.norm.weight"].mul_(2))
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight: changed in"):
        adopt(path, spec, tmp_path / "checkpoint")


class Touch:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_does_something_is_refused_and_not_run(lora, spec, tmp_path, save) -> None:
    path, touched = tmp_path / "hostile.pth", tmp_path / "touched"
    save(torch.load(lora, weights_only=False) | {"model_state": Touch(touched)}, path)
    with pytest.raises(ArtifactError, match=r"hostile\.pth") as caught:
        adopt(path, spec, tmp_path / "checkpoint")
    assert "weights_only" not in str(caught.value)
    assert not touched.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert touched.exists(), "the file is not hostile, the test shows nothing"


def test_a_damaged_file(lora: Path, spec: ModelSpec, tmp_path: Path) -> None:
    path, content = tmp_path / "damaged.pth", bytearray(lora.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"damaged\.pth: damaged, the checksum of its"):
        adopt(path, spec, tmp_path / "checkpoint")


def test_a_truncated_file(lora: Path, spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    path.write_bytes(lora.read_bytes()[:20_000])
    with pytest.raises(ArtifactError, match=r"short\.pth: not a checkpoint file"):
        adopt(path, spec, tmp_path / "checkpoint")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all"])
def test_a_file_that_is_no_checkpoint(spec: ModelSpec, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.pth"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"text\.pth: not a checkpoint file"):
        adopt(path, spec, tmp_path / "checkpoint")


Q_PROJ = "post_hooks.model:layers:0:self_attn:q_proj:weight__0.0"


def command(content: dict) -> dict:
    return next(one for one in content["nncf_config"]["compression_state"] if Q_PROJ in one["hook_names_in_model"])


EDITS: dict[str, tuple[Callable[[dict], object], str]] = {
    "a plain state dict": (lambda content: content.pop("nncf_config"), "holds nncf_state_dict, not"),
    "another part": (lambda content: content.update(optimizer={}), "optimizer"),
    "an unknown class": (lambda content: command(content).update(module_cls_name="SQMultiply"), "SQMultiply"),
    "a class from elsewhere": (lambda content: command(content).update(module_path="os"), r"os\.AsymmetricLora"),
    "an activation": (lambda content: command(content).update(hook_names_in_model=["pre_hooks.x__0.0"]), "no weight"),
    "no configuration": (lambda content: command(content).update(module_config={}), "q_proj"),
    "no quantizer": (lambda content: content["nncf_config"].update(compression_state=[]), "compression_state"),
    "8 bits": (lambda content: command(content)["module_config"]["qspec"].update(num_bits=8), "_num_bits"),
    "no scale": (lambda content: content["nncf_state_dict"].pop(f"{Q_PROJ}.input_low"), "no input_low"),
    "a strange tensor": (lambda content: content["nncf_state_dict"].update(x=torch.ones(1)), "holds a tensor x"),
    "no tensor": (lambda content: content["nncf_state_dict"].update(x=1), "no dense tensor"),
    "switched off": (lambda content: content["nncf_state_dict"][f"{Q_PROJ}.enabled"].zero_(), "enabled"),
    "not finite": (lambda content: content["nncf_state_dict"][f"{Q_PROJ}.lora_A"].fill_(torch.nan), "not finite"),
    "another shape": (
        lambda content: content["nncf_state_dict"].update({f"{Q_PROJ}.lora_B": torch.zeros(64, 4)}),
        "lora_B",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_not_as_nncf_writes_it_is_named(lora: Path, spec: ModelSpec, edited, tmp_path: Path, edit: str) -> None:
    change, text = EDITS[edit]
    with pytest.raises(ArtifactError, match=text) as caught:
        adopt(edited(lora, change), spec, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()


def test_a_model_whose_weights_are_stored_the_other_way_round(example: Example, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    config = GPT2Config(
        vocab_size=2048, n_embd=64, n_layer=1, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    )
    base = save_tiny_model(tmp_path / "gpt2", config)
    with pytest.raises(UnsupportedModelError, match="a Conv1D, whose quantizer can't be adopted"):
        adopt(Example(base, example.folder)(), ModelSpec(id=str(base)), tmp_path / "checkpoint")


@pytest.mark.parametrize("change", [{"hidden_size": 96}, {"num_hidden_layers": 1}])
def test_another_base_model(lora: Path, tmp_path: Path, change: dict) -> None:
    (tmp_path / "other").mkdir()
    other = save_tiny_model(tmp_path / "other", LlamaConfig(**COMMON | {"tie_word_embeddings": True} | change))
    with pytest.raises(ArtifactError, match="give the base model that was tuned"):
        adopt(lora, ModelSpec(id=str(other)), tmp_path / "checkpoint")


def test_another_base_model_of_the_same_shapes(lora: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The file does not tell which weights were tuned, but INT8 ranges, which nobody tunes, are of the weights."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"INT8 ranges of model\.embed_tokens\.weight are not those"):
        adopt(lora, ModelSpec(id=str(other)), tmp_path / "checkpoint")


def test_a_tensor_that_is_larger_than_its_storage_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.pth"
    wide = torch.zeros(1).expand(10**9, 10**9)
    torch.save({"nncf_state_dict": {"wide": wide}, "nncf_config": {}}, path)
    content = read_file(path)
    with pytest.raises(ArtifactError, match=r"wide has the shape \(1000000000, 1000000000\) and 4 bytes"):
        dense_tensors(path, "nncf_state_dict", content["nncf_state_dict"])


def test_an_archive_with_compressed_parts_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "packed.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(ArtifactError, match="compressed part archive/data/0"):
        read_file(path)
