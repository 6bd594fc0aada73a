import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomli_w
from command_line import ovexport
from conftest import REPOSITORY, tiny_values

from ovexport import recipe
from ovexport.artifacts import MODELS, RunFolder
from ovexport.errors import GateFailed, RecipeError
from ovexport.gates.figures import KINDS, Figure, figures
from ovexport.gates.judging import check, judge, require_passed, write_junit
from ovexport.pipeline import services
from ovexport.recipe import Gate, Recipe, list_gates, parse_gates
from ovexport.reports import EvaluationReport, GateReport, IsolationStep, ModelEvaluation, VerificationSummary
from ovexport.storage.records import Record

UNJUDGED = figures(dict.fromkeys(KINDS), models=MODELS, tasks=("quiz",))


def gates(*texts: str) -> tuple[Gate, ...]:
    return list_gates(parse_gates(texts))


def verdict(text: str, value: float | None) -> Any:
    return judge(gates(text), {"similarity": Figure(value, "nobody looked")}).gates[0]


def gated(model: Path, **conditions: Any) -> Recipe:
    return recipe.parse(tiny_values(model) | {"gates": conditions}, base=REPOSITORY, origin="gated")


@pytest.fixture
def write(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the recipe of the finished run with some gates, and return its path."""

    def write_gates(**conditions: Any) -> Path:
        path = tmp_path / "gated.toml"
        path.write_text(tomli_w.dumps(tiny_values(tiny_model) | {"gates": conditions}))
        return path

    return write_gates


@pytest.fixture
def evaluation() -> EvaluationReport:
    """A report of three models, of which plain was not evaluated and int4's similarity is not a number."""
    report = EvaluationReport(
        reference="bf16",
        models={
            "bf16": ModelEvaluation(perplexity=9.0, reason="the reference"),
            "plain": ModelEvaluation(reason="plain was not measured"),
            "int4": ModelEvaluation(
                perplexity=9.5,
                kl_mean_nats=0.02,
                kl_mean_ci95=(0.015, 0.03),
                perplexity_ratio={"value": 1.05, "ci95": (1.01, 1.1)},
                tasks={"quiz": {"acc_norm": 0.75}},
                isolation=(IsolationStep(name="weights", settings={}, kl_mean_nats=0.018, kl_mean_ci95=(0.01, 0.02)),),
            ),
        },
        comparisons={
            "int4 - plain": {  # type: ignore[dict-item]
                "kl_mean_nats": {"value": 0.02, "ci95": (0.015, 0.03)},
                "kl_verdict": "higher",
                "nll_mean_nats": {"value": 0.01, "ci95": (-0.1, 0.1)},
                "nll_verdict": "tie",
            }
        },
        histogram_edges_nats=(0.0, 1.0),
        conditions={},
        versions={},
    )
    not_a_number = report.models["int4"].model_copy(update={"similarity": math.nan})
    return report.model_copy(update={"models": report.models | {"int4": not_a_number}})


@pytest.mark.parametrize(
    ("text", "value", "passed", "margin"),
    [
        ("similarity<0.9", 0.9, False, 0.0),
        ("similarity<0.9", 0.8, True, 0.1),
        ("similarity<=0.9", 0.9, True, 0.0),
        ("similarity<=0.9", 1.0, False, -0.1),
        ("similarity==0.9", 0.9, True, 0.0),
        ("similarity==0.9", 0.8, False, -0.1),
        ("similarity==0.9", 1.0, False, -0.1),
        ("similarity>=0.9", 0.9, True, 0.0),
        ("similarity>=0.9", 0.8, False, -0.1),
        ("similarity>0.9", 0.9, False, 0.0),
        ("similarity > 0.9", 1.0, True, 0.1),
    ],
)
def test_each_operator_draws_its_line_and_says_how_far_off_the_value_is(text, value, passed, margin) -> None:
    result = verdict(text, value)
    assert result.passed is passed
    assert result.margin == pytest.approx(margin)
    assert result.gate == text.replace(" ", "")


@pytest.mark.parametrize("operator", ["<", "<=", "==", ">=", ">"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_never_passes(operator: str, value: float | None) -> None:
    result = verdict(f"similarity{operator}0", value)
    assert (result.passed, result.value, result.margin) == (False, None, None)
    assert result.reason == (
        "not measured: nobody looked" if value is None else f"measured as {value}, which keeps no limit"
    )


@pytest.mark.parametrize(
    "text",
    ["similarity", "similarity=0.9", "similarity=>0.9", "similarity>=", ">=0.9", "similarity>=high", "similarity>=nan",
     "similarity<=inf", "0.9<similarity<1", "similarity>=0.9,", "", "a,b>=1"],
)  # fmt: skip
def test_a_condition_that_can_not_be_read_is_refused_with_a_cure(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--gate .* write ") as caught:
        parse_gates([text])
    assert f'--gate "{text}"' in str(caught.value)


def test_two_limits_of_one_figure_are_two_gates() -> None:
    both = gates("kl_mean_nats>=0", "similarity>0.5", "kl_mean_nats < 1e-2")
    assert [str(gate) for gate in both] == ["kl_mean_nats>=0", "kl_mean_nats<0.01", "similarity>0.5"]
    assert gates("kl_mean_nats>=0,<1") == gates("kl_mean_nats>=0", "kl_mean_nats<1")


def test_every_gate_of_a_recipe_that_can_not_be_read_is_named_at_once(tiny_model: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        gated(tiny_model, similarity=0.9, fdt="~5", **{"a b>": ">1"})
    message = str(caught.value)
    assert "gates.similarity: 0.9 is not a condition; write an operator too" in message
    assert "gates.fdt: '~5' is not a condition" in message
    assert "'a b>' is not the name of a figure" in message


def test_a_recipe_names_figures_with_or_without_quotes_and_reads_back(tiny_model: Path, tmp_path: Path) -> None:
    table = {"plain": {"kl_mean_nats": "<=0.1"}, "int4/bf16.time_per_output_token": "<=1", "int4 - plain.nll": "<0"}
    resolved = gated(tiny_model, **table)
    assert resolved.gates == {
        "plain.kl_mean_nats": "<=0.1",
        "int4/bf16.time_per_output_token": "<=1",
        "int4-plain.nll": "<0",
    }
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.dump(resolved))
    assert recipe.load(path) == resolved
    assert recipe.load(path, ["gates.plain.kl_mean_nats=<=0.5"]).gates["plain.kl_mean_nats"] == "<=0.5"


def test_an_option_takes_the_place_of_the_recipes_gate_on_the_same_figure(tiny_model: Path) -> None:
    merged = recipe.with_gates(gated(tiny_model, similarity=">=0.9", fdt=">=5"), ["similarity>=0.5", "sdt<=3"])
    assert merged.gates == {"similarity": ">=0.5", "fdt": ">=5", "sdt": "<=3"}


def test_all_unknown_figures_are_named_with_the_nearest_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        check(gates("similarty>=0.9", "int9.kl_mean_nats<=1", "kl<=1", "xyzzy<=1", "fdt>=0"), UNJUDGED)
    message = str(caught.value)
    assert "gate similarty>=0.9: no figure is named similarty; the nearest are similarity" in message
    assert "int9.kl_mean_nats; the nearest are int4.kl_mean_nats" in message
    assert "kl; the nearest are kl_" in message
    assert "xyzzy; ovexport gates lists the names" in message
    assert "fdt" not in message


@pytest.mark.parametrize(
    ("metric", "command"),
    [
        ("code_mismatches", "verify"),
        ("verified", "verify"),
        ("time_per_output_token_ms", "bench"),
        ("int4/bf16.time_per_output_token.high", "bench"),
        ("weight_bytes", "bench"),
    ],
)
def test_a_figure_that_another_command_measures_is_said_to_be_so(metric: str, command: str) -> None:
    known = figures({"evaluation": None}, models=("bf16", "int4"))
    with pytest.raises(RecipeError, match=f"{metric} is not measured here; ovexport {command} does it"):
        check(gates(f"{metric}<=1"), known)


def test_figures_are_the_reports_fields_under_the_names_of_their_models(evaluation: EvaluationReport) -> None:
    known = figures({"evaluation": evaluation})
    values = {name: figure.value for name, figure in known.items()}
    assert values["perplexity"] == values["int4.perplexity"] == 9.5
    assert values["bf16.perplexity"] == 9.0
    assert values["perplexity_ratio"] == values["perplexity_ratio.value"] == 1.05
    assert (values["perplexity_ratio.low"], values["perplexity_ratio.high"]) == (1.01, 1.1)
    assert (values["kl_mean_nats.low"], values["kl_mean_nats.high"]) == (0.015, 0.03)
    assert values["quiz.acc_norm"] == values["int4.quiz.acc_norm"] == 0.75
    assert values["isolation.weights.kl_mean_nats.high"] == 0.02
    assert values["int4-plain.nll_mean_nats.low"] == -0.1
    assert known["bf16.kl_mean_nats"] == Figure(None, "the reference")
    assert not [name for name in known if "histogram" in name or "worst" in name or "ci95" in name]


def test_the_product_can_be_another_model_than_the_last(evaluation: EvaluationReport) -> None:
    assert figures({"evaluation": evaluation}, product="bf16")["perplexity"].value == 9.0


def test_a_known_figure_that_was_not_measured_fails_with_its_reason(evaluation: EvaluationReport) -> None:
    known = figures({"evaluation": evaluation, "benchmark": None}, product="int4", models=MODELS)
    asked = gates("plain.kl_mean_nats<=1", "peak_rss_bytes<=1", "bf16.fdt>=1", "bf16.isolation.weights.perplexity<=1")
    report = judge((*asked, *gates("kl_mean_nats<=0.04")), known)
    assert [result.reason for result in report.gates] == [
        "not measured: plain was not measured",
        "not measured: there is no benchmark.json",
        "not measured: the reference",
        "not measured: the reference",
        None,
    ]
    assert [result.passed for result in report.gates] == [False] * 4 + [True]
    assert not report.passed


def test_every_interval_is_its_figures_low_and_high() -> None:
    for name in ("kl_mean_nats", "similarity", "perplexity_ratio", "recovered_gap", "int4/plain.time_to_first_token"):
        assert {f"{name}.low", f"{name}.high"} <= set(UNJUDGED)
    assert not [name for name in UNJUDGED if name.endswith("_ci95")]


def test_names_known_beforehand_are_those_of_a_finished_run(finished_run: RunFolder, tiny_recipe: Recipe) -> None:
    from ovexport.gates.figures import run_figures

    known = run_figures(finished_run, tiny_recipe)
    beforehand = figures(dict.fromkeys(KINDS), product="int4", models=MODELS)
    open_ended = tuple(name for name in beforehand if name.endswith("."))
    assert [name for name in known if name not in beforehand and not name.startswith(open_ended)] == []
    assert known["verified"].value == 1
    assert known["code_mismatches"].value == 0
    assert known["weight_bytes"].value == finished_run.ir("int4").weight_bytes
    assert known["verification.weight_bytes"].value < known["weight_bytes"].value


def test_a_new_field_of_a_record_is_a_figure_at_once() -> None:
    class Grown(Record):
        models: dict[str, ModelEvaluation]
        brand_new_ms: float
        brand_new_ci95: tuple[float, float]

    from ovexport.gates.figures import Source, of_record

    grown = Grown(models={}, brand_new_ms=3, brand_new_ci95=(2, 4))
    named = dict(of_record(Grown, grown, "", Source(keys={}, over={"": "9 rounds"})))
    assert named["brand_new_ms"] == Figure(3, ci95=(2, 4), over="9 rounds")
    assert {name: figure.value for name, figure in named.items()} == {
        "brand_new_ms": 3,
        "brand_new_ms.low": 2,
        "brand_new_ms.high": 4,
        "brand_new_ms.value": 3,
    }


def test_the_error_holds_every_failed_gate_and_the_report(evaluation: EvaluationReport) -> None:
    report = judge(gates("perplexity<=9", "similarity>=0", "kl_mean_nats<=1"), figures({"evaluation": evaluation}))
    with pytest.raises(GateFailed) as caught:
        require_passed(report)
    assert caught.value.report is report
    assert str(caught.value) == (
        "2 of 3 gates failed: perplexity is 9.5, limit <= 9, margin -0.5; "
        "similarity>=0: measured as nan, which keeps no limit"
    )


def test_the_junit_file_counts_tests_and_failures_and_says_why(evaluation: EvaluationReport, tmp_path: Path) -> None:
    report = judge(gates("perplexity<=9", "bf16.fdt>=1", "kl_mean_nats<=1"), figures({"evaluation": evaluation}))
    write_junit(report, "evaluate", tmp_path / "new" / "gates.xml")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gates.xml"]
    root = ElementTree.parse(tmp_path / "new" / "gates.xml").getroot()
    suite = root.find("testsuite")
    assert (root.tag, suite.get("name"), suite.get("tests"), suite.get("failures")) == (
        "testsuites",
        "ovexport",
        "3",
        "2",
    )
    assert [case.get("classname") for case in suite.iter("testcase")] == ["ovexport.evaluate"] * 3
    assert [case.get("name") for case in suite.iter("testcase")] == ["perplexity<=9", "bf16.fdt>=1", "kl_mean_nats<=1"]
    messages = [failure.get("message") for failure in suite.iter("failure")]
    assert messages == ["perplexity is 9.5, limit <= 9, margin -0.5", "bf16.fdt>=1: not measured: the reference"]
    assert "openvino" in {one.get("name") for one in suite.iter("property")}


def of_similarity(*texts: str) -> GateReport:
    """Gates on a similarity of 0.89 whose interval 24 prompts gave."""
    return judge(gates(*texts), {"similarity": Figure(0.89, ci95=(0.84, 0.94), over="24 prompts")})


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("similarity>=0.9", "undecided"),
        ("similarity>=0.85", "undecided"),
        ("similarity>=0.84", "passed"),
        ("similarity>0.84", "undecided"),
        ("similarity>=0.95", "failed"),
        ("similarity<=0.9", "undecided"),
        ("similarity<=0.94", "passed"),
        ("similarity<0.84", "failed"),
        ("similarity==0.9", "undecided"),
        ("similarity==0.99", "failed"),
    ],
)
def test_a_gate_whose_limit_is_inside_the_interval_is_undecided(text: str, status: str) -> None:
    result = of_similarity(text).gates[0]
    assert (result.status, result.passed, result.ci95) == (status, status == "passed", (0.84, 0.94))
    told = f"24 prompts are too few: 0.89 (0.84–0.94) holds the limit {text[-4:].lstrip('=<>')}"
    assert result.reason == (told if status == "undecided" else None)


def test_an_undecided_gate_is_no_pass_and_says_what_there_is_too_little_of(tmp_path: Path) -> None:
    report = of_similarity("similarity>=0.9", "similarity>=0.8", "similarity>=0.99")
    with pytest.raises(GateFailed) as caught:
        require_passed(report)
    assert str(caught.value) == (
        "1 of 3 gates failed: similarity is 0.89 (0.84–0.94), limit >= 0.99, margin -0.1; 1 of 3 gates undecided: "
        "similarity>=0.9: undecided, 24 prompts are too few: 0.89 (0.84–0.94) holds the limit 0.9"
    )
    write_junit(report, "evaluate", tmp_path / "gates.xml")
    root = ElementTree.parse(tmp_path / "gates.xml").getroot()
    assert root.get("failures") == "2"
    assert [failure.get("type") for failure in root.iter("failure")] == ["GateUndecided", "GateFailed"]
    assert "similarity is 0.89 (0.84–0.94), limit >= 0.8" in next(root.iter("system-out")).text


def test_the_ends_and_the_value_alone_are_always_decided(evaluation: EvaluationReport) -> None:
    known = figures({"evaluation": evaluation})
    report = judge(gates("kl_mean_nats<=0.02", "kl_mean_nats.value<=0.02", "kl_mean_nats.high<=0.02"), known)
    assert [result.status for result in report.gates] == ["undecided", "passed", "failed"]
    assert judge(gates("perplexity_ratio.value<=1.05"), known).gates[0].status == "passed"


def test_too_few_values_for_an_interval_decide_nothing(finished_run: RunFolder) -> None:
    report = EvaluationReport.model_validate_json((finished_run.path / "evaluation.json").read_bytes())
    models = {name: model.model_copy(update={"similarity_ci95": None}) for name, model in report.models.items()}
    few = report.model_copy(update={"models": models, "conditions": report.conditions | {"prompts": 3}})
    known = figures({"evaluation": few})
    result = judge(gates("similarity>=0.01"), known).gates[0]
    assert (result.status, result.reason) == ("undecided", "3 prompts are too few for an interval")
    assert judge(gates("similarity.value>=0.01"), known).passed
    older = few.model_copy(update={"conditions": {}})
    assert judge(gates("similarity>=0.01"), figures({"evaluation": older})).passed


def test_a_tasks_figure_has_the_interval_of_its_standard_error() -> None:
    quiz = {"acc": 0.5, "acc_stderr": 0.05, "items": 100.0}
    report = EvaluationReport(
        reference="a",
        models={"a": ModelEvaluation(tasks={"quiz": quiz})},
        histogram_edges_nats=(0.0, 1.0),
        conditions={},
        versions={},
    )
    known = figures({"evaluation": report})
    assert known["quiz.acc.low"].value == pytest.approx(0.402)
    result = judge(gates("quiz.acc>=0.55"), known).gates[0]
    assert (result.status, result.reason) == (
        "undecided",
        "100 questions are too few: 0.5 (0.402–0.598) holds the limit 0.55",
    )


def test_every_figure_has_a_meaning(finished_run: RunFolder, tiny_recipe: Recipe) -> None:
    from ovexport.gates.figures import run_figures

    known = UNJUDGED | run_figures(finished_run, tiny_recipe)
    assert [name for name, figure in known.items() if not (figure.meaning and figure.meaning.text)] == []


def test_an_undecided_gate_exits_8_and_shows_its_interval(finished_run: RunFolder, tmp_path: Path) -> None:
    report = EvaluationReport.model_validate_json((finished_run.path / "evaluation.json").read_bytes())
    value, (low, high) = report.models["int4"].kl_mean_nats, report.models["int4"].kl_mean_ci95
    folder = RunFolder(shutil.copytree(finished_run.path, tmp_path / "run"))
    done = ovexport("report", folder.path, "--gate", f"kl_mean_nats<={(value + high) / 2:.6f}")
    assert done.returncode == 8
    assert "UNDECIDED: 8 sequences are too few" in done.stdout
    assert f"({low:.4g}–{high:.4g})" in done.stdout
    page, card = (folder.path / "report.html").read_text(), (folder.path / "README.md").read_text()
    assert "Conversion verified, quality undecided" in page
    assert "Gates: 0 of 1 passed, 1 undecided" in page
    assert ">UNDECIDED</span>" in page
    assert "UNDECIDED: 8 sequences are too few" in card
    decided = ovexport("report", folder.path, "--gate", f"kl_mean_nats.value<={(value + high) / 2:.6f}")
    assert decided.returncode == 0, decided.stderr


def test_a_run_whose_gate_fails_is_whole_and_exits_8_again_when_resumed(
    run_copy: RunFolder, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(**{"code_mismatches": "==0", "int4/bf16.time_per_output_token.low": ">0"})
    junit = ("--junit", tmp_path / "gates.xml")
    arguments = ("run", path, "--out", run_copy.path, "--resume", *junit, "--gate", "kl_mean_nats>=1e9")
    (run_copy.path / "report.html").unlink()
    first = ovexport(*arguments)
    assert first.returncode == 8, first.stderr
    assert "1 of 3 gates failed: kl_mean_nats is " in first.stderr
    assert "Traceback" not in first.stderr
    assert "bench  (done before)" in first.stderr
    assert "report  (done before)" not in first.stderr
    assert (run_copy.path / "report.html").is_file()
    report = GateReport.model_validate_json(run_copy.gates.read_bytes())
    assert [result.passed for result in report.gates] == [True, True, False]
    rows = [line for line in first.stdout.splitlines() if "kl_mean_nats" in line]
    assert len(rows) == 1
    assert all(text in rows[0] for text in (">= 1000000000", "FAILED", f"{report.gates[2].value:.6g}"))
    suite = ElementTree.parse(tmp_path / "gates.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")

    (tmp_path / "gates.xml").unlink()
    again = ovexport(*arguments)
    assert again.returncode == 8
    assert "report  (done before)" in again.stderr
    assert (tmp_path / "gates.xml").is_file()


def test_a_run_whose_gates_pass_exits_0_with_them_in_its_document(
    run_copy: RunFolder, write: Callable[..., Path]
) -> None:
    path = write(verified="==1", plain={"kl_mean_nats": ">=0"})
    done = ovexport("run", path, "--out", run_copy.path, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["gates"]["passed"] is True
    assert [gate["metric"] for gate in document["gates"]["gates"]] == ["verified", "plain.kl_mean_nats"]
    assert ovexport("run", path, "--out", run_copy.path, "--resume", "--quiet").stdout == ""


def test_an_edit_of_the_gates_judges_anew_and_measures_nothing(
    run_copy: RunFolder, tiny_model: Path, tiny_recipe: Recipe
) -> None:
    def redone(resolved: Recipe) -> list[str]:
        stages: list[str] = []
        services.run(
            resolved,
            run_copy.path,
            resume=True,
            announce=lambda name, skipped: None if skipped else stages.append(name),
        )
        return stages

    assert redone(gated(tiny_model, verified="==1")) == ["report"]
    assert redone(gated(tiny_model, verified="==1")) == []
    with pytest.raises(GateFailed):
        services.run(gated(tiny_model, verified="<1"), run_copy.path, resume=True)
    assert redone(tiny_recipe) == ["report"]
    assert not run_copy.gates.exists()


def test_a_run_that_stops_early_judges_nothing(run_copy: RunFolder, write: Callable[..., Path]) -> None:
    path = write(verified="<1")
    done = ovexport("run", path, "--out", run_copy.path, "--resume", "--until", "bench")
    assert done.returncode == 0, done.stderr
    assert "the gates are judged by the stage report" in done.stderr
    assert not run_copy.gates.exists()


def test_a_gate_on_an_unknown_figure_is_refused_before_any_work(write: Callable[..., Path], tmp_path: Path) -> None:
    for arguments in (("run", write(similarty=">=0.9")), ("plan", write(similarty=">=0.9"))):
        done = ovexport(*arguments, "--out", tmp_path / "out")
        assert done.returncode == 2
        assert "no figure is named similarty; the nearest are similarity" in done.stderr
    done = ovexport("run", write(), "--out", tmp_path / "out", "--gate", "similarity=>1")
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_a_junit_file_needs_gates_and_a_name(write: Callable[..., Path], tmp_path: Path) -> None:
    done = ovexport("run", write(), "--out", tmp_path / "out", "--junit", tmp_path / "gates.xml")
    assert (done.returncode, "no gate to write there" in done.stderr) == (2, True)
    done = ovexport("run", write(fdt=">=0"), "--out", tmp_path / "out", "--junit", tmp_path)
    assert (done.returncode, "a folder; give a file's name" in done.stderr) == (2, True)


def test_verify_judges_what_it_proved(finished_run: RunFolder, tmp_path: Path) -> None:
    arguments = ("verify", finished_run.ir("int4").path, "--no-runtime", "--junit", tmp_path / "gates.xml")
    done = ovexport(*arguments, "--gate", "packed_int4>=1", "--gate", "verification.float==0", "--json")
    assert json.loads(done.stdout)["gates"]["gates"][0]["value"] > 1
    done = ovexport(*arguments, "--gate", "packed_int4>=1", "--gate", "code_mismatches==0")
    assert done.returncode == 8
    assert "code_mismatches==0: not measured: " in done.stderr
    assert ElementTree.parse(tmp_path / "gates.xml").getroot().get("failures") == "1"
    done = ovexport(*arguments, "--gate", "similarity>=1")
    assert (done.returncode, "ovexport evaluate does it" in done.stderr) == (2, True)


def test_a_failed_proof_comes_before_a_failed_gate(run_copy: RunFolder, tmp_path: Path) -> None:
    product = run_copy.ir("int4")
    content = bytearray(product.bin.read_bytes())
    content[len(content) // 2] ^= 1
    product.bin.write_bytes(content)
    done = ovexport(
        "verify", product.path, "--checkpoint", run_copy.checkpoint.path, "--no-runtime", "--gate", "verified==1",
        "--junit", tmp_path / "gates.xml",
    )  # fmt: skip
    assert done.returncode == 7
    assert ElementTree.parse(tmp_path / "gates.xml").getroot().get("failures") == "1"


def test_the_report_judges_a_finished_run_by_other_gates(run_copy: RunFolder, tmp_path: Path) -> None:
    (run_copy.path / "benchmark.json").unlink()
    done = ovexport("report", run_copy.path, "--gate", "verified==1", "--gate", "load_time_ms<=1e9")
    assert done.returncode == 8
    assert "load_time_ms<=1000000000: not measured: there is no benchmark.json" in done.stderr
    assert GateReport.model_validate_json(run_copy.gates.read_bytes()).gates[0].passed
    done = ovexport("report", run_copy.path, "--gate", "verified==1", "--junit", tmp_path / "gates.xml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gates.xml").is_file()
    assert ovexport("report", run_copy.path).returncode == 0
    assert not run_copy.gates.exists()


def test_no_two_reports_have_a_figure_of_the_same_name() -> None:
    names = [
        name for kind in KINDS for name in figures({kind: None}, models=("a", "b")) if name.startswith(("a.", "b."))
    ]
    assert len(names) == len(set(names)) > 100


def test_every_count_of_the_proof_is_a_figure() -> None:
    counts = VerificationSummary.model_fields.keys() - {"reason"}
    assert {f"verification.{name}" for name in counts} | {"verified"} <= set(UNJUDGED)
