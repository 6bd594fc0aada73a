"""Elastic adapters: ranks drawn in tuning, searched after it, kept in the checkpoint and absorbed in the IR."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ovexport, refused
from conftest import REPOSITORY, tiny_values

from ovexport import recipe
from ovexport.artifacts import Checkpoint, RunFolder
from ovexport.convert import convert
from ovexport.errors import RecipeError
from ovexport.models.device import Compute
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import Recipe, SearchSpec, TuneSpec
from ovexport.reports import SearchReport
from ovexport.search import search
from ovexport.storage.records import read_record
from ovexport.strip import strip
from ovexport.tune import tune
from ovexport.tune.trainer import Trainer, make_trainer
from ovexport.verify import verify
from ovexport.weights.adapters import load_quantizer

pytestmark = pytest.mark.run

SPACE = [8, 6, 2]


@pytest.fixture(scope="module")
def nls_recipe(tiny_model, tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("task")
    words = ("a cat", "the dog", "one bird", "two frogs")
    for split, count in (("train", 24), ("validation", 12), ("test", 6)):
        rows = [
            {"query": f"In the {split} story {n} there was", "choices": list(words), "gold": n % 4}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_values(tiny_model)
    values["data"] = {"sequence_length": 32, "validation_sequences": 1, "test_sequences": 2}
    values["task"] = {"name": "mine", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    values["compress"] |= {"format": "fq_lora_nls", "rank_space": SPACE}
    del values["compress"]["rank"]
    values["tune"] |= {"objective": "task", "steps": 8, "learning_rate": 2e-2}
    values["search"] = {"evaluations": 8, "sample": 5, "finalists": 2}
    values["evaluate"] |= {"prompt_count": 1, "max_new_tokens": 2}
    return recipe.parse(values, base=folder, origin="nls")


@pytest.fixture(scope="module")
def nls_run(nls_recipe: Recipe, tmp_path_factory) -> RunFolder:
    """A run up to the report; nobody may write to it."""
    return services.run(nls_recipe, tmp_path_factory.mktemp("runs") / "nls")


def searched(
    run: RunFolder, chosen: Recipe, out: Path, spec: SearchSpec, **options
) -> tuple[Checkpoint, SearchReport | None]:
    checkpoint, log = Checkpoint(out / "checkpoint"), out / "logs" / "search.jsonl"
    places = {"log": log, "identity": "a"}
    report = search(run.tuned, chosen.model, spec, chosen.tune, run.data, checkpoint.path, **places, **options)
    return checkpoint, report


def made_trainer(run: RunFolder, chosen: Recipe, spec: TuneSpec) -> Trainer:
    compute = Compute.of("cpu", spec.precision)
    return make_trainer(run.compressed, chosen.model, spec, run.data, compute, silent)


def ranks_of(checkpoint: Checkpoint) -> list[int]:
    manifest = checkpoint.manifest
    used = {layer.name: layer.used_rank for layer in manifest.layers}
    return [used[names[0]] for names in manifest.elastic_ranks.layers]


def test_the_chosen_ranks_are_absorbed_and_proven(nls_run) -> None:
    report = read_record(nls_run.search, SearchReport)
    assert ranks_of(nls_run.checkpoint) == list(report.chosen)
    proof = verify(nls_run.ir("int4"), checkpoint=nls_run.checkpoint, base=nls_run.ir("bf16"), twin=nls_run.ir("plain"))
    assert proof.passed
    assert proof.summary.code_mismatches == 0
    page = (nls_run.path / "report.html").read_text()
    assert "configurations of ranks were scored on 5 of" in page
    assert "Search of ranks" in page


def test_a_reload_that_forgets_the_ranks_is_found(nls_run, nls_recipe, tmp_path) -> None:
    """The largest ranks, which NNCF's reload falls back to, give other codes and fail the proof."""
    run = RunFolder(shutil.copytree(nls_run.path, tmp_path / "run"))
    chosen, _ = searched(run, nls_recipe, tmp_path / "smallest", SearchSpec(ranks=(min(SPACE),)))
    assert set(ranks_of(chosen)) == {min(SPACE)}
    assert chosen.adapters["model.layers.0.mlp.up_proj.weight.lora_A"].shape[0] == max(SPACE)
    shutil.rmtree(run.checkpoint.path)
    shutil.copytree(chosen.path, run.checkpoint.path)
    forgotten = run.checkpoint.path / "checkpoint.json"
    forgotten.write_text(forgotten.read_text().replace(f'"active_rank": {min(SPACE)}', '"active_rank": null'))
    report = verify(nls_run.ir("int4"), checkpoint=run.checkpoint, base=run.ir("bf16"), twin=run.ir("plain"))
    assert not report.passed
    manifest = run.checkpoint.manifest
    layer = next(layer for layer in manifest.layers if layer.rank)
    weights = torch.zeros(layer.out_features, layer.in_features)
    whole = load_quantizer(layer, run.checkpoint.adapters).quantize(weights).digest()
    small = load_quantizer(layer.model_copy(update={"active_rank": min(SPACE)}), run.checkpoint.adapters)
    assert whole != small.quantize(weights).digest()


