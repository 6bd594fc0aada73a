"""What hides from a proof that looks at the outermost graph, at one reader of a weight, or at bytes alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from conftest import COMMON, save_tiny_model
from openvino import opset13 as opset
from shapes import convert_moved
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from ovexport.artifacts import IR, RunFolder
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.openvino.graph import read_graph, weights
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.reports import VerificationReport
from ovexport.verify import verify

EMBEDDING = "model.embed_tokens.weight"


def failures(report: VerificationReport) -> str:
    return "\n".join(f"{check.name}: {check.subject}: {check.detail}" for check in report.checks if not check.passed)


def proof(run: RunFolder, **changes: Any) -> VerificationReport:
    given = {"checkpoint": run.checkpoint, "base": run.ir("bf16"), "twin": run.ir("plain"), "runtime": False}
    return verify(run.ir("int4"), **(given | changes))


def rewrite(ir: IR, change: Callable[[ov.Model], None]) -> None:
    """Change an IR's graph in place; ovexport.json, which would tell, goes."""
    graph = read_graph(ir)
    change(graph)
    graph.validate_nodes_and_infer_types()
    ov.save_model(graph, ir.path / "changed.xml", compress_to_fp16=False)
    del graph
    for suffix in ("xml", "bin"):
        (ir.path / f"changed.{suffix}").replace(ir.path / f"openvino_model.{suffix}")
    (ir.path / "ovexport.json").unlink(missing_ok=True)


def branch(compute: Callable[[ov.Output], Any]) -> tuple[ov.Model, Any]:
    given = opset.parameter([-1, -1, -1], np.float32)
    return ov.Model([opset.result(compute(given.output(0)))], [given], "branch"), given


def choice(value: ov.Output, then: Callable[[ov.Output], Any], otherwise: Callable[[ov.Output], Any]) -> ov.Output:
    """An If with these two branches."""
    operation = opset.if_op(opset.constant(True).output(0))
    (first, given), (second, other) = branch(then), branch(otherwise)
    operation.set_then_body(first)
    operation.set_else_body(second)
    operation.set_input(value, given, other)
    operation.set_friendly_name("choice")
    return operation.set_output(first.results[0], second.results[0])


def repeated(
    value: ov.Output,
    compute: Callable[[ov.Output, ov.Output], Any],
    *,
    rounds: int = 3,
    crossed: bool = False,
) -> ov.Output:
    """A Loop whose body computes from what goes around and from what stays the same; `crossed` exchanges the two."""
    given, same = (opset.parameter([-1, -1, -1], np.float32) for _ in range(2))
    results = [opset.result(opset.constant(np.array([True]))), opset.result(compute(given.output(0), same.output(0)))]
    operation = opset.loop(opset.constant(np.array(rounds)).output(0), opset.constant(np.array(True)).output(0))
    operation.set_function(ov.Model(results, [given, same], "round"))
    operation.set_special_body_ports([-1, 0])
    around, staying = (same, given) if crossed else (given, same)
    operation.set_merged_input(around, value, results[1].output(0))
    operation.set_invariant_input(staying, doubled(value).output(0))
    operation.set_friendly_name("rounds")
    return operation.get_iter_value(results[1].output(0), -1)


def scanned(value: ov.Output, *, backward: bool = False) -> ov.Output:
    """A TensorIterator over the tokens, forth or back."""
    (body, given), operation = branch(opset.relu), opset.tensor_iterator()
    operation.set_body(body)
    start, stride, end = (-1, -1, 0) if backward else (0, 1, -1)
    operation.set_sliced_input(given, value, start, stride, 1, end, 1)
    operation.set_friendly_name("scan")
    return operation.get_concatenated_slices(body.results[0].output(0), 0, 1, 1, -1, 1)


def spliced(wrap: Callable[[ov.Output], ov.Output]) -> Callable[[ov.Model], None]:
    """Let the logits go through something more."""

    def change(graph: ov.Model) -> None:
        end = graph.get_results()[0]
        names = end.input_value(0).get_names()
        wrapped = wrap(end.input_value(0))
        end.input_value(0).get_node().output(0).set_names(set())
        wrapped.get_node().output(0).set_names(names)
        end.input(0).replace_source_output(wrapped)

    return change


def doubled(value: ov.Output) -> Any:
    return opset.multiply(value, np.float32(2))


def packed(value: ov.Output) -> Any:
    """A product with a packed matrix that has the name of another one."""
    codes = opset.constant(np.ones((2048, 2048), np.int8), ov.Type.u8)
    codes.set_friendly_name(EMBEDDING)
    scaled = opset.multiply(opset.convert(codes, "f16"), opset.constant(np.full((2048, 1), 2**-11, np.float16)))
    return opset.matmul(value, opset.convert(scaled, "f32"), False, True)


