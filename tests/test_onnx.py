"""ONNX beside the IR: the same codes, proven, and run by onnxruntime."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import ovexport, refused
from conftest import COMMON, REPOSITORY, save_tiny_model, tiny_values
from transformers import Gemma2Config, GPT2Config, Qwen3Config

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.errors import MissingDependencyError, RecipeError, UnsupportedModelError
from ovexport.exporters import OnnxExporter
from ovexport.openvino.graph import read_graph, weights
from ovexport.openvino.runtime import LogitsRunner
from ovexport.pipeline import services
from ovexport.reports import Check, VerificationReport
from ovexport.storage.records import read_record
from ovexport.verify import verify_onnx
from ovexport.verify.behaviour import relative_errors, rounding_limit

pytestmark = pytest.mark.families
TOKENS = np.random.default_rng(0).integers(2, 2000, (2, 19)).astype(np.int64)


def of(model: Path, **compress: Any) -> recipe.Recipe:
    values = tiny_values(model)
    values["compress"] |= compress
    values["convert"] = {"formats": ["openvino", "onnx"]}
    return recipe.parse(values, base=REPOSITORY, origin="onnx")


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return services.run(of(tiny_model), tmp_path_factory.mktemp("onnx") / "run", until="verify")


def logits_of_onnxruntime(folder: Path, pieces: int = 1) -> np.ndarray:
    """Of TOKENS, read in so many pieces, each behind the cache of those before."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32 activations
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    caches = [port for port in session.get_inputs() if port.name.startswith("past_key_values.")]
    past = {port.name: np.zeros((len(TOKENS), port.shape[1], 0, port.shape[3]), np.float32) for port in caches}
    logits, before = [], 0
    for piece in np.array_split(TOKENS, pieces, axis=1):
        length = before + piece.shape[1]
        given = {
            "input_ids": piece,
            "attention_mask": np.ones((len(piece), length), np.int64),
            "position_ids": np.tile(np.arange(before, length), (len(piece), 1)),
        }
        known = {port.name for port in session.get_inputs()}
        found = session.run(None, {name: value for name, value in given.items() if name in known} | past)
        logits.append(found[0])
        past, before = dict(zip(past, found[1:], strict=True)), length
    return np.concatenate(logits, axis=1)


def agrees_with_the_ir(found: RunFolder, pieces: int = 1) -> None:
    graph = read_graph(found.ir("int4"))
    expected = LogitsRunner(graph, "int4")(TOKENS)
    errors = relative_errors(logits_of_onnxruntime(found.product("onnx"), pieces), expected)
    assert errors.max() < rounding_limit(weights(graph))


def test_a_run_proves_the_onnx_product_code_for_code(run: RunFolder) -> None:
    report = read_record(run.path / "verification.json", VerificationReport)
    assert report.passed, [check for check in report.checks if not check.passed]
    own = [check for check in report.checks if check.subject.startswith("onnx: ")]
    packed = run.checkpoint.manifest.packed
    assert sum(check.name == "as the checkpoint recorded it" for check in own) == 3 * len(packed)
    # the embedding is read by a Gather and, as it is the head too, by a MatMul
    assert sum(check.name.startswith("unpacked as") for check in own) == len(packed) + 1
    assert {"logits as the checkpoint's", "packed Linears run on packed weights", "files as convert wrote them"} <= {
        check.name for check in own
    }


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.parametrize("pieces", [1, 4])
def test_onnxruntime_gives_the_irs_logits_with_and_without_a_cache(run: RunFolder, pieces: int) -> None:
    agrees_with_the_ir(run, pieces)


def test_the_file_holds_codes_of_opset_21_and_no_path_of_this_machine(run: RunFolder) -> None:
    folder = run.product("onnx")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {each.version for each in model.opset_import if not each.domain} == {21}
    types = {one.name: one.data_type for one in model.graph.initializer}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (types[name], types[f"{name}/zero_point"]) == (onnx.TensorProto.UINT4, onnx.TensorProto.UINT4)
    blocks = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and name in node.input]
    assert {(each.name, each.i) for each in blocks[0].attribute} == {("axis", 0), ("block_size", 32)}
    assert str(REPOSITORY).encode() not in (folder / "model.onnx").read_bytes()
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= {file.name for file in folder.iterdir()}