def test_the_search_scores_heuristics_first_and_finalists_on_everything(nls_run, nls_recipe) -> None:
    report = read_record(nls_run.search, SearchReport)
    sources = [row.source for row in report.scores]
    assert {"median", "largest", "smallest", "least loss"} <= set(sources)
    assert len({row.ranks for row in report.scores}) == len(sources)
    possible = len(SPACE) ** len(report.units)
    assert len(sources) >= min(8, possible)
    assert (report.sample_examples, report.validation_examples) == (5, 12)
    whole = {row.ranks: row.validation_nll_nats for row in report.scores if row.validation_nll_nats is not None}
    assert 2 <= len(whole) <= 3
    assert min(whole, key=whole.get) == report.chosen
    assert sorted(row.sample_nll_nats for row in report.scores) == [row.sample_nll_nats for row in report.scores]


def test_a_search_repeats_with_its_seed_and_goes_on_from_its_log(nls_run, nls_recipe, tmp_path) -> None:
    spec = nls_recipe.search

    def kill(moment) -> None:
        if moment.task == "search" and moment.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(nls_run, nls_recipe, tmp_path, spec, listener=kill)
    log = tmp_path / "logs" / "search.jsonl"
    assert len(log.read_text().splitlines()) == 5
    with log.open("a") as file:
        file.write('{"identity": "')
    checkpoint, found = searched(nls_run, nls_recipe, tmp_path, spec)
    expected = read_record(nls_run.search, SearchReport)
    assert found.chosen == expected.chosen
    assert [row.ranks for row in found.scores] == [row.ranks for row in expected.scores]
    assert checkpoint.manifest.digests == nls_run.checkpoint.manifest.digests
    scored = [json.loads(line)["ranks"] for line in log.read_text().splitlines() if line.endswith("}")]
    assert len(scored) == len(found.scores) + sum(row.validation_nll_nats is not None for row in found.scores)


def test_another_search_does_not_tune_again(nls_run, nls_recipe, tmp_path) -> None:
    run = RunFolder(shutil.copytree(nls_run.path, tmp_path / "run"))
    before = run.checkpoint.adapters["model.layers.0.mlp.up_proj.weight.lora_A"].copy()
    other = nls_recipe.model_copy(update={"search": SearchSpec(ranks=(2,))})
    tasks: list[str] = []
    services.run(other, run.path, resume=True, until="verify", listener=lambda moment: tasks.append(moment.task))
    assert "tune" not in tasks
    assert set(ranks_of(run.checkpoint)) == {2}
    assert np.array_equal(run.checkpoint.adapters["model.layers.0.mlp.up_proj.weight.lora_A"], before)
    assert not run.search.exists()


