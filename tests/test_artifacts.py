import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ovexport.artifacts import FORMAT_VERSION, Checkpoint, StageRecord
from ovexport.errors import ArtifactError
from ovexport.storage.files import atomic_folder, write_text
from ovexport.storage.records import read_record, write_record
from ovexport.storage.tensorfile import TensorFile, TensorWriter, write_tensors


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(target) as folder:
        (folder / "a").write_text("second")
        raise RuntimeError("half way")
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_full_disk_is_one_clear_line_whatever_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ArtifactError, match="no space left"), atomic_folder(tmp_path / "artifact"):
        raise RuntimeError("a library's own words for ENOSPC")
    assert not (tmp_path / "artifact").exists()


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.zeros((0,), np.uint8)}
    write_tensors(tensors, tmp_path / "t.safetensors")
    read = TensorFile(tmp_path / "t.safetensors")
    assert {name: read[name].tolist() for name in read} == {name: value.tolist() for name, value in tensors.items()}
    with pytest.raises(ArtifactError, match="holds no tensor c"):
        read.require("c")


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    values = torch.randn(5, 7).bfloat16()
    save_file({"w": values}, tmp_path / "w.safetensors")
    assert np.array_equal(TensorFile(tmp_path / "w.safetensors")["w"], values.float().numpy())


def test_bfloat16_is_written_as_its_bits(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    values = torch.randn(3, 4).bfloat16()
    with TensorWriter(tmp_path / "a.safetensors", {"value": ("BF16", (3, 4))}) as writer:
        writer.write("value", values.view(torch.int16).numpy().view(np.uint16))
    assert torch.equal(load_file(tmp_path / "a.safetensors")["value"], values)
    assert np.array_equal(TensorFile(tmp_path / "a.safetensors")["value"], values.float().numpy())


@pytest.mark.parametrize("kept", [0, 4, 20, 60])
def test_a_truncated_tensor_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors({"a": np.arange(100, dtype=np.float32)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"t\.safetensors"):
        TensorFile(path)


def test_a_record_with_a_stranger_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = StageRecord(stage="tune", format_version=FORMAT_VERSION, digest="d", files={}, seconds=1.0, versions={})
    write_record(record, path)
    assert read_record(path, StageRecord) == record
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    with pytest.raises(ArtifactError, match="not a StageRecord"):
        read_record(path, StageRecord)


def test_a_checkpoint_of_another_version_is_one_clear_line(tmp_path: Path) -> None:
    former = {"format_version": 1, "model_id": "m", "revision": None, "layers": [], "validation_kl_nats": 0.1}
    (tmp_path / "checkpoint.json").write_text(json.dumps(former))
    with pytest.raises(ArtifactError, match=r"another version of ovexport wrote it, in format 1\); make it again"):
        _ = Checkpoint(tmp_path).manifest


@pytest.mark.parametrize("header", ["[]", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "data_offsets": []}}'])
def test_a_header_of_another_shape_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        TensorFile(path)


def test_a_place_that_can_not_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="can't be written"), atomic_folder(tmp_path / "file" / "artifact"):
        pass
    with pytest.raises(ArtifactError, match="can't be written"):
        write_text("", tmp_path / "file" / "record.json")
