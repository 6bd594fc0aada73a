"""Norms that are tuned: they are the student's, ship in the IR in the place of the base's, and are proven."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
import transformers
from conftest import COMMON, REPOSITORY, save_tiny_model, tiny_values
from graphs import rewrite
from safetensors.torch import load_file, save_file
from torch import nn

from ovexport import recipe
from ovexport.artifacts import IR, Checkpoint, RunFolder
from ovexport.convert import convert
from ovexport.errors import ArtifactError, RecipeError, UnsupportedModelError
from ovexport.exporters import exporters
from ovexport.models.loading import load_model
from ovexport.models.norms import find_norms, require_norms
from ovexport.models.peft_folder import load_backbone
from ovexport.models.student import TunedModel
from ovexport.openvino.graph import read_graph
from ovexport.pipeline import services
from ovexport.readers.nncf_out import to_nncf
from ovexport.recipe import ModelSpec, Recipe, TuneSpec
from ovexport.reports import VerificationReport
from ovexport.strip import strip
from ovexport.tune import require_tunable_norms, tune
from ovexport.verify import verify, verify_onnx

NORM = "model.layers.1.post_attention_layernorm.weight"
CHECKER = Path(__file__).parent / "independent_checker.py"


def spec(**changes) -> TuneSpec:
    base = {"steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "validate_every": 2, "save_every": 2}
    return TuneSpec(**{**base, "norms": True, "norm_learning_rate": 1e-2, "precision": "fp32", **changes})


def tuned(run: RunFolder, model: ModelSpec, settings: TuneSpec, out: Path, **options) -> Checkpoint:
    folders = {"logs": out / "logs", "identity": "a"}
    return tune(run.compressed, model, settings, run.data, out / "tuned", **folders, **options)


@pytest.fixture(scope="module")
def tuned_run(finished_run: RunFolder, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The folder of a run whose norms were tuned, up to its product; nobody may write to it."""
    folder = RunFolder(tmp_path_factory.mktemp("norms"))
    checkpoint = tuned(finished_run, tiny_recipe.model, spec(), folder.path)
    checkpoint.path.rename(folder.checkpoint.path)
    packed = strip(folder.checkpoint, finished_run.ir("bf16"), folder.packed("int4").path)
    convert(finished_run.ir("bf16"), packed, folder.ir("int4").path)
    return folder


@pytest.fixture
def product(finished_run: RunFolder, tuned_run: RunFolder, tmp_path: Path) -> IR:
    """Its product again, to be damaged."""
    return convert(finished_run.ir("bf16"), tuned_run.packed("int4"), tmp_path / "int4")


def constant(ir: IR, name: str) -> np.ndarray:
    """The values of the one constant of a name."""
    nodes = [node for node in read_graph(ir).get_ops() if node.get_friendly_name() == name]
    assert len(nodes) == 1
    return np.array(nodes[0].data)


def flip_bit(ir: IR, name: str) -> None:
    """Flip the lowest bit of a norm's third value, in the .bin."""
    needle = constant(ir, name).tobytes()
    content = bytearray(ir.bin.read_bytes())
    assert content.count(needle) == 1
    content[content.index(needle) + 8] ^= 0x01
    ir.bin.write_bytes(content)


def proof(run: RunFolder, checkpoint: Checkpoint | None, ir: IR, **changes) -> VerificationReport:
    given = {"checkpoint": checkpoint, "base": run.ir("bf16"), "twin": run.ir("plain"), "runtime": False}
    return verify(ir, **(given | changes))


def failures(report: VerificationReport) -> dict[str, str]:
    """By name of a check that failed, each subject with its detail, a line each."""
    failed = [check for check in report.checks if not check.passed]
    return {
        name: "\n".join(f"{check.subject}: {check.detail}" for check in failed if check.name == name)
        for name in {check.name for check in failed}
    }


