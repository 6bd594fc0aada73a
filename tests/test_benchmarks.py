import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from provenance import modules_of, source_digest, stale_sources
from reliability import count
from shapes import TINY, build_run
from tables import BENCHMARKS_README, filled

from ovexport.recipe import CompressSpec


def test_the_tables_on_the_pages_are_the_committed_results() -> None:
    command = [sys.executable, REPOSITORY / "benchmarks" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_words_leave_a_result_as_it_is_and_another_value_makes_it_stale(tmp_path: Path) -> None:
    def digest(name: str, text: str) -> str:
        source = tmp_path / name
        source.write_text(text, encoding="utf-8")
        return source_digest(source)

    script = '"""Measure."""\n\nSTEPS = 3  # a few\n\ndef main():\n    """Do it."""\n    print("# 3", STEPS)\n'
    assert digest("a.py", script) == digest("a.py", script.replace("Do it", "Go").replace("a few", "three"))
    assert digest("a.py", script) != digest("a.py", script.replace("STEPS = 3", "STEPS = 4"))
    assert digest("a.py", script) != digest("a.py", script.replace("# 3", "# 4"))
    assert digest("a.toml", "[tune]\nsteps = 3") == digest("a.toml", "# three\n[tune]\nsteps=3\n")
    assert digest("a.toml", "[tune]\nsteps = 3") != digest("a.toml", "[tune]\nsteps = 4")


def test_a_result_depends_on_all_that_its_script_imports() -> None:
    found = {path.name for path in modules_of(REPOSITORY / "benchmarks" / "tuning.py")}
    assert found == {"tuning.py", "nncf_loop.py", "shapes.py"}  # the last two are imported inside functions


def test_a_stale_or_quick_result_or_one_without_its_origin_is_named() -> None:
    name = "benchmarks/process.py"
    fresh = {"quick": False, "sources": {name: source_digest(REPOSITORY / name)}}
    assert stale_sources({"provenance": fresh}) == []
    assert stale_sources({}) == ["it does not say what it was measured with"]
    assert stale_sources({"provenance": fresh | {"quick": True}}) == ["it was measured with --quick"]
    assert stale_sources({"provenance": fresh | {"sources": {name: "0"}}}) == [f"{name} has changed"]
    assert stale_sources({"provenance": fresh | {"sources": {"no.toml": "0"}}}) == ["no.toml is gone"]


def test_a_result_without_a_place_on_its_page_is_named_and_not_appended() -> None:
    with pytest.raises(SystemExit, match=r"benchmarks/README\.md: has no place for the table demo"):
        filled(BENCHMARKS_README, "# A page without marks")


@pytest.mark.run
@pytest.mark.slow
def test_a_fiftieth_of_the_random_damages_is_found_and_named_by_the_proof_itself(tmp_path: Path) -> None:
    """With ovexport.json removed and rewritten as well; damage that changes no code is the one thing that it misses."""
    run = build_run(tmp_path, TINY, CompressSpec(group_size=32, rank=8))
    counts = count(run, random.Random(7), share=50)
    assert sum(count.trials for count in counts.values()) == 44
    checkpoint = counts.pop("a bit flipped in the checkpoint")
    assert checkpoint.found["in place"] == 4
    assert all(checkpoint.found[case] + checkpoint.same_codes >= 4 for case in ("removed", "rewritten"))
    for kind, one in counts.items():
        assert set(one.found.values()) == {one.trials}, kind
        named = one.file_named if one.part_named is None else one.part_named
        assert named >= 0.9 * one.trials, kind
        assert (one.missed, one.unexpected) == ([], 0), kind