def test_ranks_for_single_units_do_not_go_with_a_budget_that_may_take_their_adapters(tiny_model) -> None:
    values = tiny_values(tiny_model)
    values["compress"] |= {"format": "fq_lora_nls", "rank_space": [8, 4], "bits_per_weight": 6.0}
    values["tune"]["objective"] = "task"
    values["task"] = {"name": "openbookqa"}
    values["search"] = {"ranks": [8]}
    recipe.parse(values, base=REPOSITORY, origin="r")
    values["search"] = {"ranks": [8, 4]}
    with pytest.raises(RecipeError, match=r"search.ranks=\[8, 4\]: compress.bits_per_weight may leave a block"):
        recipe.parse(values, base=REPOSITORY, origin="r")


def test_without_a_choice_of_ranks_the_checkpoint_is_the_tuned_one_by_another_name(finished_run: RunFolder) -> None:
    tuned, checkpoint = finished_run.tuned.path, finished_run.checkpoint.path
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted(path.name for path in tuned.iterdir())
    assert all((tuned / name).samefile(checkpoint / name) for name in names)
    assert finished_run.tuned.drawn_ranks is None


def test_an_edit_of_the_search_searches_again_and_leaves_the_tuned_checkpoint(nls_run, nls_recipe, tmp_path) -> None:
    run = RunFolder(shutil.copytree(nls_run.path, tmp_path / "run"))
    before = run.stage_record("tune").read_bytes()
    fewer = nls_recipe.model_copy(update={"search": nls_recipe.search.model_copy(update={"method": "heuristics"})})
    services.run(fewer, run.path, resume=True, until="search")
    assert run.stage_record("tune").read_bytes() == before
    assert {row.source for row in read_record(run.search, SearchReport).scores}.isdisjoint({"evolution"})
    assert set(ranks_of(run.tuned)) == {run.tuned.manifest.elastic_ranks.median[0]}


def test_each_step_draws_its_ranks_and_an_interrupted_tuning_draws_the_same(nls_run, nls_recipe) -> None:
    spec = nls_recipe.tune

    first, second = (made_trainer(nls_run, nls_recipe, spec) for _ in range(2))
    drawn = {first.sampler.ranks(step) for step in range(20)}
    assert len(drawn) > 5
    assert {rank for configuration in drawn for rank in configuration} == set(SPACE)
    for step in range(4):
        first.step(step)
        ranks = first.space.by_layer(first.sampler.ranks(step + 1))
        assert {name: q.active_rank for name, q in first.student.quantizers.items() if q.layer.rank} == ranks
    second.restore(first.state(), 4, first.optimizer.updates)
    assert second.step(4).loss_nats == first.step(4).loss_nats


def test_ranks_that_are_not_in_use_get_no_gradient(nls_run) -> None:
    layer = next(layer for layer in nls_run.compressed.manifest.layers if layer.rank)
    quantizer = load_quantizer(layer, nls_run.checkpoint.adapters)
    quantizer.active_rank = 2
    weight = torch.randn(layer.out_features, layer.in_features) / 10
    found = quantizer.gradients(weight, torch.randn_like(weight))
    assert found["lora_A"][:2].abs().sum() > 0
    assert found["lora_A"][2:].abs().sum() == found["lora_B"][:, 2:].abs().sum() == 0


def test_a_space_of_one_is_plain_lora(nls_recipe, tmp_path) -> None:
    one = nls_recipe.model_copy(
        update={"compress": nls_recipe.compress.model_copy(update={"rank_space": (6,)})},
    )
    plain = nls_recipe.model_copy(
        update={"compress": nls_recipe.compress.model_copy(update={"format": "fq_lora", "rank_space": None, "rank": 6})}
    )
    runs = [services.run(each, tmp_path / str(n), until="search") for n, each in enumerate((one, plain))]
    assert runs[0].checkpoint.manifest.digests == runs[1].checkpoint.manifest.digests
    assert not any(run.search.exists() for run in runs)


