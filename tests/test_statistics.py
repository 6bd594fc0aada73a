"""A statistic has its own name, in what the benchmarks measure and in what is committed of it."""

import json
from collections.abc import Iterator
from typing import Any

import convert
import numpy as np
import pytest
import tuning
from intervals import difference, interval, ratio
from tables import CENTRES, RESULTS

COMMITTED = {path.relative_to(RESULTS).as_posix(): json.loads(path.read_text()) for path in RESULTS.rglob("*.json")}


def spreads(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every figure of a document that has an interval or a range, with where it stands."""
    if isinstance(value, dict):
        if {"ci95", "range"} & set(value):
            yield path, value
        for name, inner in value.items():
            yield from spreads(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from spreads(inner, f"{path}/{index}")


FIGURES = dict(one for name, document in COMMITTED.items() for one in spreads(document, name))


def test_every_committed_ratio_has_one_centre_by_its_name_and_an_interval_or_a_range() -> None:
    ratios = {path: one for path, one in FIGURES.items() if "/ratios/" in path}
    assert len(ratios) > 50
    for path, one in ratios.items():
        assert len([name for name in CENTRES if name in one]) == 1, path
        assert ("ci95" in one) != ("range" in one), path


def test_no_committed_range_is_called_an_interval_and_no_ratio_of_means_a_median() -> None:
    figures, ratios = (COMMITTED["convert.json"][name] for name in ("figures", "ratios"))
    assert len(ratios) == 2 * len(convert.RATIOS)
    for name, (ours, theirs) in convert.RATIOS.items():
        for figure in ("seconds", "peak_rss_bytes"):
            pairs = np.divide(figures[ours][figure], figures[theirs][figure])
            expected = {"median": np.median(pairs), "range": [pairs.min(), pairs.max()]}
            assert ratios[f"{figure} {name}"] == expected
    for name, found in COMMITTED["tuning.json"]["ratios"].items():
        assert set(found) == ({"ratio_of_medians", "ci95"} if name.startswith("tokens_per_s") else {"median", "range"})
    for name in (name for name in COMMITTED if name.startswith("quality-")):
        rows = COMMITTED[name]["rows"]
        for pair, found in COMMITTED[name]["ratios"].items():
            ours, theirs = (rows[row]["kl_mean_nats"] for row in pair.removeprefix("kl ").split(" / "))
            assert found["ratio_of_means"] == pytest.approx(ours / theirs)


def test_no_committed_interval_is_of_fewer_than_five_sessions() -> None:
    trials = COMMITTED["settings.json"]["trials"]
    timed = [trial["time_per_output_token"] for trial in trials if trial["time_per_output_token"]]
    assert [(one["ci95"], one["reason"]) for one in timed] == [(None, "2 sessions are too few for an interval")] * len(
        timed
    )
    assert all(document["conditions"]["sessions"] >= 5 for name, document in COMMITTED.items() if "benchmark" in name)


def test_a_ratio_of_means_is_called_one_and_few_items_have_no_interval() -> None:
    ours, theirs = np.array([[1.0, 1.0, 10.0, 1.0, 1.0]]), np.array([[1.0, 2.0, 2.0, 2.0, 2.0]])
    found = ratio(ours, theirs)
    assert found["ratio_of_means"] == pytest.approx(14 / 9)
    assert found["ci95"][0] < 14 / 9 < found["ci95"][1]
    few, fewer = ours[:, :2], theirs[:, :2]
    assert [ratio(few, fewer)["ci95"], difference(few, fewer)["ci95"], interval(few)] == [None, None, None]


def test_the_steps_of_tuning_have_an_interval_where_they_are_enough_and_processes_a_range() -> None:
    def runs(*memory: int, seconds: float) -> list[dict[str, Any]]:
        return [
            {"seconds": [seconds, seconds + 1, seconds + 2], "peak_memory_bytes": one, "losses": [2.0]}
            for one in memory
        ]

    found = tuning.ratios(runs(1, 3, seconds=1), runs(4, 4, seconds=3))
    assert found["tokens_per_s"]["ratio_of_medians"] == 2
    assert len(found["tokens_per_s"]["ci95"]) == 2
    assert found["peak_memory"] == {"median": 0.5, "range": [0.25, 0.75]}
    assert tuning.ratios(runs(1, seconds=1), runs(4, seconds=3))["tokens_per_s"]["ci95"] is None
