"""The documents: their links lead somewhere, their commands exist, and what a script writes into them is fresh."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import recipe_keys
import typer
from conftest import REPOSITORY

from ovexport.artifacts.checkpoint import CheckpointManifest
from ovexport.cli.main import app
from ovexport.compress import starting_points
from ovexport.errors import OvexportError
from ovexport.objectives import objectives
from ovexport.pipeline.stages import STAGES
from ovexport.readers import readers
from ovexport.recipe import Recipe, Spec, parse
from ovexport.registry import Registry
from ovexport.weights.layer import LayerFormat
from ovexport.weights.policy import layer_policies

PAGES = sorted(
    path
    for pattern in ("*.md", "benchmarks/*.md", "models/**/*.md", "ovexport/**/README.md", "pipelines/*.md")
    for path in REPOSITORY.glob(pattern)
)
README = REPOSITORY / "README.md"
README_LINES = 200
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links and pictures, but for those on the web."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("https://", "http://")):
            yield target


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each ovexport command in a page's blocks of shell lines."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in ("bash", "yaml"):
            joined = re.sub(r"(?: >)?\n +--", " --", block)
            for line in re.findall(r"(?:^| && |^ +)(ovexport .+)$", joined, re.MULTILINE):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`((?:ovexport|tests|benchmarks|pipelines|models)/[\w./-]+)`", page.read_text("utf-8")):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_command_and_option_exists(page: Path) -> None:
    assert isinstance(COMMANDS, click.Group)
    for _, name, *words in commands(page):
        command = COMMANDS.commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given <= known, (name, given - known)


@pytest.mark.parametrize("page", [README, recipe_keys.MANUAL], ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_recipe_that_is_shown_is_one(page: Path) -> None:
    shown = [tomllib.loads(block) for language, block in FENCE.findall(page.read_text("utf-8")) if language == "toml"]
    recipes = [sections for sections in shown if set(sections) <= set(Recipe.model_fields)]
    assert recipes
    whole = {"model": {"id": "m"}, "data": {"train": {"path": "text.txt"}}, "tune": {"steps": 1}}
    for sections in recipes:
        parse(whole | sections, base=REPOSITORY, origin=page.name)


def test_the_readme_is_short_and_its_rooms_exist() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    rooms = re.findall(r"`([\w/]+(?:/|\.py))`", text.partition("\nEach stage has one room")[2])
    assert len(rooms) > 20
    for room in set(rooms) - {"ovexport/"}:
        assert (REPOSITORY / "ovexport" / room).exists(), room


def test_the_readme_names_every_group_of_plug_ins() -> None:
    registries: tuple[Registry[Any], ...] = (starting_points, layer_policies, objectives, readers)
    named = set(re.findall(r"`(ovexport\.\w+)`", README.read_text(encoding="utf-8")))
    assert named == {registry.group for registry in registries}


def test_the_readmes_picture_shows_every_stage() -> None:
    picture = README.read_text(encoding="utf-8").partition("## How it works")[2].partition("## Results")[0]
    assert re.findall(r"^   [│├▼](?:──►)? +(\w+)  ", picture, re.MULTILINE) == [stage.name for stage in STAGES]


def test_the_readmes_exit_codes_are_the_errors() -> None:
    documented = set(re.findall(r"^\| (\d+) \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    raised = {str(error.exit_code) for error in OvexportError.__subclasses__()}
    assert documented == raised | {"0", "1", "130"}


def test_the_table_of_recipe_keys_is_what_the_specs_say() -> None:
    text = recipe_keys.MANUAL.read_text(encoding="utf-8")
    assert recipe_keys.filled(text) == text, "run python pipelines/recipe_keys.py"


def test_a_key_without_a_description_is_named() -> None:
    class UndescribedSpec(Spec):
        """A section.

        Attributes:
            first: what it is for.
        """

        first: int = 0
        second: int = 0

    with pytest.raises(ValueError, match="second"):
        recipe_keys.described(UndescribedSpec)


def test_the_readme_names_a_test_command_that_ci_finds() -> None:
    block = README.read_text().partition("<!-- test command -->")[2].partition("```bash\n")[2].partition("```")[0]
    assert block.startswith("pip install -e")
    assert "pytest" in block
    found = subprocess.run(
        ["sed", "-n", "/<!-- test command -->/,/```$/p", README], capture_output=True, text=True, check=True
    )
    assert block.strip() in found.stdout


def test_the_proofs_readme_names_the_fields_of_a_checkpoint() -> None:
    text = (REPOSITORY / "ovexport" / "verify" / "README.md").read_text(encoding="utf-8")
    inputs = text.partition("### Inputs")[2].partition("| tensor |")[0]
    assert set(re.findall(r"^\| `(\w+)`", inputs, re.MULTILINE)) <= set(LayerFormat.model_fields)
    assert "`replaced_weights`" in text
    assert "replaced_weights" in CheckpointManifest.model_fields
