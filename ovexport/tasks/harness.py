"""lm-evaluation-harness: its tasks on our rows, its prompts for tuning, its counts for evaluation.

Its errors and its output are dealt with here, once; it is imported when a task is made, as it is an extra.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from ovexport.errors import DataError, MissingDependencyError, RecipeError
from ovexport.recipe import HARNESS_TASKS, SourceSpec, TaskSpec
from ovexport.tasks.layouts import Row

if TYPE_CHECKING:
    from ovexport.tasks.asked import AskedModel

_FILES = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
}
_PLAIN_FILTERS = ("none", "strict-match")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model reached in a task.

    Attributes:
        figures: lm-evaluation-harness's metrics, each with its standard error as `NAME_stderr`; `items`, how many
            questions; and where there are choices `answer_nll_nats`, the mean over the questions of -log p(right answer
            | question), with its standard error. A metric of a filter of the answers has its name behind its own,
            `exact_match_flexible_extract`; gsm8k's strict-match, which counts, has none.
        items: per question, in the rows' order, the metrics and what the model said of it.
    """

    figures: dict[str, float]
    items: tuple[dict[str, Any], ...]


def require_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import lm_eval.api.task  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'tasks need lm-evaluation-harness, which is not installed; pip install "ovexport[tasks]"'
        ) from error


