"""Reading a recipe: TOML, `--set` overrides, paths, and errors that name the key."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from ovexport.errors import RecipeError
from ovexport.foreign import translated
from ovexport.prompt_sets import LANGUAGES
from ovexport.recipe.data import SourceSpec
from ovexport.recipe.recipe import Recipe
from ovexport.recipe.spec import Spec
from ovexport.recipe.task import TaskSpec
from ovexport.storage.bounded import DEEPEST, LARGEST_RECIPE_BYTES, parse_toml
from ovexport.storage.textfile import NotTextError, read_text
from ovexport.wording import shortened


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides, resolve its paths and check it whole.

    Raises:
        ArtifactError: a path in it can't be looked up.
        RecipeError: with every problem at once, each with the field's path, the value and the cure.
    """
    path = Path(path)
    values = _read_toml(path, "no such recipe; the ones that ship are in pipelines/")
    for override in overrides:
        _apply(values, override)
    return parse(values, base=path.parent, origin=str(path))


def parse(values: Mapping[str, Any], *, base: Path, origin: str) -> Recipe:
    """Check the sections and resolve their paths against `base`.

    Raises:
        ArtifactError: a path can't be looked up.
        RecipeError: with every problem at once.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise RecipeError(f"{origin}: " + "; ".join(problems)) from error
    return _resolve_paths(recipe, base)


def load_task(name: str) -> TaskSpec:
    """A task by its name in HARNESS_TASKS, or from a TOML file with the keys of a recipe's section [task].

    Raises:
        RecipeError: there is no such task, or the file is none of a task; with every problem at once.
    """
    path = Path(name)
    if path.suffix != ".toml":
        return section(TaskSpec, name=name)
    spec = section(TaskSpec, **_read_toml(path, "no such file; give a task's name or its TOML file"))
    return _resolve_task(spec, path.parent)


AnySpec = TypeVar("AnySpec", bound=Spec)


def section(spec_type: type[AnySpec], /, **values: Any) -> AnySpec:
    """A single section from values that a command line gives.

    Raises:
        RecipeError: with every problem at once.
    """
    try:
        return spec_type(**values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise RecipeError("; ".join(problems)) from error


def dump(recipe: Recipe) -> str:
    """The recipe as TOML with every default spelled out; unset options are left out, as TOML has no null."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _read_toml(path: Path, absent: str) -> dict[str, Any]:
    """The file's tables.

    Args:
        absent: what to say of a file that is not there.
    """
    try:
        return parse_toml(read_text(path, LARGEST_RECIPE_BYTES))
    except FileNotFoundError:
        raise RecipeError(f"{path}: {absent}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; give a TOML file") from None
    except (OSError, NotTextError) as error:
        raise RecipeError(f"{path}: can't be read ({error})") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not 2 <= len(keys) <= DEEPEST or not all(keys):
        raise RecipeError(
            f"--set {shortened(override)}: write section.key=value, such as --set tune.learning_rate=1e-4"
        )
    section = values
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override}: {key} is a value, not a section")
    section[keys[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    """The text as a TOML value; a string where it is none."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


_CURES = {
    "extra_forbidden": "no such key; remove it or correct its spelling",
    "missing": "missing; add it",
}
_LISTS = {
    "tuple_type": "give a list",
    "too_short": "empty; name at least one, or leave it out",
}
"""What is said of a value that should be a list; pydantic's words are about Python's tuples."""


def _describe(problem: Mapping[str, Any]) -> str:
    where = shortened(".".join(str(part) for part in problem["loc"])) or "recipe"
    if problem["type"] in _CURES:
        return f"{where}: {_CURES[problem['type']]}"
    message = _LISTS.get(problem["type"], str(problem["msg"]).removeprefix("Value error, "))
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where != "recipe" else message
    given = problem["input"]
    shown = repr(list(given) if isinstance(given, tuple) else given)
    return f"{where}={shortened(shown)}: {message[:1].lower()}{message[1:]}"


def _resolve(key: str, name: str | None, base: Path) -> str | None:
    """A path beside the recipe, or else in the current folder; a name that is neither is left as it is.

    Args:
        key: that names it, for messages.

    Raises:
        ArtifactError: it can't be looked up, such as a name of 300 characters.
        RecipeError: it can't be a path.
    """
    if name is None:
        return None
    given = f"{key}={shortened(repr(name))}"
    if "\0" in name:
        raise RecipeError(f"{given}: holds a NUL character; give another path or name")
    with translated(given):
        for candidate in (base / name, Path(name)):
            if candidate.exists():
                return str(candidate.resolve())
    return name


def _resolve_task(task: TaskSpec, base: Path) -> TaskSpec:
    return task.model_copy(update={split: _resolve(f"task.{split}", path, base) for split, path in task.files.items()})


def _resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    def resolve(key: str, name: str | None) -> str | None:
        return _resolve(key, name, base)

    def source(split: str, spec: SourceSpec | None) -> SourceSpec | None:
        return spec and spec.model_copy(update={"path": resolve(f"data.{split}.path", spec.path)})

    model, data, evaluate = recipe.model, recipe.data, recipe.evaluate
    sources = {split: source(split, getattr(data, split)) for split in ("train", "validation", "test")}
    sensitivities = resolve("compress.sensitivities", recipe.compress.sensitivities)
    prompts = evaluate.prompts
    return recipe.model_copy(
        update={
            "model": model.model_copy(
                update={"id": resolve("model.id", model.id), "adapter": resolve("model.adapter", model.adapter)}
            ),
            "data": data.model_copy(update=sources),
            "compress": recipe.compress.model_copy(update={"sensitivities": sensitivities}),
            "task": recipe.task and _resolve_task(recipe.task, base),
            "evaluate": evaluate.model_copy(
                update={
                    "encoder": resolve("evaluate.encoder", evaluate.encoder),
                    "prompts": prompts if prompts in LANGUAGES else resolve("evaluate.prompts", prompts),
                }
            ),
        }
    )
