"""What a stranger adds without an edit to ovexport: a starting point, a layer policy and a reader of checkpoints, in a
file outside the package, found through entry points."""

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import ovexport, refused
from conftest import REPOSITORY, tiny_values
from plug_ins import install

from ovexport import recipe
from ovexport.artifacts import IR, Checkpoint, PreparedData
from ovexport.compress import StartingPoint, compress, starting_points
from ovexport.errors import ArtifactError, PlugInError, RecipeError
from ovexport.pipeline import services
from ovexport.readers import CheckpointReader, readers
from ovexport.recipe import CompressSpec, ConvertSpec, ModelSpec, Recipe
from ovexport.reports import VerificationReport
from ovexport.storage.records import read_record
from ovexport.storage.tensorfile import write_tensors
from ovexport.verify import verify
from ovexport.weights.policy import LayerPolicy, layer_policies

pytestmark = pytest.mark.run

CODE = '''
import torch

from ovexport.compress import StartingPoint
from ovexport.readers import BaseWeights, CheckpointReader
from ovexport.recipe import CompressSpec
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.plan import plan_layers
from ovexport.weights.policy import RecipePolicy, format_layer
from ovexport.weights.quantizer import FakeQuantizer


class Halves(StartingPoint):
    """Every tuned weight halved."""

    replaces_weights = True

    def apply(self, start):
        for layer in start.layers:
            if layer.rank:
                start.replaced_weights[layer.name] = start.weight(layer.name).float() / 2
                start.quantizers[layer.name].initialize(start.replaced_weights[layer.name], start.generator)


class CoarseMlp:
    """Large groups without zero points in the MLPs."""

    def __init__(self, spec, matrices):
        self.recipe = RecipePolicy(spec, matrices)

    def __call__(self, matrix):
        if ".mlp." in matrix.name:
            return format_layer(matrix, "int4_sym", group_size=64, rank=2)
        return self.recipe(matrix)


class Deltas(CheckpointReader):
    """One tensor per layer, (output, input): what was learned, which is added to the base model's weights."""

    takes = "a .deltas file"

    def recognizes(self, path):
        return path.suffix == ".deltas"

    def read(self, path, model, out, *, ranks):
        base, deltas = BaseWeights.load(model), TensorFile(path)
        layers = plan_layers(base.matrices, CompressSpec(group_size=32, rank=1))
        replaced = {layer.name: base.weights[layer.name].float() + torch.tensor(deltas.require(layer.name))
                    for layer in layers if layer.rank}
        quantizers = {layer.name: FakeQuantizer(layer) for layer in layers}
        for name, quantizer in quantizers.items():
            quantizer.initialize(replaced.get(name, base.weights[name]), torch.Generator())
        return base.write(out, layers, quantizers, replaced)
'''
ENTRY_POINTS = """
[ovexport.starting_points]
halves = {0}:Halves
[ovexport.layer_policies]
coarse_mlp = {0}:CoarseMlp
[ovexport.readers]
deltas = {0}:Deltas
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as site-packages is, with the stranger's file and its distribution."""
    folder = install(tmp_path / "site", CODE, ENTRY_POINTS.format("stranger_code"))
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("stranger_code", None)


@pytest.fixture
def strange(tiny_model: Path) -> Recipe:
    values = tiny_values(tiny_model)
    values["compress"] |= {"starting_point": "halves", "layer_policy": "coarse_mlp"}
    return recipe.parse(values, base=REPOSITORY, origin="strange")


def test_a_starting_point_and_a_policy_go_from_a_recipe_to_the_proof(site: Path, strange: Recipe, tmp_path) -> None:
    run = services.run(strange, tmp_path / "run", until="verify")
    manifest = run.compressed.manifest
    coarse = {layer.name for layer in manifest.layers if layer.mode == "int4_sym"}
    assert {name.split(".")[-2] for name in coarse} == {"gate_proj", "up_proj", "down_proj"}
    assert set(manifest.replaced_weights) == {layer.name for layer in manifest.layers if layer.rank}
    assert read_record(run.path / "verification.json", VerificationReport).passed
    assert redone(strange, run.path) == []

    (site / "stranger_code.py").write_text(CODE.replace("/ 2", "/ 4"))
    again(site)
    assert redone(strange, run.path)[0] == "compress"
    assert run.compressed.manifest.digests != manifest.digests


def redone(resolved: Recipe, out: Path) -> list[str]:
    stages: list[str] = []
    services.run(
        resolved, out, resume=True, until="compress", announce=lambda name, kept: None if kept else stages.append(name)
    )
    return stages


def again(site: Path) -> None:
    """As a new process would import it."""
    sys.modules.pop("stranger_code", None)
    importlib.invalidate_caches()
    for file in (site / "__pycache__").glob("*"):
        file.unlink()


