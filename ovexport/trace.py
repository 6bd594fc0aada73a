"""Stage trace: the IR of the uncompressed model, traced once. The product and its twin are this graph, repacked."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import openvino as ov
import torch
import transformers
from openvino_tokenizers import convert_tokenizer
from optimum.exporters.openvino import model_configs
from optimum.exporters.openvino.convert import export_from_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ovexport.artifacts import IR, atomic_folder
from ovexport.errors import UnsupportedModelError
from ovexport.foreign import exhausted, said
from ovexport.model import load_model, load_tokenizer
from ovexport.recipe import ConvertSpec, ModelSpec

TASK = "text-generation-with-past"
_LIFTED_CAPS = {"gemma2": model_configs.Gemma2OpenVINOConfig}
"""Architectures that optimum-intel 2.1 refuses beyond transformers 5.0 and exports rightly from 5.5 all the same: the
logits of its IR are torch's, soft capping and sliding window included (tests/test_architectures.py)."""


def trace(model: ModelSpec, convert: ConvertSpec, out: Path) -> IR:
    """Export the model with its weights as they are, with tokenizer, detokenizer and configurations.

    Raises:
        ArtifactError, UnsupportedModelError: the model can't be loaded or exported.
    """
    network = load_model(model)
    tokenizer = load_tokenizer(model, network.config.get_text_config().vocab_size)
    with atomic_folder(out) as folder:
        _export(network, model.id, folder)
        del network
        gc.collect()  # the exporter leaves cycles that would keep the weights mapped
        set_runtime_options(folder / "openvino_model.xml", convert)
        _write_tokenizer(tokenizer, folder)
    return IR(out)


def set_runtime_options(xml: Path, convert: ConvertSpec) -> None:
    """Pin what the runtime reads from an IR, and drop what the exporter put there on its own account.

    The graph's file alone is edited: a model saved anew would be read and written once more, weights and all.
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


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    try:
        encode, decode = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # openvino_tokenizers raises anything at all on a tokenizer it does not know
        raise exhausted(error) or UnsupportedModelError(
            f"{type(tokenizer).__name__}: openvino_tokenizers can't convert it ({said(error)})"
        ) from error
    ov.save_model(encode, folder / "openvino_tokenizer.xml")
    ov.save_model(decode, folder / "openvino_detokenizer.xml")