class HarnessTask:
    """A task as lm-evaluation-harness asks it.

    Args:
        rows: of test, which is asked, and of train, which worked examples are taken from, where there is one.

    Attributes:
        metric: the figure that counts.
        num_fewshot: worked examples before each question.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed.
        DataError: the task shows more worked examples than there are training rows.
        RecipeError: the task has no such metric as the spec names.
    """

    def __init__(self, spec: TaskSpec, rows: Mapping[str, Sequence[Row]]) -> None:
        require_harness()
        import datasets
        from lm_eval.api.task import ConfigurableTask

        self.spec = spec
        splits = {split: datasets.Dataset.from_list(list(some)) for split, some in rows.items()}
        config = _config(spec, splits["test"].column_names)
        config |= {
            "task": spec.name,
            "custom_dataset": lambda **_: splits,
            "training_split": "train" if "train" in splits else None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": "train" if "train" in splits else None,
        }
        if spec.num_fewshot is not None:
            config["num_fewshot"] = spec.num_fewshot
        self.num_fewshot = int(config.get("num_fewshot") or 0)
        available = len(rows.get("train", ()))
        if self.num_fewshot > available:
            raise DataError(
                f"task {spec.name}: its {self.num_fewshot} worked examples come from training rows, and there are "
                f"{available}; give more, or set num_fewshot"
            )
        metrics = [str(metric["metric"]) for metric in config["metric_list"]]
        if spec.metric is not None and spec.metric not in metrics:
            raise RecipeError(f"task {spec.name}: metric={spec.metric!r}: it is counted by {', '.join(metrics)}")
        own = "acc_norm" if "acc_norm" in metrics else metrics[0]
        self.metric = spec.metric or HARNESS_TASKS.get(spec.name, own)
        with _silent():
            self._task = ConfigurableTask(config=config)

    @property
    def generates(self) -> bool:
        """Whether answers are generated; else they are chosen."""
        return bool(self._task.OUTPUT_TYPE == "generate_until")

    def answered(self, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
        """Of each row the question as it is asked, without worked examples, and the right answer."""
        import datasets

        documents = datasets.Dataset.from_list(list(rows))
        if self._task.config.process_docs is not None:
            with _silent():
                documents = self._task.config.process_docs(documents)
        for document in documents:
            context = self._task.fewshot_context(document, num_fewshot=0)
            if self.generates:
                yield context, f"{self._task.config.target_delimiter}{self._task.doc_to_target(document)}"
            else:
                yield self._task.construct_requests(document, context)[self._gold(document)].args

    def ask(self, model: "AskedModel") -> TaskResult:
        """Ask a model every question of test and count."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        with _silent() as stderr, model.reporting_to(stderr):
            answers = simple_evaluate(
                model=model,
                tasks=[self._task],
                num_fewshot=self.num_fewshot,
                task_manager=TaskManager(include_defaults=False),
                log_samples=True,
            )
        (results,), (samples,) = answers["results"].values(), answers["samples"].values()
        figures = {"items": float(len({sample["doc_id"] for sample in samples}))}
        for key, value in results.items():
            name, _, chosen = key.partition(",")
            if chosen and isinstance(value, int | float):
                error = "_stderr" if name.endswith("_stderr") else ""
                behind = "" if chosen in _PLAIN_FILTERS else f"_{chosen.replace('-', '_')}"
                figures[f"{name.removesuffix('_stderr')}{behind}{error}"] = float(value)
        items = [self._item(sample) for sample in samples if sample["filter"] in _PLAIN_FILTERS]
        if not self.generates:
            nll = np.array([item["answer_nll_nats"] for item in items])
            figures["answer_nll_nats"] = float(nll.mean())
            figures["answer_nll_nats_stderr"] = float(nll.std(ddof=1) / len(nll) ** 0.5) if len(nll) > 1 else 0.0
        return TaskResult(figures=figures, items=tuple(items))

    def _item(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        item = {"question": sample["doc_id"], **{name: sample[name] for name in sample["metrics"]}}
        if self.generates:
            return item | {"answer": sample["resps"][0][0]}
        likelihoods = [float(answer[0][0]) for answer in sample["resps"]]
        gold = self._gold(sample["doc"])
        return item | {"gold": gold, "log_likelihoods": likelihoods, "answer_nll_nats": -likelihoods[gold]}

    def _gold(self, document: Mapping[str, Any]) -> int:
        """Which choice is right; where the question has the choices, lm-evaluation-harness has it for the text."""
        multiple = self._task.multiple_input
        return int(self._task.doc_to_text(document) if multiple else self._task.doc_to_target(document))


def hub_sources(name: str) -> dict[str, SourceSpec]:
    """Where the hub has the rows of one of lm-evaluation-harness's tasks, by split; test is what it evaluates on.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed.
    """
    require_harness()
    config = _harness_config(name) if name in HARNESS_TASKS else {}
    train, validation, test = (config.get(f"{split}_split") for split in ("training", "validation", "test"))
    splits = {"train": train, "validation": validation if test else None, "test": test or validation}
    return {
        split: SourceSpec(hub=config["dataset_path"], config=config.get("dataset_name"), split=theirs)
        for split, theirs in splits.items()
        if theirs
    }


def _config(spec: TaskSpec, columns: Sequence[str]) -> dict[str, Any]:
    if spec.name in HARNESS_TASKS:
        return _harness_config(spec.name)
    if "prompt" in columns:
        return {
            "output_type": "generate_until",
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["answer"],
            "generation_kwargs": {"until": list(spec.stop), "do_sample": False, "max_gen_toks": spec.max_new_tokens},
            "filter_list": [
                {
                    "name": "none",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    in_context = "context_options" in columns
    question, choices, answer = (
        ("gold", "context_options", "continuation") if in_context else ("query", "choices", "gold")
    )
    return {
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row[question],
        "doc_to_choice": lambda row: list(row[choices]),
        "doc_to_target": lambda row: row[answer],
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (("acc",) if in_context else ("acc", "acc_norm"))
        ],
    }


def _harness_config(name: str) -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml  # the public way reads all of its 13,000 files first

    config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / _FILES[name]))
    config.pop("tag", None)
    return config


@contextlib.contextmanager
def _silent() -> Iterator[TextIO]:
    """Within, lm-evaluation-harness's bars and warnings are not shown; gives the stream they would have gone to."""
    stderr = sys.stderr
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield stderr
    finally:
        logger.setLevel(level)
