"""Nothing passes that should not: each damage is found and named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from conftest import COMMON, save_tiny_model
from graphs import rewrite
from openvino import opset13 as opset
from shapes import moved
from transformers import LlamaConfig

from ovexport.artifacts import IR, Checkpoint, PreparedData, RunFolder
from ovexport.compress import compress
from ovexport.convert import convert
from ovexport.errors import ArtifactError, RecipeError
from ovexport.openvino.graph import raw, read_graph, type_name, weights
from ovexport.openvino.runtime import ExecutedNode
from ovexport.recipe import CompressSpec, ConvertSpec, ModelSpec
from ovexport.reports import VerificationReport
from ovexport.storage.tensorfile import write_tensors
from ovexport.strip import strip
from ovexport.trace.stage import trace
from ovexport.verify import verify
from ovexport.verify.executed import no_float_weights

LAYER = "model.layers.0.mlp.down_proj.weight"


def proof(run: RunFolder, **changes) -> VerificationReport:
    given = {"checkpoint": run.checkpoint, "base": run.ir("bf16"), "twin": run.ir("plain"), "runtime": False}
    return verify(run.ir("int4"), **(given | changes))


def failures(report: VerificationReport) -> str:
    return "\n".join(f"{check.name}: {check.subject}: {check.detail}" for check in report.checks if not check.passed)


def test_a_finished_run_is_proven(finished_run: RunFolder) -> None:
    report = proof(finished_run, runtime=True)
    assert report.passed, failures(report)
    summary = report.summary
    assert (summary.linear_layers, summary.packed_int4, summary.packed_int8, summary.float) == (15, 14, 1, 0)
    assert (summary.code_mismatches, summary.scale_mismatches, summary.zero_point_mismatches) == (0, 0, 0)
    assert (summary.adapter_nodes, summary.operators_beyond_twin) == (0, 0)
    assert summary.runtime_packed_linears == 15
    assert summary.weight_bytes == summary.predicted_weight_bytes
    assert summary.reason is None


def flip_bit(ir: IR, choose: Callable[[ov.Model], Any]) -> None:
    """Flip one bit in the middle of a constant, in the .bin."""
    graph = read_graph(ir)
    needle = raw(choose(graph)).tobytes()
    del graph
    content = bytearray(ir.bin.read_bytes())
    assert content.count(needle) == 1
    content[content.index(needle) + len(needle) // 2] ^= 0x01
    ir.bin.write_bytes(content)


@pytest.mark.parametrize("part", ["codes", "scale", "zero_point"])
def test_a_flipped_bit_in_the_weights_is_found_and_named(run_copy: RunFolder, part: str) -> None:
    flip_bit(
        run_copy.ir("int4"),
        lambda graph: next(getattr(weight, part) for weight in weights(graph) if weight.name == LAYER),
    )
    report = proof(run_copy)
    assert not report.passed
    assert f"as the checkpoint recorded it: {LAYER} {part}" in failures(report)
    assert f"codes recomputed from the checkpoint: {LAYER}" in failures(report)


def test_a_flipped_bit_in_a_norm_is_found(run_copy: RunFolder) -> None:
    flip_bit(
        run_copy.ir("int4"),
        lambda graph: next(
            node
            for node in graph.get_ordered_ops()
            if node.get_type_name() == "Constant"
            and type_name(node) in ("f32", "bf16")
            and tuple(node.get_output_shape(0)) == (1, 1, 64)
        ),
    )
    assert "all other constants as the base IR's: model: model.layers.1.input_layernorm.weight" in failures(
        proof(run_copy)
    )


def test_a_layer_left_float_is_found(run_copy: RunFolder) -> None:
    def change(graph: ov.Model) -> None:
        weight = next(weight for weight in weights(graph) if weight.name == LAYER)
        multiply = weight.codes
        while multiply.get_type_name() != "MatMul":
            source, multiply = multiply, next(iter(multiply.output(0).get_target_inputs())).get_node()
        floats = opset.constant(np.ones((64, 128), np.float32))
        floats.set_friendly_name("left_float")
        multiply.input(1).replace_source_output(floats.output(0))
        assert source is not None

    rewrite(run_copy.ir("int4"), change)
    text = failures(proof(run_copy))
    assert f"layer packed as promised: {LAYER}" in text
    assert "matrices left in floating point: model: left_float" in text


def test_an_adapter_left_in_the_graph_is_found(run_copy: RunFolder) -> None:
    def change(graph: ov.Model) -> None:
        weight = next(weight for weight in weights(graph) if weight.name == LAYER)
        user = next(node for node in graph.get_ordered_ops() if node.get_friendly_name() == weight.consumer_names[0])
        down = opset.matmul(user.input_value(0), opset.constant(np.ones((8, 128), np.float32)), False, True)
        up = opset.matmul(down, opset.constant(np.zeros((64, 8), np.float32)), False, True)
        added = opset.add(user.output(0), up)
        for target in user.output(0).get_target_inputs():
            if target.get_node() != added:
                target.replace_source_output(added.output(0))

    rewrite(run_copy.ir("int4"), change)
    report = proof(run_copy)
    assert report.summary.adapter_nodes >= 2
    assert report.summary.operators_beyond_twin == 3
    assert "no adapter in the graph" in failures(report)
    assert "same operators as the twin" in failures(report)


def test_two_swapped_layers_are_found(run_copy: RunFolder) -> None:
    def change(graph: ov.Model) -> None:
        by_name = {weight.name: weight for weight in weights(graph)}
        first, second = (by_name[f"model.layers.{index}.mlp.down_proj.weight"] for index in (0, 1))
        first.codes.set_friendly_name("swap")
        second.codes.set_friendly_name(first.name)
        first.codes.set_friendly_name(second.name)

    rewrite(run_copy.ir("int4"), change)
    text = failures(proof(run_copy))
    assert "model.layers.0.mlp.down_proj.weight" in text
    assert "model.layers.1.mlp.down_proj.weight" in text


def test_the_twin_passed_off_as_the_product_is_found(finished_run: RunFolder) -> None:
    report = verify(finished_run.ir("plain"), checkpoint=finished_run.checkpoint, base=finished_run.ir("bf16"))
    changed = finished_run.checkpoint.manifest.digests != finished_run.compressed.manifest.digests
    assert report.passed != changed


def test_a_changed_tokenizer_is_found(run_copy: RunFolder) -> None:
    path = run_copy.ir("int4").path / "tokenizer.json"
    path.write_text(path.read_text().replace("Once", "Ounce", 1))
    assert "tokenizer and configurations as the twin's: files: tokenizer.json" in failures(proof(run_copy))


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_truncated_ir_is_refused(run_copy: RunFolder, name: str, kept: float) -> None:
    path = run_copy.ir("int4").path / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ArtifactError, match="not a readable OpenVINO IR"):
        proof(run_copy)


def test_a_missing_or_corrupt_checkpoint_is_refused(run_copy: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"checkpoint\.json: missing"):
        proof(run_copy, checkpoint=Checkpoint(tmp_path / "none"))
    path = run_copy.checkpoint.path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        proof(run_copy)


def test_weights_of_another_base_model_are_refused(run_copy: RunFolder) -> None:
    with pytest.raises(ArtifactError, match="does not hold the weights this checkpoint was tuned on"):
        proof(run_copy, base=run_copy.ir("plain"))


def test_without_a_checkpoint_the_graph_alone_is_judged_and_the_report_says_so(finished_run: RunFolder) -> None:
    report = verify(finished_run.ir("int4"))
    assert report.passed
    assert report.summary.code_mismatches is None
    assert "no checkpoint is given" in (report.summary.reason or "")
    assert {row.element_type for row in report.layers} == {"u4", "u8"}
    baseline = verify(finished_run.ir("bf16"), runtime=False)
    assert baseline.summary.float == baseline.summary.linear_layers
    assert baseline.summary.bits_per_weight == 16


def test_converting_twice_gives_the_same_bytes(finished_run: RunFolder, tmp_path: Path) -> None:
    again = convert(finished_run.ir("bf16"), finished_run.packed("int4"), tmp_path / "again")
    first = finished_run.ir("int4")
    assert (again.xml.read_bytes(), again.bin.read_bytes()) == (first.xml.read_bytes(), first.bin.read_bytes())


def test_no_operation_of_a_product_has_a_name_that_openvino_made_up_while_converting(finished_run: RunFolder) -> None:
    base, product = (read_graph(finished_run.ir(name)) for name in ("bf16", "int4"))
    of_base = {node.get_friendly_name() for node in base.get_ops()}
    added = {node.get_friendly_name() for node in product.get_ops()} - of_base
    layers = tuple(layer.name for layer in finished_run.checkpoint.manifest.packed)
    assert added
    assert all(name.startswith(layers) for name in added)


@pytest.mark.parametrize("name", ["generation_config.json", "additional_chat_templates/tool.jinja"])
def test_a_file_that_product_and_twin_both_lost_is_found_beside_the_base(run_copy: RunFolder, name: str) -> None:
    lost = run_copy.ir("bf16").path / name
    lost.parent.mkdir(exist_ok=True)
    lost.write_text("{}")
    for model in ("plain", "int4"):
        (run_copy.ir(model).path / name).unlink(missing_ok=True)
    report = verify(
        run_copy.ir("int4"),
        checkpoint=run_copy.checkpoint,
        base=run_copy.ir("bf16"),
        twin=run_copy.ir("plain"),
        runtime=False,
    )
    found = {check.name: check for check in report.checks}
    assert found["tokenizer and configurations as the twin's"].passed
    assert found["tokenizer and configurations as the base IR's"].detail == name


def test_converting_takes_folders_over(run_copy: RunFolder, tmp_path: Path) -> None:
    template = run_copy.ir("bf16").path / "additional_chat_templates" / "tool.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    product = convert(run_copy.ir("bf16"), run_copy.packed("int4"), tmp_path / "int4")
    assert (product.path / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
    assert product.manifest is not None
    assert "additional_chat_templates/tool.jinja" in product.manifest.files


def exchange_inputs(graph: ov.Model, kind: str, first: str, second: str) -> None:
    """Let two operations of a kind, known by a part of their names, read each other's second input."""
    nodes = [node for node in graph.get_ordered_ops() if node.get_type_name() == kind]
    one, other = (next(node for node in nodes if part in node.get_friendly_name()) for part in (first, second))
    left, right = one.input_value(1), other.input_value(1)
    one.input(1).replace_source_output(right)
    other.input(1).replace_source_output(left)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        ("layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"),
    ],
)
def test_weights_that_feed_the_wrong_place_are_found(run_copy: RunFolder, first: str, second: str) -> None:
    rewrite(run_copy.ir("int4"), lambda graph: exchange_inputs(graph, "MatMul", first, second))
    text = failures(proof(run_copy))
    assert "wired as the twin: model: first at" in text
    assert "wired as the base IR: model: first at" in text


