"""The tokenizer of an IR says what the model's own says, or is refused before any work."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from conftest import COMMON, REPOSITORY, STORYTELLER, save_tiny_model, tiny_values
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, LlamaConfig, PreTrainedTokenizerFast

from ovexport import recipe
from ovexport.artifacts import IR, RunFolder
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.evaluate.answers import PromptTokenizer, common_template, generate
from ovexport.models.loading import load_tokenizer
from ovexport.openvino.tokenizer import check_tokenizer
from ovexport.pipeline import services
from ovexport.prepare import prepare
from ovexport.progress import silent
from ovexport.prompt_sets import packaged_prompts
from ovexport.recipe import DataSpec, ModelSpec, SourceSpec

CANT_BE_APPLIED = "{% for message in messages %}{{ message.content | title }}{% endfor %}"


def a_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> ModelSpec:
    """A model as far as its tokenizer needs one: no weights."""
    LlamaConfig(**COMMON).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(id=str(folder))


def bundled(folder: Path, **generation) -> ModelSpec:
    """The bundled tokenizer, in a model of its own."""
    LlamaConfig(**COMMON).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(STORYTELLER / name, folder / name)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelSpec(id=str(folder))


def of_words(*words: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word between blanks."""
    names = ["<PAD>", "<EOS>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<PAD>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte and none else."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_tokenizer_that_is_converted_wrongly_is_refused_with_the_text_that_differs(tmp_path: Path) -> None:
    model = a_model(tmp_path, of_words("5-axis_Milling", eos_token="<EOS>", unk_token="<PAD>"))
    with pytest.raises(UnsupportedModelError, match=r"encodes '.*5-axis_Milling.*' as \[.*\], its own as \[.*5-axis_M"):
        check_tokenizer(model)


def test_text_of_the_run_counts_too(tmp_path: Path) -> None:
    model = bundled(tmp_path / "model")
    tokenizer = load_tokenizer(model, 4096)
    tokenizer.add_tokens([AddedToken("qux", single_word=True)])
    tokenizer.save_pretrained(model.id)
    LlamaConfig(**COMMON | {"vocab_size": 4096}).save_pretrained(model.id)
    check_tokenizer(model, ["A qux is none."])
    with pytest.raises(UnsupportedModelError, match=r"encodes '.*quxes.*' as"):
        check_tokenizer(model, ["A qux is none.", "Many quxes are."])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"These {index} quxes are none."}) + "\n" for index in range(40)))
    with pytest.raises(UnsupportedModelError, match=r"encodes '.*quxes.*' as"):
        prepare(model, DataSpec(train=SourceSpec(path=str(rows)), sequence_length=8), tmp_path / "data")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_plan_refuses_text_of_any_split_that_prepare_would_refuse(tmp_path: Path, split: str) -> None:
    model = save_tiny_model(tmp_path / "model", LlamaConfig(**COMMON | {"vocab_size": 2049}))
    tokenizer = load_tokenizer(ModelSpec(id=str(model)), 2049)
    tokenizer.add_tokens([AddedToken("qux", single_word=True)])
    tokenizer.save_pretrained(model)
    values = tiny_values(model)
    for name in ("train", "validation", "test"):
        rows = tmp_path / f"{name}.jsonl"
        word = "quxes" if name == split else "boxes"
        rows.write_text("".join(json.dumps({"text": f"{name} {n}: many {word} " * 200}) + "\n" for n in range(40)))
        values["data"][name] = {"path": str(rows)}
    plan = services.plan(recipe.parse(values, base=REPOSITORY, origin="tiny"), tmp_path / "out")
    assert any("quxes" in problem for problem in plan.problems), plan.problems


def test_double_blanks_that_are_encoded_otherwise_are_refused_in_text_of_the_run_only(tmp_path: Path, caplog) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(packaged_prompts("long"), trainer)
    model = a_model(tmp_path, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))
    with caplog.at_level(logging.WARNING, logger="ovexport"):
        check_tokenizer(model, ["One blank each."])
    assert "text of a run that holds such a difference is refused" in caplog.text
    with pytest.raises(UnsupportedModelError, match=r"encodes '.*blanks.*' as"):
        check_tokenizer(model, ["Two  blanks."])