def test_every_linear_can_have_a_rank_of_its_own(nls_run) -> None:
    manifest = nls_run.compressed.manifest
    blocks = manifest.elastic_ranks
    assert blocks.units == ("model.layers.0", "model.layers.1")
    linear = manifest.model_copy(update={"rank_by": "linear"}).elastic_ranks
    assert len(linear.units) == 14
    assert "model.layers.1.mlp.down_proj" in linear.units


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([8, 6, 2], "3 ranks, and there are 2 units, from model.layers.0 to model.layers.1"),
        ([9], "9 is out of range, the adapters have ranks 1 to 8"),
        ([0], "0 is out of range"),
    ],
)
def test_ranks_that_do_not_suit_the_adapters_are_refused(nls_run, ranks, message) -> None:
    with pytest.raises(RecipeError, match=message):
        nls_run.checkpoint.manifest.elastic_ranks.chosen(ranks, "--ranks")


def test_an_empty_rank_space_and_a_rank_above_the_layers_size_are_refused(nls_recipe, tmp_path) -> None:
    values = nls_recipe.model_dump(exclude_none=True)
    values["compress"]["rank_space"] = []
    with pytest.raises(RecipeError, match=r"rank_space=\[\] holds no rank"):
        recipe.parse(values, base=tmp_path, origin="nls")
    values["compress"]["rank_space"] = [65, 8]
    with pytest.raises(RecipeError, match=r"compress.rank_space: 65 is above the smaller side, 64, of model.layers.0"):
        services.run(recipe.parse(values, base=tmp_path, origin="nls"), tmp_path / "out")
    values["compress"] = {"group_size": 32}
    values["search"] = {"ranks": [8]}
    with pytest.raises(RecipeError, match=r"search\.ranks goes with compress.format"):
        recipe.parse(values, base=tmp_path, origin="nls")


def test_a_configuration_is_asked_by_hand_without_tuning(nls_run) -> None:
    done = ovexport("search", nls_run.path, "--ranks", "2 8", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["validation"]["given"]["ranks"] == [2, 8]
    assert document["validation"]["given"]["figures"]["items"] == 12
    assert document["validation"]["chosen"]["ranks"] == document["search"]["chosen"]
    shown = ovexport("search", nls_run.path)
    assert "(chosen)" in shown.stdout
    assert "2 x" in refused(ovexport("search", nls_run.path, "--ranks", "2 x"), 2)
    assert "3 ranks, and there are 2 units" in refused(ovexport("search", nls_run.path, "--ranks", "2 4 6"), 2)


def test_loss_on_everything_learns_the_question_too(nls_run, nls_recipe) -> None:
    def made(**changes) -> Trainer:
        return made_trainer(nls_run, nls_recipe, TuneSpec(**{**nls_recipe.tune.model_dump(), **changes}))

    answer, everything = made(loss_on="answer").objective, made(loss_on="everything").objective
    examples = nls_run.data.examples("train")
    every = range(len(examples))
    assert answer.weight(every) == sum(len(example.tokens) - example.answer for example in examples)
    assert everything.weight(every) == sum(len(example.tokens) - 1 for example in examples)


def test_tuned_norms_are_searched_with_and_shipped(nls_run: RunFolder, nls_recipe: Recipe, tmp_path: Path) -> None:
    spec = nls_recipe.tune.model_copy(update={"norms": True, "norm_learning_rate": 1e-2})
    folder = {"logs": tmp_path / "logs", "identity": "a"}
    tuned = tune(nls_run.compressed, nls_recipe.model, spec, nls_run.data, tmp_path / "tuned", **folder)
    names = [norm.name for norm in tuned.manifest.norms]
    assert len(names) == 5
    chosen = tmp_path / "checkpoint"
    settings = SearchSpec(ranks=(2,))
    search(tuned, nls_recipe.model, settings, spec, nls_run.data, chosen, log=tmp_path / "log", identity="a")
    checkpoint, base = Checkpoint(chosen), nls_run.ir("bf16")
    assert all(np.array_equal(checkpoint.adapters[name], tuned.adapters[name]) for name in names)
    product = convert(base, strip(checkpoint, base, tmp_path / "packed"), tmp_path / "int4")
    report = verify(product, checkpoint=checkpoint, base=base, twin=nls_run.ir("plain"))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert sum(check.name == "norm as the checkpoint has it" for check in report.checks) == 5
