"""compress.engine = "nncf": NNCF's own compression and quantizers in a run of ours."""

from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, tiny_values
from nncf_files import differences, our_codes, stripped_codes
from test_search import nls_recipe  # noqa: F401 (a fixture)

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.compress.starting_points import nncf_engine
from ovexport.errors import OvexportError, RecipeError
from ovexport.models.student import Student
from ovexport.pipeline import services
from ovexport.recipe import ModelSpec, Recipe
from ovexport.reports import VerificationReport
from ovexport.storage.records import read_record
from ovexport.weights.adapters import NncfFakeQuantizer
from ovexport.weights.layer import LayerFormat

pytestmark = pytest.mark.families


def of(model: Path, **compress: object) -> Recipe:
    values = tiny_values(model)
    values["compress"] = {"group_size": 32, "rank": 8, "engine": "nncf"} | compress
    values["tune"] |= {"learning_rate": 5e-3, "steps": 8, "validate_every": 4}
    return recipe.parse(values, base=REPOSITORY, origin="nncf")


@pytest.fixture(scope="module", params=[{}, {"mode": "int4_sym"}, {"awq": True, "scale_estimation": True}], ids=str)
def run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return services.run(of(tiny_model, **request.param), tmp_path_factory.mktemp("nncf") / "run", until="verify")


def test_a_run_with_nncfs_quantizers_is_tuned_and_proven(run: RunFolder) -> None:
    report = read_record(run.path / "verification.json", VerificationReport)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert (report.summary.code_mismatches, report.summary.adapter_nodes) == (0, 0)
    assert {check.name for check in report.checks} >= {"logits as the checkpoint's"}
    manifest = run.checkpoint.manifest
    assert manifest.steps
    assert {layer.arithmetic for layer in manifest.packed} == {"nncf"}
    assert manifest.digests != run.compressed.manifest.digests


@pytest.mark.parametrize(("mode", "form"), [("int4_asym", "fq_lora"), ("int4_sym", "fq_lora_nls")])
def test_the_start_has_the_codes_that_nncf_compresses_and_strips(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, form: str
) -> None:
    keys = {"mode": mode} if form == "fq_lora" else {"mode": mode, "format": form, "rank_space": [8, 4]}
    values = tiny_values(tiny_model) | {"compress": {"group_size": 32, "rank": 8, "engine": "nncf"} | keys}
    if form == "fq_lora_nls":
        del values["compress"]["rank"]
        values["tune"]["objective"] = "task"
        values["task"] = {"name": "mine", "train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"}
    spec = recipe.parse(values, base=REPOSITORY, origin="nncf")
    models, made = [], nncf_engine.NncfEngine.compressed

    def remember(self: nncf_engine.NncfEngine, start: object) -> torch.nn.Module:
        models.append(made(self, start))
        return models[-1]

    monkeypatch.setattr(nncf_engine.NncfEngine, "compressed", remember)
    from ovexport.artifacts import PreparedData
    from ovexport.compress import compress

    prepared = services.run(of(tiny_model), tmp_path / "run", until="prepare").data
    checkpoint = compress(spec.model, spec.compress, PreparedData(prepared.path), 0, tmp_path / "start")
    for name, parameter in models[0].named_parameters():
        if "__nncf_hooks" not in name:  # as NNCF's examples export: the model in float32, adapters in bfloat16
            parameter.data = parameter.data.float()
    assert differences(our_codes(checkpoint, ModelSpec(id=str(tiny_model))), stripped_codes(models[0])) == {}


def test_ranks_are_searched_among_nncfs_adapters(nls_recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    chosen = nls_recipe.compress.model_copy(update={"engine": "nncf"})
    found = services.run(nls_recipe.model_copy(update={"compress": chosen}), tmp_path / "run", until="verify")
    assert read_record(found.path / "verification.json", VerificationReport).passed


def test_training_sees_what_nncf_gives_and_validation_what_ships(run: RunFolder, tiny_recipe: Recipe) -> None:
    from ovexport.models.loading import load_model
    from ovexport.models.matrix_view import matrix_view

    network = load_model(tiny_recipe.model)
    own = {layer.name: matrix_view(network, layer.name).read().clone() for layer in run.checkpoint.manifest.layers}
    student = Student(network, run.checkpoint, own, torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    quantizer = student.quantizers[name]
    assert isinstance(quantizer, NncfFakeQuantizer)
    trained = student.network.get_parameter(name).clone()
    student.settle_weights()
    shipped = student.network.get_parameter(name)
    codes = quantizer.quantize(student.base_weights[name])
    assert not torch.equal(trained, shipped)
    assert len(torch.unique(shipped[0, :32])) <= 16
    assert codes.digest() == run.checkpoint.manifest.digests[name]


def test_gradients_are_those_of_nncfs_own_module() -> None:
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization.layers import AsymmetricLoraQuantizer, PTLoraSpec, PTQuantizerSpec

    layer = LayerFormat(
        name="w",
        kind="linear",
        mode="int4_asym",
        out_features=24,
        in_features=32,
        group_size=16,
        rank=4,
        arithmetic="nncf",
    )
    scales = (24, 2, 1)
    module = AsymmetricLoraQuantizer(
        PTQuantizerSpec(4, QuantizationScheme.ASYMMETRIC_LORA, True, False, False, scales, False),
        PTLoraSpec(4, torch.Size((24, 32)), torch.Size((24, 2, 16))),
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator) * 0.1
    values = {
        "input_low": -torch.rand(scales, generator=generator) * 0.2 - 0.1,
        "input_range": torch.rand(scales, generator=generator) * 0.2 + 0.3,
        "lora_A": torch.randn(4, 32, generator=generator).bfloat16().float(),
        "lora_B": (torch.randn(24, 4, generator=generator) * 0.05).bfloat16().float(),
    }
    quantizer = NncfFakeQuantizer(layer)
    quantizer.take(values)
    with torch.no_grad():
        for name, parameter in module.get_trainable_params().items():
            parameter.copy_(values[name])
            parameter.requires_grad_(True)
    incoming = torch.randn(24, 32, generator=generator)
    with torch.compiler.set_stance("force_eager"):
        output = module.quantize(weight)
        output.backward(incoming)
    found, written = quantizer.gradients(weight, incoming), torch.empty_like(weight)
    quantizer.train_into(weight, written)
    assert torch.equal(written, output.detach())
    for name, parameter in module.get_trainable_params().items():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad.float(), rtol=1e-2, atol=1e-4), name


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"rounding": "gptq"}, "rounding does not go with engine"),
        ({"method": "qalora"}, "method does not go with engine"),
        ({"layers": [{"pattern": "*.up_proj", "rank": 4}]}, "layers does not go with engine"),
        ({"fallback": "int8"}, "fallback does not go with engine"),
    ],
)
def test_keys_that_nncf_does_not_have_are_refused(tiny_model: Path, compress: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        of(tiny_model, **compress)


def test_a_rank_above_a_layers_side_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OvexportError, match=r"compress\.rank=128: NNCF has one rank .* use at most 32"):
        services.run(of(tiny_model, rank=128), tmp_path / "run")