def test_a_reader_goes_from_convert_to_the_proof(site: Path, strange: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    from ovexport.readers import BaseWeights

    model, path = ModelSpec(id=str(tiny_model)), tmp_path / "tuned.deltas"
    base = BaseWeights.load(model)
    generator = np.random.default_rng(0)
    deltas = {name: generator.normal(0, 0.02, weight.shape).astype(np.float32) for name, weight in base.weights.items()}
    write_tensors(deltas, path)
    out, keep = tmp_path / "int4", tmp_path / "proof"
    done = ovexport("convert", path, "--model", tiny_model, "--out", out, "--keep", keep)
    assert done.returncode == 0, done.stderr
    checkpoint = Checkpoint(keep / "checkpoint")
    assert len(checkpoint.manifest.replaced_weights) == 14
    assert verify(IR(out), checkpoint=checkpoint, base=IR(keep / "bf16")).passed

    with pytest.raises(RecipeError, match=r"--ranks: .* is a .deltas file, which has its ranks in it"):
        services.convert_checkpoint(path, model, ConvertSpec(), tmp_path / "other", ranks=[4])


def test_what_no_reader_recognizes_is_refused_with_what_they_take(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.what"
    path.write_text("?")
    with pytest.raises(ArtifactError) as caught:
        services.convert_checkpoint(path, ModelSpec(id=str(tiny_model)), ConvertSpec(), tmp_path / "int4")
    assert str(caught.value) == (
        f"{path}: not a checkpoint that a reader recognizes; give a file that NNCF's examples saved, or a folder with "
        "checkpoint.json, or a model in 4 bits (GPTQ, AWQ, AutoRound, compressed-tensors), or a folder with a "
        "LoRA adapter, or a folder with a QA-LoRA adapter, or a .deltas file"
    )
    with pytest.raises(ArtifactError, match="gone: no such file or folder; give a checkpoint"):
        services.convert_checkpoint(tmp_path / "gone", ModelSpec(id=str(tiny_model)), ConvertSpec(), tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


def test_a_reader_that_fails_is_named(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    (site / "stranger_code.py").write_text(CODE.replace("base, deltas = ", "1 / 0; base, deltas = "))
    path = tmp_path / "tuned.deltas"
    path.touch()
    message = (
        r"plug-in 'deltas' of stranger 0.1: failed: ZeroDivisionError: division by zero \(stranger_code.py, line 4"
    )
    with pytest.raises(PlugInError, match=message):
        services.convert_checkpoint(path, ModelSpec(id=str(tiny_model)), ConvertSpec(), tmp_path / "int4")


def test_plan_refuses_a_plug_in_that_is_not_installed_or_fails(site: Path, strange: Recipe, tmp_path: Path) -> None:
    (site / "stranger_code.py").write_text("import a_package_that_nobody_has\n")
    problems = services.plan(strange, tmp_path / "run").problems
    assert [problem[:60] for problem in problems] == [
        "plug-in 'coarse_mlp' of stranger 0.1: failed: ModuleNotFound",
        "plug-in 'halves' of stranger 0.1: failed: ModuleNotFoundErro",
    ]
    (site / "stranger-0.1.dist-info" / "entry_points.txt").write_text("")
    importlib.invalidate_caches()
    problems = services.plan(strange, tmp_path / "run").problems
    assert "compress.layer_policy='coarse_mlp': no such layer policy; the known ones are recipe; " in problems[0]
    assert "compress.starting_point='halves': no such starting point; the known ones are " in problems[1]


def test_the_command_line_shows_one_line_for_a_plug_in_that_fails(site: Path, strange: Recipe, tmp_path: Path) -> None:
    (site / "stranger_code.py").write_text(CODE.replace("for layer in start.layers", "for layer in 3"))
    (tmp_path / "recipe.toml").write_text(recipe.dump(strange))
    done = ovexport("run", tmp_path / "recipe.toml", "--out", tmp_path / "run", "--until", "compress")
    assert refused(done, 3).startswith(
        "error: plug-in 'halves' of stranger 0.1: failed: TypeError: 'int' object is not iterable (str"
    )


@pytest.mark.parametrize("protocol", [StartingPoint, LayerPolicy, CheckpointReader])
@pytest.mark.usefixtures("_forget_what_is_registered")
def test_the_example_of_a_protocol_is_registered_and_works(protocol: type, compress_tiny) -> None:
    blocks = re.findall(r"(?:^ {4}.*\n|^\n)+", inspect.cleandoc(protocol.__doc__), re.MULTILINE)
    (example,) = [block for block in blocks if "import" in block]
    exec(textwrap.dedent(example), {"__name__": "notebook"})
    if protocol is StartingPoint:
        assert compress_tiny(starting_point="halves").manifest.replaced_weights
    elif protocol is LayerPolicy:
        modes = {layer.mode for layer in compress_tiny(layer_policy="coarse_mlp").manifest.layers}
        assert modes == {"int8_asym", "int4_asym", "int4_sym"}
    else:
        assert readers.load("deltas", "readers").thing().recognizes(Path("tuned.deltas"))


@pytest.fixture
def _forget_what_is_registered() -> Iterator[None]:
    before = [(registry, registry.names) for registry in (starting_points, layer_policies, readers)]
    yield
    for registry, names in before:
        for name in set(registry.names) - set(names):
            registry.unregister(name)


@pytest.fixture
def compress_tiny(tiny_model: Path, tmp_path: Path):
    def compressed(**keys: str) -> Checkpoint:
        spec = CompressSpec(group_size=32, rank=4, **({"rounding": "nearest"} | keys))
        return compress(ModelSpec(id=str(tiny_model)), spec, PreparedData(tmp_path), 0, tmp_path / "compressed")

    return compressed
