"""Downstream tasks: their rows, how lm-evaluation-harness asks and counts them, and what it asks of a model."""

from ovexport.tasks.harness import HarnessTask, TaskResult, hub_sources, require_harness
from ovexport.tasks.layouts import read_task_rows, read_test_rows

__all__ = ["HarnessTask", "TaskResult", "hub_sources", "read_task_rows", "read_test_rows", "require_harness"]
