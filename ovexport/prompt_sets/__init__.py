"""Prompts that come with the package: a file of JSON lines for each set."""

import json
from collections.abc import Mapping
from importlib.resources import files

LANGUAGES: Mapping[str, str] = {"long": "en", "short": "en", "chinese": "cn"}
"""The sets, and their language as WhoWhatBench writes it."""


def packaged_prompts(name: str) -> tuple[str, ...]:
    """The prompts of a set."""
    lines = (files("ovexport.prompt_sets") / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return tuple(json.loads(line)["prompt"] for line in lines if line)
