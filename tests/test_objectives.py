"""Objectives: chosen by name, and what a plug-in's can do and is refused for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ovexport.artifacts import PreparedData, RunFolder
from ovexport.errors import PlugInError
from ovexport.models.device import Compute
from ovexport.models.head import hidden_states
from ovexport.objectives import Answers, Distillation, Material, objectives
from ovexport.objectives.loss import cross_entropy
from ovexport.pipeline import services
from ovexport.recipe import OBJECTIVES, Recipe
from ovexport.tune import tune


class NextToken:
    """-log p of the next token of text, as a plug-in would have it."""

    figure = "validation_next_token_nats"

    def __init__(self, train: torch.Tensor, validation: torch.Tensor, compute: Compute) -> None:
        self.train, self.validation, self.compute = train, validation, compute
        self.validation_examples = len(validation)

    @classmethod
    def train_examples(cls, data: PreparedData) -> int:
        return len(data.tokens("train"))

    @classmethod
    def build(cls, material: Material) -> "NextToken":
        train, validation = (torch.from_numpy(material.data.tokens(name)).long() for name in ("train", "validation"))
        return cls(train[material.train], validation, material.compute)

    def tokens(self, indices: Sequence[int]) -> int:
        return len(indices) * self.train.shape[1]

    def weight(self, indices: Sequence[int]) -> int:
        return len(indices) * (self.train.shape[1] - 1)

    def loss(self, network, head, indices, weight) -> torch.Tensor:
        return self._cross_entropy(network, head, self.train[list(indices)], weight)

    @torch.no_grad()
    def score(self, network, head, indices) -> float:
        ids = self.validation[list(indices)]
        return float(self._cross_entropy(network, head, ids, ids[:, 1:].numel()))

    def _cross_entropy(self, network, head, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
        with self.compute.autocast():
            hidden = hidden_states(network, ids)
        return cross_entropy(hidden.float(), following, head, tokens=tokens)


@pytest.fixture
def register() -> Iterator[Callable[[Any], Any]]:
    """Registers an objective for one test."""
    before = objectives.names
    yield objectives.register("next_token")
    if objectives.names != before:
        objectives.unregister("next_token")


def asked_for(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"objective": "next_token", **changes})})


def test_ours_are_known_by_their_names() -> None:
    assert objectives.names == OBJECTIVES
    assert [objectives.load(name, "tune.objective").thing for name in OBJECTIVES] == [Distillation, Answers]


def test_a_model_is_tuned_for_an_objective_from_outside(
    finished_run: RunFolder, tiny_recipe, tmp_path, register
) -> None:
    register(NextToken)
    asked = asked_for(tiny_recipe, steps=20, learning_rate=2e-3)
    folders = {"logs": tmp_path / "logs", "identity": "a"}
    tuned = tune(finished_run.compressed, asked.model, asked.tune, finished_run.data, tmp_path / "tuned", **folders)
    validation = tuned.manifest.validation
    assert validation.figure == "validation_next_token_nats"
    first = (tmp_path / "logs" / "tuning.jsonl").read_text().splitlines()[0]
    assert validation.value < float(first.partition(f'"{validation.figure}": ')[2].rstrip("}"))
    assert tuned.manifest.digests != finished_run.compressed.manifest.digests
    assert np.isfinite(tuned.reference.require("logits")).all()


def test_an_objective_that_fails_is_named(finished_run: RunFolder, tiny_recipe, tmp_path, register) -> None:
    class Fails(NextToken):
        def loss(self, network, head, indices, weight) -> torch.Tensor:
            raise ValueError("no such text")

    register(Fails)
    asked, folders = asked_for(tiny_recipe), {"logs": tmp_path / "logs", "identity": "a"}
    with pytest.raises(PlugInError, match=r"'next_token' .* failed: ValueError: no such text"):
        tune(finished_run.compressed, asked.model, asked.tune, finished_run.data, tmp_path / "tuned", **folders)


def test_an_objective_whose_figure_is_no_validation_is_named(finished_run, tiny_recipe, tmp_path, register) -> None:
    register(type("Wrong", (NextToken,), {"figure": "loss"}))
    asked, folders = asked_for(tiny_recipe), {"logs": tmp_path / "logs", "identity": "a"}
    with pytest.raises(PlugInError, match=r"'next_token' .* has to begin with 'validation_'"):
        tune(finished_run.compressed, asked.model, asked.tune, finished_run.data, tmp_path / "tuned", **folders)


def test_an_unknown_objective_is_found_before_any_work(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (problem,) = services.plan(asked_for(tiny_recipe), tmp_path / "out").problems
    assert "tune.objective='next_token': no such objective; the known ones are distillation, task" in problem