def test_a_stranger_among_the_files_is_found(run_copy: RunFolder) -> None:
    (run_copy.ir("int4").path / "adapter_model.safetensors").write_bytes(b"")
    assert "tokenizer and configurations as the twin's: files: adapter_model.safetensors" in failures(proof(run_copy))


@pytest.mark.parametrize("damage", ["digests", "weight_digests"])
def test_a_manifest_without_a_layer_is_refused(run_copy: RunFolder, damage: str) -> None:
    path = run_copy.checkpoint.path / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest[damage][LAYER]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="its digests are not of its layers"):
        proof(run_copy)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def traced(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, IR]:
    """A tiny model of a dtype and its baseline IR."""
    folder = tmp_path_factory.mktemp("traced")
    config = LlamaConfig(**COMMON, tie_word_embeddings=False, initializer_range=0.1)
    model = ModelSpec(id=str(save_tiny_model(folder / "model", config, request.param)))
    return model, trace(model, ConvertSpec(), folder / "bf16")


@pytest.mark.run
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("active_rank", [None, 3])
def test_whatever_is_tuned_is_what_ships(traced, mode, group_size, active_rank, tmp_path: Path) -> None:
    """Every dtype, mode, group size and format, the INT8 embedding and head of an untied model included."""
    model, base = traced
    nls = {"format": "fq_lora_nls", "rank_space": (8, 4)} if active_rank else {"rank": 8}
    spec = CompressSpec(mode=mode, group_size=group_size, rounding="nearest", **nls)
    start = compress(model, spec, PreparedData(tmp_path), 0, tmp_path / "start")
    checkpoint = moved(start, model, tmp_path / "checkpoint", active_rank)
    product = convert(base, strip(checkpoint, base, tmp_path / "packed"), tmp_path / "int4")
    report = verify(product, checkpoint=checkpoint, base=base, runtime=False)
    assert report.passed, failures(report)
    summary = report.summary
    assert (summary.code_mismatches, summary.scale_mismatches, summary.zero_point_mismatches) == (0, 0, 0)
    assert (summary.packed_int4, summary.packed_int8) == (14, 1)
    if active_rank:  # the largest rank coming back must not pass
        whole = moved(start, model, tmp_path / "whole")
        assert verify(product, checkpoint=whole, base=base, runtime=False).summary.code_mismatches