MODELS = {
    "symmetric": ({}, {"mode": "int4_sym"}),
    "per channel": ({}, {"group_size": -1}),
    "a layer in floating point": ({}, {"ignored": ["*layers.0.mlp.up_proj"]}),
    "gpt2": (GPT2Config(vocab_size=2048, n_positions=256, n_embd=64, n_layer=2, n_head=4), {}),
    "a 4-bit embedding that is the head": ({}, {"layers": [{"pattern": "*embed*", "mode": "int4_asym"}]}),
    "qwen3": (Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=False), {}),
    "qwen3, all layers in 4 bits": (
        Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=False),
        {"layers": [{"pattern": "*", "mode": "int4_sym"}]},
    ),
    "gemma2": (Gemma2Config(**COMMON, head_dim=16, sliding_window=64), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_formats_and_families_are_exported_proven_and_run(name: str, tiny_model: Path, tmp_path: Path) -> None:
    config, compress = MODELS[name]
    model = save_tiny_model(tmp_path / "model", config) if config else tiny_model
    found = services.run(of(model, **compress), tmp_path / "run", until="verify")
    assert read_record(found.path / "verification.json", VerificationReport).passed
    if importlib.util.find_spec("onnxruntime"):
        agrees_with_the_ir(found)


Change = Callable[[onnx.ModelProto], Any]


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


def flipped_bit(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "model.layers.1.mlp.down_proj.weight")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def another_scale(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "model.layers.0.self_attn.q_proj.weight/scale")
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    values[3] *= 2
    tensor.raw_data = values.tobytes()


def swapped_zero_points(model: onnx.ModelProto) -> None:
    ways = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0].endswith(("0.mlp.gate_proj.weight", "0.mlp.up_proj.weight"))
    ]
    ways[0].input[2], ways[1].input[2] = ways[1].input[2], ways[0].input[2]


def an_adapter(model: onnx.ModelProto) -> None:
    product = next(node for node in model.graph.node if node.op_type == "MatMul" and "dequantized" in node.input[1])
    matrix = onnx.numpy_helper.from_array(np.full((64, 64), 1e-3, np.float32), "extra")
    model.graph.initializer.append(matrix)
    index = list(model.graph.node).index(product)
    model.graph.node.insert(index, onnx.helper.make_node("MatMul", [product.input[0], "extra"], ["extra/output"]))
    product.input[0] = "extra/output"


@pytest.mark.parametrize(
    ("change", "name", "subject"),
    [
        (flipped_bit, "as the checkpoint recorded it", "model.layers.1.mlp.down_proj.weight codes"),
        (another_scale, "as the checkpoint recorded it", "model.layers.0.self_attn.q_proj.weight scale"),
        (swapped_zero_points, "unpacked as codes, zero points and scales say", "mlp.gate_proj.weight as read by"),
        (an_adapter, "no adapter in the graph", "model"),
    ],
)
def test_what_was_changed_is_found_and_named(
    run: RunFolder, tmp_path: Path, change: Change, name: str, subject: str
) -> None:
    folder = shutil.copytree(run.product("onnx"), tmp_path / "onnx")
    model = onnx.load(folder / "model.onnx")
    change(model)
    for file in ("model.onnx", "model.onnx.data"):
        (folder / file).unlink()
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    failed: list[Check] = [check for check in verify_onnx(folder, run.checkpoint) if not check.passed]
    assert any(check.name == name and subject in check.subject for check in failed)
    assert any(check.name == "logits as the checkpoint's" for check in failed)


def test_the_command_converts_and_proves_it(run: RunFolder, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "product"
    done = ovexport("convert", run.checkpoint.path, "--model", tiny_model, "--out", out, "--format", "onnx")
    assert done.returncode == 0, done.stderr
    proof = ovexport("verify", out, "--checkpoint", run.checkpoint.path)
    assert proof.returncode == 0, proof.stderr
    assert "PARTLY PROVEN" in proof.stdout
    line = refused(ovexport("verify", out), 2)
    assert "give --checkpoint" in line
    line = refused(ovexport("bench", out), 4)
    assert "an ONNX model, which is proven by ovexport verify and measured by no command" in line


def test_what_onnx_can_not_hold_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    floats = of(tiny_model, method="qalora", mode="int4_asym_f16zp", rank=2)
    with pytest.raises(UnsupportedModelError, match="its zero points are float16, and ONNX's are codes"):
        services.run(floats, tmp_path / "run")
    with pytest.raises(UnsupportedModelError, match="its adapter lies beside the codes"):
        services.run(of(tiny_model, method="lora"), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()
    with pytest.raises(RecipeError, match='lacks "openvino"'):
        recipe.parse(tiny_values(tiny_model) | {"convert": {"formats": ["onnx"]}}, base=REPOSITORY, origin="onnx")


def test_a_missing_package_is_named_with_its_cure(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ovexport\[onnx\]"'):
        OnnxExporter().check(run.checkpoint.manifest.layers)
