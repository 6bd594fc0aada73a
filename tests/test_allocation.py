"""Bits where they count: an exact knapsack, formats within the budget, a choice that is checked, and a proof of it."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import STORYTELLER, tiny_values

from ovexport import recipe
from ovexport.artifacts import RunFolder
from ovexport.checking import Caution
from ovexport.compress import check
from ovexport.compress.allocation import limit_of, uniform_within
from ovexport.compress.knapsack import Option, frontier
from ovexport.errors import RecipeError
from ovexport.pipeline import services
from ovexport.recipe import CompressSpec, LayerRule, section
from ovexport.report.page import write_report
from ovexport.reports import FormatCost, HeldOut, LayerSensitivity, SensitivityReport
from ovexport.storage.records import read_record, write_record
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import LayerPlan
from ovexport.weights.policy import candidate_formats


def random_layers(seed: int) -> list[list[Option]]:
    generator = np.random.default_rng(seed)
    return [
        [
            Option(int(size), float(cost))
            for size, cost in zip(generator.integers(1, 9, 3), generator.random(3), strict=True)
        ]
        for _ in range(6)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_is_exact(seed: int) -> None:
    layers = random_layers(seed)
    best = frontier(layers)
    every = list(itertools.product(range(3), repeat=len(layers)))
    totals = {
        choice: (
            sum(options[index].size_bytes for options, index in zip(layers, choice, strict=True)),
            sum(options[index].cost for options, index in zip(layers, choice, strict=True)),
        )
        for choice in every
    }
    for limit in range(int(best.sizes_bytes[0]), int(best.sizes_bytes[-1]) + 3):
        found = totals[best.within(limit)]
        assert found[0] <= limit
        assert found[1] == pytest.approx(min(cost for size, cost in totals.values() if size <= limit))
    assert (np.diff(best.sizes_bytes) > 0).all()
    assert (np.diff(best.costs) < 0).all()
    with pytest.raises(ValueError, match="smallest choice takes"):
        best.within(int(best.sizes_bytes[0]) - 1)


def linear(name: str, in_features: int, **values: object) -> LayerFormat:
    made = {"kind": "linear", "mode": "int4_asym", "out_features": 64, "group_size": 64, "rank": 8} | values
    return LayerFormat(name=f"{name}.weight", in_features=in_features, **made)


LAYERS = (
    linear("embed", 64, kind="embedding", mode="int8_asym", out_features=500, rank=0),
    linear("wide", 256),
    linear("narrow", 96, group_size=32),
    linear("ruled", 256),
    linear("left", 256, mode="float", rank=0, group_size=256),
)
HEAD = linear("head", 64, kind="head", mode="int8_asym", out_features=500, rank=0)


def test_layers_choose_among_the_formats_that_suit_them() -> None:
    spec = CompressSpec(rank=8, bits_per_weight=5, layers=(LayerRule(pattern="ruled", mode="int8_asym"),))
    found = candidate_formats(LAYERS, spec)
    formats = {name: {(each.mode, each.group_size) for each in of} for name, of in found.items()}
    int8 = "int8_asym"
    wide = {("int4_asym", size) for size in (32, 64, 128, 256)} | {(int8, 256)}
    assert formats == {"wide.weight": wide, "narrow.weight": {("int4_asym", 32), ("int4_asym", 96), (int8, 96)}}
    assert all(layer.rank == (0 if layer.mode == int8 else 8) for of in found.values() for layer in of)
    assert "wide.weight" not in candidate_formats(LAYERS, spec, {"wide.weight"})


def test_the_one_format_may_be_a_layers_whole_width() -> None:
    layers = (linear("wide", 256), linear("exact", 128))
    formats = candidate_formats(layers, CompressSpec(rank=8, bits_per_weight=5))
    coarse = [next(one for one in of if (one.mode, one.group_size) == ("int4_asym", 128)) for of in formats.values()]
    limit = sum(each.weight_bytes for each in coarse)
    assert list(uniform_within(layers, formats, limit)) == coarse
    whole = uniform_within(layers, formats, 10**6)
    assert {each.mode for each in whole} == {"int8_asym"}


def test_the_one_format_may_be_the_recipes_own_where_layers_differ_in_it() -> None:
    layers = (linear("wide", 256, group_size=128), linear("narrow", 192))
    formats = candidate_formats(layers, CompressSpec(rank=8, group_size=128, fallback="smaller_group", size_mb=1))
    assert uniform_within(layers, formats, sum(each.weight_bytes for each in layers)) == layers


def test_a_budget_is_bits_or_megabytes_or_what_a_token_reads() -> None:
    packed = [layer for layer in LAYERS if layer.encoding]
    elements = sum(layer.out_features * layer.in_features for layer in packed)
    assert limit_of(CompressSpec(bits_per_weight=5), LAYERS) == int(5 / 8 * elements)
    assert limit_of(CompressSpec(size_mb=0.05), LAYERS) == 50_000
    assert limit_of(CompressSpec(size_mb=1e305), LAYERS) == 2 * elements
    own = sum(layer.weight_bytes for layer in packed)
    assert limit_of(CompressSpec(at_most_slower=1), LAYERS) == own
    assert limit_of(CompressSpec(at_most_slower=1.5), LAYERS) == own * 3 // 2  # the embedding is the head as well
    read = own - LAYERS[0].weight_bytes + HEAD.weight_bytes
    assert limit_of(CompressSpec(at_most_slower=1.5), (*LAYERS, HEAD)) == read * 3 // 2 + LAYERS[0].weight_bytes
    floats = HEAD.with_values(mode="float")
    assert limit_of(CompressSpec(at_most_slower=1.5), (*LAYERS, floats)) == (
        (own - LAYERS[0].weight_bytes) * 3 // 2 + LAYERS[0].weight_bytes
    )


def test_a_budget_that_nothing_fits_is_refused_before_any_work() -> None:
    _, problem = check(LayerPlan(layers=LAYERS), CompressSpec(rank=8, bits_per_weight=2))
    assert isinstance(problem, RecipeError)
    assert "compress.bits_per_weight=2: the smallest formats take" in str(problem)
    (caution,) = check(LayerPlan(layers=LAYERS), CompressSpec(rank=8, bits_per_weight=7))
    assert isinstance(caution, Caution)
    held = frozenset(layer.name for layer in LAYERS)
    _, problem = check(LayerPlan(layers=LAYERS, held_as_codes=held), CompressSpec(rank=8, bits_per_weight=7))
    assert "no Linear layer is left to choose a format for" in str(problem)


def test_a_budget_that_no_layer_can_choose_within_is_refused_before_any_work() -> None:
    spec = CompressSpec(rank=8, size_mb=50, layers=(LayerRule(pattern="*", mode="int8_asym"),))
    _, problem = check(LayerPlan(layers=LAYERS), spec)
    assert "compress.size_mb=50: no Linear layer is left to choose a format for" in str(problem)


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0])
def test_costs_that_can_not_be_are_refused(cost: float) -> None:
    with pytest.raises(ValueError, match="cost_nats"):
        FormatCost(mode="int4_asym", group_size=32, weight_bytes=1, cost_nats=cost)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size_mb": 3, "bits_per_weight": 5}, "bits_per_weight and size_mb are budgets; give one of them"),
        ({"size_mb": 3, "layer_policy": "mine"}, "size_mb chooses the formats itself; leave layer_policy out"),
        ({"at_most_slower": 1, "engine": "nncf"}, "at_most_slower does not go with engine"),
    ],
)
def test_budgets_that_do_not_go_together_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        section(CompressSpec, **keys)


def run_within(folder: Path, until: str = "compress", **compress: object) -> RunFolder:
    values = tiny_values(STORYTELLER)
    values["data"] |= {"sequence_length": 64, "train_sequences": 16, "validation_sequences": 4}
    values["compress"] = {"group_size": 64, "rank": 8, "calibration_sequences": 8, **compress}
    values["tune"] |= {"steps": 2}
    return services.run(recipe.parse(values, base=folder, origin="r"), folder, until=until)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run within the bytes of its own format, up to the proof."""
    return run_within(tmp_path_factory.mktemp("mixed") / "run", until="verify", at_most_slower=1.0)


