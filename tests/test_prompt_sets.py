import json
import os
import subprocess
import sys
from importlib.resources import files
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from conftest import REPOSITORY

LENGTHS = {"long": (1400, 5300), "short": (20, 160), "chinese": (20, 400)}
LIST_SETS = """
import json
from importlib.resources import files

sets = files("ovexport") / "prompt_sets"
print(json.dumps({"folder": str(sets), "names": sorted(entry.name for entry in sets.iterdir())}))
"""


def prompts(name: str) -> list[str]:
    text = (files("ovexport") / "prompt_sets" / f"{name}.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(list(line) == ["prompt"] and isinstance(line["prompt"], str) for line in lines)
    return [line["prompt"] for line in lines]


def han_share(prompt: str) -> float:
    return sum("\u4e00" <= character <= "\u9fff" for character in prompt) / len(prompt)


def word_pairs(prompt: str) -> set[tuple[str, str]]:
    words = prompt.lower().split()
    return set(pairwise(words))


@pytest.mark.parametrize("name", LENGTHS)
def test_a_set_holds_at_least_26_prompts_of_its_lengths(name: str) -> None:
    shortest, longest = LENGTHS[name]
    assert len(prompts(name)) >= 26
    assert {prompt: len(prompt) for prompt in prompts(name) if not shortest <= len(prompt) <= longest} == {}


def test_no_prompt_occurs_twice_in_any_set() -> None:
    everything = [" ".join(prompt.split()).casefold() for name in LENGTHS for prompt in prompts(name)]
    assert sorted(everything) == sorted(set(everything))


def test_no_two_long_prompts_share_more_than_a_tenth_of_their_pairs_of_words() -> None:
    pairs = [(prompt[:60], word_pairs(prompt)) for prompt in prompts("long")]
    alike = [(a, b) for (a, mine), (b, other) in combinations(pairs, 2) if len(mine & other) > 0.1 * len(mine | other)]
    assert alike == []


@pytest.mark.parametrize("name", LENGTHS)
def test_a_prompt_has_no_space_around_it_and_no_character_that_a_csv_changes(name: str) -> None:
    wrong = [p for p in prompts(name) if p != p.strip() or "\r" in p or not p.replace("\n", "").isprintable()]
    assert wrong == []


@pytest.mark.parametrize("name", ["long", "short"])
def test_the_english_sets_are_written_in_latin_letters(name: str) -> None:
    assert [prompt for prompt in prompts(name) if not prompt.isascii()] == []


def test_the_chinese_set_is_written_in_simplified_characters() -> None:
    assert [prompt for prompt in prompts("chinese") if han_share(prompt) < 0.5] == []
    for prompt in prompts("chinese"):
        prompt.encode("gb2312")  # which has no traditional form of a simplified character


def test_an_installed_package_finds_the_sets(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    build = (
        "from setuptools import setup; setup(script_args=['-q', 'egg_info', '--egg-base', '.', "
        f"'build', '--build-base', {str(tmp_path / 'build')!r}, '--build-lib', {str(installed)!r}])"
    )
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "ovexport"):
        (source / name).symlink_to(REPOSITORY / name)
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    found = subprocess.run(
        [sys.executable, "-P", "-c", LIST_SETS],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(found.stdout) == {
        "folder": str(installed / "ovexport" / "prompt_sets"),
        "names": ["__init__.py", "chinese.jsonl", "long.jsonl", "short.jsonl"],
    }
