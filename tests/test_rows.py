"""Files as users have them: the exact text comes in, or one line says which row is wrong and how."""

import csv
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ovexport import recipe
from ovexport.artifacts import DataManifest
from ovexport.data.rows import load_rows, load_texts
from ovexport.errors import ArtifactError, DataError, RecipeError
from ovexport.evaluate import read_ground_truth
from ovexport.evaluate.prompts import choose_prompts
from ovexport.prepare import read_documents
from ovexport.recipe import EvaluateSpec, SourceSpec, TaskSpec
from ovexport.storage.records import read_json_lines, read_record
from ovexport.tasks import read_test_rows

BOM = b"\xef\xbb\xbf"
SEPARATORS = "a\u2028b\x85c\u2029d\x1ce"
LATIN = "Windows-1252 or Latin-1, probably"
OTHER = "an encoding such as GB 18030, Shift-JIS or Windows-1251, probably"


def names_alone(value: object) -> str:
    """Contents and texts are too long to name a test."""
    return value if isinstance(value, str) else ""


def texts(folder: Path, name: str, content: bytes) -> list[str]:
    (folder / name).write_bytes(content)
    return load_texts(SourceSpec(path=str(folder / name)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "values.csv",
            b"text\n007\n1.50\nNA\nTrue\nnull\n1e5\n-0\n",
            ["007", "1.50", "NA", "True", "null", "1e5", "-0"],
        ),
        ("mark.csv", BOM + b"text,n\na,1\n", ["a"]),
        ("mark.csv", BOM + b'"text"\na\n', ["a"]),
        ("UPPER.CSV", b"text\na\n", ["a"]),
        ("wide.csv", "text\nä\n".encode("utf-16"), ["ä"]),
        ("wide.csv", b"\xfe\xff" + "text\nä\n".encode("utf-16-be"), ["ä"]),
        ("wider.csv", "text\n𝄞\n".encode("utf-32"), ["𝄞"]),
        ("crlf.csv", b'text,n\r\n"a\r\nb",1\r\nc,2\r\n', ["a\r\nb", "c"]),
        ("cr.csv", b"text,n\ra,1\rb,2", ["a", "b"]),
        ("blank.csv", b"text\n\na\n\n", ["a"]),
        ("empty.csv", b"n,text\n1,\n2,a\n3,  \n", ["a"]),
        ("quoted.csv", b'text,n\n" say ""hi"", ",1\n', [' say "hi", ']),
        ("separators.csv", f"text\n{SEPARATORS}\x0bf\x0cg\n".encode(), [f"{SEPARATORS}\x0bf\x0cg"]),
        ("long.csv", b"text\n" + b"x" * 200_000, ["x" * 200_000]),
        ("name [1-2] {a,b} *?!#%é.csv", b"text\na\n", ["a"]),
        ("mark.jsonl", BOM + b'{"text": "a"}\r\n\r\n{"text": "b"}', ["a", "b"]),
        ("cr.jsonl", b'{"text": "a"}\r{"text": "b"}\r', ["a", "b"]),
        ("separators.jsonl", f'{{"text": "{SEPARATORS[:-2]}"}}\n'.encode(), [SEPARATORS[:-2]]),
        ("wide.jsonl", '{"text": "ä"}\n'.encode("utf-16"), ["ä"]),
        ("pairs.jsonl", b'{"text": "\\ud834\\udd1e"}\n', ["𝄞"]),
        ("absent.jsonl", b'{"n": 1}\n{"text": null}\n{"text": "a"}\n', ["a"]),
        ("name[0].jsonl", b'{"text": "a"}\n', ["a"]),
        ("list.json", BOM + b' [{"text": "a"},\n {"text": "b"}]\n', ["a", "b"]),
        ("strings.json", b'["a", "\\u2028b"]', ["a", "\u2028b"]),
        ("lines.json", b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("indented.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}', ["a", "b"]),
    ],
    ids=names_alone,
)
def test_the_text_comes_in_as_it_stands_in_the_file(tmp_path: Path, name: str, content: bytes, expected) -> None:
    assert texts(tmp_path, name, content) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,n\na,1\nété,2\n".encode("latin-1"), f"row 2 (line 3): byte 0xE9 is not UTF-8 ({LATIN}); save"),
        ("a.csv", 'text,n\n"a\nb",1\n\né,2\n'.encode("latin-1"), "row 2 (line 5): byte 0xE9 is not UTF-8"),
        ("a.csv", "té,n\na,1\n".encode("latin-1"), "the header (line 1): byte 0xE9 is not UTF-8"),
        ("a.csv", "text\n你好世界\n".encode("gb18030"), f"row 1 (line 2): byte 0xC4 is not UTF-8 ({OTHER}); save"),
        ("a.csv", "text\n你好世界\n".encode() + b"\xff\n", "row 2 (line 3): byte 0xFF is not UTF-8; save"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "the header (line 1): NUL characters, as in binary files and in"),
        ("a.csv", b"\xff\xfet\0e\0x", "the header (line 1): byte 0x78 is not UTF-16-LE; save the file as UTF-8"),
        ("a.csv", b"text,n\na,1\nb\n", "row 2 (line 3) has 1 fields, and the header 2"),
        ("a.csv", b'text,n\n"a\nb",1\nb,2,3\n', "row 2 (line 4) has 3 fields, and the header 2"),
        ("a.csv", b"text,n,text\na,1,b\n", "the header (line 1) has the name 'text' twice; rename one of them"),
        ("a.csv", b'text,n\n"a,1\nb,2\n', "row 1 (line 2): a quote is opened and never closed"),
        ("a.csv", b'text,n\na,1\n"a"b,1\n', "row 2 (line 3): more text follows a closing quote"),
        ("a.csv", b"text\n", "holds no rows; give a file with some"),
        ("a.csv", b"body\na\n", "no column 'text'; it has body; set column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', f"row 2 (line 2): byte 0xE9 is not UTF-8 ({LATIN}); save"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', 'row 2 (line 3) is a list, and no object, such as {"text": "..."}'),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "row 2 (line 2) is text, and no object"),
        ("a.jsonl", b'[{"text": "a"}]', "row 1 (line 1) is a list, and no object"),
        ("a.jsonl", b'{"text": "a"}\n{"text" "b"}\n', "row 2 (line 2): not JSON (Expecting ':' delimiter at column 9)"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "row 1 (line 1): an object has the name 'text' twice"),
        ("a.jsonl", b'{"text": "a\\ud83d"}\n', "row 1 (line 1) holds half of a character, \\ud83d; its other half"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": 7}\n',
            "row 2: text is a number, not text; convert it, or name another column",
        ),
        ("a.jsonl", b'{"text": ["a"]}\n', "row 1: text is a list, not text"),
        ("a.jsonl", b"[" * 100_000, "row 1 (line 1): its lists and objects are nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "row 1 (line 1): Exceeds the limit (4300 digits)"),
        ("a.jsonl", b"\n\n", "holds no rows; give a file with some"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: not JSON (Expecting ':' delimiter at column 9)"),
        ("a.json", b'{"text": "a"}\n{"text" "b"}', "row 2 (line 2): not JSON (Expecting ':' delimiter at column 9)"),
        ("a.json", b'[{"text": "a"}, ["b"]]', "row 2 is a list, and no object"),
        ("a.json", b'["a", 7]', "row 2 is a number, and no object"),
        ("a.json", b'{"text": "\xe9"}', "line 1: byte 0xE9 is not UTF-8"),
        ("a.json", b'{"data": [{"text": "a"}]}', "no column 'text'; it has data; set column"),
        ("a.json", b"[]", "holds no rows; give a file with some"),
        ("a.parquet", b"PAR1 no parquet", "not a parquet file that can be read (Parquet magic bytes not found"),
        ("a.csv", b"", "holds no text; give a file with some"),
    ],
    ids=names_alone,
)
def test_a_file_that_is_wrong_is_one_line_that_names_the_row(
    tmp_path: Path, name: str, content: bytes, message
) -> None:
    with pytest.raises(DataError) as caught:
        texts(tmp_path, name, content)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_is_read_by_its_literal_name_and_columns(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["007", None, "a\u2028b"], "n": [1, 2, 3]})
    path = tmp_path / "a[1].parquet"
    pyarrow.parquet.write_table(table, path)
    assert load_texts(SourceSpec(path=str(path))) == ["007", "a\u2028b"]
    assert next(iter(load_rows(SourceSpec(path=str(path))).records)) == {"text": "007", "n": 1}
    with pytest.raises(DataError, match="row 1: n is a number, not text"):
        load_texts(SourceSpec(path=str(path), column="n"))
    with pytest.raises(DataError, match="no column 'body'; it has text, n; set column"):
        load_texts(SourceSpec(path=str(path), column="body"))
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], names=["n", "n"]), path)
    with pytest.raises(DataError, match="the schema has the name 'n' twice"):
        load_rows(SourceSpec(path=str(path)))


