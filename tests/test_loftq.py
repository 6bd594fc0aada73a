"""LoRA beside frozen codes, and LoftQ's beginning of it."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ovexport, refused
from conftest import REPOSITORY, tiny_values
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from ovexport import recipe
from ovexport.artifacts import IR, RunFolder
from ovexport.compress.starting_points.loftq import alternate
from ovexport.errors import RecipeError
from ovexport.models.loading import load_model
from ovexport.openvino.graph import read_graph, unpacked, weights
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.pipeline import services
from ovexport.recipe import ModelSpec
from ovexport.reports import BenchmarkReport, EvaluationReport, VerificationReport
from ovexport.storage.digests import file_digest
from ovexport.storage.records import read_record
from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.verify.arithmetic import ExpectedCodes, expected_grid
from ovexport.weights.adapters import BesideQuantizer
from ovexport.weights.layer import LayerFormat

MODES = ["int4_asym", "int4_sym"]
OUTPUTS, INPUTS = 48, 64
WEIGHTS = {
    "normal": lambda drawn: drawn,
    "heavy-tailed": lambda drawn: drawn**3,
    "off zero": lambda drawn: drawn + 3,
    "of low rank and noise": lambda drawn: 4 * drawn[:, :3] @ drawn[:3] + drawn,
}


def layer_format(mode: str = "int4_asym", group_size: int = 16, rank: int = 4, factor: float = 1.0) -> LayerFormat:
    shape = {"out_features": OUTPUTS, "in_features": INPUTS, "group_size": group_size}
    return LayerFormat(name="w", kind="linear", mode=mode, **shape, rank=rank, adapter="beside", adapter_factor=factor)


def drawn(kind: str = "normal") -> torch.Tensor:
    return WEIGHTS[kind](torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))) * 0.1


def begun(layer: LayerFormat, weight: torch.Tensor, iterations: int) -> tuple[BesideQuantizer, torch.Tensor]:
    quantizer = BesideQuantizer(layer)
    quantizer.initialize(weight, torch.Generator().manual_seed(0))
    return quantizer, alternate(weight, quantizer, iterations)


def error(layer: LayerFormat, weight: torch.Tensor, iterations: int) -> float:
    quantizer, rounded = begun(layer, weight, iterations)
    return float((weight - quantizer.base(rounded) - quantizer.product()).norm())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_error_falls_with_each_iteration_and_stays_below_plain_roundings(mode: str, kind: str) -> None:
    weight, layer = drawn(kind), layer_format(mode)
    plain = BesideQuantizer(layer)
    plain.initialize(weight, torch.Generator())
    errors = [error(layer, weight, iterations) for iterations in range(1, 8)]
    assert errors[0] < float((weight - plain.base(weight)).norm())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors)), errors
    assert errors[-1] < errors[0]


def test_one_iteration_is_plain_rounding_and_the_decomposition_of_what_it_leaves() -> None:
    weight, layer = drawn(), layer_format()
    quantizer, rounded = begun(layer, weight, 1)
    assert rounded is weight
    residual = (weight - quantizer.base(weight)).double()
    left, values, right = torch.linalg.svd(residual)
    best = left[:, :4] * values[:4] @ right[:4]
    assert torch.allclose(quantizer.product().double(), best, atol=1e-6)


def test_a_tall_matrix_is_decomposed_as_a_wide_one_is_and_one_without_error_gives_no_adapter() -> None:
    weight, layer = drawn(), layer_format()
    tall = layer.model_copy(update={"out_features": INPUTS, "in_features": OUTPUTS})
    assert error(tall, weight.T.contiguous(), 3) < error(tall, weight.T.contiguous(), 1)
    on_the_grid = BesideQuantizer(layer)
    on_the_grid.initialize(weight, torch.Generator())
    quantizer, _ = begun(layer, on_the_grid.base(weight), 2)
    assert quantizer.product().abs().max() < 1e-7
    assert torch.isfinite(quantizer.lora_A).all()


def test_alpha_changes_the_factors_and_not_their_product() -> None:
    one, other = (begun(layer_format(factor=factor), drawn(), 3)[0].product() for factor in (1.0, 0.25))
    assert torch.allclose(one, other, atol=1e-6)


def test_gradients_are_those_of_the_sum() -> None:
    weight, layer = drawn(), layer_format(factor=0.5)
    quantizer, rounded = begun(layer, weight, 2)
    quantizer.double()
    incoming = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    down, up = (one.detach().clone().requires_grad_() for one in (quantizer.lora_A, quantizer.lora_B))
    (quantizer.base(rounded).double() + 0.5 * up @ down).backward(incoming)
    found = quantizer.gradients(rounded, incoming)
    assert set(found) == {"lora_A", "lora_B"}
    assert torch.allclose(found["lora_A"], down.grad)
    assert torch.allclose(found["lora_B"], up.grad)


def test_what_the_adapter_adds_to_an_output_is_its_product_with_the_inputs() -> None:
    quantizer, rounded = begun(layer_format(factor=0.5), drawn(), 2)
    inputs = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(2))
    together = inputs @ quantizer(rounded).T
    assert torch.allclose(together, inputs @ quantizer.base(rounded).T + quantizer.adapter_output(inputs), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_proof_computes_the_same_codes_whatever_the_adapter_is(mode: str, tmp_path: Path) -> None:
    quantizer, rounded = begun(layer_format(mode), drawn(), 3)
    write_tensors({f"w.{key}": value.numpy() for key, value in quantizer.stored().items()}, tmp_path / "a.safetensors")
    adapters = TensorFile(tmp_path / "a.safetensors")
    codes = quantizer.quantize(rounded)
    rows = ExpectedCodes(quantizer.layer, adapters).rows(rounded.numpy().copy(), slice(0, OUTPUTS))
    assert np.array_equal(codes.codes.numpy(), rows)
    assert np.array_equal(codes.scale[..., 0].numpy(), expected_grid(quantizer.layer, adapters).scale)


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"init": "loftq"}, 'init="loftq" goes with method = "lora"'),
        ({"init": "loftq", "method": "lora", "rounding": "gptq"}, "rounds the weights itself; leave rounding out"),
        ({"loftq_iterations": 3, "method": "lora"}, 'loftq_iterations=3 goes with init = "loftq"'),
        ({"method": "lora", "format": "fq_lora_nls", "rank_space": [4, 2]}, 'is of method = "fq_lora"'),
        ({"method": "lora", "mode": "int4_asym_f16zp"}, 'goes with method = "qalora"'),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tiny_model: Path, compress: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.parse(tiny_values(tiny_model) | {"compress": compress}, base=REPOSITORY, origin="bad")


def loftq_values(model: Path) -> dict:
    values = tiny_values(model)
    values["compress"] = {"group_size": 16, "rank": 4, "alpha": 8.0, "method": "lora", "init": "loftq"}
    values["tune"] |= {"learning_rate": 0.003, "steps": 12, "validate_every": 4, "adapter_dropout": 0.1}
    return values


@pytest.fixture(scope="module")
def loftq_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run; nobody may write to it."""
    parsed = recipe.parse(loftq_values(tiny_model), base=REPOSITORY, origin="loftq")
    return services.run(parsed, tmp_path_factory.mktemp("loftq") / "run")


