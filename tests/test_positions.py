"""Lengths beyond what a model reads are refused wherever an IR is asked, not only in a run."""

import json
from pathlib import Path

import pytest
from command_line import ovexport, refused

from ovexport.artifacts import IR, RunFolder
from ovexport.models.positions import readable_by_all, readable_tokens


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"n_positions": 96}, 96),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 128}, 64),
        ({"max_position_embeddings": 128, "rope_scaling": {"factor": 4.0}}, 512),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {"factor": 4, "original_max_position_embeddings": 128},
            },
            512,
        ),
        ({"max_position_embeddings": 128, "rope_scaling": {"factor": float("inf")}}, 128),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_what_a_model_reads_is_in_its_configuration(config: dict, expected: int | None) -> None:
    assert readable_tokens(config) == expected


def test_the_model_that_reads_least_sets_the_limit(tmp_path: Path) -> None:
    for name, positions in (("a", 128), ("b", 96), ("c", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"n_positions": positions}))
    (tmp_path / "d").mkdir()
    assert readable_by_all(IR(tmp_path / name) for name in "abcd") == 96
    assert readable_by_all([IR(tmp_path / "d")]) is None


def test_bench_and_evaluate_refuse_what_the_model_cannot_read(finished_run: RunFolder, tmp_path: Path) -> None:
    product, baseline = finished_run.ir("int4").path, finished_run.ir("bf16").path
    done = ovexport("bench", product, "--prompt-tokens", "128", "--output-tokens", "2")
    assert "the model reads 128 tokens at most; lower bench.prompt_tokens to 127" in refused(done, 2)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 400)
    asked = ("--reference", baseline, "--data", text, "--encoder", "offline", "--out", tmp_path / "out")
    done = ovexport("evaluate", product, *asked, "--sequence-length", "256")
    assert "data.sequence_length=256: 256 tokens, and the model reads 128 at most" in refused(done, 2)
    done = ovexport("evaluate", product, *asked, "--sequence-length", "64", "--max-new-tokens", "128")
    assert "evaluate.max_new_tokens=128: 1" in refused(done, 2)