def adapted(value: ov.Output) -> Any:
    added = opset.add(value, value)
    added.set_friendly_name("lora_B")
    return added


def nested(compute: Callable[[ov.Output, ov.Output], Any]) -> Callable[[ov.Output], ov.Output]:
    """A Loop in an If."""
    return lambda value: choice(value, opset.relu, lambda inner: opset.relu(repeated(inner, compute)))


def honest_choice(value: ov.Output) -> ov.Output:
    return choice(value, opset.relu, doubled)


def honest_rounds(value: ov.Output) -> ov.Output:
    return repeated(value, opset.add)


def with_graphs_inside(run: RunFolder, honest: Callable, product: Callable) -> RunFolder:
    """A run whose baseline and twin compute something more, and its product something that may differ."""
    for name, wrap in (("bf16", honest), ("plain", honest), ("int4", product)):
        rewrite(run.ir(name), spliced(wrap))
    return run


@pytest.mark.parametrize("honest", [honest_choice, honest_rounds, scanned])
def test_graphs_inside_operations_are_proven(run_copy: RunFolder, honest: Callable) -> None:
    lines = failures(proof(with_graphs_inside(run_copy, honest, honest))).splitlines()
    # The operations that are added here have names that OpenVINO makes up, others in each file.
    assert [line for line in lines if not line.startswith("graph's file as the twin's")] == []


@pytest.mark.parametrize(
    ("honest", "product", "says"),
    [
        (
            honest_choice,
            lambda value: choice(value, opset.relu, opset.negative),
            "wired as the {}: model: first at choice/",
        ),
        (honest_choice, lambda value: choice(value, doubled, opset.relu), "wired as the {}: model: first at choice"),
        (
            honest_choice,
            lambda value: choice(value, opset.relu, packed),
            f"each weight stands once: model: {EMBEDDING}",
        ),
        (honest_choice, lambda value: choice(value, adapted, doubled), "no adapter in the graph: model: choice/lora_B"),
        (nested(opset.add), nested(opset.subtract), "wired as the {}: model: first at choice/rounds/Subtract"),
        (honest_rounds, lambda value: repeated(value, opset.subtract), "wired as the {}: model: first at rounds/"),
        (honest_rounds, lambda value: repeated(value, opset.add, rounds=4), "all other constants as the {}'s"),
        (
            honest_rounds,
            lambda value: repeated(value, opset.add, crossed=True),
            "wired as the {}: model: first at rounds",
        ),
        (scanned, lambda value: scanned(value, backward=True), "wired as the {}: model: first at scan"),
    ],
)
def test_another_graph_inside_an_operation_is_found_and_named(
    run_copy: RunFolder, honest: Callable, product: Callable, says: str
) -> None:
    text = failures(proof(with_graphs_inside(run_copy, honest, product)))
    for other in ("base IR", "twin"):
        assert says.format(other) in text


def test_graphs_that_lie_too_deep_in_each_other_are_refused_by_name(run_copy: RunFolder) -> None:
    def deep(value: ov.Output, levels: int = 10) -> ov.Output:
        return choice(value, lambda inner: deep(inner, levels - 1) if levels else doubled(inner), doubled)

    rewrite(run_copy.ir("int4"), spliced(deep))
    with pytest.raises(ArtifactError, match=r"choice/choice/.*more than 8 graphs inside each other"):
        proof(run_copy)


def reader_of(graph: ov.Model, name: str, kind: str) -> Any:
    """The operation of a kind that reads a weight."""
    weight = next(weight for weight in weights(graph) if weight.name == name)
    reader = weight.consumer_names[weight.consumers.index(kind)]
    return next(node for node in graph.get_ops() if node.get_friendly_name() == reader)


@pytest.mark.parametrize("kind", ["Gather", "MatMul"])
@pytest.mark.parametrize("part", ["scale", "zero_point"])
def test_one_reader_of_a_tied_embedding_with_a_grid_of_its_own_is_found(
    run_copy: RunFolder, kind: str, part: str
) -> None:
    """The other reader keeps the honest one; types, shapes and names are all the same."""

    def change(graph: ov.Model) -> None:
        weight = next(weight for weight in weights(graph) if weight.name == EMBEDDING)
        user = reader_of(graph, EMBEDDING, kind)
        port = 0 if kind == "Gather" else 1
        values = {name: np.array(getattr(weight, name).data) for name in ("codes", "scale", "zero_point")}
        values[part][7] += 1
        constants = {}
        for name, value in values.items():
            constants[name] = weight.codes if name == "codes" else opset.constant(value)
            constants[name].set_friendly_name(getattr(weight, name).get_friendly_name())
        shifted = opset.subtract(opset.convert(weight.codes, "f16"), opset.convert(constants["zero_point"], "f16"))
        scaled = opset.multiply(shifted, constants["scale"])
        user.input(port).replace_source_output(opset.convert(scaled, "f32").output(0))

    rewrite(run_copy.ir("int4"), change)
    reader = " as read by "
    for given in ({"twin": None}, {"twin": None, "base": None}):
        text = failures(proof(run_copy, **given))
        assert f"each weight stands once: model: {EMBEDDING}{reader}" in text
        assert f"as the checkpoint recorded it: {EMBEDDING} {part}{reader}" in text
    assert f"codes recomputed from the checkpoint: {EMBEDDING}{reader}" in failures(proof(run_copy, twin=None))


