"""Loading a causal LM, its configuration and tokenizer. Errors of transformers and the hub are translated here."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ovexport.artifacts import PeftAdapter
from ovexport.errors import ArtifactError, OvexportError, UnsupportedModelError
from ovexport.foreign import exhausted, said, translate
from ovexport.models.adapted import merge
from ovexport.models.architecture import Architecture
from ovexport.models.files import check_configuration, check_weight_files, quantization_config, weight_files
from ovexport.models.packed import PackedFolder, network_state, packed_formats, recognized
from ovexport.models.reordering import reorder_inputs
from ovexport.recipe import ModelSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(spec: ModelSpec, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in evaluation mode on the CPU, with every weight from the checkpoint, and the adapter added if the spec
    names one.

    Weights that the checkpoint holds as 4-bit codes are what the codes stand for, in the model's type. Where its
    act-order has their inputs in another order, the layer reads them in that order, and its weight is stored so.

    Args:
        dtype: of the weights; the spec's when None.

    Raises:
        ArtifactError: it is not there, can't be reached, or is corrupt; or the adapter is, or is another model's.
        UnsupportedModelError: it is no causal LM that transformers knows, or lacks weights; or the adapter is no plain
            LoRA.
    """
    packed = open_packed(spec)
    check_weights(spec)
    with _translated(spec), _quiet():
        wanted: torch.dtype | Literal["auto"] = dtype or ("auto" if spec.dtype == "auto" else DTYPES[spec.dtype])
        model, loading_info = _load(spec, dtype=wanted) if packed is None else _load_packed(spec, packed, wanted)
    _require_whole(spec, loading_info)
    if spec.adapter is not None:
        merge(PeftAdapter.read(Path(spec.adapter)), model, spec.id)
    model.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def open_packed(spec: ModelSpec) -> PackedFolder | None:
    """The model's files, where they hold weights as 4-bit codes of a known format; None where they don't.

    Raises:
        ArtifactError: there are no safetensors files, or codes, scales or zero points are incomplete or damaged.
        UnsupportedModelError: it is a variant that can't be read.
    """
    config = quantization_config(spec)
    registered = recognized(config)
    if config is None or registered is None:
        return None
    if spec.adapter is not None:
        raise UnsupportedModelError(
            f"{spec.id}: its weights are 4-bit codes, which merging {spec.adapter} would change; convert the adapter "
            f"with ovexport convert {spec.adapter} --model {spec.id}, or give the model that the codes were made from"
        )
    matrices = Architecture(skeleton(spec)).all_matrices()
    files = weight_files(spec)
    if not files:
        check_weight_files(spec, ())
    return PackedFolder(spec.id, config, registered, files, matrices)


def check_checkpoint(spec: ModelSpec) -> None:
    """Look whether load_model will find every weight, by the files' headers.

    Raises:
        ArtifactError: as check_weights.
        UnsupportedModelError: as check_weights; or a weight has another name or shape.
    """
    packed = open_packed(spec)
    check_weights(spec)
    loading_info: Mapping[str, Any] = {}
    with suppress(Exception), _quiet():  # what transformers can't load without its values, load_model judges
        if packed is None:
            _, loading_info = _load(spec, device_map="meta")
        else:
            state = {name: torch.empty(shape, device="meta") for name, shape in packed.shapes().items()}
            _, loading_info = _from_state(spec, state, device_map="meta")
    _require_whole(spec, loading_info)


