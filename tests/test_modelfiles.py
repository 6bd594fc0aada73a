"""A model's folder is not believed: files that it names lie in it, numbers are possible, tensors as long as said."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovexport.artifacts import PreparedData
from ovexport.compress import compress
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models.head import Head, gives_logits
from ovexport.models.loading import load_config, load_model, load_tokenizer
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.storage.tensorfile import TensorFile

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def spec(model: Path) -> ModelSpec:
    return ModelSpec(id=str(model))


def configured(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sharded(model: Path, name: Any) -> None:
    """The model in one shard, and an index that names another file for one of its tensors."""
    (model / "model.safetensors").replace(model / SHARD)
    tensors = load_file(model / SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD) | {next(iter(tensors)): name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_model_in_shards_is_loaded(model: Path) -> None:
    sharded(model, SHARD)
    assert load_model(spec(model)).num_parameters() > 0


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/hosts", "sub/other.safetensors", "weights.bin", "..", "a\\b.safetensors", 5, None,
     "\x00.safetensors", "\x1b[2J.safetensors", "x" * 100_000],
    ids=lambda name: repr(name)[:30],
)  # fmt: skip
def test_an_index_names_plain_safetensors_files_of_the_folder_and_nothing_else(model: Path, name: Any) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "other.safetensors")
    sharded(model, name)
    with pytest.raises(ArtifactError, match=r"names .* lie in the folder itself and nothing else"):
        load_model(spec(model))


def test_a_missing_shard_is_named(model: Path) -> None:
    sharded(model, "none.safetensors")
    with pytest.raises(ArtifactError, match="lacks 1 of its 2 files of weights, such as none"):
        load_model(spec(model))


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 5000, "{", "\x00"])
def test_an_index_that_is_none_is_one_line(model: Path, text: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"model\.safetensors\.index\.json"):
        load_model(spec(model))


def test_no_other_file_is_named_by_a_configuration(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "other.safetensors")
    configured(model, transformers_weights="../other.safetensors")
    with pytest.raises(UnsupportedModelError, match="names its weights itself"):
        load_model(spec(model))


def test_no_other_tokenizer_is_named_by_a_configuration(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}))
    with pytest.raises(ArtifactError, match="names files outside the folder"):
        load_config(spec(model))


def test_an_adapter_beside_the_model_loads_no_other_model(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(UnsupportedModelError, match="names another model to load"):
        load_model(spec(model))


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": -1},
        {"vocab_size": 0},
        {"vocab_size": "many"},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": True},
        {"hidden_size": 64.5},
        {"hidden_size": 10**40},
        {"num_attention_heads": 0},
        {"head_dim": [4, -4]},
        {"rope_theta": 10**30},
        {"rms_norm_eps": float("inf")},
        {"time_step_limit": [0.0, float("nan")]},
        {"rope_parameters": {"factor": float("nan")}},
    ],
    ids=str,
)
def test_a_number_that_no_model_has_is_named(model: Path, values: dict[str, Any]) -> None:
    configured(model, **values)
    with pytest.raises(UnsupportedModelError, match=rf"config\.json has .*{next(iter(values))}"):
        load_config(spec(model))


def test_the_infinite_bound_of_a_time_step_is_a_number_that_models_have(model: Path) -> None:
    configured(model, time_step_limit=[0.0, float("inf")])
    assert load_config(spec(model)).time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"a": ' + "9" * 6000 + "}", '{"a": ' * 200 + "1" + "}" * 200]
)
def test_a_configuration_that_can_not_be_read_is_one_line(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_config(spec(model))


def test_a_configuration_that_asks_for_more_than_the_files_hold_allocates_nothing(model: Path) -> None:
    configured(model, vocab_size=2**31, hidden_size=2**20, intermediate_size=2**24)
    with pytest.raises(UnsupportedModelError, match="weights, and its files hold"):
        load_model(spec(model))


def header_of(change: Callable[[dict[str, Any]], None], path: Path) -> None:
    """The file with another header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "entry",
    [{"shape": [2**62, 2**62]}, {"shape": [2**40]}, {"shape": [-64]}, {"shape": [0, 2**62, 2**62]}, {"dtype": "F4"},
     {"shape": [1] * 100}, {"data_offsets": [0, 2**63]}, {"data_offsets": [-2, 126]}, {"data_offsets": [10, 2]}],
    ids=str,
)  # fmt: skip
def test_a_tensor_that_is_not_as_long_as_it_says_is_refused(model: Path, entry: dict[str, Any]) -> None:
    header_of(lambda header: header[NORM].update(entry), model / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: corrupt weights"):
        load_model(spec(model))
    with pytest.raises(ArtifactError, match="safetensors"):
        TensorFile(model / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("model.layers.0.mlp.up_proj.weight", 1e38, "which float16 scales can't reach"),
        ("model.layers.0.mlp.up_proj.weight", 1e7, "which float16 scales can't reach"),
        ("model.layers.0.mlp.up_proj.weight", float("inf"), "not finite"),
        ("model.norm.weight", float("nan"), "model.norm.weight: holds weights that are not finite"),
    ],
)
def test_weights_that_overflow_are_named(model: Path, tmp_path: Path, name: str, value: float, text: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    compression = CompressSpec(group_size=32, rank=8, rounding="nearest")
    with pytest.raises(UnsupportedModelError, match=text):
        compress(spec(model), compression, PreparedData(tmp_path / "none"), 0, tmp_path / "out")


def test_logits_that_overflow_are_one_line_before_tuning(model: Path) -> None:
    network = load_model(spec(model), dtype=torch.float32)
    network.get_parameter(NORM).data.fill_(3e38)
    with pytest.raises(UnsupportedModelError, match="logits are not finite"):
        gives_logits(Head.of(network), network, torch.arange(8)[None])


@pytest.mark.parametrize("text", ["", "{", "[" * 50_000, "[]", '{"version": 1}', "\x00"], ids=lambda text: text[:8])
def test_a_damaged_tokenizer_is_one_line(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match="transformers can't load it"):
        load_tokenizer(spec(model), 2048)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pipe_in_the_folder_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ArtifactError, match="a device or a pipe"):
        load_model(spec(model))