@pytest.mark.run
def test_mixed_formats_diverge_less_in_as_many_bytes_and_are_proven(mixed: RunFolder) -> None:
    run = mixed
    report = read_record(run.sensitivities, SensitivityReport)
    held_out = report.held_out
    assert held_out.chosen_weight_bytes <= report.limit_bytes == held_out.uniform_weight_bytes
    assert report.taken == "chosen"
    assert held_out.chosen_nats < held_out.uniform_nats
    proof = json.loads((run.path / "verification.json").read_text())
    assert proof["passed"]
    assert proof["summary"]["weight_bytes"] == held_out.chosen_weight_bytes
    assert {each.formats[each.chosen].mode for each in report.layers} == {"int4_asym", "int8_asym"}
    page = write_report(run).read_text(encoding="utf-8")
    assert f"{len(report.layers)} layers and what their formats cost" in page
    assert page.count("● ") == len(report.layers)
    for each in report.layers:
        sizes = [one.weight_bytes for one in each.formats]
        costs = [one.cost_nats for one in each.formats]
        assert costs[int(np.argmax(sizes))] == min(costs)
    points = report.frontier
    assert [point.weight_bytes for point in points] == sorted(point.weight_bytes for point in points)
    assert [point.cost_nats for point in points] == sorted((point.cost_nats for point in points), reverse=True)


