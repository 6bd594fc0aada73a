"""Checkpoint files that NNCF itself wrote, as its examples do, become checkpoints of ours with NNCF's codes."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ovexport, refused
from conftest import COMMON, save_tiny_model
from nncf.common.quantization.structs import QuantizationScheme
from nncf_files import RANK, Example, differences, nncf_codes, nncf_model, our_codes, recomputed, stripped
from transformers import GPT2Config, LlamaConfig

from ovexport.artifacts import IR, Checkpoint
from ovexport.errors import ArtifactError, RecipeError, UnsupportedModelError
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline.services import convert_checkpoint
from ovexport.readers import adopt
from ovexport.readers.nncf_file import dense_tensors, read_file
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.verify.nncf_arithmetic import NncfCodes
from ovexport.verify.proof import verify
from ovexport.weights.nncf_quantizer import NncfQuantizer

pytestmark = pytest.mark.families


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


CASES = {
    "ASYM": ({}, None, {"int4_asym", "int8_asym"}),
    "SYM": ({"mode": "int4_sym"}, None, {"int4_sym", "int8_asym"}),
    "NLS": ({"form": "FQ_LORA_NLS"}, [6, 3], {"int4_asym", "int8_asym"}),
    "NLS SYM": ({"mode": "int4_sym", "form": "FQ_LORA_NLS"}, [6, 3], {"int4_sym", "int8_asym"}),
    "AWQ": ({"model_state": True, "awq": True}, None, {"int4_asym", "int8_asym"}),
    "AWQ SYM": ({"mode": "int4_sym", "model_state": True, "awq": True}, None, {"int4_sym", "int8_asym"}),
    "INT8_SYM": ({"backup_mode": "int8_sym"}, None, {"int4_asym", "int8_sym"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_code_scale_and_zero_point_is_that_of_nncfs_own_export(
    example: Example, spec: ModelSpec, tmp_path: Path, case: str
) -> None:
    options, ranks, modes = CASES[case]
    path = example(**options)
    checkpoint = adopt(path, spec, tmp_path / "checkpoint", ranks=ranks)
    assert {layer.mode for layer in checkpoint.manifest.layers} == modes
    assert differences(our_codes(checkpoint, spec), nncf_codes(path, spec, ranks)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_odd_ranges_give_nncfs_codes_too(example: Example, spec: ModelSpec, edited, tmp_path: Path, mode: str) -> None:
    """Ranges that are negative, zero, below the smallest step or without zero in them, and adapters that cancel out."""
    generator = torch.Generator().manual_seed(1)

    def spoil(content: dict) -> None:
        for name, value in content["nncf_state_dict"].items():
            part = name.rpartition(".")[2]
            tuned = value.numel() > 1 and "embed_tokens" not in name
            if tuned and part in ("scale", "input_range", "input_low"):
                factors = torch.tensor([1, -1, 0, 1e-3, 1e-7, 1e-12, 30, 1, 1, 1])
                value.mul_(factors[torch.randint(len(factors), value.shape, generator=generator)])
            if tuned and part == "lora_A":
                value[1::2] = value[::2]
            if tuned and part == "lora_B":
                value[:, 1::2] = -value[:, ::2]

    path = edited(example(mode), spoil)
    checkpoint = adopt(path, spec, tmp_path / "checkpoint")
    assert differences(our_codes(checkpoint, spec), nncf_codes(path, spec)) == {}


@pytest.mark.slow
def test_the_largest_rank_gives_other_codes_than_the_chosen_ones(elastic, spec, tmp_path, caplog) -> None:
    ranks = [4, 2]
    whole = our_codes(adopt(elastic, spec, tmp_path / "whole"), spec)
    assert "does not tell which ranks were chosen" in caplog.text
    chosen = our_codes(adopt(elastic, spec, tmp_path / "chosen", ranks=ranks), spec)
    theirs = nncf_codes(elastic, spec, ranks)
    assert differences(chosen, theirs) == {}
    for name in (name for name in theirs if "layers" in name):
        assert np.mean(whole[name]["codes"] != theirs[name]["codes"]) > 0.05, name


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
    with pytest.raises(RecipeError, match="which has its ranks in it; leave --ranks out"):
        convert_checkpoint(ours.path, spec, ConvertSpec(), tmp_path / "out", ranks=[4])


def test_layers_without_a_quantizer_stay_as_they_are(example: Example, spec: ModelSpec, tmp_path: Path) -> None:
    import nncf

    path = example(ignored_scope=nncf.IgnoredScope(patterns=[".*up_proj/.*"]))
    checkpoint = adopt(path, spec, tmp_path / "checkpoint")
    floats = [layer.name for layer in checkpoint.manifest.layers if layer.mode == "float"]
    assert floats == [f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1)]
    assert not checkpoint.manifest.replaced_weights


@pytest.mark.slow
def test_the_product_is_as_near_to_the_tuned_model_as_nncfs_own(example: Example, spec: ModelSpec, tmp_path) -> None:
    """INT8_SYM is tuned with scale / 127 and ships with scale / 128, and the embedding is the output embedding too."""
    from optimum.exporters.openvino.convert import export_from_model

    path = example("int4_sym", backup_mode="int8_sym")
    product = convert_checkpoint(path, spec, ConvertSpec(), tmp_path / "int4", keep=tmp_path / "proof")
    checkpoint, base = Checkpoint(tmp_path / "proof" / "checkpoint"), IR(tmp_path / "proof" / "bf16")
    report = verify(product, checkpoint=checkpoint, base=base)
    assert report.passed
    assert {row.element_type for row in report.layers} == {"i4", "i8"}
    assert report.summary.runtime_packed_linears == report.summary.linear_layers == 15
    checker: list[str | Path] = [sys.executable, "-W", "error", Path(__file__).parent / "independent_checker.py"]
    assert "15 layers, 0 mismatches" in subprocess.check_output(
        [*checker, product.path, checkpoint.path, spec.id], text=True
    )

    tokens = np.random.default_rng(0).integers(2, 2048, (4, 64))
    model = nncf_model(path, spec)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        tuned = model(torch.from_numpy(tokens)).logits.numpy()
    export_from_model(stripped(model), tmp_path / "documented", device="cpu")
    ours, theirs = (
        LogitsRunner(read_graph(ir), ir.path.name)(tokens).copy() for ir in (product, IR(tmp_path / "documented"))
    )
    assert np.abs(ours - theirs).max() < 1e-5 * np.ptp(tuned)
    assert np.abs(ours - tuned).max() < 1.01 * np.abs(theirs - tuned).max()


def test_the_few_sums_that_torch_rounded_otherwise_are_recorded_and_checked(lora: Path, spec, tmp_path: Path) -> None:
    checkpoint = adopt(lora, spec, tmp_path / "checkpoint")
    layer = next(layer for layer in checkpoint.manifest.layers if layer.rank)
    tensors = {name: np.array(value) for name, value in checkpoint.adapters.items()}
    exact = tensors[f"{layer.name}.lora_B"].astype(np.float64) @ tensors[f"{layer.name}.lora_A"].astype(np.float64)
    weight = matrix_view(load_model(spec), layer.name).read().float().numpy()
    position = int(np.argmax(np.abs(exact)))

    def with_entry(value: float, at: int = position) -> TensorFile:
        tensors[f"{layer.name}.product_positions"] = np.array([at])
        tensors[f"{layer.name}.product_values"] = torch.tensor([value]).bfloat16().float().numpy()
        write_tensors(tensors, tmp_path / "edited.safetensors")
        return TensorFile(tmp_path / "edited.safetensors")

    recorded = with_entry(exact.reshape(-1)[position] * (1 + 2**-8))
    NncfQuantizer.load(layer, recorded)
    recomputed(layer, weight, recorded)
    row, column = divmod(position, layer.in_features)
    with pytest.raises(ArtifactError, match=f"product_values: .* for row {row}, column {column}, where B·A is"):
        recomputed(layer, weight, with_entry(exact.reshape(-1)[position] * 1.02))
    with pytest.raises(ArtifactError, match=r"product_positions: .* convert NNCF's file again"):
        NncfQuantizer.load(layer, with_entry(0.0, at=exact.size))


def test_a_range_that_nncf_can_not_have_written(lora: Path, spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = adopt(lora, spec, tmp_path / "checkpoint")
    layer = checkpoint.manifest.packed[0]
    tensors = {name: np.array(value) for name, value in checkpoint.adapters.items()}
    tensors[f"{layer.name}.input_range"][0] = 0
    write_tensors(tensors, tmp_path / "edited.safetensors")
    for reader in (NncfQuantizer.load, NncfCodes):
        with pytest.raises(ArtifactError, match=rf"{re.escape(layer.name)}\.input_range: below"):
            reader(layer, TensorFile(tmp_path / "edited.safetensors"))


def test_a_scale_that_no_float16_holds(lora: Path, spec: ModelSpec, edited, tmp_path: Path) -> None:
    path = edited(lora, lambda content: content["nncf_state_dict"][f"{Q_PROJ}.input_range"].fill_(2e6))
    with pytest.raises(
        UnsupportedModelError, match=r"a scale of model\.layers\.0\.self_attn\.q_proj\.weight is 1\.33e\+05"
    ):
        adopt(path, spec, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def awq(example: Example) -> Path:
    """AWQ moves factors from one layer's weights to another's, so the file has to hold the weights too."""
    return example(model_state=True, awq=True)


@pytest.mark.slow
def test_weights_in_the_file_take_the_place_of_the_base_models(awq: Path, spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = adopt(awq, spec, tmp_path / "checkpoint")
    changed = {f"model.layers.{block}.mlp.{name}_proj.weight" for block in (0, 1) for name in ("up", "down")}
    assert set(checkpoint.manifest.replaced_weights) == changed


def test_without_them_the_codes_are_others(awq: Path, spec: ModelSpec, edited, tmp_path: Path) -> None:
    path = edited(awq, lambda content: content.pop("model_state"))
    left, right = (adopt(one, spec, tmp_path / one.stem).manifest for one in (awq, path))
    assert {name for name in left.digests if left.digests[name] != right.digests[name]} == set(left.replaced_weights)


def test_unchanged_weights_in_the_file_are_the_base_models(example: Example, spec: ModelSpec, tmp_path: Path) -> None:
    assert adopt(example(model_state=True), spec, tmp_path / "checkpoint").manifest.replaced_weights == ()


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


@dataclass(frozen=True, slots=True)
class ByGetattr:
    """Pickles as `getattr(owner, name)`, which is how Python 3.11.2 pickles a member of an enumeration."""

    owner: object
    name: str

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_an_enumeration_that_python_3_11_2_pickled_is_read(lora: Path, tmp_path: Path) -> None:
    content = read_file(lora)
    former = tmp_path / "former.pth"
    torch.save(content | {"model_state": {"mode": ByGetattr(QuantizationScheme, "ASYMMETRIC")}}, former)
    assert read_file(former)["model_state"]["mode"] is QuantizationScheme.ASYMMETRIC


@pytest.mark.parametrize(
    ("owner", "name"), [(QuantizationScheme, "__class__"), (QuantizationScheme, "mro"), (torch.Tensor, "tolist")]
)
def test_no_other_attribute_is_read(lora: Path, tmp_path: Path, owner: object, name: str) -> None:
    hostile = tmp_path / "hostile.pth"
    torch.save(read_file(lora) | {"model_state": {"mode": ByGetattr(owner, name)}}, hostile)
    with pytest.raises(ArtifactError, match="nothing of it was run"):
        read_file(hostile)


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
