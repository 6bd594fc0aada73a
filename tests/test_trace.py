"""What stands beside a traced graph is the source model's, and tracing again gives the same bytes."""

import json
import shutil
from pathlib import Path

import openvino_genai
import pytest

from ovexport.artifacts import IR, RunFolder
from ovexport.errors import UnsupportedModelError
from ovexport.models.loading import load_tokenizer
from ovexport.openvino.tokenizer import write_tokenizer
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.trace.stage import check_kept, trace

pytestmark = pytest.mark.run

GENERATION = {"eos_token_id": [1, 5], "bos_token_id": 0, "temperature": 0.7, "max_length": 64, "own_field": {"a": 1}}


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The tiny model with a temperature that transformers refuses to save, and several chat templates."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("trace") / "source"))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages[0].content }} with tools")
    return ModelSpec(id=str(folder))


@pytest.fixture(scope="module")
def traced(source: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> IR:
    return trace(source, ConvertSpec(), tmp_path_factory.mktemp("trace") / "bf16")


def test_nothing_beside_the_weights_is_lost(source: ModelSpec, traced: IR) -> None:
    for name in ("generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        assert (traced.path / name).read_bytes() == (Path(source.id) / name).read_bytes(), name
    read = openvino_genai.LLMPipeline(str(traced.path), "CPU").get_generation_config()
    assert read.stop_token_ids == {1, 5}


def test_tracing_again_gives_the_same_bytes(tiny_model: Path, traced: IR, finished_run: RunFolder, tmp_path) -> None:
    """`finished_run` traced the same weights with other work before it."""
    former = finished_run.ir("bf16").path
    model = ModelSpec(id=str(tiny_model))
    write_tokenizer(load_tokenizer(model, 2048), tmp_path, model.id)
    again = [traced.xml, traced.bin, *tmp_path.glob("*.xml"), *tmp_path.glob("*.bin"), *tmp_path.glob("*.json")]
    assert len(again) == 8
    for file in again:
        assert file.read_bytes() == (former / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "eos_token_id", 5),
        ("config.json", "rms_norm_eps", 0.5),
        ("generation_config.json", "eos_token_id", 1),
        ("generation_config.json", "own_field", None),
        ("tokenizer_config.json", "pad_token", "<s>"),
    ],
)
def test_what_would_be_another_in_the_ir_is_refused(source, traced, tmp_path: Path, file: str, key: str, value) -> None:
    folder = Path(shutil.copytree(traced.path, tmp_path / "ir"))
    values = json.loads((folder / file).read_text()) | {key: value}
    (folder / file).write_text(json.dumps(values))
    said = "the tokenizer's special_tokens_map" if file.startswith("tokenizer") else f"{key} of {file}"
    tokenizer = load_tokenizer(source, 2048)
    check_kept(source, tokenizer, traced.path)
    with pytest.raises(UnsupportedModelError, match=f"the IR would lose or change {said}; save model and tokenizer"):
        check_kept(source, tokenizer, folder)


def test_a_chat_template_that_is_lost_is_refused(source: ModelSpec, traced: IR, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(traced.path, tmp_path / "ir"))
    shutil.rmtree(folder / "additional_chat_templates")
    with pytest.raises(UnsupportedModelError, match="lose or change the tokenizer's chat_template"):
        check_kept(source, load_tokenizer(source, 2048), folder)
