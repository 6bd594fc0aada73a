"""Section [task]."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ovexport.recipe.data import ROW_SUFFIXES
from ovexport.recipe.spec import NotNegative, Positive, Spec

HARNESS_TASKS = {
    "gsm8k": "exact_match",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "winogrande": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
}
"""Tasks whose prompts, answers and metrics are lm-evaluation-harness's own, each with the metric that counts."""


class TaskSpec(Spec):
    """A downstream task: rows of questions and answers, and how they are asked and counted.

    gsm8k, hellaswag, openbookqa, winogrande, arc_challenge and arc_easy are lm-evaluation-harness's tasks, with its
    prompts, answers and metrics, on the hub's data or on files in the data set's original layout. Any other name is a
    task of your own, whose files hold `prompt` and `answer`, or `query`, `choices` and `gold`, or `context_options`,
    `continuation` and `gold`.

    Attributes:
        name: the task's name.
        train: file with the rows to tune on: .jsonl, .json, .csv or .parquet, a row per example.
        validation: file with the rows for validation. Without it, the last `data.validation_fraction` of train's rows.
        test: file with the rows that the reported accuracy is measured on. Without it, the last `data.test_fraction`
            of train's rows.
        train_examples: the most rows of train, from the first.
        validation_examples: the most rows of validation, from the first.
        test_examples: the most rows of test, from the first.
        metric: the figure that counts. Without it: exact_match for gsm8k and tasks with generated answers, acc for
            winogrande, acc_norm for other tasks with choices.
        num_fewshot: worked examples before each question when the task is evaluated; without it,
            lm-evaluation-harness's own number. Tuning shows none.
        stop: texts that end a generated answer, for a task of your own.
        max_new_tokens: the most tokens of a generated answer, for a task of your own.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    train_examples: Positive | None = None
    validation_examples: Positive | None = None
    test_examples: Positive | None = None
    metric: Literal["acc", "acc_norm", "exact_match"] | None = None
    num_fewshot: NotNegative | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: Positive = 128

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by split."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: path for split, path in given.items() if path is not None}

    @model_validator(mode="after")
    def _known(self) -> Self:
        for split, path in self.files.items():
            if Path(path).suffix.lower() not in ROW_SUFFIXES:
                raise ValueError(f"{split}={path!r} is none of {', '.join(ROW_SUFFIXES)}; convert it, or rename it")
        if self.name not in HARNESS_TASKS and not self.files:
            raise ValueError(
                f"name={self.name!r} is none of lm-evaluation-harness's {', '.join(HARNESS_TASKS)}; "
                "a task of your own needs files: train, validation, test"
            )
        return self
