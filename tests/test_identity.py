"""What a model is called: by what its weights are stored in, and by whether tuning changed them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from command_line import ovexport
from typer.testing import CliRunner

from ovexport.artifacts import IR, RunFolder
from ovexport.evaluate import evaluate, load_encoder
from ovexport.openvino.identity import identify, weight_precision
from ovexport.recipe import EvaluateSpec
from ovexport.report.compare import write_comparison
from ovexport.report.names import titles
from ovexport.report.page import write_report
from ovexport.report.table import comparison, read_findings
from ovexport.reports import BenchmarkReport, EvaluationReport
from ovexport.storage.records import read_record, write_record

KINDS = {"evaluation.json": EvaluationReport, "benchmark.json": BenchmarkReport}


def describe(folder: RunFolder, **models: dict) -> RunFolder:
    """Let the run's reports say other things of their models."""
    for name, kind in KINDS.items():
        report: Any = read_record(folder.path / name, kind)
        conditions = report.conditions | {"models": report.conditions["models"] | models}
        write_record(report.model_copy(update={"conditions": conditions}), folder.path / name)
    return folder


@pytest.fixture
def untuned_run(run_copy: RunFolder) -> RunFolder:
    """The finished run with the twin for its product, measured as one whose tuning was worth nothing."""
    described = describe(run_copy, int4={"weights": "INT4", "tuning_steps": 0})
    path = described.path / "evaluation.json"
    report = read_record(path, EvaluationReport)
    models = report.models | {"int4": report.models["plain"]}
    nothing = {"models": models, "recovered_gap": None, "recovered_gap_ci95": None, "reason": "int4 was not tuned"}
    write_record(report.model_copy(update=nothing), path)
    return described


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(ov.Type.f32, "FP32"), (ov.Type.f16, "FP16"), (ov.Type.bf16, "BF16"), (ov.Type.u8, "INT8"), (ov.Type.i4, "INT4")],
)
def test_a_model_is_called_by_what_its_linear_layers_are_stored_in(stored: ov.Type, expected: str) -> None:
    data = ops.parameter([1, 8], np.float32)
    matrix = ops.convert(ops.constant(np.ones((4, 8)), stored), "f32")
    if expected.startswith("INT"):
        matrix = ops.multiply(matrix, ops.constant(np.ones((4, 1), np.float32)))
    graph = ov.Model([ops.matmul(data, matrix, False, True)], [data])
    assert weight_precision(graph) == expected


def test_an_ir_says_how_long_it_was_tuned(finished_run: RunFolder) -> None:
    steps = finished_run.checkpoint.manifest.steps
    assert steps
    assert identify(finished_run.ir("bf16")) == {"weights": "BF16"}
    assert identify(finished_run.ir("plain")) == {"weights": "INT4", "tuning_steps": 0}
    assert identify(finished_run.ir("int4")) == {"weights": "INT4", "tuning_steps": steps}
    for name, kind in KINDS.items():
        report: Any = read_record(finished_run.path / name, kind)
        assert report.conditions["models"] == {
            name: identify(finished_run.ir(name)) for name in ("bf16", "plain", "int4")
        }


def test_a_tuned_product_is_called_tuned(finished_run: RunFolder) -> None:
    assert comparison(read_findings(finished_run))[0] == ("BF16", "INT4, not tuned", "INT4, tuned")
    assert read_findings(finished_run).tuned is True


@pytest.mark.parametrize("weights", ["FP32", "FP16"])
def test_the_baseline_is_called_what_it_is_wherever_it_is_named(run_copy: RunFolder, weights: str) -> None:
    folder = describe(run_copy, bf16={"weights": weights})
    page = write_report(folder).read_text(encoding="utf-8")
    shown = page.partition('<h2 id="conditions">')[0] + (folder.path / "README.md").read_text()
    assert f"KL from {weights}, mean, nats" in shown
    assert f"as fast as {weights} per token" in shown
    assert "BF16" not in shown
    assert f"KL from {weights}, mean" in write_comparison([folder], folder.path / "compare.html").read_text()


def test_a_product_that_was_not_tuned_is_nowhere_called_tuned(untuned_run: RunFolder) -> None:
    page = write_report(untuned_run).read_text(encoding="utf-8")
    card = (untuned_run.path / "README.md").read_text(encoding="utf-8")
    compared = write_comparison([untuned_run], untuned_run.path / "compare.html").read_text(encoding="utf-8")
    assert "Tuning: none is in this model: it took no step" in page
    assert "It was not tuned" in card
    for text in (page, card, compared):
        told = text.replace("not tuned", "").replace("untuned", "").lower()
        assert "tuned" not in told
        assert "tuning recovered" not in told
    assert comparison(read_findings(untuned_run))[0] == ("BF16", "INT4, not tuned (plain)", "INT4, not tuned (int4)")


def test_a_report_that_does_not_say_what_its_models_are_claims_nothing(finished_run: RunFolder) -> None:
    report = read_record(finished_run.path / "evaluation.json", EvaluationReport)
    silent = report.model_copy(update={"conditions": {"encoder": "offline"}})
    assert [titles(silent)[name] for name in ("bf16", "plain", "int4", "other")] == [
        "uncompressed",
        "INT4, not tuned",
        "INT4",
        "other",
    ]


def test_a_folder_named_int4_is_called_by_what_lies_in_it(finished_run: RunFolder, tmp_path: Path) -> None:
    twin = IR(shutil.copytree(finished_run.ir("plain").path, tmp_path / "int4"))
    spec = EvaluateSpec(encoder="offline", prompts="short", prompt_count=1, max_new_tokens=2)
    models = {"bf16": finished_run.ir("bf16"), "plain": finished_run.ir("plain"), "int4": twin}
    report = evaluate(models, "bf16", finished_run.data, spec, load_encoder("offline"), tmp_path)
    assert report.recovered_gap is None
    assert report.reason == "int4 was not tuned: it took no step, or no step validated better than the starting point"
    assert titles(report)["int4"] == "INT4, not tuned (int4)"


def test_the_terminal_says_that_a_run_was_not_tuned(untuned_run: RunFolder) -> None:
    from ovexport.cli.run import print_figures

    runner = CliRunner()
    with runner.isolation() as (out, *_):
        print_figures(read_findings(untuned_run))
        said = out.getvalue().decode()
    assert "not tuned: it took no step" in said
    assert "tuning recovered" not in said


def test_the_figures_of_gates_are_listed_with_their_meaning_and_a_runs_with_their_values(
    finished_run: RunFolder,
) -> None:
    document = json.loads(ovexport("gates", "--json").stdout)
    known = {figure["name"]: figure for figure in document["figures"]}
    assert all(figure["meaning"] for figure in known.values())
    assert known["kl_mean_nats"]["unit"] == "nats"
    assert (known["similarity"]["better"], known["similarity"]["file"]) == ("higher", "evaluation.json")
    assert {"similarity.low", "similarity.value", "code_mismatches", "int4/bf16.time_per_output_token"} <= known.keys()
    measured = json.loads(ovexport("gates", finished_run.path, "--json").stdout)["figures"]
    values = {figure["name"]: figure for figure in measured}
    assert values["kl_mean_nats"]["ci95"][0] < values["kl_mean_nats"]["value"] < values["kl_mean_nats"]["ci95"][1]
    assert values["kl_mean_nats"]["interval_over"] == "8 sequences"
    shown = ovexport("gates", finished_run.path)
    assert "plain.perplexity" in shown.stdout
    missing = ovexport("gates", finished_run.path / "int4")
    assert (missing.returncode, "no run, it has no recipe.toml" in missing.stderr) == (4, True)
