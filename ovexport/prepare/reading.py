"""All that a recipe names to read: its text, and its task's rows."""

from pathlib import Path

from ovexport.errors import DataError
from ovexport.prepare.documents import Documents, split_documents
from ovexport.prepare.examples import TaskData
from ovexport.recipe import DataSpec, SourceSpec, TaskSpec
from ovexport.tasks import HarnessTask, hub_sources, read_task_rows


def read_splits(data: DataSpec, task: TaskSpec | None) -> tuple[dict[str, Documents], int, TaskData | None]:
    """The documents of each split, how many were dropped as repeats, and the task's examples."""
    dropped = 0
    answered_rows = None
    if task is not None:
        rows, dropped = read_task_rows(task, data, {} if task.files else hub_sources(task.name))
        harness = HarnessTask(task, rows)
        answered = {split: list(harness.answered(some)) for split, some in rows.items()}
        answered_rows = TaskData(rows, answered, harness.generates)
    if data.train is not None:
        splits, repeated = split_documents(data)
        return splits, dropped + repeated, answered_rows
    assert answered_rows is not None, "a recipe has text or a task"
    texts = {
        split: [question + answer for question, answer in pairs] for split, pairs in answered_rows.answered.items()
    }
    return {split: Documents(some, running=False) for split, some in texts.items()}, dropped, answered_rows


def named_sources(data: DataSpec) -> dict[str, SourceSpec]:
    """The sources that the recipe names, by their keys."""
    named = {f"data.{name}": getattr(data, name) for name in ("train", "validation", "test")}
    return {key: source for key, source in named.items() if source is not None}


def missing_files(data: DataSpec, task: TaskSpec | None) -> list[DataError]:
    """A problem for each file that the recipe names and that is not there."""
    paths = {f"{key}.path": source.path for key, source in named_sources(data).items() if source.path}
    paths |= {f"task.{split}": path for split, path in task.files.items()} if task else {}
    return [
        DataError(f"{key}={path}: no such file; paths are looked for beside the recipe, then in the working directory")
        for key, path in paths.items()
        if not Path(path).is_file()
    ]
