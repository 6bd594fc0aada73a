"""A task's rows, whatever layout their file has, in the columns that lm-evaluation-harness's task reads.

    gsm8k           question, answer
    hellaswag       activity_label, ctx_a, ctx_b, endings, label           or query, choices, gold
    openbookqa      question_stem, choices {text, label}, answerKey        or query, choices, gold
    arc_*           question, choices {text, label}, answerKey             or query, choices, gold
    winogrande      sentence, option1, option2, answer                     or context_options, continuation, gold
    one's own       prompt, answer; query, choices, gold; or context_options, continuation, gold

AI2's own files of ARC and OpenBookQA nest the question: question {stem, choices [{text, label}]}, answerKey.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from ovexport.data.rows import load_rows, without_repeats
from ovexport.errors import DataError
from ovexport.recipe import DataSpec, SourceSpec, TaskSpec

Row = dict[str, Any]


def read_task_rows(task: TaskSpec, data: DataSpec, hub: Mapping[str, SourceSpec]) -> tuple[dict[str, list[Row]], int]:
    """The rows of train, validation and test, none of them in two, and how many were left out for that.

    Args:
        data: says which share of the training rows becomes validation or test where these have no source.
        hub: where the rows are when the task names no file, by split.

    Raises:
        DataError: a source can't be read, or a row is not of the task's layout; the row is named.
    """
    sources = {split: SourceSpec(path=path) for split, path in task.files.items()} or dict(hub)
    if "train" not in sources:
        raise DataError(f"task {task.name}: no train file; give one to tune on, such as task.train = train.jsonl")
    splits = _alike({split: _rows(task, source) for split, source in sources.items()}, task)
    for split, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if split not in splits:
            count = max(1, round(fraction * len(splits["train"])))
            splits["train"], splits[split] = splits["train"][:-count], splits["train"][-count:]
    ordered = {split: splits[split] for split in ("test", "validation", "train")}
    kept, dropped = without_repeats(ordered, lambda row: json.dumps(row, sort_keys=True), f"task {task.name}")
    return {split: _limited(task, split, rows) for split, rows in kept.items()}, dropped


def read_test_rows(task: TaskSpec, hub: Mapping[str, SourceSpec]) -> dict[str, list[Row]]:
    """The rows of test and, where there is a source, of train, which worked examples are taken from.

    Raises:
        DataError: as read_task_rows, or there is no source for test.
    """
    sources = {split: SourceSpec(path=path) for split, path in task.files.items()} or dict(hub)
    if "test" not in sources:
        raise DataError(f"task {task.name}: no test file; give one, such as test = test.jsonl")
    splits = {split: _rows(task, source) for split, source in sources.items() if split != "validation"}
    return {split: _limited(task, split, rows) for split, rows in _alike(splits, task).items()}


def _alike(splits: dict[str, list[Row]], task: TaskSpec) -> dict[str, list[Row]]:
    """Itself, when all rows are of one layout.

    Raises:
        DataError: one is of another.
    """
    columns = set(next(iter(splits.values()))[0])
    for split, rows in splits.items():
        for number, row in enumerate(rows, 1):
            if set(row) != columns:
                raise DataError(
                    f"task {task.name}: {split} row {number} has {', '.join(row)}, and others "
                    f"{', '.join(sorted(columns))}; give one layout to all"
                )
    return splits


def _limited(task: TaskSpec, split: str, rows: list[Row]) -> list[Row]:
    return rows[: getattr(task, f"{split}_examples")]


def _rows(task: TaskSpec, source: SourceSpec) -> list[Row]:
    origin = source.path or str(source.hub)
    convert = _LAYOUTS.get(task.name, _own)
    rows = []
    for number, row in enumerate(load_rows(source).records, 1):
        present = {name: value for name, value in row.items() if value is not None}
        try:
            rows.append(convert(present))
        except ValueError as error:
            raise DataError(f"{origin}: row {number}: {error}") from None
    if not rows:
        raise DataError(f"{origin}: holds no rows; give a file with some")
    return rows


def _own(row: Row) -> Row:
    if "prompt" in row:
        return {"prompt": _text(row, "prompt"), "answer": _text(row, "answer")}
    if "context_options" in row:
        options = _texts(row, "context_options")
        continuation = _text(row, "continuation")
        return {"context_options": options, "continuation": continuation, "gold": _gold(row, "gold", options)}
    if "query" in row:
        choices = _texts(row, "choices")
        return {"query": _text(row, "query"), "choices": choices, "gold": _gold(row, "gold", choices)}
    raise ValueError(
        f"its columns are {', '.join(row)}; a task's are prompt and answer, query, choices and gold, or "
        "context_options, continuation and gold"
    )


def _gsm8k(row: Row) -> Row:
    answer = _text(row, "answer")
    if "#### " not in answer:
        raise ValueError("answer has no '#### ' before its result")
    return {"question": _text(row, "question"), "answer": answer}


def _hellaswag(row: Row) -> Row:
    if "query" in row:
        own = _own(row)
        activity, separator, context = own["query"].partition(": ")
        if not separator:
            raise ValueError("query has no 'activity: ' before the context")
        return {
            "activity_label": activity,
            "ctx_a": context,
            "ctx_b": "",
            "endings": own["choices"],
            "label": str(own["gold"]),
        }
    endings = _texts(row, "endings")
    texts = {name: _text(row, name, empty=True) for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**texts, "endings": endings, "label": str(_gold(row, "label", endings))}


def _answer_key(name: str) -> Callable[[Row], Row]:
    """ARC's and OpenBookQA's rows, which differ in what the question's column is called."""

    def convert(row: Row) -> Row:
        if "query" in row:
            own = _own(row)
            question = own["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            labels = [chr(ord("A") + index) for index in range(len(own["choices"]))]
            texts, key = own["choices"], labels[own["gold"]]
        else:
            nested = row.get("question") if isinstance(row.get("question"), dict) else None
            question = _text(nested or row, "stem" if nested else name)
            texts, labels = _labelled((nested or row).get("choices"))
            key = _text(row, "answerKey").strip()
            if key not in labels:
                raise ValueError(f"answerKey={key!r} is none of its choices' labels, {', '.join(labels)}")
        return {name: question, "choices": {"text": texts, "label": labels}, "answerKey": key}

    return convert


def _labelled(choices: Any) -> tuple[list[str], list[str]]:
    """Texts and labels, from {text: [...], label: [...]} or [{text, label}]."""
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise ValueError("no choices; give text and label of each")
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices with {len(labels)} labels")
    return texts, labels


def _winogrande(row: Row) -> Row:
    if "context_options" in row:
        own = _own(row)
        options = own["context_options"]
        if len(options) != 2:
            raise ValueError(f"{len(options)} context_options; winogrande has two")
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*options, strict=False))
        shared = "".join(letter for letter, _ in alike)
        shared = shared[: shared.rfind(" ") + 1]
        if "_" in shared:
            raise ValueError("context_options hold '_', which marks the gap")
        first, second = (option[len(shared) :] for option in options)
        sentence, answer = f"{shared}_ {own['continuation'].lstrip()}", str(own["gold"] + 1)
        return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}
    sentence, answer = _text(row, "sentence"), str(row.get("answer", ""))
    if "_" not in sentence:
        raise ValueError("sentence has no gap, '_'")
    if answer not in ("1", "2"):
        raise ValueError(f"answer={answer!r} is neither 1 nor 2; give a split with answers")
    return {
        "sentence": sentence,
        "option1": _text(row, "option1"),
        "option2": _text(row, "option2"),
        "answer": answer,
    }


_LAYOUTS: dict[str, Callable[[Row], Row]] = {
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "openbookqa": _answer_key("question_stem"),
    "winogrande": _winogrande,
    "arc_challenge": _answer_key("question"),
    "arc_easy": _answer_key("question"),
}


def _text(row: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"no {name}; it has {', '.join(row)}" if name not in row else f"{name}={value!r} is no text")
    return value


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    values = row.get(name)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"no {name}; give a list of at least two texts")
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{name} holds something that is no text")
    return values


def _gold(row: Mapping[str, Any], name: str, choices: list[str]) -> int:
    value = row.get(name)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is no index of a choice; give a split with answers")
    if not 0 <= value < len(choices):
        raise ValueError(f"{name}={value} is out of range: it has {len(choices)} choices, 0 to {len(choices) - 1}")
    return value