def test_norms_are_tuned_with_their_own_learning_rate(finished_run, tiny_recipe, tuned_run, tmp_path) -> None:
    base = {name: value.float().numpy() for name, value in load_model(tiny_recipe.model).named_parameters()}
    checkpoint = tuned_run.checkpoint
    names = [norm.name for norm in checkpoint.manifest.norms]
    assert len(names) == 5
    assert {NORM, "model.norm.weight"} <= set(names)
    for name in names:
        assert checkpoint.adapters[name].dtype == np.float32
        assert not np.array_equal(checkpoint.adapters[name], base[name]), name
    first = json.loads((tuned_run.path / "logs" / "tuning.jsonl").read_text().splitlines()[1])
    assert first["learning_rate_norms"] == pytest.approx(1e-2)
    assert first["learning_rate_adapters"] == pytest.approx(1e-4)
    slow = tuned(finished_run, tiny_recipe.model, spec(norm_learning_rate=1e-6), tmp_path)
    assert np.abs(slow.adapters[NORM] - base[NORM]).max() < 1e-4 < np.abs(checkpoint.adapters[NORM] - base[NORM]).max()


def test_tuned_norms_lower_the_divergence_further(finished_run, tiny_recipe, tmp_path) -> None:
    values = {
        norms: tuned(finished_run, tiny_recipe.model, settings, tmp_path / str(norms)).manifest.validation.value
        for norms, settings in ((True, spec(steps=20)), (False, spec(steps=20, norms=False, norm_learning_rate=1e-4)))
    }
    assert values[True] < 0.95 * values[False]


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_killed_tuning_of_norms_ends_in_the_same_bytes(finished_run, tiny_recipe, tmp_path, ema_decay) -> None:
    settings = spec(ema_decay=ema_decay)
    whole = tuned(finished_run, tiny_recipe.model, settings, tmp_path / "whole")

    def kill(moment) -> None:
        if moment.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(finished_run, tiny_recipe.model, settings, tmp_path / "killed", listener=kill)
    resumed = tuned(finished_run, tiny_recipe.model, settings, tmp_path / "killed")
    assert resumed.manifest.norms
    for name in ("adapters.safetensors", "reference.safetensors", "checkpoint.json"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_a_probe_of_learning_rates_begins_with_the_base_models_norms(finished_run, tiny_recipe, tmp_path) -> None:
    settings = spec(probe_learning_rates=(1e-4,), probe_steps=3)
    probed = tuned(finished_run, tiny_recipe.model, settings, tmp_path / "probed")
    straight = tuned(finished_run, tiny_recipe.model, spec(), tmp_path / "straight")
    assert np.array_equal(probed.adapters[NORM], straight.adapters[NORM])


def test_the_product_holds_the_tuned_norms_and_is_proven(finished_run, tuned_run) -> None:
    checkpoint, ir = tuned_run.checkpoint, tuned_run.ir("int4")
    report = proof(finished_run, checkpoint, ir, runtime=True)
    assert report.passed, failures(report)
    assert report.verdict == "proven"
    compared = [check.subject for check in report.checks if check.name == "norm as the checkpoint has it"]
    assert compared == [norm.name for norm in checkpoint.manifest.norms]
    for norm in checkpoint.manifest.norms:
        assert np.array_equal(constant(ir, norm.name).ravel(), checkpoint.adapters[norm.name]), norm.name
        assert np.array_equal(
            constant(finished_run.ir("plain"), norm.name), constant(finished_run.ir("bf16"), norm.name)
        )
    assert ir.manifest.norms == tuple(compared)


def test_a_flipped_bit_in_a_norm_is_found_and_named(finished_run, tuned_run, product) -> None:
    flip_bit(product, NORM)
    failed = failures(proof(finished_run, tuned_run.checkpoint, product))
    assert failed["norm as the checkpoint has it"] == f"{NORM}: other values than those that were tuned, first at 2"


def test_without_tuned_norms_each_is_the_bases(run_copy) -> None:
    assert run_copy.checkpoint.manifest.norms == ()
    flip_bit(run_copy.ir("int4"), NORM)
    failed = failures(proof(run_copy, run_copy.checkpoint, run_copy.ir("int4")))
    assert NORM in failed["all other constants as the base IR's"]
    assert NORM in failed["all other constants as the twin's"]


@pytest.mark.parametrize("damage", ["a second one", "another reader", "another type", "another name"])
def test_a_norm_that_is_not_its_layers_alone_is_found(finished_run, tuned_run, product, damage) -> None:
    rewrite(product, lambda graph: misplace(graph, damage))
    failed = failures(proof(finished_run, tuned_run.checkpoint, product))
    assert NORM in failed["norm as the checkpoint has it"]


def misplace(graph: ov.Model, damage: str) -> None:
    nodes = {node.get_friendly_name(): node for node in graph.get_ops()}
    own, other = nodes[NORM], nodes["model.norm.weight"]
    if damage == "another name":
        own.set_friendly_name("another")
    elif damage == "a second one":
        other.set_friendly_name(NORM)
    elif damage == "another reader":
        for target in other.output(0).get_target_inputs():
            target.replace_source_output(own.output(0))
    else:
        half = ov.opset13.constant(own.data.astype(np.float16))
        half.set_friendly_name(NORM)
        readers = own.output(0).get_target_inputs()
        wide = ov.opset13.convert(half, "f32", name=f"{NORM}/wide")
        for target in readers:
            target.replace_source_output(wide.output(0))


def test_a_base_with_other_norms_is_found_and_refused(run_copy, tuned_run, product, tmp_path) -> None:
    flip_bit(run_copy.ir("bf16"), NORM)
    failed = failures(proof(run_copy, tuned_run.checkpoint, product))
    assert failed["norm of the base as tuning began with it"].startswith(NORM)
    with pytest.raises(ArtifactError, match=f"{NORM}: not the norm that the checkpoint was tuned on"):
        strip(tuned_run.checkpoint, run_copy.ir("bf16"), tmp_path / "packed")


@pytest.mark.parametrize("damage", ["shape", "nan"])
def test_a_damaged_norm_of_a_checkpoint_is_refused_by_name(finished_run, tuned_run, tmp_path, damage: str) -> None:
    checkpoint = Checkpoint(Path(shutil.copytree(tuned_run.checkpoint.path, tmp_path / "checkpoint")))
    name, file = checkpoint.manifest.norms[0].name, checkpoint.path / "adapters.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].clone() if damage == "shape" else tensors[name] * float("nan")
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=f"{name}: the checkpoint has no finite float32 values"):
        strip(checkpoint, finished_run.ir("bf16"), tmp_path / "packed")