def proof(run: RunFolder) -> VerificationReport:
    return read_record(run.path / "verification.json", VerificationReport)


@pytest.mark.run
def test_a_tuned_run_ships_frozen_codes_and_a_tuned_adapter_both_proven(loftq_run: RunFolder) -> None:
    report = proof(loftq_run)
    assert report.passed
    assert (report.summary.code_mismatches, report.summary.adapter_nodes) == (0, 0)
    checks = [check for check in report.checks if check.name == "adapter as the checkpoint has it"]
    assert len(checks) == 14
    assert any(check.name == "logits as the checkpoint's" for check in report.checks)
    assert loftq_run.checkpoint.manifest.steps
    plain, product = (loftq_run.ir(name) for name in ("plain", "int4"))
    for one, other in zip(*(weights(read_graph(ir)) for ir in (plain, product)), strict=True):
        assert np.array_equal(unpacked(one.codes), unpacked(other.codes))
    assert file_digest(plain.adapter_tensors) != file_digest(product.adapter_tensors)


@pytest.mark.run
def test_the_product_is_measured_with_its_adapter(loftq_run: RunFolder) -> None:
    evaluation = read_record(loftq_run.path / "evaluation.json", EvaluationReport)
    ir, tokens = loftq_run.ir("int4"), loftq_run.data.tokens("test").astype(np.int64)
    base = LogitsRunner(read_graph(loftq_run.ir("bf16")), "bf16")
    divergences = {}
    for name, graph in (("with", running_graph(ir)), ("without", read_graph(ir))):
        runner, kl = LogitsRunner(graph, name), []
        for row in tokens:
            expected, actual = (torch.from_numpy(one(row[None]).copy()).log_softmax(-1) for one in (base, runner))
            kl.append(float((expected.exp() * (expected - actual)).sum(-1)[0, :-1].mean()))
        divergences[name] = np.mean(kl)
    assert evaluation.models["int4"].kl_mean_nats == pytest.approx(divergences["with"], rel=1e-3)
    assert divergences["with"] < 0.9 * divergences["without"]
    applied = read_record(loftq_run.path / "benchmark.json", BenchmarkReport).conditions["adapters"]
    assert {name: one["layers"] for name, one in applied.items()} == {"plain": 14, "int4": 14}
    card = (loftq_run.path / "README.md").read_text()
    assert "adapters=adapters" in card
    assert "| INT4 and adapter, tuned |" in card
    assert "absorbed" not in card


