"""Downstream tasks: rows in their original layouts, lm-evaluation-harness's prompts and counts, one answer from torch
and from the IR."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ovexport, refused
from conftest import tiny_values
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.errors import DataError, MissingDependencyError, RecipeError
from ovexport.evaluate.tasks import ask_model, loaded
from ovexport.models.student import TunedModel
from ovexport.pipeline import services
from ovexport.prepare import prepare
from ovexport.recipe import DataSpec, ModelSpec, TaskSpec
from ovexport.reports import EvaluationReport
from ovexport.storage.records import read_record
from ovexport.tasks import HarnessTask, harness, read_task_rows
from ovexport.tasks.asked import AskedModel

LABELS = ("A", "B", "C", "D")
SHORT = DataSpec(sequence_length=64, train_sequences=4, validation_sequences=1, test_sequences=1)


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arc(number: int, *, labels=LABELS) -> dict:
    choices = [{"text": f"thing {number + index}", "label": label} for index, label in enumerate(labels)]
    return {"id": f"q{number}", "question": {"stem": f"What is {number}?", "choices": choices}, "answerKey": labels[1]}


def hellaswag(number: int) -> dict:
    return {
        "ind": number,
        "activity_label": "Removing ice from car",
        "ctx_a": f"Then, the man writes over the snow {number} [title] times.",
        "ctx_b": "the man",
        "ctx": "",
        "split": "val",
        "split_type": "indomain",
        "label": number % 4,
        "endings": [f"goes {way}  home [step] now." for way in ("slowly", "quickly", "gladly", "back")],
        "source_id": "wikihow~1",
    }


def winogrande(number: int) -> dict:
    sentence = f"Sarah saw {number} birds before Maria did, so _ was glad."
    return {"qID": str(number), "sentence": sentence, "option1": "Sarah", "option2": "Maria", "answer": "1"}


def gsm8k(number: int) -> dict:
    return {"question": f"What is {number} plus 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"}


ORIGINAL = {
    "gsm8k": gsm8k,
    "hellaswag": hellaswag,
    "openbookqa": arc,
    "winogrande": winogrande,
    "arc_challenge": arc,
    "arc_easy": arc,
}


def of_task(name: str, folder: Path, row=None, **options: Any) -> TaskSpec:
    """A task with files of twelve, four and four rows."""
    make = row or ORIGINAL[name]
    files = {"train": range(12), "validation": range(20, 24), "test": range(30, 34)}
    paths = {split: written(folder / f"{split}.jsonl", [make(n) for n in numbers]) for split, numbers in files.items()}
    return TaskSpec(name=name, **paths, **options)


def asked_of(task: TaskSpec) -> tuple[HarnessTask, list[tuple[str, str]]]:
    rows, _ = read_task_rows(task, SHORT, {})
    made = HarnessTask(task, rows)
    return made, list(made.answered(rows["test"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINAL)
def test_each_task_goes_the_whole_way_offline_in_its_original_layout(name, tiny_model, finished_run, tmp_path) -> None:
    for traced in ("bf16", "stages/trace.json"):  # the same model's; the other stages have other inputs
        target = tmp_path / "run" / traced
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copy if target.suffix else shutil.copytree
        copy(finished_run.path / traced, target)
    values = tiny_values(tiny_model)
    task = of_task(name, tmp_path, num_fewshot=1 if name == "gsm8k" else None)
    values["task"] = task.model_dump(exclude_none=True)
    values["data"] = {"sequence_length": 32, "validation_sequences": 1, "test_sequences": 1}
    values["tune"] |= {"objective": "task", "steps": 2}
    values["evaluate"] |= {"prompt_count": 1, "max_new_tokens": 2}
    whole = recipe.parse(values, base=tmp_path, origin="test")
    run = services.run(whole, tmp_path / "run", resume=True, until="evaluate")
    report = read_record(run.path / "evaluation.json", EvaluationReport)
    metric = {"winogrande": "acc", "gsm8k": "exact_match"}.get(name, "acc_norm")
    for model in ("bf16", "plain", "int4", "torch"):
        figures = report.models[model].tasks[name]
        assert figures["items"] == 4
        assert 0 <= figures[metric] <= 1
        assert f"{metric}_stderr" in figures
        lines = (run.path / "evaluation" / model / f"{name}.jsonl").read_text().splitlines()
        assert {json.loads(line)["question"] for line in lines} == {0, 1, 2, 3}
    ours, theirs = (report.models[model].tasks[name] for model in ("int4", "torch"))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert report.conditions["tasks"][name]["metric"] == metric
    assert report.recovered_gap is None
    assert run.checkpoint.manifest.validation is not None


@pytest.mark.parametrize(
    ("name", "row", "question", "answer"),
    [
        ("arc_easy", arc, "Question: What is 30?\nAnswer:", " thing 31"),
        ("openbookqa", arc, "What is 30?", " thing 31"),
        ("gsm8k", gsm8k, "Question: What is 30 plus 1?\nAnswer:", " It is 31.\n#### 31"),
        ("winogrande", winogrande, "Sarah saw 30 birds before Maria did, so Sarah", " was glad."),
        (
            "hellaswag",
            hellaswag,
            "Removing ice from car: Then, the man writes over the snow 30. times. The man",
            " goes gladly home now.",
        ),
    ],
)
def test_questions_are_asked_as_lm_evaluation_harness_asks_them(name, row, question, answer, tmp_path) -> None:
    assert asked_of(of_task(name, tmp_path, row))[1][0] == (question, answer)


@pytest.mark.parametrize(
    ("name", "row", "question", "answer"),
    [
        (
            "arc_challenge",
            lambda n: {"query": f"Question: What is {n}?", "choices": ["it", "that"], "gold": 1},
            "Question: What is 30?\nAnswer:",
            " that",
        ),
        ("openbookqa", lambda n: {"query": f"It is {n}:", "choices": ["one", "two"], "gold": 0}, "It is 30:", " one"),
        (
            "winogrande",
            lambda n: {
                "context_options": [f"Of {n} it is Sam", f"Of {n} it is Sarah"],
                "continuation": "who came.",
                "gold": 1,
            },
            "Of 30 it is Sarah",
            " who came.",
        ),
        (
            "hellaswag",
            lambda n: {"query": f"Roofs: A man has {n}. he", "choices": ["sings.", "flies."], "gold": 0},
            "Roofs: A man has 30. he",
            " sings.",
        ),
        ("mine", lambda n: {"prompt": f"{n}+1=", "answer": str(n + 1)}, "30+1=", " 31"),
        ("mine", lambda n: {"query": f"After {n} is", "choices": ["0", str(n + 1)], "gold": 1}, "After 30 is", " 31"),
    ],
)
def test_other_layouts_are_asked_the_same_way(name, row, question, answer, tmp_path) -> None:
    assert asked_of(of_task(name, tmp_path, row))[1][0] == (question, answer)


def test_hub_layouts_of_arc_are_read_too(tmp_path) -> None:
    def row(number: int) -> dict:
        return {
            "question": f"What is {number}?",
            "choices": {"text": ["it", "that"], "label": ["1", "2"]},
            "answerKey": "2",
        }

    assert asked_of(of_task("arc_easy", tmp_path, row))[1][0] == ("Question: What is 30?\nAnswer:", " that")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mine", {"query": "Is it?", "gold": 0}, r"train.jsonl: row 1: no choices; give a list of at least two texts"),
        ("mine", {"query": "Is it?", "choices": ["no"], "gold": 0}, "row 1: no choices; give a list"),
        (
            "mine",
            {"query": "Is it?", "choices": ["no", "yes"], "gold": 2},
            "row 1: gold=2 is out of range: it has 2 choices, 0 to 1",
        ),
        ("mine", {"query": "Is it?", "choices": ["no", "yes"], "gold": -1}, "gold=-1 is out of range"),
        ("mine", {"prompt": "Is it?"}, "row 1: no answer; it has prompt"),
        ("mine", {"question": "Is it?"}, "its columns are question; a task's are prompt and answer"),
        ("hellaswag", hellaswag(1) | {"label": 4}, "label=4 is out of range"),
        ("hellaswag", hellaswag(1) | {"label": ""}, "label='' is no index of a choice; give a split with answers"),
        ("arc_easy", arc(1) | {"answerKey": "E"}, "answerKey='E' is none of its choices' labels, A, B, C, D"),
        ("arc_easy", {"question": {"stem": "Is it?"}, "answerKey": "A"}, "no choices; give text and label of each"),
        ("winogrande", winogrande(1) | {"sentence": "no gap"}, "sentence has no gap, '_'"),
        ("winogrande", winogrande(1) | {"answer": ""}, "answer='' is neither 1 nor 2; give a split with answers"),
        ("gsm8k", gsm8k(1) | {"answer": "2"}, "answer has no '#### ' before its result"),
    ],
)
def test_a_row_that_is_none_of_the_task_is_named(name, row, message, tmp_path) -> None:
    files = {split: written(tmp_path / f"{split}.jsonl", [row]) for split in ("train", "validation", "test")}
    with pytest.raises(DataError, match=message):
        read_task_rows(TaskSpec(name=name, **files), SHORT, {})


def test_unknown_tasks_and_broken_task_files_are_refused_in_a_line(tmp_path) -> None:
    with pytest.raises(RecipeError, match="name='arc_hard' is none of lm-evaluation-harness's gsm8k"):
        recipe.load_task("arc_hard")
    with pytest.raises(RecipeError, match=r"mine.toml: no such file; give a task's name or its TOML file"):
        recipe.load_task(str(tmp_path / "mine.toml"))
    (tmp_path / "mine.toml").write_text('name = "mine"\ntest = "rows.jsonl"\nmetrics = "acc"\n')
    with pytest.raises(RecipeError, match="metrics: no such key"):
        recipe.load_task(str(tmp_path / "mine.toml"))
    (tmp_path / "mine.toml").write_text('name = "mine"\ntest = "rows.tsv"\nkind = 1\n')
    with pytest.raises(RecipeError, match=r"kind: no such key"):
        recipe.load_task(str(tmp_path / "mine.toml"))
    (tmp_path / "mine.toml").write_text('name = "mine"\ntest = "rows.tsv"\n')
    with pytest.raises(RecipeError, match=r"test='rows.tsv' is none of .json, .jsonl, .csv, .parquet"):
        recipe.load_task(str(tmp_path / "mine.toml"))
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "mine.toml").write_text('name = "mine"\ntest = "rows.jsonl"\n')
    assert recipe.load_task(str(tmp_path / "mine.toml")).test == str(tmp_path / "rows.jsonl")


def test_a_metric_that_the_task_has_not_is_refused_and_one_it_has_is_chosen(tmp_path) -> None:
    row = {"context_options": ["It is", "It was"], "continuation": "so.", "gold": 0}
    files = {"test": written(tmp_path / "test.jsonl", [row])}
    assert HarnessTask(TaskSpec(name="mine", **files), {"test": [row]}).metric == "acc"
    with pytest.raises(RecipeError, match="metric='exact_match': it is counted by acc"):
        HarnessTask(TaskSpec(name="mine", metric="exact_match", **files), {"test": [row]})


def test_rows_of_two_layouts_are_refused(tmp_path) -> None:
    rows = {
        "train": [{"query": "Is it?", "choices": ["no", "yes"], "gold": 0}],
        "test": [{"prompt": "Is it?", "answer": 1}],
    }
    files = {split: written(tmp_path / f"{split}.jsonl", some) for split, some in rows.items()}
    with pytest.raises(DataError, match="test row 1 has prompt, answer, and others choices, gold, query"):
        read_task_rows(TaskSpec(name="mine", **files), SHORT, {})


def test_an_answer_longer_than_the_model_reads_is_refused(tiny_model) -> None:
    model = AskedModel(AutoTokenizer.from_pretrained(tiny_model), _Fixed(2048), longest=4)
    request = Instance("loglikelihood", {}, ("so", " it was a very long answer indeed"), 0)
    with pytest.raises(DataError, match=r"an answer has \d+ tokens, and the model reads 4"):
        model.loglikelihood([request])


def test_without_the_harness_the_pip_line_is_given(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.task", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ovexport\[tasks\]"'):
        harness.require_harness()


def test_examples_hold_the_answer_at_their_end_and_no_row_is_in_two_splits(tiny_model, tmp_path) -> None:
    def row(number: int) -> dict:
        return {"query": f"After {number % 30} comes", "choices": ["a cat", "a big dog"], "gold": number % 2}

    task = of_task("mine", tmp_path, row)
    data = prepare(ModelSpec(id=str(tiny_model)), DataSpec(sequence_length=16), tmp_path / "data", task)
    assert data.manifest.examples == {"test": 4, "validation": 4, "train": 8}
    assert data.manifest.dropped_duplicates == 4
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    example = data.examples("train")[0]
    assert tokenizer.decode(example.tokens[example.answer :]).strip() == "a cat"
    assert tokenizer.decode(example.tokens[: example.answer]).strip().endswith("After 4 comes")


def test_an_answer_that_does_not_fit_is_refused(tiny_model, tmp_path) -> None:
    task = of_task("mine", tmp_path, lambda n: {"prompt": f"{n}", "answer": f"{n} is a very long answer, " * 9})
    with pytest.raises(DataError, match=r"train row 1: its answer has \d+ tokens, and data.sequence_length=16"):
        prepare(ModelSpec(id=str(tiny_model)), DataSpec(sequence_length=16), tmp_path / "data", task)


def test_questions_lose_their_beginning_where_they_do_not_fit(tiny_model, tmp_path) -> None:
    task = of_task("mine", tmp_path, lambda n: {"prompt": f"{n} and " * 20 + "so", "answer": "it is"})
    data = prepare(ModelSpec(id=str(tiny_model)), DataSpec(sequence_length=16), tmp_path / "data", task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    example = data.examples("train")[0]
    assert len(example.tokens) == 16
    assert tokenizer.decode(example.tokens[: example.answer]).endswith("and so")


class _Fixed:
    """A model whose next token is always one more than the last."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        return self.extend(tokens)

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        return 10 * np.eye(self._vocabulary, dtype=np.float32)[(tokens + 1) % self._vocabulary]