def test_the_logits_recorded_at_the_end_of_tuning_are_the_irs(run_copy: RunFolder) -> None:
    path = run_copy.checkpoint.path / "reference.safetensors"
    reference = {name: np.array(value) for name, value in run_copy.checkpoint.reference.items()}
    report = proof(run_copy, runtime=True)
    error = next(check for check in report.checks if check.name == "logits as the checkpoint's")
    assert 0 < error.value < error.limit / 4
    reference["logits"][0, 3] += 10 * error.limit * np.ptp(reference["logits"][0, 3]) * np.eye(1, 2048, 7)[0]
    reference["logits"][0, 5, 11] = reference["logits"][0, 5].max() * 1.5
    write_tensors(reference, path)
    text = failures(proof(run_copy, runtime=True))
    assert "logits as the checkpoint's: largest relative error: more than float32 rounding can explain" in text
    assert "likeliest token as the checkpoint's: 512 positions: first at sequence 0, position 5" in text
    assert "made from this checkpoint: files: reference.safetensors" in text
    path.unlink()
    assert "no reference logits" in (proof(run_copy, runtime=True).summary.reason or "")


def test_logits_that_are_not_finite_never_pass(run_copy: RunFolder) -> None:
    reference = {name: np.array(value) for name, value in run_copy.checkpoint.reference.items()}
    reference["logits"][0, 3, 0] = np.nan
    write_tensors(reference, run_copy.checkpoint.path / "reference.safetensors")
    text = failures(proof(run_copy, runtime=True))
    assert "logits as the checkpoint's" in text
    assert "likeliest token as the checkpoint's" in text


