"""Text in any script: what its words are, which language it is in, and which figures make no sense of it."""

import json
from pathlib import Path

import pytest

from ovexport.artifacts import PreparedData, RunFolder
from ovexport.data.languages import count_words, language_of
from ovexport.evaluate import evaluate
from ovexport.evaluate.encoder import language_note
from ovexport.evaluate.prompts import choose_prompts
from ovexport.prepare import prepare
from ovexport.prompt_sets import packaged_prompts
from ovexport.recipe import DataSpec, EvaluateSpec, ModelSpec, SourceSpec
from ovexport.storage.files import write_text

CHINESE = "小猫坐在窗边，看着外面的雨。\n她想出去玩，可是妈妈说外面太冷了。"
JAPANESE = "猫は窓のそばに座って、外の雨を見ていました。"
KOREAN = "고양이가 창가에 앉아서 비를 보고 있었어요."
GERMAN = "Die kleine Katze saß am Fenster und sah dem Regen zu, bis die Sonne wieder schien."
FRENCH = "Le petit chat était assis à la fenêtre et regardait la pluie tomber sur le jardin."
DUTCH = "De kleine kat zat bij het raam en keek naar de regen, die al de hele dag viel."
ENGLISH = "The little cat sat by the window and watched the rain that had been falling all day."
CODE = "for index in range(len(values)):\n    total += values[index] ** 2\nreturn total / count"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (CHINESE, "cn"),
        ("用 PyTorch 训练模型，然后用 OpenVINO 部署到 CPU 上。", "cn"),
        (JAPANESE, "ja"),
        (KOREAN, "ko"),
        (ENGLISH, "en"),
        ("What is OpenVINO?", "en"),
        ("She said that the word 猫 is Chinese for cat.", "en"),
        (GERMAN, "und"),
        (FRENCH, "und"),
        (DUTCH, "und"),
        ("Маленькая кошка сидела у окна.", "und"),
        (CODE, "und"),
        ("", "und"),
    ],
)
def test_a_texts_language_is_told_by_its_script_or_its_commonest_words(text: str, language: str) -> None:
    assert language_of([text]) == language


def test_the_packaged_sets_are_in_the_languages_that_are_said_of_them() -> None:
    assert [language_of(packaged_prompts(name)) for name in ("long", "short", "chinese")] == ["en", "en", "cn"]


@pytest.mark.parametrize(
    ("text", "words", "reason"),
    [
        (ENGLISH, 17, None),
        (KOREAN, 6, None),
        (CHINESE, 0, "the text is in a script that has no blanks between words"),
        ("一\n" * 50, 0, "the text is in a script that has no blanks between words"),
        ("แมวนั่งอยู่ริมหน้าต่าง มองดูฝน", 0, "the text is in a script that has no blanks between words"),
        ("ACGT" * 100 + " " + "TTGA" * 100, 0, "the text is not written in words: 400 characters stand between"),
        (" \n", 0, "the text holds no words"),
    ],
)
def test_words_are_counted_where_a_text_is_written_in_words(text: str, words: int, reason: str | None) -> None:
    found, why = count_words(text)
    assert found == words
    if reason is None:
        assert why is None
    else:
        assert why.startswith(reason)


def test_prompts_of_a_text_without_blanks_are_cut_between_characters_each_once_with_their_line_ends() -> None:
    spec = EvaluateSpec(prompt_words=15, prompt_count=8)
    first, second = CHINESE, CHINESE.replace("小猫", "小狗")
    found = choose_prompts([first, second, first + "完", ENGLISH], spec)
    assert found.texts == ("小猫坐在窗边，看着外面的雨。\n她", "小狗坐在窗边，看着外面的雨。\n她")
    assert found.language == "cn"
    thai = choose_prompts(["แมวที่นั่งอยู่" * 4], EvaluateSpec(prompt_words=4)).texts
    assert thai == ("แมวที่",)
    assert choose_prompts(["ACGT" * 100], EvaluateSpec(prompt_words=2)).texts == ("ACGT" * 10,)
    assert choose_prompts(["one two\n\nthree  four five six"], EvaluateSpec(prompt_words=3)).texts == (
        "one two\n\nthree",
    )


def test_prompts_of_a_file_are_taken_once_and_their_language_is_told(tmp_path: Path) -> None:
    write_text(f"{JAPANESE}\n{JAPANESE}\n猫が好きです。\n", tmp_path / "p.txt")
    found = choose_prompts([], EvaluateSpec(prompts=str(tmp_path / "p.txt")))
    assert (found.texts, found.language) == ((JAPANESE, "猫が好きです。"), "ja")


@pytest.mark.parametrize(
    ("encoder", "language", "note"),
    [
        ("offline", "en", None),
        ("offline", "cn", "the encoder offline was made for English, and the prompts are in the language 'cn'"),
        ("sentence-transformers/all-mpnet-base-v2", "und", "made for English, and the prompts are not recognized as"),
        ("sentence-transformers/paraphrase-multilingual-mpnet-base-v2", "cn", None),
    ],
)
def test_an_encoder_for_english_is_named_beside_other_texts(encoder: str, language: str, note: str | None) -> None:
    found = language_note(encoder, language)
    if note is None:
        assert found is None
    else:
        assert note in found


@pytest.mark.parametrize(
    ("card", "english"),
    [
        ("---\nlanguage: en\n---\n", True),
        ("---\nlicense: mit\nlanguage:\n- en\ntags: x\n---\n", True),
        ("---\nlanguage:\n- en\n- ja\n---\n", False),
        ("---\nlanguage: multilingual\n---\nlanguage: en\n", False),
        ("---\nlicense: mit\n---\n", False),
        ("\xff", False),
    ],
)
def test_an_encoders_card_says_whether_it_was_made_for_english(tmp_path: Path, card: str, english: bool) -> None:
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    assert (language_note(str(tmp_path), "ja") is not None) == english


@pytest.fixture
def chinese_data(finished_run: RunFolder, tmp_path: Path) -> PreparedData:
    sentences = [f"第{number}只小猫坐在窗边，看着外面的雨。她想出去玩，可是妈妈说太冷了。" for number in range(60)]
    text = tmp_path / "text.jsonl"
    write_text("".join(json.dumps({"text": sentence * 2}) + "\n" for sentence in sentences), text)
    lengths = {"sequence_length": 64, "validation_sequences": 2, "test_sequences": 4}
    spec = DataSpec(train=SourceSpec(path=str(text)), **lengths)
    return prepare(ModelSpec(id=str(finished_run.ir("bf16").path)), spec, tmp_path / "data")


def test_a_report_says_which_figures_make_no_sense_of_a_text(
    finished_run: RunFolder, chinese_data: PreparedData, tmp_path: Path
) -> None:
    models = {name: finished_run.ir(name) for name in ("bf16", "int4")}
    spec = EvaluateSpec(encoder="offline", prompt_count=4, prompt_words=8, max_new_tokens=1)
    encode = lambda first, second: [1.0] * len(first)  # noqa: E731
    report = evaluate(models, "bf16", chinese_data, spec, encode, tmp_path / "out")
    for model in report.models.values():
        assert (model.word_perplexity, model.perplexity is None) == (None, False)
        assert model.word_perplexity_reason == "the text is in a script that has no blanks between words"
        assert 1 <= model.different_answers <= 4
    assert report.conditions["prompt_language"] == "cn"
    assert any(
        "the encoder offline was made for English, and the prompts are in the language 'cn'" in note
        for note in report.notes
    )
    rows = (tmp_path / "out" / "reference.csv").read_text(encoding="utf-8")
    assert rows.count('"cn"') == report.conditions["prompts"]
