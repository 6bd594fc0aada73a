"""The index that trace leaves of its weights: strip and convert trust it, the proof does not."""

from pathlib import Path

import pytest

from ovexport.artifacts import IR, RunFolder, WeightIndex
from ovexport.convert import convert
from ovexport.errors import ArtifactError
from ovexport.openvino import matrices
from ovexport.openvino.graph import read_graph
from ovexport.openvino.matrices import layer_matrices
from ovexport.openvino.weight_index import indexed_matrices
from ovexport.storage.records import write_record
from ovexport.strip import strip
from ovexport.verify import verify

SWAPPED = [f"model.layers.{index}.mlp.down_proj.weight" for index in (0, 1)]


def forge(run: RunFolder) -> None:
    """Let the index say of two layers of one shape that each is the other."""
    base, digests = run.ir("bf16"), run.checkpoint.manifest.weight_digests
    first, second = (digests[name] for name in SWAPPED)
    other = {first: second, second: first}
    entries = base.weight_index.constants
    forged = [entry.model_copy(update={"digest": other.get(entry.digest, entry.digest)}) for entry in entries]
    assert sum(ours != theirs for ours, theirs in zip(entries, forged, strict=True)) >= 2
    write_record(WeightIndex(constants=tuple(forged)), base.index_file)


def failed(run: RunFolder, product: IR) -> list[str]:
    report = verify(product, checkpoint=run.checkpoint, base=run.ir("bf16"), runtime=False)
    return [check.name for check in report.checks if not check.passed]


def test_the_index_names_the_constants_that_hashing_finds(finished_run: RunFolder) -> None:
    base, manifest = finished_run.ir("bf16"), finished_run.checkpoint.manifest
    graph = read_graph(base)
    indexed, hashed = indexed_matrices(base, graph, manifest), layer_matrices(graph, manifest)

    def places(found: dict[str, matrices.Matrix]) -> dict[str, tuple[str, bool]]:
        return {name: (matrix.node.get_friendly_name(), matrix.transposed) for name, matrix in found.items()}

    assert places(indexed) == places(hashed)
    assert set(indexed) == {layer.name for layer in manifest.layers}


def test_strip_and_convert_hash_no_weight_of_the_base_model(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(matrices, "bytes_digest", refuse)
    base = finished_run.ir("bf16")
    product = convert(base, strip(finished_run.checkpoint, base, tmp_path / "packed"), tmp_path / "int4")
    assert product.bin.read_bytes() == finished_run.ir("int4").bin.read_bytes()


def test_a_forged_index_misleads_convert_and_the_proof_finds_it(run_copy: RunFolder, tmp_path: Path) -> None:
    assert not failed(run_copy, run_copy.ir("int4"))
    forge(run_copy)
    misled = convert(run_copy.ir("bf16"), run_copy.packed("int4"), tmp_path / "int4")
    assert failed(run_copy, misled)
    assert not failed(run_copy, run_copy.ir("int4"))  # whose making it had no part in


def test_a_forged_index_misleads_strip_whose_codes_are_then_not_those_of_tuning(
    run_copy: RunFolder, tmp_path: Path
) -> None:
    forge(run_copy)
    with pytest.raises(ArtifactError, match=r"down_proj.*not those that tuning ended with"):
        strip(run_copy.checkpoint, run_copy.ir("bf16"), tmp_path / "packed")


def test_the_proof_needs_no_index(run_copy: RunFolder) -> None:
    run_copy.ir("bf16").index_file.unlink()
    assert not failed(run_copy, run_copy.ir("int4"))


def test_a_missing_index_is_named(run_copy: RunFolder, tmp_path: Path) -> None:
    run_copy.ir("bf16").index_file.unlink()
    with pytest.raises(ArtifactError, match=r"bf16\.weights\.json: missing"):
        strip(run_copy.checkpoint, run_copy.ir("bf16"), tmp_path / "packed")


@pytest.mark.parametrize("change", [{"constant": "of_another"}, {"in_features": 8}])
def test_an_index_of_another_ir_is_refused(run_copy: RunFolder, tmp_path: Path, change: dict) -> None:
    base = run_copy.ir("bf16")
    first, *others = base.weight_index.constants
    write_record(WeightIndex(constants=(first.model_copy(update=change), *others)), base.index_file)
    with pytest.raises(ArtifactError, match="trace the model again"):
        convert(base, run_copy.packed("int4"), tmp_path / "int4")
