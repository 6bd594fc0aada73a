"""Downstream tasks: the same questions to every model, asked and counted by lm-evaluation-harness."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovexport.artifacts import IR
from ovexport.models.loading import load_config, load_tokenizer
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.progress import Listener, silent
from ovexport.recipe import ModelSpec
from ovexport.storage.files import write_text
from ovexport.tasks import HarnessTask, TaskResult

Loaded = Callable[[], Any]
"""Loads a model that does what ovexport.tasks.asked.CausalLM asks for."""


def ask_models(
    task: HarnessTask, models: Mapping[str, Loaded], tokenizer: ModelSpec, out: Path, listener: Listener
) -> dict[str, dict[str, float]]:
    """Each model's figures in a task; `NAME/TASK.jsonl` in `out` holds them question by question.

    Args:
        models: by name; one is in memory at a time.
        tokenizer: of all of them, and the configuration that says how much they can read.
    """
    figures = {}
    for name, load in models.items():
        result = ask_model(task, name, load, tokenizer, listener)
        lines = "".join(json.dumps(item) + "\n" for item in result.items)
        write_text(lines, out / name / f"{task.spec.name}.jsonl")
        figures[name] = result.figures
    return figures


def ask_model(
    task: HarnessTask, name: str, load: Loaded, tokenizer: ModelSpec, listener: Listener = silent
) -> TaskResult:
    """What one model reaches in a task; the arguments as in ask_models."""
    from ovexport.tasks.asked import AskedModel

    config = load_config(tokenizer).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    encoder = load_tokenizer(tokenizer, config.vocab_size)
    return task.ask(AskedModel(encoder, load(), name=name, longest=longest, listener=listener))


def loaded(ir: IR) -> Loaded:
    """What loads an IR, under settings where nothing but the weights is approximate."""
    return lambda: LogitsRunner(running_graph(ir), str(ir.path))