def test_plain_text_is_split_at_line_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "a [x].txt"
    for content, expected in (
        (BOM + b"one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
        (b"one\rtwo\r\rthree", ["one\ntwo", "three"]),
        (f"{SEPARATORS}\nx\x0by\x0cz\n".encode(), [SEPARATORS, "x\x0by\x0cz"]),
        ("ä\nö\n".encode("utf-16"), ["ä", "ö"]),
    ):
        path.write_bytes(content)
        assert read_documents(SourceSpec(path=str(path))).texts == expected
        assert "\n".join(choose_prompts([], EvaluateSpec(prompts=str(path))).texts) == "\n".join(expected)
    path.write_bytes("a\nb\né\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"can't be read: line 3: byte 0xE9 is not UTF-8 .*; save the file as UTF-8"):
        read_documents(SourceSpec(path=str(path)))


def test_a_tasks_csv_holds_strings(tmp_path: Path) -> None:
    path = tmp_path / "t[1].csv"
    path.write_bytes(BOM + b"prompt,answer\r\nroom?,007\r\nprice?,1.50\r\nknown?,NA\r\ntrue?,True\r\n")
    rows = read_test_rows(TaskSpec(name="mine", test=str(path)), {})["test"]
    assert [row["answer"] for row in rows] == ["007", "1.50", "NA", "True"]


def test_reading_a_csv_leaves_pythons_limit_of_a_field_alone(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    texts(tmp_path, "a.csv", b"text\na\n")
    with pytest.raises(DataError):
        texts(tmp_path, "a.csv", b"text\na,b\n")
    assert csv.field_size_limit() == limit


def test_local_files_are_read_without_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    code = (
        "import sys; from ovexport.data.rows import load_texts; from ovexport.recipe import SourceSpec\n"
        f"load_texts(SourceSpec(path={str(tmp_path / 'a.csv')!r}))\n"
        "print({'datasets', 'pandas', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_message_of_a_wrapped_error_is_its_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_, **__):
        try:
            raise ValueError("row 7 of part-0.parquet has no column 'text'\nand more")
        except ValueError as cause:
            raise datasets.exceptions.DatasetGenerationError(
                "An error occurred while generating the dataset"
            ) from cause

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        load_texts(SourceSpec(hub="some/data"))
    assert str(caught.value) == "some/data: can't be read (row 7 of part-0.parquet has no column 'text')"


def test_a_data_set_of_the_hub_gives_its_texts_as_a_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["007", None, " ", "a"], "n": [1, 2, 3, 4]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert load_texts(SourceSpec(hub="some/data")) == ["007", "a"]
    with pytest.raises(DataError, match="some/data: row 1: n is a number, not text"):
        load_texts(SourceSpec(hub="some/data", column="n"))
    with pytest.raises(DataError, match="some/data: no column 'body'; it has text, n; set column"):
        load_texts(SourceSpec(hub="some/data", column="body"))


def test_our_own_files_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    section = '[model]\nid = "m"\n[data]\ntrain = {path = "a.txt"}\n[tune]\nsteps = 0\n'
    for content in (BOM + section.encode(), section.encode("utf-16"), section.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert recipe.load(path).model.id == "m"
    path.write_bytes(b'[model]\nid = "\xe9"\n')
    with pytest.raises(RecipeError, match=r"can't be read \(line 2: byte 0xE9 is not UTF-8"):
        recipe.load(path)

    manifest = DataManifest(sequence_length=8, documents={}, sequences={}, dropped_duplicates=0, test_words=0)
    path = tmp_path / "data.json"
    path.write_bytes(BOM + manifest.model_dump_json().encode())
    assert read_record(path, DataManifest) == manifest
    path.write_bytes(b'{"sequence_length": "\xe9"}')
    with pytest.raises(ArtifactError, match=r"not a DataManifest \(line 1: byte 0xE9 is not UTF-8"):
        read_record(path, DataManifest)
    path.write_text('{"a": "x\u2028y"}\n{"a": 1}\n', encoding="utf-8")
    assert read_json_lines(path) == [{"a": "x\u2028y"}, {"a": 1}]


def test_a_ground_truth_is_read_as_any_csv(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_bytes(BOM + b",prompts,answers\r\n0,007,1.50\r\n1,NA,\r\n2,q," + b"x" * 200_000 + b"\r\n")
    truth = read_ground_truth(path)
    assert truth.prompts.texts == ("007", "NA", "q")
    assert truth.texts == ("1.50", "", "x" * 200_000)
    path.write_bytes(b",prompts,answers\n0,a,b\n1,\xe9,c\n")
    with pytest.raises(ArtifactError, match=r"row 2 \(line 3\): byte 0xE9 is not UTF-8"):
        read_ground_truth(path)