def test_a_weight_in_floating_point_in_the_executed_graph_is_found(finished_run: RunFolder) -> None:
    found = weights(read_graph(finished_run.ir("int4")))
    packed = ExecutedNode(
        layer_type="FullyConnected",
        originals=("a",),
        constant_inputs=(("u4", (64, 128)), ("f32", (64, 4)), ("u4", (64, 4))),
    )
    unpacked = ExecutedNode(layer_type="FullyConnected", originals=("b",), constant_inputs=(("f32", (64, 128)),))
    assert no_float_weights([packed], found).passed
    check = no_float_weights([packed, unpacked], found)
    assert (check.passed, check.value, check.detail) == (False, 1, "1 of 8192 elements")


def test_another_group_size_and_another_checkpoint_are_found(run_copy: RunFolder, tmp_path: Path) -> None:
    model = ModelSpec(id=run_copy.checkpoint.manifest.model_id)
    other = compress(model, CompressSpec(group_size=16, rank=8), run_copy.data, 0, tmp_path / "other")
    report = proof(run_copy, checkpoint=other, twin=None)
    text = failures(report)
    assert f"layer packed as promised: {LAYER}" in text
    assert "made from this checkpoint: files: adapters.safetensors, checkpoint.json" in text
    assert report.summary.code_mismatches