def _load(spec: ModelSpec, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers noted while loading it, `missing_keys` and `mismatched_keys` among it."""
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        spec.id,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused by name
        use_safetensors=True,  # a pickle is never loaded
        **options,
    )
    return model, loading_info


def _load_packed(
    spec: ModelSpec, packed: PackedFolder, dtype: torch.dtype | Literal["auto"]
) -> tuple[Any, Mapping[str, Any]]:
    """As _load, of a checkpoint with 4-bit codes."""
    stored = load_config(spec).dtype if dtype == "auto" else dtype
    stored = stored if isinstance(stored, torch.dtype) else torch.float16
    state, orders = network_state(packed, stored)
    model, loading_info = _from_state(spec, state, dtype=stored)
    reorder_inputs(model, orders)
    return model, loading_info


def _from_state(spec: ModelSpec, state: Mapping[str, torch.Tensor], **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """As _load, from tensors by name."""
    model, loading_info = type(skeleton(spec)).from_pretrained(
        None,
        config=load_config(spec),
        state_dict=dict(state),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    return model, loading_info


def _require_whole(spec: ModelSpec, loading_info: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not all in its files.

    Args:
        loading_info: as _load gives it.

    Raises:
        UnsupportedModelError: one is missing or has another shape.
    """
    cure = "give the folder of the whole model"
    unlike = sorted(loading_info.get("mismatched_keys", ()), key=str)
    if unlike:
        name, held, needed = unlike[0]
        raise UnsupportedModelError(
            f"{spec.id}: {len(unlike)} weights have another shape than config.json says, such as {name}: {list(held)}, "
            f"not {list(needed)}; {cure}"
        )
    missing = sorted(loading_info.get("missing_keys", ()))
    if missing:
        raise UnsupportedModelError(
            f"{spec.id}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}; {cure}"
        )


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """The model without weights (on PyTorch's meta device): shapes and names at no cost.

    Raises:
        ArtifactError, UnsupportedModelError: as load_model.
    """
    config = load_config(spec)
    require_unquantized(spec, config)
    with _translated(spec), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        model.tie_weights()
    return model  # type: ignore[no-any-return]


def load_config(spec: ModelSpec) -> Any:
    """The model's transformers configuration.

    Raises:
        ArtifactError, UnsupportedModelError: as load_model.
    """
    check_reachable(spec)
    with _translated(spec):
        check_configuration(spec)
        config = AutoConfig.from_pretrained(spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        if recognized(quantization_config(spec)):
            del config.quantization_config  # what is loaded has floating-point weights
        vocabulary = config.get_text_config().vocab_size
    if type(vocabulary) is not int or vocabulary < 1:
        raise UnsupportedModelError(f"{spec.id}: config.json has vocab_size={vocabulary!r}; give a causal LM")
    return config


def require_unquantized(spec: ModelSpec, config: Any) -> None:
    """Refuse a checkpoint whose weights are codes already, in a format that is not read.

    Raises:
        UnsupportedModelError: its configuration has a quantization_config.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    values = quantization if isinstance(quantization, dict) else vars(quantization)
    method = values.get("quant_method", "not named")
    readable = ", ".join(registered.thing.title for registered in packed_formats.all())
    raise UnsupportedModelError(
        f"{spec.id}: is quantized already (quantization_config of config.json, quant_method {method}), and not in a "
        f"4-bit format that can be read ({readable}); give the checkpoint that it was made from"
    )


def check_weights(spec: ModelSpec) -> None:
    """Look whether a checkpoint's files are there, whole, and of this model, by their headers; download them if needed.

    Raises:
        ArtifactError: one is missing, cut short or no safetensors file.
        UnsupportedModelError: the model can't be built, is quantized already, or they hold too few numbers for it.
    """
    check_weight_files(spec, [tuple(parameter.shape) for parameter in skeleton(spec).parameters()])


def generation_config_file(spec: ModelSpec) -> Path | None:
    """The model's generation_config.json; None where it has none.

    Raises:
        ArtifactError: it can't be downloaded.
    """
    with _translated(spec):
        path = cached_file(
            spec.id,
            "generation_config.json",
            revision=spec.revision,
            _raise_exceptions_for_missing_entries=False,
        )
    return Path(path) if path else None


def load_generation_config(spec: ModelSpec) -> GenerationConfig:
    """What the model says of generating, of its configuration where it has no generation_config.json.

    Raises:
        ArtifactError: the file can't be read.
    """
    file = generation_config_file(spec)
    with _translated(spec):
        if file is None:
            return GenerationConfig.from_model_config(load_config(spec))
        return GenerationConfig.from_pretrained(file.parent)


def load_tokenizer(spec: ModelSpec, vocabulary: int) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        vocabulary: rows of the model's embedding.

    Raises:
        ArtifactError: there is none.
        UnsupportedModelError: it has tokens that the model has no embedding for.
    """
    with _translated(spec):
        tokenizer = AutoTokenizer.from_pretrained(
            spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise UnsupportedModelError(f"{spec.id}: its tokenizer has no tokens; add tokenizer.json beside the model")
    if highest >= vocabulary:
        raise UnsupportedModelError(
            f"{spec.id}: its tokenizer has token ids up to {highest}, the model embeds {vocabulary}; "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer  # type: ignore[no-any-return]


def load_own_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, checked against the model's configuration.

    Raises:
        ArtifactError, UnsupportedModelError: as load_config and load_tokenizer.
    """
    return load_tokenizer(spec, load_config(spec).get_text_config().vocab_size)


def check_reachable(spec: ModelSpec) -> None:
    """Tell a folder that is no model, and a name that is neither folder nor hub id, from what may be one.

    Raises:
        ArtifactError: no such folder, or one with a device or a pipe in it.
        UnsupportedModelError: a folder without config.json, or one whose adapter names another model.
    """
    path = Path(spec.id)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModelError(f"{path}: no model, it has no config.json; give a transformers checkpoint")
        for entry in path.iterdir():
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise ArtifactError(f"{entry}: a device or a pipe, which may have no end; remove it from the model")
        if (path / "adapter_config.json").exists():
            raise UnsupportedModelError(
                f"{path}: holds an adapter_config.json, which names another model to load; give the folder of that "
                "model, and this one as model.adapter or --adapter"
            )
    elif path.exists():
        raise UnsupportedModelError(f"{path}: a file; give the folder of a transformers checkpoint")
    elif path.is_absolute() or spec.id.count("/") > 1 or spec.id.startswith("."):
        raise ArtifactError(f"model.id={spec.id}: no such folder; give a transformers checkpoint or a hub id")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar while it loads, and prints a table of weights that it sets at random; progress is ours
    to show, and missing weights are refused."""
    drawn, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if drawn:
            transformers_logging.enable_progress_bar()


@contextmanager
def _translated(spec: ModelSpec) -> Iterator[None]:
    name = spec.id if spec.revision is None else f"{spec.id} at {spec.revision}"
    try:
        yield
    except OvexportError:
        raise
    except Exception as error:  # transformers raises anything at all on a model that it does not know
        raise _of_ours(error, name, spec) from error


def _of_ours(error: Exception, name: str, spec: ModelSpec) -> OvexportError:
    first = said(error)
    if isinstance(error, ImportError):
        return UnsupportedModelError(f"{name}: needs a package that is not installed ({first})")
    ours = exhausted(error, name)
    if ours is None and isinstance(error, OSError):
        return _translated_os_error(name, spec, error)
    ours = ours or translate(error, name)
    return ours or UnsupportedModelError(f"{name}: transformers can't load it as a causal LM ({first})")


def _translated_os_error(name: str, spec: ModelSpec, error: OSError) -> ArtifactError:
    if Path(spec.id).is_dir():
        return ArtifactError(f"{name}: can't be read ({said(error)}); copy the model again")
    offline = " (HF_HUB_OFFLINE is set)" if _offline() else ""
    return ArtifactError(
        f"{name}: not a folder here, and could not be downloaded from the Hugging Face hub{offline}; check the name "
        "and the network, or give a folder"
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
