"""One verdict on a proof, the same on the terminal, the page and the card."""

import json

import pytest

from ovexport.artifacts import RunFolder
from ovexport.cli.run import print_figures
from ovexport.cli.verify import print_verdict
from ovexport.report.page import write_report
from ovexport.report.table import read_findings
from ovexport.report.verdict import verdict
from ovexport.reports import VerificationReport
from ovexport.storage.records import read_record, write_record
from ovexport.verify import verify


@pytest.fixture
def partial(run_copy: RunFolder) -> RunFolder:
    """A run whose product the runtime was not asked about."""
    report = verify(
        run_copy.ir("int4"),
        checkpoint=run_copy.checkpoint,
        base=run_copy.ir("bf16"),
        twin=run_copy.ir("plain"),
        runtime=False,
    )
    write_record(report, run_copy.path / "verification.json")
    write_report(run_copy)
    return run_copy


def test_a_proof_is_proven_partial_described_or_failed(finished_run: RunFolder) -> None:
    report = read_record(finished_run.path / "verification.json", VerificationReport)
    assert report.verdict == "proven"
    assert verify(finished_run.ir("int4"), checkpoint=finished_run.checkpoint, runtime=False).verdict == "partial"
    without_twin = verify(finished_run.ir("int4"), checkpoint=finished_run.checkpoint, base=finished_run.ir("bf16"))
    assert without_twin.verdict == "partial"
    assert "no twin is given" in (without_twin.summary.reason or "")
    assert verify(finished_run.ir("int4"), runtime=False).verdict == "described"
    assert report.model_copy(update={"passed": False}).verdict == "failed"


def test_a_verdict_written_into_the_file_is_not_believed(run_copy: RunFolder) -> None:
    path = run_copy.path / "verification.json"
    document = json.loads(path.read_text())
    assert document["verdict"] == "proven"
    document["passed"] = False
    path.write_text(json.dumps(document))
    assert read_record(path, VerificationReport).verdict == "failed"


def test_a_partial_proof_is_called_partial_everywhere(partial: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    findings = read_findings(partial)
    assert findings.verification is not None
    assert findings.verification.passed
    assert verdict(findings).standing == "open"
    print_figures(findings)
    print_verdict(findings.verification)
    printed = capsys.readouterr().out
    page, card = ((partial.path / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    told = findings.verification.told
    assert told.startswith("PARTLY PROVEN: ")
    assert told.endswith("not checked: the runtime was not checked")
    for text in (printed, page, card):
        assert told in text
    assert "Partly proven" in page
    assert "compiled" not in card


def test_the_card_of_a_proven_run_says_what_was_done(finished_run: RunFolder) -> None:
    card = (finished_run.path / "README.md").read_text(encoding="utf-8")
    assert "PROVEN: " in card
    assert "The model was compiled, and its logits were compared" in card