def test_files_that_convert_did_not_write_so_are_found(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    content = bytearray((ir.path / "openvino_tokenizer.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (ir.path / "openvino_tokenizer.bin").write_bytes(content)
    (ir.path / "extra.txt").write_text("")
    report = verify(ir, runtime=False)
    assert "files as convert wrote them: files: openvino_tokenizer.bin, extra.txt was added" in failures(report)


def test_what_cant_be_read_is_blamed_on_the_file_that_changed(run_copy: RunFolder) -> None:
    path = run_copy.checkpoint.path / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["weight_digests"][LAYER] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"does not hold the weights.*changed since convert: checkpoint\.json"):
        proof(run_copy)


@pytest.mark.parametrize(
    ("mode", "options", "types"),
    [
        ("INT8_ASYM", {}, {"u8"}),
        ("INT8_SYM", {}, {"i8"}),
        ("INT4_SYM", {"ratio": 0.5, "group_size": 32}, {"i4", "u8"}),
        ("INT4_ASYM", {"ratio": 1.0, "group_size": 32, "all_layers": True}, {"u4"}),
        ("NF4", {"ratio": 1.0, "group_size": 32}, {"nf4", "u8"}),
    ],
)
def test_an_ir_of_another_tool_is_described(finished_run: RunFolder, mode, options, types, tmp_path: Path) -> None:
    import nncf

    graph = read_graph(finished_run.ir("bf16"))
    ov.save_model(
        nncf.compress_weights(graph, mode=nncf.CompressWeightsMode[mode], **options), tmp_path / "openvino_model.xml"
    )
    report = verify(IR(tmp_path))
    assert report.passed, failures(report)
    assert {row.element_type for row in report.layers} == types
    assert report.summary.float == 0
    for row in report.layers:
        beyond = row.element_type in ("u8", "i8")
        assert (row.note is not None) == beyond
        assert row.bits_per_weight > 8 if beyond else 4 < row.bits_per_weight < 5
        assert row.group_size == 32 or beyond
    assert report.summary.bytes_read_per_token == sum(row.weight_bytes for row in report.layers)


def embedding_replaced(graph: ov.Model) -> None:
    """Let the embedding read floats of its own under the packed weight's name; the output embedding stays honest."""
    weight = next(weight for weight in weights(graph) if weight.element_type == "u8")
    gather = next(node for node in graph.get_ordered_ops() if node.get_friendly_name() in weight.consumer_names)
    floats = opset.constant(np.ones((2049, 64), np.float32))
    floats.set_friendly_name(weight.name)
    gather.input(0).replace_source_output(floats.output(0))


def scale_turned(graph: ov.Model) -> None:
    """Put the scale's bytes through a Transpose."""
    weight = next(weight for weight in weights(graph) if weight.name == LAYER)
    rows, groups, _ = weight.shape
    values = raw(weight.scale).view(np.float16).reshape(groups, rows, 1).copy()
    other = opset.constant(values)
    other.set_friendly_name(weight.scale.get_friendly_name())
    turned = opset.transpose(other, np.array([1, 0, 2], np.int64))
    for target in weight.scale.output(0).get_target_inputs():
        target.replace_source_output(turned.output(0))


def options_changed(graph: ov.Model) -> None:
    graph.set_rt_info("u4", ["runtime_options", "KV_CACHE_PRECISION"])


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (embedding_replaced, "each weight stands once: model: model.embed_tokens.weight"),
        (scale_turned, f"layer packed as promised: {LAYER}"),
        (options_changed, "runtime options as the base IR's"),
    ],
)
def test_what_computes_something_else_from_the_same_bytes_is_found(run_copy: RunFolder, tamper, said: str) -> None:
    ir = run_copy.ir("int4")
    rewrite(ir, tamper)
    (ir.path / "ovexport.json").unlink()  # whoever tampers can remove or rewrite it
    report = proof(run_copy, twin=None)
    assert said in failures(report)
    assert "no ovexport.json" in (report.summary.reason or "")