def test_a_reader_that_takes_more_than_the_weight_is_found_without_twin_and_base(run_copy: RunFolder) -> None:
    def change(graph: ov.Model) -> None:
        gather = reader_of(graph, EMBEDDING, "Gather")
        louder = opset.multiply(gather.input_value(0), np.float32(2))
        louder.set_friendly_name("louder")
        gather.input(0).replace_source_output(louder.output(0))

    rewrite(run_copy.ir("int4"), change)
    text = failures(proof(run_copy, twin=None, base=None))
    assert f"packed weights are read whole: model: {EMBEDDING}, read by louder" in text


def with_equal_matrices(folder: Path, config: PretrainedConfig, dtype: torch.dtype, values: dict[str, float]) -> Path:
    """A tiny model whose matrices of these names are the same number throughout."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, config, dtype), dtype=dtype)
    for name, parameter in model.named_parameters():
        for part, value in values.items():
            if name.endswith(f"{part}.weight"):
                torch.nn.init.constant_(parameter, value)
    model.save_pretrained(folder)
    return folder


EQUAL = {
    # Blocks as an expansion of depth adds them; k_proj is square here, and so its own transpose.
    "tied": (LlamaConfig, COMMON | {"num_key_value_heads": 4, "tie_word_embeddings": True}, torch.bfloat16),
    "untied": (LlamaConfig, COMMON | {"num_key_value_heads": 4, "tie_word_embeddings": False}, torch.float32),
    "transposed": (
        GPT2Config,
        {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128},
        torch.float32,
    ),
}
ZEROS = {"o_proj": 0.0, "down_proj": 0.0, "k_proj": 0.5, "c_fc": 0.0, "mlp.c_proj": 0.0, "attn.c_proj": 0.25}


@pytest.mark.run
@pytest.mark.parametrize("kind", EQUAL)
def test_matrices_with_equal_values_are_told_apart_the_whole_way(kind: str, tmp_path: Path) -> None:
    config, values, dtype = EQUAL[kind]
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    folder = with_equal_matrices(tmp_path / "model", config(**values | ends), dtype, ZEROS)
    run = convert_moved(ModelSpec(id=str(folder)), tmp_path, CompressSpec(group_size=16, rank=8, rounding="nearest"))
    report = proof(run, runtime=True)
    assert report.passed, failures(report)
    assert report.summary.packed_int4 == (8 if kind == "transposed" else 14)
    last = "mlp.c_proj" if kind == "transposed" else "down_proj"
    rewrite(run.ir("int4"), lambda graph: exchange(graph, last))
    assert "wired as the base IR: model: first at" in failures(proof(run, twin=None))


def exchange(graph: ov.Model, part: str) -> None:
    """Let two MatMuls whose names hold a part read each other's weights."""
    users = [
        node
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "MatMul" and part in node.get_friendly_name()
    ]
    one, other = users
    first, second = one.input_value(1), other.input_value(1)
    one.input(1).replace_source_output(second)
    other.input(1).replace_source_output(first)


@pytest.mark.run
def test_matrices_that_the_tracer_computes_as_one_are_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(**COMMON, tie_word_embeddings=True)
    folder = with_equal_matrices(tmp_path / "model", config, torch.float32, {"k_proj": 0.0, "v_proj": 0.0})
    with pytest.raises(UnsupportedModelError, match=r"v_proj\.weight: its weights equal those of .*k_proj\.weight"):
        convert_moved(ModelSpec(id=str(folder)), tmp_path, CompressSpec(group_size=16, rank=8, rounding="nearest"))


def test_what_is_unpacked_by_too_much_is_no_weight_and_takes_no_time() -> None:
    """A shape computed by 60 operations that each read the one before twice would be 2^60 words."""
    shape = opset.constant(np.array([64, 64]))
    for _ in range(60):
        shape = opset.maximum(shape, shape)
    matrix = opset.convert(opset.constant(np.ones((64, 64), np.float16)), "f32")
    given = opset.parameter([-1, 64], np.float32)
    product = opset.matmul(given, opset.reshape(matrix, shape, False), False, True)
    assert weights(ov.Model([opset.result(product)], [given], "model")) == ()