def test_without_the_checkpoint_the_twin_is_compared_but_for_the_norms(finished_run, tuned_run, product) -> None:
    report = proof(finished_run, None, product, base=None)
    assert report.passed, failures(report)
    assert "5 tuned norms can't be compared" in report.summary.reason


@pytest.mark.parametrize("damaged", [False, True])
def test_a_checker_written_from_the_readme_compares_the_norms(tuned_run, product, damaged) -> None:
    if damaged:
        flip_bit(product, NORM)
    model = tuned_run.checkpoint.manifest.model_id
    command = [sys.executable, "-W", "error", CHECKER, product.path, tuned_run.checkpoint.path, model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = f"{NORM} differs or is missing\n15 layers, 1 mismatches\n" if damaged else "15 layers, 0 mismatches\n"
    assert (done.returncode, done.stdout) == (int(damaged), expected)


def test_a_norm_without_a_constant_is_refused_before_any_tuning(run_copy, tiny_recipe) -> None:
    require_tunable_norms(spec(), tiny_recipe.model, run_copy.ir("bf16"))
    xml = run_copy.ir("bf16").xml
    xml.write_text(xml.read_text().replace(f'name="{NORM}"', 'name="Constant_x"'))
    require_tunable_norms(spec(norms=False, norm_learning_rate=1e-4), tiny_recipe.model, run_copy.ir("bf16"))
    with pytest.raises(UnsupportedModelError, match=rf"{NORM}: no float32 constant .* set tune.norms = false"):
        require_tunable_norms(spec(), tiny_recipe.model, run_copy.ir("bf16"))


def test_the_tuned_model_in_torch_has_the_norms(tuned_run, tiny_recipe) -> None:
    reference = tuned_run.checkpoint.reference
    tokens = np.array(reference["token_ids"][:1]).astype(np.int64)
    logits = TunedModel(tuned_run.checkpoint, tiny_recipe.model).begin(tokens)
    assert np.abs(logits - reference["logits"][:1]).max() < 1e-5 * np.abs(reference["logits"][:1]).max()


def test_a_float_model_of_the_checkpoint_has_the_norms(tuned_run, tiny_recipe) -> None:
    network = load_backbone(tuned_run.checkpoint, tiny_recipe.model)
    assert np.array_equal(network.get_parameter(NORM).numpy(), tuned_run.checkpoint.adapters[NORM])


def test_nncfs_format_refuses_norms(tuned_run, tiny_recipe) -> None:
    with pytest.raises(UnsupportedModelError, match=r"its norms were tuned .* convert the checkpoint to an IR"):
        to_nncf(tuned_run.checkpoint, tiny_recipe.model)


def test_onnx_holds_the_norms_and_is_proven(finished_run, tuned_run, tiny_recipe, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    import onnx

    exporter = exporters.load("onnx", "--format").thing()
    out = tmp_path / "onnx"
    exporter.export(tiny_recipe.model, finished_run.ir("bf16"), tuned_run.packed("int4"), out)
    checks = verify_onnx(out, tuned_run.checkpoint)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert sum(check.name == "norm as the checkpoint has it" for check in checks) == 5
    model = onnx.load(out / "model.onnx")
    held = next(each for each in model.graph.initializer if each.name == f"network.{NORM}")
    values = onnx.numpy_helper.to_array(held).copy()
    values[2] = np.nextafter(values[2], np.float32(9))
    held.CopyFrom(onnx.numpy_helper.from_array(values, held.name))
    onnx.save(model, out / "model.onnx")
    failed = [check for check in verify_onnx(out, tuned_run.checkpoint, runtime=False) if not check.passed]
    assert f"onnx: {NORM}" in [check.subject for check in failed if check.name == "norm as the checkpoint has it"]


FAMILIES = {
    "gemma2": ("Gemma2Config", COMMON | {"head_dim": 16, "query_pre_attn_scalar": 16}, 9, {1}),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 16}, 9, {0}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}, 10, {0}),
}


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_norms_go_the_whole_way(family: str, tmp_path: Path) -> None:
    kind, values, count, added = FAMILIES[family]
    sections = tiny_values(save_tiny_model(tmp_path / "model", getattr(transformers, kind)(**values)))
    sections["tune"] |= {"norms": True, "norm_learning_rate": 1e-2, "precision": "fp32"}
    resolved = recipe.parse(sections, base=REPOSITORY, origin=family)
    run = services.run(resolved, tmp_path / "run", until="verify")  # raises when verification fails
    norms = run.checkpoint.manifest.norms
    assert run.checkpoint.manifest.steps > 0
    assert len(norms) == count
    assert {norm.added for norm in norms} == added
    for norm in norms:
        used = run.checkpoint.adapters[norm.name] + np.float32(norm.added)
        assert np.array_equal(constant(run.ir("int4"), norm.name).ravel(), used)


class ExponentialNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * self.weight.exp()


def test_a_norm_that_is_computed_otherwise_is_refused_by_name(tiny_recipe) -> None:
    network = load_model(tiny_recipe.model)
    assert all(norm.problem is None for norm in find_norms(network))
    network.model.norm = ExponentialNorm()
    with pytest.raises(UnsupportedModelError, match=r"model.norm.weight: can't be tuned, .* set tune.norms = false"):
        require_norms(network)
    network.model.norm = network.model.layers[0].input_layernorm
    with pytest.raises(UnsupportedModelError, match="several layers share it"):
        require_norms(network)


def test_a_learning_rate_of_norms_goes_with_norms(tiny_model: Path) -> None:
    sections = tiny_values(tiny_model)
    sections["tune"] |= {"norm_learning_rate": 1e-3}
    with pytest.raises(RecipeError, match="norm_learning_rate goes with norms = true"):
        recipe.parse(sections, base=REPOSITORY, origin="tiny")


def test_a_plan_counts_the_norms(tiny_model: Path, tmp_path: Path) -> None:
    sections = tiny_values(tiny_model)
    without = services.plan(recipe.parse(sections, base=REPOSITORY, origin="tiny"), tmp_path)
    sections["tune"] |= {"norms": True}
    planned = services.plan(recipe.parse(sections, base=REPOSITORY, origin="tiny"), tmp_path)
    assert planned.problems == ()
    assert planned.tuned_parameters == without.tuned_parameters + 5 * 64