@pytest.mark.parametrize("kind", ["words", "bytes", "added"])
def test_a_tokenizer_without_special_tokens_is_refused_by_plan(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = of_words(*"abc") if kind == "words" else of_bytes()
    if kind == "added":
        tokenizer.add_tokens([AddedToken("qux")])
    model = a_model(tmp_path / "model", tokenizer)
    shutil.copy(tiny_model / "model.safetensors", model.id)
    found = services.plan(recipe.parse(tiny_values(Path(model.id)), base=REPOSITORY, origin="tiny"), tmp_path / "run")
    (problem,) = [problem for problem in found.problems if "it has no special token" in problem]
    assert "\n" not in problem
    assert found.exit_code == 5


def test_unknown_characters_in_a_row_are_said_and_not_refused(tmp_path: Path, caplog) -> None:
    letters = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="?", fuse_unk=True))
    model = a_model(tmp_path, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="?"))
    with caplog.at_level(logging.WARNING):
        check_tokenizer(model)
    assert "has another number of unknown tokens for unknown characters in a row" in caplog.text


def test_a_chat_template_that_openvino_genai_cant_apply_is_said_and_refused_where_prompts_need_it(
    tiny_model: Path, tmp_path: Path, caplog
) -> None:
    model = ModelSpec(id=str(shutil.copytree(tiny_model, tmp_path / "model")))
    (tmp_path / "model" / "chat_template.jinja").write_text(CANT_BE_APPLIED)
    with caplog.at_level(logging.WARNING):
        check_tokenizer(model)
    assert "openvino-genai can't apply its chat template (Value is not callable" in caplog.text
    sections = tiny_values(tmp_path / "model")
    needed = services.plan(recipe.parse(sections, base=REPOSITORY, origin="tiny"), tmp_path / "run").problems
    assert any('set evaluate.chat_template = "off"' in problem for problem in needed)
    sections["evaluate"]["chat_template"] = "off"
    assert not services.plan(recipe.parse(sections, base=REPOSITORY, origin="tiny"), tmp_path / "run").problems


def test_a_chat_template_that_loops_too_long_is_refused_before_openvino_genai_applies_it(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, LlamaConfig(**COMMON))
    (tmp_path / "chat_template.jinja").write_text("{% for x in range(10**9) %}a{% endfor %}")
    with pytest.raises(UnsupportedModelError, match=r"its chat template loops too long .*; mend or remove it"):
        check_tokenizer(ModelSpec(id=str(tmp_path)))


def test_a_chat_template_that_openvino_genai_applies_otherwise_is_said(tmp_path: Path, caplog) -> None:
    model = bundled(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ 'é' | length }}")
    with caplog.at_level(logging.WARNING):
        check_tokenizer(model, templated=True)
    assert "openvino-genai applies its chat template otherwise than transformers" in caplog.text


def test_the_bundled_tokenizer_passes_without_a_word(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="ovexport"):
        check_tokenizer(bundled(tmp_path, eos_token_id=[1, 5], temperature=0.7), templated=True)
    assert not [record for record in caplog.records if record.name.startswith("ovexport")]


@pytest.mark.parametrize("ends", [[-1, 5], [-7, 1]])
def test_an_end_token_below_0_is_refused(tmp_path: Path, ends: list[int]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"eos_token_id=\[-\d, \d\] .* give ids from 0 on"):
        check_tokenizer(bundled(tmp_path, eos_token_id=ends))


def test_an_end_token_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"can't read its generation_config.json: a configuration is no valid"
    ):
        check_tokenizer(bundled(tmp_path, eos_token_id="one"))


def test_a_generation_config_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    model = bundled(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_')
    with pytest.raises(ArtifactError, match=r"generation_config\.json"):
        check_tokenizer(model)


@pytest.mark.parametrize("ends", [None, -1])
def test_no_end_token_at_all_is_said(tmp_path: Path, caplog, ends: int | None) -> None:
    tokenizer = of_bytes()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model = a_model(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with caplog.at_level(logging.WARNING):
        check_tokenizer(model)
    assert "answers end at max_new_tokens only" in caplog.text


def test_what_openvino_genai_would_say_late_is_said_when_an_ir_is_opened(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    xml = ir.path / "openvino_tokenizer.xml"
    text = xml.read_text()
    begin = text.index('<chat_template value="')
    xml.write_text(f'{text[:begin]}<chat_template value="{CANT_BE_APPLIED}" />{text[text.index("/>", begin) + 2 :]}')
    with pytest.raises(UnsupportedModelError, match=r"can't apply its chat template \(Value is not callable.*\); set"):
        common_template({"int4": PromptTokenizer(ir)}, "auto")
    (ir.path / "openvino_detokenizer.xml").unlink()
    with pytest.raises(ArtifactError, match=r"openvino_detokenizer\.xml: missing; convert the model again"):
        PromptTokenizer(IR(ir.path))


def test_an_ir_that_openvino_genai_cant_answer_with_is_said(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    path = ir.path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [-1, 5]}))
    with pytest.raises(UnsupportedModelError, match=r"can't answer with it .* has an id below 0"):
        generate("int4", ir, ["Once"], templated=False, max_new_tokens=2, listener=silent)
