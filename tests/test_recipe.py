from pathlib import Path

import pytest
from conftest import REPOSITORY, tiny_values

from ovexport import recipe
from ovexport.errors import ArtifactError, RecipeError

PIPELINES = sorted((REPOSITORY / "pipelines").glob("*.toml"))


def parse(values: dict) -> recipe.Recipe:
    return recipe.parse(values, base=REPOSITORY, origin="test")


@pytest.fixture
def values(tmp_path: Path) -> dict:
    return tiny_values(tmp_path)


def test_every_problem_is_named_at_once_with_its_path_and_value(values: dict) -> None:
    values["tune"] |= {"learning_rte": 1, "batch_size": "many"}
    values["compress"]["group_size"] = 0.5
    with pytest.raises(RecipeError) as caught:
        parse(values)
    message = str(caught.value)
    assert "tune.learning_rte: no such key" in message
    assert "tune.batch_size='many'" in message
    assert "compress.group_size=0.5" in message


@pytest.mark.parametrize(
    ("section", "change", "cure"),
    [
        ("tune", {"epochs": 1}, "either steps or epochs"),
        ("tune", {"objective": "task"}, "needs a section .task. with a name"),
        ("tune", {"objective": "task", "temperature": 2.0}, "temperature: not of objective = 'task'"),
        ("tune", {"loss_on": "answer"}, "loss_on: not of objective = 'distillation'"),
        ("tune", {"learning_rate": float("nan")}, "tune.learning_rate"),
        ("compress", {"group_size": 0}, "divisor of the layers' in-features"),
        ("compress", {"rank": 0}, "compress.rank=0"),
        ("compress", {"rank_space": [4, 2]}, "go together"),
        ("data", {"train": {"hub": "a/b", "path": "x.txt"}}, "either path (a file) or hub"),
        ("data", {"train": {"path": "x.pdf"}}, "x.pdf is none of"),
    ],
)
def test_impossible_combinations_are_refused(values: dict, section: str, change: dict, cure: str) -> None:
    values[section] |= change
    with pytest.raises(RecipeError, match=cure.replace("(", r"\(").replace(")", r"\)")):
        parse(values)


def test_overrides_keep_toml_types(tmp_path: Path, values: dict) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.dump(parse(values)))
    loaded = recipe.load(path, ["tune.learning_rate=1e-3", "compress.mode=int4_sym", 'compress.ignored=["*.q_proj"]'])
    assert loaded.tune.learning_rate == 1e-3
    assert loaded.compress.mode == "int4_sym"
    assert loaded.compress.ignored == ("*.q_proj",)


@pytest.mark.parametrize("override", ["tune.learning_rate", "learning_rate=1", "tune.=1", "model.id.x=1"])
def test_an_override_that_names_no_key_is_refused(tmp_path: Path, values: dict, override: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.dump(parse(values)))
    with pytest.raises(RecipeError, match="--set"):
        recipe.load(path, [override])


def test_the_written_recipe_reads_back_as_the_same(tmp_path: Path, values: dict) -> None:
    resolved = parse(values)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.dump(resolved))
    assert recipe.load(path) == resolved


def test_paths_beside_the_recipe_come_first(tmp_path: Path, values: dict) -> None:
    (tmp_path / "stories.txt").write_text("a story")
    values["data"]["train"] = {"path": "stories.txt"}
    found = recipe.parse(values, base=tmp_path, origin="test")
    assert found.data.train.path == str(tmp_path / "stories.txt")


def test_a_path_that_can_not_be_looked_up_is_one_line(tmp_path: Path, values: dict) -> None:
    values["data"]["test"] = {"path": "x" * 300 + ".txt"}
    with pytest.raises(ArtifactError, match=r"^data.test.path='x{100}.*: a name longer than the file system takes"):
        recipe.parse(values, base=tmp_path, origin="test")
    values["data"]["test"] = {"path": "a\0b.txt"}
    with pytest.raises(
        RecipeError, match=r"^data.test.path='a.x00b.txt': holds a NUL character; give another path or name$"
    ):
        recipe.parse(values, base=tmp_path, origin="test")
    values["model"]["id"] = ""
    with pytest.raises(RecipeError, match=r"model.id='': string should have at least 1 character"):
        recipe.parse(values, base=tmp_path, origin="test")


def test_a_missing_or_broken_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        recipe.load(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(RecipeError, match="not TOML"):
        recipe.load(tmp_path / "broken.toml")


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid(path: Path) -> None:
    assert recipe.load(path).model.id
