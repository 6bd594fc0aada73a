"""Which of five kinds a test is: it has exactly one of these markers, its own or one that follows from what it uses."""

import types
from collections.abc import Sequence

import pytest

MARKERS = ("unit", "run", "families", "cli", "browser")
_MADE_FROM_A_RUN = {"finished_run"}
_STARTS_COMMANDS = {"ovexport", "started"}


def mark_all(items: Sequence[pytest.Item]) -> None:
    """Give every test its marker where it has none.

    Raises:
        pytest.UsageError: a test has two.
    """
    for item in items:
        own = {mark.name for mark in item.iter_markers()} & set(MARKERS)
        if len(own) > 1:
            raise pytest.UsageError(f"{item.nodeid}: has the markers {', '.join(sorted(own))}; give it one")
        if not own:
            item.add_marker(_follows(item))


def _follows(item: pytest.Item) -> str:
    """The marker of a test without one of its own: `cli` if it calls the command line, `run` if it uses a run."""
    function = getattr(item, "function", None)
    if isinstance(function, types.FunctionType) and _STARTS_COMMANDS & set(function.__code__.co_names):
        return "cli"
    return "run" if _MADE_FROM_A_RUN & set(getattr(item, "fixturenames", ())) else "unit"
