import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import openvino_genai
import pytest
import torch

from ovexport.artifacts import IR, RunFolder
from ovexport.bootstrap import FEWEST_VALUES
from ovexport.errors import ArtifactError, DataError, UnsupportedModelError
from ovexport.evaluate import evaluate, load_encoder
from ovexport.evaluate.answers import PromptTokenizer, common_template, generate, prompt_tokens
from ovexport.evaluate.divergence import (
    Resampling,
    TokenFigures,
    compare,
    difference,
    perplexity,
    recovered_gap,
    summarize,
    verdict,
    word_perplexity,
)
from ovexport.evaluate.isolation import KeptRunner
from ovexport.evaluate.prompts import choose_prompts
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.token_divergence import Comparator
from ovexport.progress import silent
from ovexport.recipe import EvaluateSpec
from ovexport.reports import EvaluationReport
from ovexport.storage.files import write_text
from ovexport.storage.records import read_record

QUICK = EvaluateSpec(encoder="offline", prompts="short", prompt_count=3, max_new_tokens=8)


def sequences(count: int, length: int) -> Resampling:
    return Resampling.of(None, (count, length), seed=0)


@pytest.mark.parametrize("vocabulary", [7, 64, 150])
def test_a_tokens_figures_are_torchs(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, candidate = (4 * torch.randn(2, 5, vocabulary, generator=generator) for _ in range(2))
    true = torch.randint(vocabulary, (2, 5), generator=generator)
    p, q = (logits.double().log_softmax(-1) for logits in (reference, candidate))
    found = Comparator(vocabulary)(reference.numpy(), candidate.numpy(), true.numpy())
    assert np.allclose(found.kl, (p.exp() * (p - q)).sum(-1).numpy(), rtol=1e-5)
    own, other = (one.gather(-1, true[..., None])[..., 0] for one in (q, p))
    assert np.allclose(found.nll, -own.numpy(), rtol=1e-5, atol=1e-7)
    assert np.allclose(found.reference_nll, -other.numpy(), rtol=1e-5, atol=1e-7)
    assert np.allclose(found.probability_change, (own.exp() - other.exp()).numpy(), atol=1e-7)
    assert (found.same_top1 == (p.argmax(-1) == q.argmax(-1)).numpy()).all()


def test_the_comparator_refuses_other_shapes_and_logits_that_are_no_numbers() -> None:
    comparator, true = Comparator(4), np.zeros((1, 2), np.int64)
    logits = np.array([[[1e4, -1e4, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0]]], np.float32)
    assert np.isfinite(comparator(logits, logits[..., ::-1].copy(), true).kl).all()
    assert comparator(logits, logits, true).kl.max() == 0
    with pytest.raises(ValueError, match="shapes differ"):
        comparator(logits, logits[..., :3], true)
    with pytest.raises(UnsupportedModelError, match="not a number"):
        comparator(logits, np.full_like(logits, np.nan), true)


def test_divergence_is_that_of_torch_on_the_same_logits_and_of_pieces_too(finished_run: RunFolder) -> None:
    tokens = finished_run.data.tokens("test")[:3]
    runners = {name: LogitsRunner(read_graph(finished_run.ir(name)), name) for name in ("bf16", "int4")}
    logits = {name: torch.tensor(runner(tokens.astype(np.int64))).double() for name, runner in runners.items()}
    p, q = (logits[name].log_softmax(-1)[:, :-1] for name in ("bf16", "int4"))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    nll = -q.gather(-1, torch.tensor(tokens[:, 1:].astype(np.int64))[..., None]).mean()
    for piece in (None, 17):
        figures = compare(runners, "bf16", tokens, 2, silent, piece=piece)
        assert figures["int4"].joined("kl").mean() == pytest.approx(kl, rel=1e-5 if piece is None else 1e-4)
        assert figures["int4"].joined("nll").mean() == pytest.approx(float(nll), rel=1e-5)
        assert figures["bf16"].joined("nll").shape == (3, 63)


def test_a_model_against_itself_differs_in_nothing(finished_run: RunFolder, tmp_path: Path) -> None:
    twin = IR(shutil.copytree(finished_run.ir("int4").path, tmp_path / "same"))
    models = {"int4": finished_run.ir("int4"), "same": twin}
    report = evaluate(models, "int4", finished_run.data, QUICK, load_encoder("offline"), tmp_path / "out")
    same = report.models["same"]
    assert same.kl_mean_nats == same.kl_maximum_nats == 0
    assert (same.same_top1, same.perplexity_verdict, same.perplexity_ratio.value) == (1, "tie", 1)
    assert same.similarity == pytest.approx(1, abs=1e-6)
    assert (same.sdt, same.worst_answers) == (0, ())


def test_answers_that_are_the_same_are_counted_and_said(finished_run: RunFolder, tmp_path: Path) -> None:
    prompts = "".join(f"{'very ' * count}long ago\n" for count in range(6))
    write_text(prompts, tmp_path / "p.txt")
    spec = EvaluateSpec(encoder="offline", prompts=str(tmp_path / "p.txt"), max_new_tokens=1)
    models = {"one": always_saying(300, finished_run, tmp_path / "one"), "int4": finished_run.ir("int4")}
    report = evaluate(models, "one", None, spec, load_encoder("offline"), tmp_path / "out")
    assert report.models["one"].different_answers == 1
    assert report.models["int4"].different_answers > 1
    assert report.notes[0] == (
        "one answers 6 prompts with the same text, and the similarity compares no more than that; give other prompts, "
        "or another chat_template"
    )


def always_saying(token: int, run: RunFolder, folder: Path) -> IR:
    """The baseline, with a token that is the likeliest everywhere."""
    ir = IR(shutil.copytree(run.ir("bf16").path, folder))
    graph = read_graph(run.ir("bf16"))
    logits = graph.output("logits").get_node()
    towards = np.zeros(2048, np.float32)
    towards[token] = 1e6
    logits.input(0).replace_source_output(ops.add(logits.input_value(0), towards).output(0))
    ov.save_model(graph, ir.xml, compress_to_fp16=False)
    return ir


def test_the_untuned_twin_can_be_the_reference(finished_run: RunFolder, tmp_path: Path) -> None:
    models = {name: finished_run.ir(name) for name in ("plain", "int4")}
    report = evaluate(models, "plain", finished_run.data, QUICK, load_encoder("offline"), tmp_path)
    assert (report.recovered_gap, report.reason) == (None, "no plain twin was compared")
    assert report.models["int4"].kl_mean_nats > 0


def test_the_bootstrap_draws_documents_where_there_are_enough_of_them() -> None:
    documents = np.repeat(np.arange(12, dtype=np.int32), 8).reshape(3, 32)
    by_document = Resampling.of(documents, (3, 31), seed=0)
    assert (by_document.name, by_document.units.max()) == ("documents", 11)
    assert Resampling.of(documents // 6, (3, 31), seed=0).name == "sequences"
    values = by_document.units.astype(float)
    spread = by_document.means(values)[:, 0].std()
    assert spread == pytest.approx(np.std(np.arange(12)) / np.sqrt(12), rel=0.2)
    assert sequences(3, 31).means(values)[:, 0].std() != pytest.approx(spread, rel=0.05)


def test_a_difference_whose_interval_holds_nothing_is_a_tie() -> None:
    assert [verdict(interval, 0.0) for interval in ((-1.0, 1.0), (0.1, 1.0), (-1.0, -0.1))] == [
        "tie",
        "higher",
        "lower",
    ]


def test_too_few_values_have_no_interval_and_no_verdict() -> None:
    generator = np.random.default_rng(0)

    def figures_of(count: int) -> TokenFigures:
        drawn = [generator.uniform(0.5, 1.5, (count, 7)) for _ in range(3)]
        return TokenFigures(nll=[drawn[0]], kl=[drawn[1]], same_top1=[drawn[1] > 1], probability_change=[drawn[2]])

    for count in (2, FEWEST_VALUES - 1, FEWEST_VALUES):
        one, other, drawn = figures_of(count), figures_of(count), sequences(count, 7)
        found, compared = summarize(one, other, drawn)[0], difference(one, other, drawn)
        intervals: list[Any] = [
            found.kl_mean_ci95,
            found.same_top1_ci95,
            found.perplexity_ratio.ci95,
            compared.kl_mean_nats.ci95,
        ]
        intervals += [recovered_gap(one, other, drawn)[1], found.perplexity_verdict, compared.nll_verdict]
        few = count < FEWEST_VALUES
        assert [interval is None for interval in intervals] == [few] * len(intervals)
        assert drawn.too_few == (f"{count} sequences are too few for an interval" if few else None)
        low, high = found.same_top1_ci95 or (0.0, 1.0)
        assert low <= found.same_top1 <= high


def test_recovered_gap_and_its_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0.5, 1.5, (64, 7)).astype(np.float32)
    before_and_after: list[Any] = [before, before * np.float32(0.25)]
    twin, tuned = (TokenFigures(kl=[kl]) for kl in before_and_after)
    gap, (low, high) = recovered_gap(twin, tuned, sequences(64, 7))
    assert gap == pytest.approx(0.75)
    assert low == pytest.approx(0.75, abs=1e-3)
    assert high == pytest.approx(0.75, abs=1e-3)


def test_word_perplexity_counts_words_not_tokens() -> None:
    figures = TokenFigures(nll=[np.full((2, 3), np.log(2.0), np.float32)])
    assert word_perplexity(figures, length=4, words=4) == pytest.approx(4.0)
    assert word_perplexity(figures, length=4, words=0) is None


def test_a_perplexity_beyond_a_float_is_none() -> None:
    figures = TokenFigures(nll=[np.full((2, 3), 400.0, np.float32)])
    assert perplexity(figures) == pytest.approx(np.exp(400.0))
    assert word_perplexity(figures, length=4, words=4) is None
    beyond = TokenFigures(nll=[np.full((5, 3), 800.0, np.float32)])
    assert perplexity(beyond) is None
    beyond.kl, beyond.same_top1, beyond.probability_change = beyond.nll, [np.zeros((5, 3), bool)], beyond.nll
    reference = TokenFigures(nll=[np.ones((5, 3), np.float32)])
    found, _ = summarize(beyond, reference, sequences(5, 3))
    assert (found.perplexity_ratio, found.perplexity_verdict, found.kl_mean_nats) == (None, "higher", 800.0)


def test_prompts_are_the_first_words_of_long_enough_documents() -> None:
    spec = EvaluateSpec(prompt_words=2, prompt_count=2)
    assert choose_prompts(["a b", "c d e f", "g h i j", "k l m n"], spec).texts == ("c d", "g h")
    assert choose_prompts(["a b c", "d", "e f"], spec).texts == ("a", "e")
    with pytest.raises(DataError, match="holds single words"):
        choose_prompts(["a", "b"], spec)


def test_prompts_come_from_packaged_sets_files_and_columns(tmp_path: Path) -> None:
    assert len(choose_prompts([], EvaluateSpec(prompts="chinese", prompt_count=100)).texts) >= 24
    write_text("one\n\ntwo\n", tmp_path / "p.txt")
    write_text('{"question": "three"}\n{"question": "four"}\n', tmp_path / "p.jsonl")
    assert choose_prompts([], EvaluateSpec(prompts=str(tmp_path / "p.txt"))).texts == ("one", "two")
    rows = EvaluateSpec(prompts=str(tmp_path / "p.jsonl"), prompts_column="question")
    assert choose_prompts([], rows).texts == ("three", "four")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("picture.png", b"\x89PNG", "neither .txt nor"),
        ("binary.txt", b"\x00\x01\x02", "NUL characters"),
        ("latin.txt", b"\xff\xfe\xfa", "can't be read"),
        ("rows.jsonl", b'{"text": "a"}\n', "no column 'prompt'"),
        ("missing.txt", None, "no such file"),
        ("empty.jsonl", b"", "holds no text"),
    ],
)
def test_a_prompt_file_that_is_of_no_use_is_refused(tmp_path: Path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        choose_prompts([], EvaluateSpec(prompts=str(tmp_path / name)))


def test_answers_are_openvino_genais_own_and_no_penalty_of_the_model_counts(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    prompts = ["Once there was a", "Lily and Tom"]
    ir = IR(shutil.copytree(finished_run.ir("int4").path, tmp_path / "int4"))

    def said() -> tuple[str, ...]:
        return generate("int4", ir, prompts, templated=False, max_new_tokens=8, listener=silent).texts

    before = said()
    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    pipeline = openvino_genai.LLMPipeline(str(ir.path), "CPU", ATTENTION_BACKEND="SDPA", **settings)
    expected = [
        pipeline.generate([prompt], max_new_tokens=8, do_sample=False, apply_chat_template=False).texts[0]
        for prompt in prompts
    ]
    assert list(before) == expected
    (ir.path / "generation_config.json").write_text(
        '{"repetition_penalty": 9.0, "do_sample": true, "temperature": 3.0, "eos_token_id": 1, "bos_token_id": 0}'
    )
    penalised = openvino_genai.LLMPipeline(str(ir.path), "CPU", ATTENTION_BACKEND="SDPA", **settings)
    assert penalised.get_generation_config().repetition_penalty == 9.0
    assert said() == before


def test_a_model_with_another_vocabulary_or_tokenizer_is_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    runners = {name: LogitsRunner(read_graph(finished_run.ir(name)), name) for name in ("bf16", "int4")}
    runners["int4"].vocabulary = 99
    tokens = finished_run.data.tokens("test")
    with pytest.raises(ArtifactError, match="its vocabulary has 99 tokens, that of bf16 2048"):
        compare(runners, "bf16", tokens, 2, silent)
    with pytest.raises(ArtifactError, match="the text holds token 5000"):
        compare({"bf16": runners["bf16"]}, "bf16", tokens + 5000 - tokens.max(), 2, silent)
    other = IR(shutil.copytree(finished_run.ir("int4").path, tmp_path / "other"))
    for file in ("openvino_tokenizer.xml", "openvino_tokenizer.bin"):
        shutil.copy(other.path / file.replace("tokenizer", "detokenizer"), other.path / file)
    with pytest.raises((ArtifactError, UnsupportedModelError), match="tokenizer"):
        evaluate(
            {"bf16": finished_run.ir("bf16"), "other": other}, "bf16", None, QUICK, load_encoder("offline"), tmp_path
        )


def test_models_are_asked_through_one_template_in_the_same_tokens_or_not_at_all(
    finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = {name: PromptTokenizer(finished_run.ir(name)) for name in ("bf16", "int4")}
    template = tokenizers["bf16"].template
    assert template
    assert common_template(tokenizers, "auto") == template
    assert common_template(tokenizers, "off") is None
    tokenizers["int4"].template = template + " "
    with pytest.raises(ArtifactError, match="int4: its chat template is not that of bf16"):
        common_template(tokenizers, "auto")
    tokenizers["int4"].template = None
    assert common_template(tokenizers, "auto") is None
    assert len(prompt_tokens(tokenizers, ["a", "b c"])) == 2
    monkeypatch.setattr(tokenizers["int4"], "encode", lambda text: (len(text),))
    with pytest.raises(ArtifactError, match="int4: its tokenizer encodes prompt 1 otherwise than that of bf16"):
        prompt_tokens(tokenizers, ["a", "b c"])


def test_a_model_that_says_nothing_is_refused(finished_run: RunFolder, tmp_path: Path) -> None:
    ir = always_saying(1, finished_run, tmp_path / "silent")
    with pytest.raises(DataError, match="generated nothing for any of the 1 prompts"):
        generate("silent", ir, ["Once"], templated=False, max_new_tokens=8, listener=silent)


@pytest.fixture(scope="module")
def isolated(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> EvaluationReport:
    models = {name: finished_run.ir(name) for name in ("bf16", "int4")}
    spec = QUICK.model_copy(update={"isolate": True})
    out = tmp_path_factory.mktemp("isolated")
    return evaluate(models, "bf16", finished_run.data, spec, load_encoder("offline"), out)


def test_what_every_step_of_isolation_is_compared_with_is_run_once_as_far_as_it_fits(finished_run, monkeypatch) -> None:
    tokens = finished_run.data.tokens("test")[:4].astype(np.int64)
    graph, asked = read_graph(finished_run.ir("bf16")), []
    plain = LogitsRunner(graph, "bf16")
    kept = KeptRunner(graph, "bf16", kept_bytes=2 * 64 * plain.vocabulary * 4)
    pieces = LogitsRunner.pieces

    def counted(self: LogitsRunner, rows: np.ndarray, longest: int) -> Iterator[np.ndarray]:
        asked.append(self)
        return pieces(self, rows, longest)

    monkeypatch.setattr(LogitsRunner, "pieces", counted)
    for runs in (2, 3):  # the first rows fit and are kept, the others are run again
        for rows in (tokens[:2], tokens[2:]):
            expected = [logits.copy() for logits in plain.pieces(rows, 32)]
            found = [logits.copy() for logits in kept.pieces(rows, 32)]
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        assert asked.count(kept) == runs


def test_isolation_tells_weights_cache_quantization_and_activations_apart(isolated: EvaluationReport) -> None:
    steps = {step.name: step for step in isolated.models["int4"].isolation}
    assert list(steps) == ["weights", "kv_cache", "dynamic_quantization", "activations", "deployment"]
    assert steps["weights"].reference_kl_mean_nats == 0
    assert steps["weights"].kl_mean_nats == pytest.approx(isolated.models["int4"].kl_mean_nats, rel=1e-3)
    assert steps["kv_cache"].runtime["KV_CACHE_PRECISION"] == "u8"
    assert steps["kv_cache"].reference_kl_mean_nats > 0
    assert isolated.models["bf16"].isolation == ()


def test_an_encoder_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ArtifactError, match=r'evaluate\.encoder="offline"'):
        load_encoder("nobody/no-such-encoder")


def test_the_report_of_a_run_holds_every_figure(finished_run) -> None:
    report = read_record(finished_run.path / "evaluation.json", EvaluationReport)
    assert list(report.models) == ["bf16", "plain", "int4"]
    assert report.models["bf16"].reason is not None
    for name in ("plain", "int4"):
        model = report.models[name]
        missing = [name for name, value in model.model_dump().items() if value is None and not name.endswith("reason")]
        assert (missing, model.reason) == ([], None)
        assert 0 < model.kl_median_nats <= model.kl_p99_nats <= model.kl_maximum_nats
        assert sum(model.kl_histogram) == 8 * 63
    assert report.recovered_gap is not None
    runtime = report.conditions["runtime"]["int4"]
    assert (runtime["INFERENCE_PRECISION_HINT"], runtime["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == ("f32", "0")
    assert report.conditions["encoder"] == "offline"
    assert report.conditions["prompt_language"] == "en"
    assert {model.different_answers for model in report.models.values()} == {report.conditions["prompts"]}
    assert report.notes == ()


def test_csv_files_are_in_whowhatbenchs_layout(finished_run) -> None:
    folder = finished_run.path / "evaluation"
    with (folder / "reference.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "prompts", "answers", "language", "prompt_length_type"]
    assert len(rows) == 6
    with (folder / "int4" / "metrics_per_question.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert header == [
        "", "similarity", "FDT", "SDT", "FDT norm", "SDT norm", "prompts", "source_model", "optimized_model",
    ]  # fmt: skip
