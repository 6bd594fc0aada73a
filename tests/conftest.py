"""Real parts, made small: a tiny Llama with the bundled tokenizer, the bundled text, and one whole run of them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers with a thread per core each would wait for one another

import gc
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markers import mark_all
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.pipeline import services
from ovexport.recipe import Recipe

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # so that OpenVINO and NNCF send nothing

REPOSITORY = Path(__file__).parent.parent
STORYTELLER = REPOSITORY / "models" / "storyteller-4m"
STORIES = REPOSITORY / "models" / "stories" / "stories.jsonl"

COMMON = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def save_tiny_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model of that configuration, norms and biases included, with the bundled tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(STORYTELLER / name, folder / name)
    return folder


def tiny_values(model: Path) -> dict:
    """A recipe's sections for a run that takes seconds."""
    return {
        "model": {"id": str(model)},
        "data": {
            "train": {"path": str(STORIES)},
            "sequence_length": 64,
            "train_sequences": 32,
            "validation_sequences": 4,
            "test_sequences": 8,
        },
        "compress": {"group_size": 32, "rank": 8, "rounding": "nearest"},
        "tune": {"steps": 4, "batch_size": 2, "gradient_accumulation_steps": 2, "validate_every": 2, "save_every": 2},
        "evaluate": {"encoder": "offline", "prompt_count": 5, "prompt_words": 8, "max_new_tokens": 8},
        "bench": {"prompt_tokens": 16, "output_tokens": 4, "pairs": 5, "sessions": 5, "warmup": 1},
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_all(items)


def pytest_collection_finish() -> None:
    _freeze()


def _freeze() -> None:
    """Leave the modules that are imported by now out of the garbage collections of `trace` and `bench`: half a second
    each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is left in the user's cache, and nothing is found there."""
    os.environ["OVEXPORT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What a command does to the package's logger ends with its test."""
    yield
    logger = logging.getLogger("ovexport")
    logging.setLogRecordFactory(logging.LogRecord)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**COMMON, tie_word_embeddings=True, initializer_range=0.1)
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", config)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: Path) -> Recipe:
    return recipe.parse(tiny_values(tiny_model), base=REPOSITORY, origin="tiny")


@pytest.fixture(scope="session")
def finished_run(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that went the whole way; nobody may write to it, copy it instead."""
    run = services.run(tiny_recipe, tmp_path_factory.mktemp("runs") / "tiny")
    _freeze()  # the modules of every stage are imported by now
    return run


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """The finished run, to be damaged."""
    return RunFolder(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _units_stay_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test traces no model, which every run does after its first stage, and types no command."""
    if request.node.get_closest_marker("unit") is None:
        return
    monkeypatch.setattr("ovexport.cli.main", _too_much_for_a_unit)
    exporter = sys.modules.get("optimum.exporters.openvino.convert")
    if exporter is not None:
        monkeypatch.setattr(exporter, "export_models", _too_much_for_a_unit)


def _too_much_for_a_unit(*_: object, **__: object) -> None:
    raise AssertionError("a test with the marker unit traces a model or types a command; mark it run or cli")