def test_another_grouping_of_the_same_bytes_is_found(run_copy: RunFolder) -> None:
    """Only declared shapes change: the scales belong to other inputs then, in a runtime that goes by the graph."""
    xml = run_copy.ir("int4").xml
    text = xml.read_text()
    for name, shape, other in (
        (LAYER, "64, 4, 32", "64, 32, 4"),
        (f"{LAYER}/scale", "64, 4, 1", "64, 1, 4"),
        (f"{LAYER}/zero_point", "64, 4, 1", "64, 1, 4"),
    ):
        begin = text.index(f'name="{name}" type="Const"')
        assert shape in text[begin : begin + 200]
        text = text[:begin] + text[begin:].replace(f'shape="{shape}"', f'shape="{other}"', 1)
    xml.write_text(text)
    assert f"layer packed as promised: {LAYER}" in failures(proof(run_copy, twin=None))


@pytest.mark.parametrize(
    "reference",
    [
        {"token_ids": np.zeros((0, 64), np.int32), "logits": np.zeros((0, 64, 2048), np.float32)},
        {"token_ids": np.zeros((1, 64), np.int32), "logits": np.zeros((1, 32, 2048), np.float32)},
        {"token_ids": np.zeros((64,), np.int32), "logits": np.zeros((64, 2048), np.float32)},
        {"token_ids": np.zeros((1, 64), np.float32), "logits": np.zeros((1, 64, 2048), np.float32)},
    ],
)
def test_a_reference_that_is_none_is_refused(run_copy: RunFolder, reference: dict) -> None:
    write_tensors(reference, run_copy.checkpoint.path / "reference.safetensors")
    with pytest.raises(ArtifactError, match=r"are no reference; tune again.*changed since convert: reference"):
        proof(run_copy, runtime=True)


def test_an_ir_is_no_evidence_for_itself(finished_run: RunFolder) -> None:
    for option in ("base", "twin"):
        with pytest.raises(RecipeError, match=f"--{option} .* is the very IR"):
            proof(finished_run, **{option: finished_run.ir("int4")})
    with pytest.raises(RecipeError, match="give --checkpoint too"):
        verify(finished_run.ir("int4"), base=finished_run.ir("bf16"))


def test_what_is_no_language_model_is_refused(run_copy: RunFolder) -> None:
    folder = run_copy.ir("int4").path
    for suffix in ("xml", "bin"):
        (folder / f"openvino_tokenizer.{suffix}").replace(folder / f"openvino_model.{suffix}")
    with pytest.raises(ArtifactError, match=r"openvino_tokenizer|no language model|not a readable"):
        verify(IR(folder), runtime=False)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_checker_written_from_the_readme_finds_the_same_codes(run_copy: RunFolder, damaged: bool) -> None:
    ir, model = run_copy.ir("int4"), run_copy.checkpoint.manifest.model_id
    if damaged:
        flip_bit(ir, lambda graph: next(weight.codes for weight in weights(graph) if weight.name == LAYER))
    checker = Path(__file__).parent / "independent_checker.py"
    command = [sys.executable, "-W", "error", checker, ir.path, run_copy.checkpoint.path, model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = f"{LAYER} differs or is missing: ('{LAYER}', 'u4')\n15 layers, 1 mismatches\n"
    assert (done.returncode, done.stdout) == ((1, expected) if damaged else (0, "15 layers, 0 mismatches\n"))
