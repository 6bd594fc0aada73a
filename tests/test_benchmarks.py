import random
import subprocess
import sys
from pathlib import Path

import auto_round_codes
import pytest
import torch
from conftest import REPOSITORY
from llama import interleaved
from provenance import modules_of, source_digest, stale_sources
from reliability import count
from shapes import TINY, build_run
from tables import BENCHMARKS_README, filled, peers_table

from ovexport.recipe import CompressSpec
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.policy import format_layer


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


def test_auto_round_has_no_row_where_it_packs_other_layers_than_the_other_rows() -> None:
    def layer(name: str, rows: int, group_size: int = 32) -> LayerFormat:
        matrix = WeightMatrix(name=name, kind="linear", out_features=rows, in_features=64, transposed=False)
        return format_layer(matrix, "int4_asym", group_size=group_size)

    reason = auto_round_codes.reason_against
    assert reason([layer("a.weight", 64), layer("b.weight", 96)]) is None
    assert reason([layer("a.weight", 64), layer("b.weight", 172)]) == (
        "it would leave 1 of 2 layers in floating point, such as one of 172 x 64 weights, as it needs multiples of 32"
    )
    assert reason([layer("a.weight", 64), layer("b.weight", 96, 64)]) == "the layers have several group sizes"


def test_an_interpreter_without_auto_round_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"--auto-round {tmp_path / 'python'}: No such file or directory; give "):
        auto_round_codes.require_installed(tmp_path / "python")


@pytest.mark.slow
def test_without_a_built_llama_cpp_one_line_says_what_to_give(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "peers.py")]
    for options, message in (
        ([], "peers.py: give --llama, a folder in which llama.cpp is built; --help has the commands"),
        (["--llama", str(tmp_path)], f"--llama {tmp_path}: has no PKG-INFO; build llama.cpp there as --help says"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == message
        assert "Traceback" not in done.stderr


def test_the_table_of_peers_shows_the_parts_that_were_measured() -> None:
    types = {"Q5_0": {"matrices": 2, "bytes": 1}, "Q4_K": {"matrices": 3, "bytes": 9}}
    sizes = {"bits_per_weight": 4.5, "file_bytes": 2e6, "weight_bytes": 1e6, "types": types}
    figures = {"kl_mean_nats": 0.5, "kl_ci95": None, "same_top1": 0.75, "perplexity": 8.0}
    quality = {
        "rows": {"Q4_K_M": sizes | {"weights": figures, "engine": figures | {"kl_ci95": [0.25, 1.0]}}},
        "conditions": {
            "model": "a",
            "compress": {"mode": "int4_asym", "group_size": 64, "rank": 8},
            "tune": {"steps": 3},
            "train": "b.txt",
            "train_tokens": 512,
            "test_sequences": 2,
            "sequence_length": 256,
            "piece_tokens": 32,
            "float_kl_nats": 1e-12,
        },
    }
    versions = {"llama-cpp-python": "0.3", "llama.cpp": "abc", "openvino": "2026"}
    document = {"ratios": {}, "conditions": {"device_name": "CPU", "threads": 2}, "versions": versions}
    shown = peers_table(document | {"quality": quality})
    row = "| Q4_K_M | 4.50 | 2.00 | 1.00 | 0.50000 | 75.00% | 8.000 | 0.50000 (0.25000–1.00000) | 75.00% | 8.000 |"
    assert f"{row} Q4_K: 3, Q5_0: 2 |" in shown
    assert "time to first token" not in shown
    assert shown.endswith("CPU, 2 threads; llama-cpp-python 0.3 (llama.cpp abc), openvino 2026.")


def test_the_rows_of_a_head_are_put_in_the_order_in_which_llama_cpp_rotates_them() -> None:
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rows = torch.arange(8.0)[:, None]
    query, key = (interleaved(f"layers.0.self_attn.{name}.weight", rows, config) for name in ("q_proj", "k_proj"))
    assert query[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert key[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved("layers.0.self_attn.v_proj.weight", rows, config)[:, 0].tolist() == rows[:, 0].tolist()


@pytest.mark.run
@pytest.mark.slow
def test_a_fiftieth_of_the_random_damages_is_found_and_named_by_the_proof_itself(tmp_path: Path) -> None:
    """With ovexport.json removed and rewritten as well; damage that changes no code is the one thing that it misses."""
    run = build_run(tmp_path, TINY, CompressSpec(group_size=32, rank=8, rounding="nearest"))
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
