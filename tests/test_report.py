import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import ovexport, refused
from report_records import SCRIPT, fill, gate_report

from ovexport.artifacts import RunFolder
from ovexport.errors import ArtifactError, RecipeError
from ovexport.report.answers import Parted, part
from ovexport.report.compare import write_comparison
from ovexport.report.page import write_report
from ovexport.report.table import comparison, read_findings
from ovexport.report.verdict import verdict
from ovexport.reports import BenchmarkReport, EvaluationReport, VerificationReport, WorstAnswer
from ovexport.storage.records import read_record, write_record


class Outline(HTMLParser):
    """What assistive technology and keyboards need to know of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def full_run(run_copy: RunFolder) -> RunFolder:
    return fill(run_copy)


def page_of(folder: RunFolder) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_the_page_stands_alone_and_holds_table_plots_and_proof(finished_run: RunFolder) -> None:
    page = (finished_run.path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    for title in ("Quality against size", "Latency", "Divergence of a token", "Tuning"):
        assert f">{title}</title>" in page
    for text in (
        "Conversion verified, quality not judged",
        "KL from BF16, mean, nats",
        "model.layers.1.mlp.down_proj.weight",
        "conditions of the",
    ):
        assert text in page
    assert len(page) < 3_000_000


def test_every_figure_there_can_be_has_its_place(full_run: RunFolder) -> None:
    page = page_of(full_run)
    for title in ("Weight error by layer", "Where the divergence comes from", "Memory", "Speed over the grid"):
        assert f">{title}</title>" in page
    for text in (
        "Fit to ship: proven, and every gate passed",
        "similarity of answers, strict mode",
        "with dynamic quantization",
        "of the bandwidth",
        "512 → 16 tokens, batch 1, PA",
        "memory, anonymous and file-backed",
    ):
        assert text in page
    assert len(page) < 3_000_000


def test_a_tie_is_called_a_tie(full_run: RunFolder) -> None:
    models, rows = comparison(read_findings(full_run))
    table = {row.figure: dict(zip(models, row.values, strict=True)) for row in rows}
    assert table["  less INT4, not tuned (95 % interval)"]["INT4, tuned"] == "−0.00400 (−0.00420 to −0.00380)"
    assert next(row for row in rows if row.figure.startswith("  over BF16")).values[1:] == (
        "0.9986 (0.9961–1.0012), a tie",
        "0.9986 (0.9961–1.0012), a tie",
    )


def test_a_ratio_whose_interval_holds_1_is_a_tie(run_copy: RunFolder) -> None:
    path = run_copy.path / "benchmark.json"
    report = read_record(path, BenchmarkReport)
    ratios = report.ratios["int4/bf16"]
    for interval, expected in (((0.9, 1.1), "0.50 (0.90–1.10), a tie"), ((0.4, 0.6), "0.50 (0.40–0.60)")):
        ratio = ratios.time_per_output_token.model_copy(update={"median": 0.5, "ci95": interval})
        changed = report.ratios | {"int4/bf16": ratios.model_copy(update={"time_per_output_token": ratio})}
        write_record(report.model_copy(update={"ratios": changed}), path)
        values = [value for row in comparison(read_findings(run_copy))[1] for value in row.values]
        assert expected in values


def test_what_was_not_measured_takes_no_row(finished_run: RunFolder) -> None:
    _, rows = comparison(read_findings(finished_run))
    assert all(any(value != "–" for value in row.values) for row in rows)


def test_a_failed_gate_comes_first_and_names_its_reason(run_copy: RunFolder) -> None:
    write_record(gate_report(passed=False), run_copy.path / "gates.json")
    page = page_of(run_copy)
    assert page.index("Not fit to ship: a gate failed") < page.index("At a glance")
    assert page.index("memory was not measured") < page.index("At a glance")


def test_without_gates_nothing_is_green(finished_run: RunFolder) -> None:
    found = verdict(read_findings(finished_run))
    assert (found.standing, found.headline) == ("open", "Conversion verified, quality not judged")
    assert "Gates: none were set" in found.reasons[-1]
    assert '<section class="verdict open"' in (finished_run.path / "report.html").read_text()


def test_a_small_divergence_is_written_in_significant_digits(run_copy: RunFolder) -> None:
    path = run_copy.path / "evaluation.json"
    report = read_record(path, EvaluationReport)
    small = {"kl_mean_nats": 1.234e-6, "kl_mean_ci95": (1.1e-6, 1.4e-6), "kl_p99_nats": 4.56e-10}
    models = report.models | {"int4": report.models["int4"].model_copy(update=small)}
    write_record(report.model_copy(update={"models": models}), path)
    page, card = page_of(run_copy), (run_copy.path / "README.md").read_text()
    for text in (page, card):
        assert "0.0000012" in text
        assert "4.6e-10" in text
    assert "0.0000012 (0.0000011–0.0000014)" in card


def test_a_failed_proof_outweighs_the_gates_and_marks_its_layer(full_run: RunFolder) -> None:
    path = full_run.path / "verification.json"
    report = read_record(path, VerificationReport)
    name = report.layers[3].name
    checks = [
        check.model_copy(update={"passed": False}) if check.subject == f"{name} codes" else check
        for check in report.checks
    ]
    write_record(report.model_copy(update={"passed": False, "checks": tuple(checks)}), path)
    page = page_of(full_run)
    assert verdict(read_findings(full_run)).headline == "Not fit to ship: the proof failed"
    row = re.search(rf'<tr><th scope="row">{re.escape(name)}.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert "FAILED: as the checkpoint recorded it" in row.group()


def test_markup_in_prompts_and_answers_is_shown_as_text(full_run: RunFolder) -> None:
    page = page_of(full_run)
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;") >= 4
    assert not Outline(page).of("script")


def test_answers_part_at_the_first_character_that_differs() -> None:
    answer = WorstAnswer(
        prompt="", reference="a small boy", candidate="a smart boy ran", similarity=None, first_difference=5
    )
    assert part(answer) == (
        Parted(common="a sma", different="ll", rest=" boy"),
        Parted(common="a sma", different="rt", rest=" boy ran"),
    )


def test_an_answer_that_ends_early_is_marked_at_its_end() -> None:
    answer = WorstAnswer(prompt="", reference="the end", candidate="the", similarity=None, first_difference=3)
    assert part(answer) == (
        Parted(common="the", different=" end", rest=""),
        Parted(common="the", different="", rest=""),
    )


def test_the_page_can_be_read_with_a_keyboard_and_by_a_screen_reader(full_run: RunFolder) -> None:
    page = page_of(full_run)
    outline = Outline(page)
    assert outline.of("a")[0] == {"class": "skip", "href": "#main"}
    targets = {attributes.get("id") for _, attributes in outline.elements}
    assert {str(link["href"]).removeprefix("#") for link in outline.of("a")} <= targets
    assert all(cell.get("scope") for cell in outline.of("th"))
    assert len(outline.of("caption")) == len(outline.of("table"))
    scrolled = [box for box in outline.of("div") if box.get("class") == "wide"]
    assert scrolled
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in scrolled)
    images = outline.of("svg")
    assert images
    assert all(image["role"] == "img" and image["aria-labelledby"] in targets for image in images)
    identifiers = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_the_card_shows_the_table_and_how_to_check_again(finished_run: RunFolder) -> None:
    card = (finished_run.path / "README.md").read_text()
    assert "| | BF16 | INT4, not tuned | INT4, tuned |\n|---|---:|---:|---:|\n| weights on disk, MB |" in card
    assert "ovexport verify int4 --checkpoint checkpoint --base bf16 --twin plain" in card
    assert re.search(r"[0-9a-f]{64}  int4/openvino_model\.bin", card)


def test_a_report_is_rebuilt_from_what_is_there(run_copy: RunFolder) -> None:
    for name in ("report.html", "README.md", "benchmark.json", "verification.json"):
        (run_copy.path / name).unlink()
    shutil.rmtree(run_copy.logs)
    page = page_of(run_copy)
    assert page.count("<svg") == 1
    assert "Not proven yet" in page


def test_a_folder_with_nothing_to_report_is_refused(run_copy: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run, it has no recipe"):
        write_report(RunFolder(tmp_path / "none"))
    for name in ("verification.json", "evaluation.json", "benchmark.json"):
        (run_copy.path / name).unlink()
    with pytest.raises(ArtifactError, match="nothing to report yet"):
        write_report(run_copy)


@pytest.fixture
def other_run(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """The same run under a name that has markup in it, with a failed gate and other conditions."""
    folder = RunFolder(shutil.copytree(finished_run.path, tmp_path / "<b>$other_run$"))
    fill(folder, passed=False)
    path = folder.path / "benchmark.json"
    report = read_record(path, BenchmarkReport)
    write_record(report.model_copy(update={"conditions": report.conditions | {"device_name": "Other CPU"}}), path)
    return folder


def test_runs_are_compared_a_column_for_each_product(run_copy: RunFolder, other_run: RunFolder, tmp_path: Path) -> None:
    page = write_comparison([run_copy, other_run], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert '<th scope="col">run</th><th scope="col">&lt;b&gt;$other_run$</th></tr>' in page
    assert "<b>" not in page
    assert "Not fit to ship: a gate failed" in page
    assert "Conversion verified, quality not judged" in page
    assert ">Quality against size</title>" in page
    differing = page[page.index("Conditions that differ") :]
    assert "Other CPU" in differing
    assert "attention_backend" not in differing


def test_a_run_is_not_compared_with_itself(run_copy: RunFolder, tmp_path: Path) -> None:
    again = RunFolder(run_copy.path / ".." / run_copy.path.name)
    with pytest.raises(RecipeError, match="given twice"):
        write_comparison([run_copy, again], tmp_path / "compare.html")


def test_the_command_compares_several_runs_and_rebuilds_one(
    run_copy: RunFolder, other_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (run_copy.path / "report.html").unlink()
    assert ovexport("report", run_copy.path).returncode == 0
    assert (run_copy.path / "report.html").is_file()
    assert ovexport("report", run_copy.path, other_run.path).returncode == 0
    assert "compared" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "goes with several runs" in refused(ovexport("report", run_copy.path, "--out", "page.html"), 2)
