import csv

import numpy as np
import pytest
import torch

from ovexport.artifacts import read_record
from ovexport.errors import ArtifactError, DataError
from ovexport.evaluate import load_encoder
from ovexport.evaluate.answers import Answers, aggregate, compare_answers, divergent_tokens
from ovexport.evaluate.divergence import TokenFigures, log_softmax, recovered_gap, token_kl, word_perplexity
from ovexport.evaluate.prompts import choose_prompts
from ovexport.recipe import EvaluateSpec
from ovexport.reports import EvaluationReport


def test_token_kl_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, candidate = torch.randn(2, 5, 11, generator=generator), torch.randn(2, 5, 11, generator=generator)
    expected = torch.nn.functional.kl_div(
        candidate.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    actual = token_kl(log_softmax(reference.numpy()), log_softmax(candidate.numpy()))
    assert np.allclose(actual, expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        token_kl(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32))


def test_huge_logits_do_not_overflow() -> None:
    assert np.isfinite(log_softmax(np.array([[1e4, -1e4, 0.0]], np.float32))).all()


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], (4, 0, 0.0)),
        ([1, 2, 3, 4], [1, 2, 9, 4], (2, 1, 0.25)),
        (
            [7, 8, 7, 9, 10],
            [7, 9, 10],
            (0, 0, 0.0),
        ),  # its own trap: an earlier block hides the prefix
        ([], [], (0, 0, 0.0)),
        ([1, 2], [], (0, 2, 1.0)),
        ([], [1, 2, 3], (0, 3, 1.0)),
    ],
)
def test_divergent_tokens_are_whowhatbenchs(reference, candidate, expected) -> None:
    assert divergent_tokens(reference, candidate) == expected


def test_similarity_is_aggregated_as_whowhatbench_does() -> None:
    reference = Answers(texts=("a", "b"), tokens=((1, 2, 3, 4), (5, 6)), chat_template=False)
    candidate = Answers(texts=("a", "c"), tokens=((1, 2, 3, 4), (5, 7)), chat_template=False)
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    rows = compare_answers(reference, candidate, lambda texts: np.array([vectors[text] for text in texts], np.float32))
    mean = aggregate(rows)
    assert mean.similarity == pytest.approx(0.9)
    assert mean.fdt == 2.5
    assert mean.fdt_norm == pytest.approx(2.5 / 3)
    assert mean.sdt == 0.5
    assert mean.sdt_norm == 0.25


def test_recovered_gap_and_its_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0.5, 1.5, (64, 7)).astype(np.float32)
    twin, tuned = TokenFigures(kl=[before]), TokenFigures(kl=[before * np.float32(0.25)])
    gap, (low, high) = recovered_gap(twin, tuned, seed=0)
    assert gap == pytest.approx(0.75)
    assert low == pytest.approx(0.75, abs=1e-3)
    assert high == pytest.approx(0.75, abs=1e-3)


def test_word_perplexity_counts_words_not_tokens() -> None:
    figures = TokenFigures(nll=[np.full((2, 3), np.log(2.0), np.float32)])
    assert word_perplexity(figures, length=4, words=4) == pytest.approx(4.0)
    assert word_perplexity(figures, length=4, words=0) is None


def test_prompts_are_the_first_words_of_long_enough_documents(tmp_path) -> None:
    spec = EvaluateSpec(prompt_words=2, prompt_count=2)
    assert choose_prompts(["a b", "c d e f", "g h i j", "k l m n"], spec) == ("c d", "g h")
    assert choose_prompts(["a b c", "d", "e f"], spec) == ("a", "e")
    with pytest.raises(DataError, match="holds single words"):
        choose_prompts(["a", "b"], spec)
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert choose_prompts([], EvaluateSpec(prompts=str(tmp_path / "p.txt"))) == ("one", "two")


def test_an_encoder_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ArtifactError, match=r'evaluate\.encoder="offline"'):
        load_encoder("nobody/no-such-encoder")


def test_the_report_of_a_run_holds_every_figure(finished_run) -> None:
    report = read_record(finished_run.path / "evaluation.json", EvaluationReport)
    assert list(report.models) == ["bf16", "plain", "int4"]
    assert report.models["bf16"].reason is not None
    for name in ("plain", "int4"):
        model = report.models[name]
        missing = [field for field, value in model.model_dump().items() if value is None and field != "reason"]
        assert not missing
        assert 0 < model.kl_median_nats <= model.kl_p99_nats <= model.kl_maximum_nats
        assert sum(model.kl_histogram) == 8 * 63
    assert report.recovered_gap is not None
    runtime = report.conditions["runtime"]["int4"]
    assert (runtime["INFERENCE_PRECISION_HINT"], runtime["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == ("f32", "0")
    assert report.conditions["encoder"] == "offline"


def test_csv_files_are_in_whowhatbenchs_layout(finished_run) -> None:
    folder = finished_run.path / "evaluation"
    with (folder / "reference.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "prompts", "answers", "language", "prompt_length_type"]
    assert len(rows) == 4
    with (folder / "int4" / "metrics_per_question.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert header == [
        "", "similarity", "FDT", "SDT", "FDT norm", "SDT norm", "prompts", "source_model", "optimized_model",
    ]  # fmt: skip
