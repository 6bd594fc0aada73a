"""The stage: optimum-intel traces the model, and the IR gets the model's own configurations and tokenizer."""

import gc
import json
import shutil
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import transformers
from optimum.exporters.openvino import model_configs
from optimum.exporters.openvino.convert import export_from_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ovexport.artifacts import IR
from ovexport.errors import UnsupportedModelError
from ovexport.foreign import exhausted, said
from ovexport.models.architecture import Architecture
from ovexport.models.loading import (
    generation_config_file,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
)
from ovexport.models.norms import find_norms
from ovexport.openvino.names import name_nodes
from ovexport.openvino.norms import name_norms
from ovexport.openvino.tokenizer import check_ends, write_tokenizer
from ovexport.openvino.weight_index import make_index
from ovexport.recipe import ConvertSpec, ModelSpec
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import write_record

TASK = "text-generation-with-past"
_LIFTED_CAPS = {"gemma2": model_configs.Gemma2OpenVINOConfig}
"""Architectures that optimum-intel 2.1 refuses beyond transformers 5.0 and exports rightly from 5.5 all the same: the
logits of its IR are torch's, soft capping and sliding window included (tests/test_architectures.py)."""

_OF_THE_SAVING = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "_commit_hash"}
"""What a configuration holds of the way in which it was saved, and not of the model."""


def trace(model: ModelSpec, convert: ConvertSpec, out: Path) -> IR:
    """Export the model with its weights as they are, with tokenizer, detokenizer and configurations; beside the IR's
    folder lies an index of its weights.

    Raises:
        ArtifactError: the model or a file of it can't be read.
        UnsupportedModelError: the model can't be loaded or exported, its tokenizer can't be converted, or a
            configuration of it would be another one in the IR.
    """
    network = load_model(model)
    tokenizer = load_tokenizer(model, network.config.get_text_config().vocab_size)
    check_ends(model, tokenizer)
    norms = {norm.name: norm.used_values() for norm in find_norms(network) if norm.problem is None}
    matrices = [matrix for matrix in Architecture(network).all_matrices() if matrix.problem is None]
    traced = IR(out)
    traced.index_file.unlink(missing_ok=True)
    with atomic_folder(out) as folder:
        write_tokenizer(tokenizer, folder, model.id)
        _export(network, model.id, folder)
        del network
        gc.collect()  # the exporter leaves cycles that would keep the weights mapped
        set_runtime_options(folder / "openvino_model.xml", convert)
        name_nodes(folder / "openvino_model.xml")
        name_norms(folder / "openvino_model.xml", norms)
        _write_generation_config(model, folder)
        check_kept(model, tokenizer, folder)
    write_record(make_index(traced, matrices), traced.index_file)
    return traced


def set_runtime_options(xml: Path, convert: ConvertSpec) -> None:
    """Pin what the runtime reads from an IR, and drop what the exporter put there on its own account.

    The graph's file alone is edited: to save the model again would read and write all its weights once more.
    """
    tree = ElementTree.parse(xml)
    info = tree.getroot().find("rt_info")
    if info is None:
        info = ElementTree.SubElement(tree.getroot(), "rt_info")
    for former in info.findall("runtime_options"):
        info.remove(former)
    options = ElementTree.SubElement(info, "runtime_options")
    ElementTree.SubElement(options, "KV_CACHE_PRECISION", value=convert.kv_cache_precision)
    tree.write(xml, encoding="utf-8", xml_declaration=True)


def _export(network: PreTrainedModel, name: str, folder: Path) -> None:
    half = network.dtype in (torch.bfloat16, torch.float16)
    try:
        with _without_cap(network.config.model_type), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every branch that it fixes
            export_from_model(network, folder, task=TASK, device="cpu", patch_16bit_model=half, stateful=True)
    except Exception as error:  # the exporter and what it traces raise anything at all
        if _interrupted(error):
            raise KeyboardInterrupt from error
        raise exhausted(error, name) or UnsupportedModelError(
            f"{name}: optimum-intel can't export {network.config.model_type} ({said(error)}); "
            "see its list of supported architectures"
        ) from error


def _interrupted(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt is behind an error, as tracing wraps it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _without_cap(model_type: str) -> Iterator[None]:
    config = _LIFTED_CAPS.get(model_type)
    if config is None:
        yield
        return
    cap = config.MAX_TRANSFORMERS_VERSION
    config.MAX_TRANSFORMERS_VERSION = transformers.__version__
    try:
        yield
    finally:
        config.MAX_TRANSFORMERS_VERSION = cap


def _write_generation_config(model: ModelSpec, folder: Path) -> None:
    """Take over generation_config.json as it is: transformers refuses to write what it finds inconsistent, such as a
    temperature without do_sample, and optimum-intel then leaves the file out, end tokens and all."""
    file, target = generation_config_file(model), folder / "generation_config.json"
    if file is not None:
        shutil.copyfile(file, target)
    else:
        load_generation_config(model).to_json_file(target)


def check_kept(model: ModelSpec, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compare what stands beside the traced graph with the model that it was traced from.

    Raises:
        UnsupportedModelError: something is lost or changed.
    """
    written = ModelSpec(id=str(folder), trust_remote_code=model.trust_remote_code)
    source = load_config(model)
    stated = PreTrainedConfig.get_config_dict(model.id, revision=model.revision)[0]
    changed = _differing(source, type(source).from_pretrained(folder), "config.json", stated)
    changed += _differing(load_generation_config(model), load_generation_config(written), "generation_config.json")
    copy = load_tokenizer(written, source.get_text_config().vocab_size)
    changed += [
        f"the tokenizer's {of}"
        for of in ("vocab_size", "special_tokens_map", "added_tokens_decoder", "chat_template", "padding_side")
        if getattr(copy, of) != getattr(tokenizer, of)
    ]
    if copy.get_vocab() != tokenizer.get_vocab():
        changed.append("the tokenizer's vocabulary")
    if changed:
        raise UnsupportedModelError(
            f"{model.id}: the IR would lose or change {', '.join(changed)}; save model and tokenizer again with "
            "transformers, and give that folder"
        )


def _differing(source: Any, written: Any, file: str, stated: Container[str] | None = None) -> list[str]:
    """The keys of a configuration that have another value than the source's.

    Args:
        stated: the keys that count; all of them when None.
    """
    first, second = (
        json.loads(
            config.to_json_string(use_diff=False),
            object_hook=lambda values: {key: value for key, value in values.items() if key not in _OF_THE_SAVING},
        )
        for config in (source, written)
    )
    keys = sorted(key for key in first.keys() | second.keys() if stated is None or key in stated)
    return [f"{key} of {file}" for key in keys if first.get(key) != second.get(key)]
