import json
import re
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
import pytest
from command_line import ovexport

from ovexport.artifacts import IR, RunFolder
from ovexport.bench import search, search_settings
from ovexport.bench.text import packaged_text
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.openvino.graph import read_graph, runtime_options
from ovexport.openvino.runtime import properties
from ovexport.openvino.runtime_settings import (
    SETTINGS_FILE,
    read_xml_text,
    settings_report,
    undo_settings,
    with_settings,
    without_settings,
    write_settings,
)
from ovexport.pipeline import services
from ovexport.recipe import BenchSpec
from ovexport.reports import SettingsReport
from ovexport.verify import verify

PROMPT = list(range(2, 18))
SPEC = BenchSpec(prompt_tokens=16, output_tokens=3)


def report(ir: IR, **options: str) -> SettingsReport:
    """As a search would have left it, with marked MatMuls."""
    _, written = with_settings(read_xml_text(ir), options, precise=True)
    return SettingsReport(
        trials=(), kl_limit_nats=1.0, chosen={}, written=written, not_written={}, conditions={}, versions={}
    )


@pytest.fixture
def quick_rounds(monkeypatch) -> None:
    monkeypatch.setattr(search, "GROUPS", (64,))
    for name, value in {"SESSIONS": 1, "ROUNDS": 1, "FINAL_SESSIONS": 1, "FINAL_ROUNDS": 1}.items():
        monkeypatch.setattr(search, name, value)


