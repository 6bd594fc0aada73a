import csv
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
from independent_similarity import metrics, random_pairs

from ovexport.artifacts import RunFolder
from ovexport.errors import ArtifactError, DataError
from ovexport.evaluate import evaluate, load_encoder, read_ground_truth
from ovexport.evaluate.ground_truth import Circumstances, sidecar_of, write_ground_truth
from ovexport.evaluate.prompts import Prompts
from ovexport.evaluate.similarity import (
    Answers,
    aggregate,
    compare_answers,
    differing_tokens,
    divergent_tokens,
    edit_distance,
    worst,
)
from ovexport.recipe import EvaluateSpec
from ovexport.storage.files import write_text

SPEC = EvaluateSpec(encoder="offline", prompts="short", prompt_count=3, max_new_tokens=8)


def answers(*tokens: tuple[int, ...]) -> Answers:
    texts = tuple(" ".join(map(str, one)) for one in tokens)
    return Answers(texts=texts, generated=tokens, encoded=tokens)


@pytest.mark.parametrize("seed", [0, 1])
def test_wwb_figures_are_those_of_an_independent_implementation(seed: int) -> None:
    pairs = random_pairs(seed, 500)
    cosines = np.random.default_rng(seed).uniform(-1, 1, 500).astype(np.float32).tolist()
    expected, total = metrics(pairs, cosines)
    rows = compare_answers(
        answers(*(tuple(a) for a, _ in pairs)), answers(*(tuple(b) for _, b in pairs)), lambda *_: cosines, "wwb"
    )
    for row, other in zip(rows, expected, strict=True):
        for name in ("similarity", "fdt", "sdt", "fdt_norm", "sdt_norm"):
            assert getattr(row, name) == pytest.approx(other[name], abs=1e-6)
    for name, value in total.items():
        assert getattr(aggregate(rows, "wwb"), name) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ((0,), (0,), (0, 0, 0.0)),
        ((0,), (), (0, 0, 0.0)),
        ((0,), (4, 5), (0, 2, 1.0)),
        ((4, 5), (0,), (0, 2, 1.0)),
        ((0, 5), (0, 5), (2, 0, 0.0)),
        ((3,), (3,), (1, 0, 0.0)),
    ],
)
def test_in_wwb_an_answer_of_the_one_token_0_counts_as_none_as_in_whowhatbench(reference, candidate, expected) -> None:
    row, other = compare_answers(answers(reference, (1, 2)), answers(candidate, (1, 2)), lambda *_: [1.0, 1.0], "wwb")
    assert (row.fdt, row.sdt, row.sdt_norm) == expected
    assert row.reference_tokens == len(reference) * (reference != (0,))
    assert other.fdt_norm == 2 / ((row.reference_tokens + 2) / 2)
    strict, _ = compare_answers(answers((0,), (1,)), answers((0,), (1,)), lambda *_: [1.0, 1.0], "strict")
    assert (strict.fdt, strict.reference_tokens) == (1, 1)


@pytest.mark.parametrize("mode", ["wwb", "strict"])
def test_fewer_than_five_prompts_give_a_similarity_and_no_interval(mode) -> None:
    said = answers(*((1, index) for index in range(5)))
    rows = compare_answers(said, said, lambda *_: [0.1, 0.3, 0.5, 0.7, 0.9], mode)
    found = aggregate(rows, mode)
    assert found.similarity_ci95[0] < found.similarity < found.similarity_ci95[1]
    few = aggregate(rows[:4], mode)
    assert (few.similarity, few.similarity_ci95) == (pytest.approx(0.4), None)


def test_where_whowhatbench_has_nan_wwb_has_none_and_strict_a_number() -> None:
    empty, said = answers((), ()), answers((1,), ())
    rows = compare_answers(empty, said, lambda *_: [0.5, 1.0], "wwb")
    assert math.isnan(rows[0].fdt_norm)
    assert aggregate(rows, "wwb").fdt_norm is None
    strict = compare_answers(empty, said, lambda *_: [0.5, 1.0], "strict")
    assert [row.fdt_norm for row in strict] == [0, 1]
    assert aggregate(strict, "strict").fdt_norm == 0.5


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4), (4, 0, 0.0)),
        ((7, 8, 7, 9, 10), (7, 9, 10), (1, 2, 0.4)),
        ((1, 2, 3), (1, 3), (1, 1, 1 / 3)),
        ((), (), (0, 0, 0.0)),
        ((1,), (), (0, 1, 1.0)),
        ((), (1, 2), (0, 2, 1.0)),
    ],
)
def test_the_strict_mode_counts_what_differs(reference, candidate, expected) -> None:
    assert differing_tokens(reference, candidate) == pytest.approx(expected)


def test_what_differs_in_the_strict_mode_is_a_share_of_the_longer_answer() -> None:
    for reference, candidate in random_pairs(3, 200):
        fdt, sdt, norm = differing_tokens(reference, candidate)
        assert 0 <= norm <= 1
        assert fdt + sdt <= max(len(reference), len(candidate))
        assert abs(len(reference) - len(candidate)) <= sdt
        assert (sdt == 0) == (list(reference) == list(candidate))
    assert edit_distance([3, 0, 2, 3, 3, 2], [2, 1, 1, 2, 1, 0, 2]) == 5


def test_the_strict_mode_has_no_autojunk() -> None:
    reference = tuple(int(token) for token in np.random.default_rng(0).integers(0, 3, 256))
    candidate = (*reference[:100], 9, *reference[101:])
    assert differing_tokens(reference, candidate)[:2] == (100, 1)
    assert divergent_tokens(reference, candidate)[1] > 1