@pytest.mark.run
def test_another_run_reads_the_costs_and_comes_to_the_same_choice(mixed: RunFolder, tmp_path: Path) -> None:
    run = run_within(tmp_path / "run", at_most_slower=1.0, sensitivities=str(mixed.sensitivities))
    ours, theirs = (read_record(one.sensitivities, SensitivityReport) for one in (run, mixed))
    assert ours == theirs
    assert run.compressed.manifest.digests == mixed.compressed.manifest.digests


@pytest.mark.run
def test_the_file_that_the_run_itself_writes_is_refused(mixed: RunFolder) -> None:
    values = recipe.load(mixed.recipe)
    again = values.compress.model_copy(update={"sensitivities": str(mixed.sensitivities)})
    with pytest.raises(RecipeError, match="is the file that this run writes; give a copy of it"):
        services.run(values.model_copy(update={"compress": again}), mixed.path, overwrite=True)
    assert mixed.sensitivities.is_file()


@pytest.mark.run
def test_costs_of_other_weights_are_refused(mixed: RunFolder, tmp_path: Path) -> None:
    report = read_record(mixed.sensitivities, SensitivityReport)
    write_record(report.with_values(weights_sha256="0" * 64), tmp_path / "s.json")
    with pytest.raises(RecipeError, match="was measured on other weights; give a file of this very model"):
        run_within(tmp_path / "run", at_most_slower=1.0, sensitivities=str(tmp_path / "s.json"))


def test_costs_of_another_model_or_of_other_formats_are_refused(tmp_path: Path) -> None:
    def problems(**changes: object) -> list[str]:
        cost = {"mode": "int4_asym", "group_size": 32, "weight_bytes": 1, "cost_nats": 1.0}
        layer = LayerSensitivity(name="wide.weight", formats=(FormatCost(**cost),), chosen=0)
        nats = {"chosen_nats": 1, "uniform_nats": 1, "chosen_weight_bytes": 1, "uniform_weight_bytes": 1}
        report = SensitivityReport(
            model_id="m",
            weights_sha256="",
            left_out=("narrow.weight", "ruled.weight"),
            limit_bytes=1,
            fixed_bytes=0,
            layers=(layer.with_values(**changes),),
            blocks=(),
            frontier=(),
            held_out=HeldOut(**nats, uniform_group_size=64),
            taken="chosen",
            versions={},
        )
        write_record(report, tmp_path / "s.json")
        spec = CompressSpec(rank=8, bits_per_weight=7, sensitivities=str(tmp_path / "s.json"))
        return [str(one) for one in check(LayerPlan(layers=LAYERS), spec) if not isinstance(one, Caution)]

    assert "has no cost of wide in int8_asym with group size 256" in " ".join(problems())
    assert "has no costs of wide; give a file of this model" in " ".join(problems(name="other.weight"))
    folder = CompressSpec(rank=8, bits_per_weight=7, sensitivities=str(tmp_path))
    assert "is no file; give the sensitivities.json of another run" in " ".join(
        map(str, check(LayerPlan(layers=LAYERS), folder))
    )
    with pytest.raises(RecipeError, match="goes with a budget; give one of bits_per_weight"):
        section(CompressSpec, sensitivities="s.json")


@pytest.mark.run
def test_a_run_without_a_budget_leaves_no_sensitivities_of_one_before(mixed: RunFolder, tmp_path: Path) -> None:
    run = run_within(tmp_path / "run", bits_per_weight=6.0, sensitivities=str(mixed.sensitivities))
    assert run.sensitivities.is_file()
    values = recipe.load(run.recipe)
    plain = values.compress.model_copy(update={"bits_per_weight": None, "sensitivities": None, "rounding": "nearest"})
    services.run(values.model_copy(update={"compress": plain}), run.path, resume=True, until="compress")
    assert not run.sensitivities.is_file()
