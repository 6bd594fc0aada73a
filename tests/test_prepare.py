import json
from pathlib import Path

import numpy as np
import pytest

from ovexport.errors import DataError, UnsupportedModelError
from ovexport.prepare import prepare, read_documents, split_documents
from ovexport.recipe import DataSpec, ModelSpec, SourceSpec

TEXTS = [f"Story {index} is about a dog that counts to {index}. " * 4 for index in range(40)]


def jsonl(path: Path, texts: list[str], column: str = "text") -> SourceSpec:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return SourceSpec(path=str(path), column=column)


def test_no_document_is_in_two_splits(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", TEXTS + TEXTS[:5])
    test = jsonl(tmp_path / "test.jsonl", TEXTS[10:12])
    splits, dropped = split_documents(DataSpec(train=train, test=test, validation_fraction=0.1))
    sets = [set(documents.texts) for documents in splits.values()]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert set(splits["test"].texts) == set(TEXTS[10:12])
    assert dropped >= 2


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_rows_of_every_format_are_documents(tmp_path: Path, suffix: str) -> None:
    import pandas

    path = tmp_path / f"rows.{suffix}"
    frame = pandas.DataFrame({"story": TEXTS[:3]})
    if suffix == "json":
        frame.to_json(path, orient="records")
    else:
        getattr(frame, f"to_{suffix}")(path, index=False)
    assert [text.strip() for text in read_documents(SourceSpec(path=str(path), column="story")).texts] == [
        text.strip() for text in TEXTS[:3]
    ]


def test_blocks_between_blank_lines_are_the_documents_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n")
    assert read_documents(SourceSpec(path=str(tmp_path / "a.txt"))).texts == ["one\ntwo", "three"]
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert read_documents(SourceSpec(path=str(tmp_path / "b.txt"))).texts == ["one", "two"]


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path: Path, tiny_model: Path) -> None:
    spec = DataSpec(train=jsonl(tmp_path / "t.jsonl", TEXTS), sequence_length=256, test_sequences=1000)
    message = r"data\.test: [\d,]+ tokens in 4 documents, and 1,024 are needed at least, for 4 sequences of 256"
    with pytest.raises(DataError, match=message):
        prepare(ModelSpec(id=str(tiny_model)), spec, tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ("\n\n", "holds no rows"),
        ('{"txt": "a"}\n', "no column 'text'; it has txt"),
        ("{broken", "can't be read"),
    ],
)
def test_a_source_without_text_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_documents(SourceSpec(path=str(tmp_path / "t.jsonl")))


def test_a_hub_data_set_without_a_network_is_one_line() -> None:
    with pytest.raises(DataError, match="could not be downloaded from the Hugging Face hub"):
        read_documents(SourceSpec(hub="nobody/nothing-of-the-kind"))


def test_sequences_are_the_documents_tokens_with_ends_between_them(tmp_path: Path, tiny_model: Path) -> None:
    spec = DataSpec(
        train=jsonl(tmp_path / "t.jsonl", TEXTS), sequence_length=16, test_sequences=4, validation_sequences=2
    )
    data = prepare(ModelSpec(id=str(tiny_model)), spec, tmp_path / "data")
    tokens = data.tokens("test")
    assert tokens.shape == (4, 16)
    assert tokens.dtype == np.int32
    assert data.manifest.test_words > 0
    assert data.test_documents == TEXTS[-4:]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    spec = DataSpec(train=jsonl(tmp_path / "t.jsonl", TEXTS), sequence_length=16)
    with pytest.raises(UnsupportedModelError, match="token ids up to 2047, the model embeds 512"):
        prepare(ModelSpec(id=str(folder)), spec, tmp_path / "data")


def test_a_text_given_for_two_splits_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"data\.validation: each of its 2 entries is in another split too"):
        split_documents(DataSpec(train=source, test=source))


def test_a_document_is_marked_once_by_the_tokenizer_or_by_an_end(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from ovexport.prepare import Documents, pack

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    spec = DataSpec(train=jsonl(tmp_path / "t.jsonl", TEXTS), sequence_length=16)
    alone, of_document = pack(Documents(["a dog", "a cat"] * 20, running=False), tokenizer, spec, "train")
    begun, _ = pack(Documents(["a dog", "a cat"] * 20, running=False), _Begins(tokenizer), spec, "train")
    running, _ = pack(Documents(["a dog", "a cat"] * 20, running=True), tokenizer, spec, "train")
    assert (alone == tokenizer.eos_token_id).any()
    ends = np.flatnonzero(alone.reshape(-1) == tokenizer.eos_token_id)
    assert (np.diff(of_document.reshape(-1))[ends] == 1).all()
    assert np.diff(of_document.reshape(-1)).sum() == len(ends)
    assert (begun == tokenizer.bos_token_id).any()
    assert not (begun == tokenizer.eos_token_id).any()
    assert not (running == tokenizer.eos_token_id).any()


def test_a_tokenizer_without_an_end_token_runs_documents_together_and_says_so(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    lengths = {"sequence_length": 16, "validation_sequences": 2, "test_sequences": 4}
    spec = DataSpec(train=jsonl(tmp_path / "t.jsonl", TEXTS), **lengths)
    note = (
        "the tokenizer has no end-of-sequence token: the documents of test, validation, train run together in the "
        "sequences, with nothing between them; set eos_token in tokenizer_config.json"
    )
    with caplog.at_level("WARNING", "ovexport"):
        data = prepare(ModelSpec(id=str(folder)), spec, tmp_path / "data")
    assert data.manifest.notes == (note,)
    assert note in caplog.messages
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    running = DataSpec(train=SourceSpec(path=str(tmp_path / "t.txt")), **lengths)
    assert prepare(ModelSpec(id=str(folder)), running, tmp_path / "running").manifest.notes == ()
    assert prepare(ModelSpec(id=str(tiny_model)), spec, tmp_path / "marked").manifest.notes == ()


class _Begins:
    """The tokenizer with a beginning of its own."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id

    def __call__(self, text: str, **options):
        return {"input_ids": [self._tokenizer.bos_token_id, *self._tokenizer(text, **options)["input_ids"]]}