@pytest.fixture(scope="module")
def peft_folder(loftq_run: RunFolder, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peft") / "folder"
    done = ovexport("convert", loftq_run.checkpoint.path, "--model", tiny_model, "--out", out, "--format", "peft")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.cli
def test_peft_loads_our_folder_and_gives_our_logits(loftq_run: RunFolder, peft_folder: Path) -> None:
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(peft_folder, dtype=torch.float32), peft_folder / "loftq_init"
    )
    reference = loftq_run.checkpoint.reference
    tokens = torch.from_numpy(np.array(reference["token_ids"])).long()
    with torch.no_grad():
        actual = network(input_ids=tokens).logits.numpy()
    np.testing.assert_allclose(actual, reference["logits"], atol=2e-5 * np.abs(reference["logits"]).max())


@pytest.mark.cli
def test_the_absorbed_form_is_a_run_on_that_folder_and_its_adapter(peft_folder: Path, tmp_path: Path) -> None:
    values = tiny_values(peft_folder)
    values["model"]["adapter"] = str(peft_folder / "loftq_init")
    run = services.run(recipe.parse(values, base=REPOSITORY, origin="absorbed"), tmp_path / "run", until="verify")
    assert proof(run).passed
    assert run.ir("int4").adapter is None


@pytest.mark.cli
def test_a_checkpoint_whose_adapters_are_absorbed_has_no_peft_folder(
    finished_run: RunFolder, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint, out = finished_run.checkpoint.path, tmp_path / "out"
    line = refused(ovexport("convert", checkpoint, "--model", tiny_model, "--out", out, "--format", "peft"), 2)
    assert "has no adapter beside its codes" in line
    assert not out.exists()


@pytest.mark.run
def test_a_checker_written_from_the_page_finds_the_codes_and_the_adapter_or_the_change(
    loftq_run: RunFolder, tiny_model: Path, tmp_path: Path
) -> None:
    checker: list[str | Path] = [sys.executable, "-W", "error", Path(__file__).parent / "independent_checker.py"]
    for ir, found in (
        (loftq_run.ir("int4"), "15 layers, 0"),
        (damaged(loftq_run.ir("int4"), tmp_path / "ir"), "15 layers, 1"),
    ):
        command = [*checker, ir.path, loftq_run.checkpoint.path, tiny_model]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"{found} mismatches" in done.stdout, done.stderr


def damaged(ir: IR, folder: Path) -> IR:
    """A product whose files are as its ovexport.json says, and whose adapter is not the checkpoint's."""
    copy = IR(Path(shutil.copytree(ir.path, folder)))
    tensors = {name: np.array(values) for name, values in TensorFile(copy.adapter_tensors).items()}
    tensors[min(tensors)][0, 0] += 1e-6
    write_tensors(tensors, copy.adapter_tensors)
    manifest = json.loads((copy.path / "ovexport.json").read_text())
    manifest["files"]["adapter/adapter_model.safetensors"] = file_digest(copy.adapter_tensors)
    (copy.path / "ovexport.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.cli
def test_an_adapter_that_is_not_the_checkpoints_is_found_and_named(loftq_run: RunFolder, tmp_path: Path) -> None:
    ir = damaged(loftq_run.ir("int4"), tmp_path / "ir")
    done = ovexport("verify", ir.path, "--checkpoint", loftq_run.checkpoint.path, "--json")
    failed = [check for check in json.loads(done.stdout)["checks"] if not check["passed"]]
    found = {(check["name"], check["subject"], check["value"]) for check in failed}
    assert ("adapter as the checkpoint has it", "model.layers.0.mlp.down_proj", 1) in found


@pytest.mark.cli
def test_a_product_without_its_adapter_is_not_proven(loftq_run: RunFolder, tmp_path: Path) -> None:
    ir = IR(Path(shutil.copytree(loftq_run.ir("int4").path, tmp_path / "ir")))
    shutil.rmtree(ir.path / "adapter")
    done = ovexport("verify", ir.path, "--checkpoint", loftq_run.checkpoint.path, "--json")
    failed = {check["name"] for check in json.loads(done.stdout)["checks"] if not check["passed"]}
    assert failed >= {"adapter as the checkpoint has it", "files as convert wrote them", "logits as the checkpoint's"}


@pytest.mark.run
def test_adapters_that_begin_with_nothing_leave_the_twin_without_one(tiny_model: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_model)
    values["compress"] = {"group_size": 16, "rank": 4, "method": "lora", "rounding": "gptq"}
    run = services.run(recipe.parse(values, base=REPOSITORY, origin="lora"), tmp_path / "run", until="verify")
    assert run.ir("plain").adapter is None
    assert run.ir("int4").adapter is not None
    assert proof(run).passed


def loftq_layout(model: Path, folder: Path) -> torch.nn.Module:
    """A folder as PEFT's LoftQ example leaves it, which itself needs bitsandbytes: rounded weights that are float, and
    the adapter that makes up for the rounding in `loftq_init`.

    Returns:
        The two together, as PEFT computes them.
    """
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = get_peft_model(own, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    for module in network.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight.data
            step = weight.abs().amax() / 7
            residual = weight - (weight / step).round() * step
            left, values, right = torch.linalg.svd(residual, full_matrices=False)
            module.lora_B["default"].weight.data = left[:, :4] * values[:4]
            module.lora_A["default"].weight.data = right[:4].contiguous()
            weight -= residual
    network.save_pretrained(folder / "loftq_init")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(
        folder, state_dict={name.replace(".base_layer", ""): value for name, value in base_state(network).items()}
    )
    return network


def base_state(network: PeftModel) -> dict[str, torch.Tensor]:
    state = network.get_base_model().state_dict()
    return {name: value for name, value in state.items() if "lora_" not in name and name != "lm_head.weight"}


def test_a_loftq_folder_of_pefts_is_a_model_and_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    together, tokens = loftq_layout(tiny_model, tmp_path), torch.tensor([[5, 17, 300, 42]])
    own = load_model(ModelSpec(id=str(tiny_model), dtype="float32"))
    backbone = load_model(ModelSpec(id=str(tmp_path)))
    merged = load_model(ModelSpec(id=str(tmp_path), adapter=str(tmp_path / "loftq_init")))
    with torch.no_grad():
        expected, *others = (network(input_ids=tokens).logits for network in (together, own, backbone, merged))
    assert all((logits - expected).abs().max() > 0.05 for logits in others[:2])
    assert torch.allclose(others[2], expected, atol=1e-4)