def test_a_generated_answer_ends_before_its_stop(tiny_model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AskedModel(tokenizer, _Fixed(2048))
    first = tokenizer.encode("a")[-1]
    whole = tokenizer.decode(range(first + 1, first + 9))
    stop = tokenizer.decode([first + 5])
    request = Instance("generate_until", {}, ("a", {"until": [stop], "max_gen_toks": 8}), 0)
    assert model.generate_until([request]) == [whole[: whole.index(stop)]]
    request = Instance("generate_until", {}, ("a", {"until": [], "max_gen_toks": 8}), 0)
    assert model.generate_until([request]) == [whole]


@pytest.mark.slow
def test_likelihoods_are_those_of_lm_evaluation_harness_on_the_same_model(finished_run, tiny_model) -> None:
    """Its own Hugging Face model on the base, ours on the same in torch and on its IR; a long question is cut alike."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    longest = theirs.max_length
    pairs = [
        ("Once upon a time there was", " a little girl"),
        ("Once upon a time there was", " a dog."),
        ("", "The end"),
        ("so it was, " * 60, " and they went home"),
    ]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    expected = theirs.loglikelihood(requests)
    asked = AskedModel(tokenizer, loaded(finished_run.ir("bf16"))(), longest=longest)
    found = asked.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)


def test_torch_and_its_ir_answer_alike(finished_run, tiny_recipe, tmp_path) -> None:
    def row(number: int) -> dict:
        return {"query": f"The girl saw {number}", "choices": ["a cat.", "the big red dog.", "it"], "gold": number % 3}

    task, _ = asked_of(of_task("mine", tmp_path, row))
    ours = ask_model(task, "int4", loaded(finished_run.ir("int4")), tiny_recipe.model)
    theirs = ask_model(task, "torch", lambda: TunedModel(finished_run.checkpoint, tiny_recipe.model), tiny_recipe.model)
    for one, other in zip(ours.items, theirs.items, strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=1e-4)
        assert one["acc"] == other["acc"]
    assert ours.figures["acc_stderr"] > 0


def test_worked_examples_need_training_rows(tmp_path) -> None:
    task = TaskSpec(name="gsm8k", test=written(tmp_path / "test.jsonl", [gsm8k(1)]))
    with pytest.raises(DataError, match="its 5 worked examples come from training rows, and there are 0"):
        HarnessTask(task, {"test": [gsm8k(1)]})
    with pytest.raises(DataError, match="and there are 2; give more, or set num_fewshot"):
        HarnessTask(task, {"test": [gsm8k(1)], "train": [gsm8k(2), gsm8k(3)]})


def test_ir_and_reference_are_asked_a_task_from_the_command_line(finished_run: RunFolder, tmp_path) -> None:
    rows = [{"query": f"It is {n}", "choices": ["so.", "not."], "gold": n % 2} for n in range(6)]
    written(tmp_path / "rows.jsonl", rows)
    (tmp_path / "mine.toml").write_text('name = "mine"\ntest = "rows.jsonl"\nmetric = "acc"\n')
    arguments = ["evaluate", str(finished_run.path / "int4"), "--reference", str(finished_run.path / "bf16")]
    arguments += ["--encoder", "offline", "--max-new-tokens", "2", "--tasks", str(tmp_path / "mine.toml"), "--json"]
    done = ovexport(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["models"]["int4"]["tasks"]["mine"]["items"] == 6
    assert report["conditions"]["tasks"]["mine"]["metric"] == "acc"
    unknown = ovexport(*arguments[:-2], "arc_hard", "--out", tmp_path / "out")
    assert "error: name='arc_hard' is none of" in refused(unknown, 2)
