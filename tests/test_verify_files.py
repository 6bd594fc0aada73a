"""What somebody who controls the product's folder can not do without being found."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_verify import flip_bit
from test_verify_graph import failures, proof

from ovexport.artifacts import IR, RunFolder
from ovexport.errors import ArtifactError
from ovexport.openvino.graph import constants
from ovexport.storage.digests import file_digest
from ovexport.storage.files import leaves_folder
from ovexport.verify import verify

SHAPE = "model.layers.0.mlp.down_proj.weight/shape"


def rewritten(ir: IR, **changes: Any) -> None:
    """Let ovexport.json say something else, and match the files as they are now."""
    path = ir.path / "ovexport.json"
    record = json.loads(path.read_text())
    record["files"] = {name: file_digest(ir.path / name) for name in record["files"] if (ir.path / name).is_file()}
    path.write_text(json.dumps(record | changes))


def test_a_manifest_that_names_another_model_is_found(run_copy: RunFolder) -> None:
    rewritten(run_copy.ir("int4"), model_id="somebody/else", revision="main")
    says = "ovexport.json: ovexport.json says that the IR was made from somebody/else at main"
    assert f"made from the checkpoint's model: {says}" in failures(proof(run_copy, twin=None))
    assert f"made from the twin's model: {says}" in failures(
        verify(run_copy.ir("int4"), twin=run_copy.ir("plain"), runtime=False)
    )


def test_a_manifest_with_paths_that_leave_the_folder_is_found_and_they_are_not_opened(
    run_copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ir, opened = run_copy.ir("int4"), []
    outside = run_copy.path / "secret.txt"
    outside.write_text("secret")
    record = json.loads((ir.path / "ovexport.json").read_text())
    names = ("../secret.txt", str(outside), "a/../../secret.txt", "C:\\secret.txt")
    record["files"] |= dict.fromkeys(names, file_digest(outside))
    record["checkpoint_files"]["../secret.txt"] = file_digest(outside)
    (ir.path / "ovexport.json").write_text(json.dumps(record))
    original = Path.open

    def noted(self: Path, *given: Any, **more: Any) -> Any:
        opened.append(self)
        return original(self, *given, **more)

    monkeypatch.setattr(Path, "open", noted)
    text = failures(proof(run_copy))
    assert f"ovexport.json names files of its folder: files: {', '.join(names)}, ../secret.txt" in text
    assert "made from this checkpoint: files: ../secret.txt" in text
    assert outside.resolve() not in {path.resolve() for path in opened}


@pytest.mark.parametrize("name", ["config.json", "sub/file", "..name", "a..b/c"])
def test_plain_paths_stay_in_the_folder(name: str) -> None:
    assert not leaves_folder(name)


def linked_file(folder: Path, elsewhere: Path) -> None:
    shutil.move(folder / "openvino_model.bin", elsewhere / "weights.bin")
    (folder / "openvino_model.bin").symlink_to(elsewhere / "weights.bin")


def linked_folder(folder: Path, elsewhere: Path) -> None:
    (folder / "more").symlink_to(elsewhere, target_is_directory=True)


def linked_nowhere(folder: Path, elsewhere: Path) -> None:
    (folder / "chat.json").symlink_to(elsewhere / "none")


@pytest.mark.parametrize(
    ("link", "name"), [(linked_file, "openvino_model.bin"), (linked_folder, "more"), (linked_nowhere, "chat.json")]
)
def test_symbolic_links_are_found_and_named(
    run_copy: RunFolder, tmp_path: Path, link: Callable[[Path, Path], None], name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link(run_copy.ir("int4").path, elsewhere)
    text = failures(proof(run_copy))
    assert f"no symbolic links among the files: files: {name} → {elsewhere}" in text


def test_the_links_of_a_hub_cache_are_none(run_copy: RunFolder, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "0a1b", tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(run_copy.ir("int4").path, snapshot)
    for index, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / str(index))
        file.symlink_to(Path("..") / ".." / "blobs" / str(index))
    assert verify(IR(snapshot), runtime=False).passed
    shutil.move(blobs / "3", tmp_path / "3")
    (blobs / "3").symlink_to(tmp_path / "3")
    assert "no symbolic links among the files" in failures(verify(IR(snapshot), runtime=False))


def another_name(text: str) -> str:
    return text.replace("__module.lm_head", "__module.lm_tail", 1)


def another_remark(text: str) -> str:
    return text.replace('<optimum_intel_version value="2', '<optimum_intel_version value="3', 1)


@pytest.mark.parametrize("change", [another_name, another_remark])
def test_what_no_fingerprint_covers_in_the_graphs_file_is_compared_with_the_twin(
    run_copy: RunFolder, change: Callable[[str], str]
) -> None:
    ir = run_copy.ir("int4")
    former = ir.xml.read_text()
    ir.xml.write_text(change(former))
    assert ir.xml.read_text() != former
    rewritten(ir)
    text = failures(proof(run_copy))
    assert text.startswith("graph's file as the twin's: openvino_model.xml: line ")
    assert len(text.splitlines()) == 1


def test_a_manifest_rewritten_to_match_hides_no_changed_companion(run_copy: RunFolder) -> None:
    ir = run_copy.ir("int4")
    path = ir.path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 9.0, "do_sample": True}))
    rewritten(ir)
    assert "tokenizer and configurations as the twin's: files: generation_config.json" in failures(proof(run_copy))


@pytest.mark.parametrize("part", ["<edge from-layer=", "<layer id=", "constant"])
def test_a_graph_that_cant_be_read_is_blamed_on_the_operation_without_a_manifest(
    run_copy: RunFolder, part: str
) -> None:
    ir = run_copy.ir("int4")
    (ir.path / "ovexport.json").unlink()
    if part == "constant":
        flip_bit(ir, lambda graph: next(node for node in constants(graph) if node.get_friendly_name() == SHAPE))
        says = re.escape(SHAPE)
    else:
        text = ir.xml.read_bytes()
        at = text.index(part.encode(), len(text) // 2 if part.startswith("<layer") else 0)
        ir.xml.write_bytes(text[:at] + b"\x89" + text[at + 1 :])
        says = (
            "openvino_model.xml, line .*, in <layer id=.* name="
            if part.startswith("<layer")
            else "openvino_model.xml, line .*, the edge between "
        )
    with pytest.raises(ArtifactError, match=rf"not a readable OpenVINO IR.*not as in the twin: {says}"):
        proof(run_copy)