def test_settings_are_in_force_in_a_plain_pipeline_proven_and_undone_to_the_byte(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    before = {file.name: file.read_bytes() for file in ir.path.iterdir()}
    write_settings(ir, report(ir, KV_CACHE_PRECISION="f16", DYNAMIC_QUANTIZATION_GROUP_SIZE="64"))
    compiled = ov.Core().compile_model(read_graph(ir), "CPU")
    found = properties(compiled)
    assert (found["KV_CACHE_PRECISION"], found["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == ("f16", "64")
    assert openvino_genai.LLMPipeline(str(ir.path), "CPU").generate("Once", max_new_tokens=2)
    proof = verify(ir, checkpoint=run_copy.checkpoint, base=run_copy.ir("bf16"), twin=run_copy.ir("plain"))
    assert "carries runtime settings" in proof.notes[0]
    assert proof.verdict == "proven"
    assert [check for check in proof.checks if not check.passed] == []
    undo_settings(ir)
    assert {file.name: file.read_bytes() for file in ir.path.iterdir()} == before
    with pytest.raises(ArtifactError, match="there is nothing to undo"):
        undo_settings(ir)


def test_marked_products_of_matrices_run_in_float32(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    marked, written = with_settings(read_xml_text(ir), {}, precise=True)
    assert marked.count('name="precise"') == len(
        [op for op in read_graph(ir).get_ops() if op.get_type_name() == "MatMul"]
    )
    assert without_settings(marked, written) == read_xml_text(ir)


def test_writing_again_takes_the_place_of_what_was_written(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    before = ir.xml.read_bytes()
    first = report(ir, KV_CACHE_PRECISION="f16")
    write_settings(ir, first)
    write_settings(ir, first.model_copy(update={"written": None}))
    assert ir.xml.read_bytes() == before
    write_settings(ir, report(ir, KV_CACHE_PRECISION="f32"))
    assert runtime_options(read_graph(ir))["KV_CACHE_PRECISION"] == "f32"
    undo_settings(ir)
    assert ir.xml.read_bytes() == before


def test_a_kill_between_the_report_and_the_graph_can_be_undone(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    before = ir.xml.read_bytes()
    write_settings(ir, report(ir, KV_CACHE_PRECISION="f16"))
    ir.xml.write_bytes(before)
    undo_settings(ir)
    assert (ir.xml.read_bytes(), settings_report(ir)) == (before, None)


def test_what_was_changed_behind_the_settings_is_found(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    write_settings(ir, report(ir, KV_CACHE_PRECISION="f16"))
    ir.xml.write_text(ir.xml.read_text().replace('name="precise"', 'name="decisive"', 1))
    with pytest.raises(ArtifactError, match="was changed after its runtime settings"):
        undo_settings(ir)
    checks = verify(ir, checkpoint=run_copy.checkpoint, base=run_copy.ir("bf16"), runtime=False).checks
    assert "files as convert wrote them" in {check.name for check in checks if not check.passed}
    with pytest.raises(UnsupportedModelError, match="no runtime_options"):
        with_settings("<net></net>", {}, precise=False)


@pytest.mark.parametrize(
    "others", ['<ACTIVATIONS_SCALE_FACTOR value="64" />', '<INFERENCE_PRECISION_HINT value="bf16" />']
)
def test_a_forged_report_excuses_nothing_but_settings(run_copy: RunFolder, others: str) -> None:
    ir = run_copy.ir("int4")
    forged = report(ir, KV_CACHE_PRECISION="u4")
    text = read_xml_text(ir)
    block = f'<runtime_options><KV_CACHE_PRECISION value="u4" />{others}</runtime_options>'
    options = dict(re.findall(r'<(\w+) value="(\w+)" />', block))
    written = forged.written.model_copy(update={"block": block, "options": options, "matmul_precision": None})
    ir.xml.write_text(text.replace(written.former_block, block))
    (ir.path / SETTINGS_FILE).write_text(forged.model_copy(update={"written": written}).model_dump_json())
    proof = verify(ir, checkpoint=run_copy.checkpoint, base=run_copy.ir("bf16"), runtime=False)
    failed = {check.name for check in proof.checks if not check.passed}
    assert {"files as convert wrote them", "runtime options as the base IR's"} <= failed


def test_a_forged_report_can_not_hide_an_edited_operation(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    forged, text = report(ir), read_xml_text(ir)
    former = next(line for line in text.splitlines() if 'type="Sigmoid"' in line or 'type="Swish"' in line)
    edited = former.replace("Swish", "Tanh").replace("Sigmoid", "Tanh")
    written = forged.written.model_copy(update={"block": edited, "former_block": former, "matmul_precision": None})
    ir.xml.write_text(text.replace(former, edited))
    (ir.path / SETTINGS_FILE).write_text(forged.model_copy(update={"written": written}).model_dump_json())
    proof = verify(ir, checkpoint=run_copy.checkpoint, base=run_copy.ir("bf16"), runtime=False)
    assert "files as convert wrote them" in {check.name for check in proof.checks if not check.passed}


def test_a_run_goes_on_with_the_settings_in_its_product(run_copy: RunFolder, tiny_recipe) -> None:
    ir = run_copy.ir("int4")
    write_settings(ir, report(ir, KV_CACHE_PRECISION="f16"))
    done: list[tuple[str, bool]] = []
    services.run(tiny_recipe, run_copy.path, resume=True, announce=lambda *stage: done.append(stage))
    assert all(skipped for _, skipped in done)
    assert runtime_options(read_graph(ir))["KV_CACHE_PRECISION"] == "f16"


def test_the_search_measures_what_settings_cost_and_keeps_to_the_limit(finished_run, quick_rounds) -> None:
    ir = finished_run.ir("int4")
    tokens = finished_run.data.tokens("test")[:2].astype(np.int64)
    found = search_settings(ir, SPEC, PROMPT, tokens, kl_limit_nats=10.0)
    usual = found.conditions["defaults"]["INFERENCE_PRECISION_HINT"]
    tried = [trial.settings for trial in found.trials]
    exact = {} if usual == "f32" else {"INFERENCE_PRECISION_HINT": "f32"}
    assert exact | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} in tried
    assert any("KV_CACHE_PRECISION" in settings for settings in tried)
    assert any(settings.get("ATTENTION_BACKEND") == "PA" for settings in tried)
    assert len({tuple(sorted(settings.items())) for settings in tried}) == len(tried)
    without = next(one for one in found.trials if one.settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") == "0")
    assert without.kl_mean_nats < found.conditions["defaults_kl_mean_nats"]
    assert not list(ir.path.parent.glob(".ovexport-*"))
    strict = search_settings(ir, SPEC, PROMPT, tokens, kl_limit_nats=0.0)
    assert (strict.chosen, strict.written) == ({}, None)
    assert all("not timed" in str(trial.reason) for trial in strict.trials if not trial.kept)


@pytest.mark.skipif(
    "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="float32 is the default here"
)
def test_the_best_settings_are_written_where_the_ir_is_the_faster_for_it(
    run_copy: RunFolder, quick_rounds, monkeypatch
) -> None:
    timed = search.Search.timed

    def half_the_time(self, folder, settings, **options):
        times = timed(self, folder, settings, **options)
        wanted = settings == {"INFERENCE_PRECISION_HINT": "f32"} or folder != self.ir.path
        factor = 0.5 if wanted else 2.0
        one = times.output_token.model_copy(update={"median": factor, "ci95": (factor - 0.1, factor + 0.1)})
        return type(times)(first_token=times.first_token, output_token=one)

    monkeypatch.setattr(search.Search, "timed", half_the_time)
    ir = run_copy.ir("int4")
    options = ("--search", "--prompt-tokens", "16", "--output-tokens", "3", "--kl-limit", "10")
    done = ovexport("bench", ir.path, *options)
    assert done.returncode == 0, done.stderr
    assert "written into the IR" in done.stdout
    found = settings_report(ir)
    assert found.chosen["INFERENCE_PRECISION_HINT"] == "f32"
    assert found.written.matmul_precision == "f32"
    assert found.written_kl_mean_nats > 0
    assert read_xml_text(ir).count('name="precise"') > 0
    shown = ovexport("runtime", ir.path, "--json")
    assert json.loads(shown.stdout)["chosen"] == found.chosen
    assert ovexport("runtime", ir.path, "--undo").returncode == 0
    assert not (ir.path / SETTINGS_FILE).exists()


def test_text_for_the_search_comes_with_the_package(finished_run) -> None:
    tokens = packaged_text(finished_run.ir("int4"), 3)
    assert tokens.shape == (3, 128)
    assert len(np.unique(tokens)) > 50


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--format", "xml"], 2, "--format xml: no such format"),
        (["--format", "csv", "--json"], 2, "two formats"),
        (["--output-tokens", "0"], 2, "output_tokens"),
        (["--backend", "FA"], 2, "attention_backend"),
        (["--device", "NPU"], 2, "device=NPU: not here"),
        (["--gate", "speed>=1"], 2, "speed"),
        (["--search", "--gate", "peak_rss_bytes<=1e9"], 2, "--search: takes one IR"),
        (["--search", "--device", "GPU"], 2, "for the CPU only"),
    ],
)
def test_a_benchmark_that_can_not_be_is_refused_in_a_line(finished_run, options, code, message) -> None:
    done = ovexport("bench", finished_run.ir("int4").path, *options)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_settings_of_a_folder_that_has_none_are_refused(finished_run, tmp_path: Path) -> None:
    copy = shutil.copytree(finished_run.ir("plain").path, tmp_path / "plain")
    for options in ([], ["--undo"]):
        done = ovexport("runtime", copy, *options)
        assert done.returncode == 4