def test_the_worst_answers_come_first_and_show_where_they_part() -> None:
    reference = Answers(texts=("same", "a cat", "a dog"), generated=((1,),) * 3, encoded=((1,),) * 3)
    candidate = Answers(texts=("same", "a car", "no"), generated=((1,),) * 3, encoded=((1,),) * 3)
    rows = compare_answers(reference, candidate, lambda *_: [1.0, 0.8, 0.1], "wwb")
    found = worst(("p", "q", "r"), reference, candidate, rows)
    assert [(one.prompt, one.first_difference) for one in found] == [("r", 0), ("q", 4)]


def test_similarity_is_sentence_transformers_own_cosine() -> None:
    from sentence_transformers import SentenceTransformer, util

    from ovexport.evaluate import check_encoder

    model = SentenceTransformer(check_encoder("offline"), device="cpu")
    first, second = ("a cat sat", "", "one"), ("the cat sat down", "x", "one")
    pairs = zip(first, second, strict=True)
    expected = [util.cos_sim(*model.encode(list(pair), convert_to_tensor=True)).item() for pair in pairs]
    assert load_encoder("offline")(first, second) == expected


NASTY = ("a\rb", '"quoted", and\nlines', "12", "True", "", " spaces ", "=1+1", "nan")


def test_whowhatbench_reads_what_is_written_and_it_comes_back(tmp_path: Path) -> None:
    prompts = Prompts(name="p", texts=tuple(f"{text}?" for text in NASTY), language="en", length_type="short")
    said = Answers(texts=NASTY, generated=tuple((1,) for _ in NASTY), encoded=tuple((1,) for _ in NASTY))
    how = Circumstances(
        prompts_sha256="0", prompt_tokens_sha256="0", chat_template_sha256=None, max_new_tokens=8, runtime={}
    )
    write_ground_truth(prompts, said, how, {}, tmp_path / "reference.csv")
    back = read_ground_truth(tmp_path / "reference.csv")
    assert (back.texts, back.prompts.texts, back.sidecar.generated) == (NASTY, prompts.texts, said.generated)
    frame = pandas.read_csv(tmp_path / "reference.csv", keep_default_na=False)
    assert frame["answers"].tolist() == list(NASTY)
    assert list(frame.columns[1:]) == ["prompts", "answers", "language", "prompt_length_type"]


def test_a_csv_of_whowhatbenchs_own_is_read(tmp_path: Path) -> None:
    rows = {"prompts": ["a", "b"], "answers": ["c, d", "e"], "language": "en", "prompt_length_type": "long"}
    pandas.DataFrame(rows).to_csv(tmp_path / "gt.csv")
    found = read_ground_truth(tmp_path / "gt.csv")
    assert (found.texts, found.prompts.length_type, found.sidecar) == (("c, d", "e"), "long", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no ground truth"),
        ("a,b\n1,2\n", "with the columns prompts and answers"),
        (",prompts,answers\n0,a\n", "row 1 .line 2. has 2 fields, and the header 3"),
        ('\n,prompts,answers\n0,"a', "can't be read"),
    ],
)
def test_a_csv_that_is_no_ground_truth_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write_text(text, tmp_path / "gt.csv")
    with pytest.raises(ArtifactError, match=message):
        read_ground_truth(tmp_path / "gt.csv")


@pytest.fixture(scope="module")
def reference_csv(finished_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("truth")
    evaluate({"bf16": finished_run.ir("bf16")}, "bf16", None, SPEC, load_encoder("offline"), out)
    return out / "reference.csv"


@pytest.mark.parametrize("mode", ["wwb", "strict"])
def test_a_ground_truth_stands_in_for_the_reference(finished_run, reference_csv, tmp_path, mode) -> None:
    encoder, spec = load_encoder("offline"), SPEC.model_copy(update={"similarity_mode": mode})
    models = {name: finished_run.ir(name) for name in ("bf16", "int4")}
    fresh = evaluate(models, "bf16", None, spec, encoder, tmp_path / "fresh").models["int4"]
    truth = read_ground_truth(reference_csv)
    stored = evaluate({"int4": models["int4"]}, None, None, spec, encoder, tmp_path / "stored", ground_truth=truth)
    assert stored.models["int4"].model_dump(exclude={"reason"}) == fresh.model_dump(exclude={"reason"})
    assert "3 prompts are too few for an interval" in str(fresh.reason)
    assert "checked by its sidecar" in stored.conditions["ground_truth"]
    assert stored.conditions["similarity_mode"] == mode


def test_a_ground_truth_of_another_run_is_refused(finished_run, reference_csv, tmp_path) -> None:
    models, encoder = {"int4": finished_run.ir("int4")}, load_encoder("offline")
    truth = read_ground_truth(reference_csv)
    longer = SPEC.model_copy(update={"max_new_tokens": 9})
    with pytest.raises(ArtifactError, match="of another run, its max_new_tokens is 8 and not 9"):
        evaluate(models, None, None, longer, encoder, tmp_path, ground_truth=truth)
    bare = SPEC.model_copy(update={"chat_template": "off"})
    with pytest.raises(ArtifactError, match="its chat_template_sha256 is"):
        evaluate(models, None, None, bare, encoder, tmp_path, ground_truth=truth)
    copy = tmp_path / "other.csv"
    with reference_csv.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[1][2] += "!"
    with copy.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    sidecar_of(copy).write_bytes(sidecar_of(reference_csv).read_bytes())
    with pytest.raises(ArtifactError, match=r"are not those that other\.json is of"):
        read_ground_truth(copy)
    sidecar_of(copy).unlink()
    with pytest.raises(DataError, match='use similarity_mode "wwb"'):
        strict = SPEC.model_copy(update={"similarity_mode": "strict"})
        evaluate(models, None, None, strict, encoder, tmp_path, ground_truth=read_ground_truth(copy))
