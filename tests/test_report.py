import re
import shutil

import pytest

from ovexport.artifacts import RunFolder
from ovexport.errors import ArtifactError
from ovexport.report import write_report


def test_the_page_stands_alone_and_holds_table_plots_and_proof(finished_run: RunFolder) -> None:
    page = (finished_run.path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!#)', page)
    assert page.count("<svg") == 3
    for text in ("Verified:", "KL from BF16, mean, nats", "model.layers.1.mlp.down_proj.weight", "conditions of the"):
        assert text in page
    assert len(page) < 3_000_000


def test_the_card_shows_the_table_and_how_to_check_again(finished_run: RunFolder) -> None:
    card = (finished_run.path / "README.md").read_text()
    assert "| | BF16 | INT4, not tuned | INT4, tuned |\n|---|---:|---:|---:|\n| weights on disk, MB |" in card
    assert "ovexport verify int4 --checkpoint checkpoint --base bf16 --twin plain" in card
    assert re.search(r"[0-9a-f]{64}  int4/openvino_model\.bin", card)


def test_a_report_is_rebuilt_from_what_is_there(run_copy: RunFolder) -> None:
    for name in ("report.html", "README.md", "benchmark.json"):
        (run_copy.path / name).unlink()
    shutil.rmtree(run_copy.logs)
    write_report(run_copy)
    assert (run_copy.path / "report.html").read_text().count("<svg") == 1


def test_a_folder_with_nothing_to_report_is_refused(run_copy: RunFolder, tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no run, it has no recipe"):
        write_report(RunFolder(tmp_path / "none"))
    for name in ("verification.json", "evaluation.json", "benchmark.json"):
        (run_copy.path / name).unlink()
    with pytest.raises(ArtifactError, match="nothing to report yet"):
        write_report(run_copy)
