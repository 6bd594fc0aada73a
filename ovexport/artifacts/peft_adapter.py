"""A LoRA adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors, read and written without PEFT.

Nothing of a folder is executed, and what is not read is refused by name: an adapter of which a part is left out answers
without an error, and wrongly.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.storage.bounded import LARGEST_CONFIG_BYTES, parse_json
from ovexport.storage.files import write_text
from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.storage.textfile import read_text
from ovexport.wording import shortened

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Where it lies beside an IR, for openvino-genai to add while the model runs."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of each module."""

_PICKLE = "adapter_model.bin"
_FACTOR = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_WITHOUT_EFFECT = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules"),
        *("exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("megatron_core", "ensure_weight_tying"),
    }
)
"""Keys of adapter_config.json that say which layers are adapted, which the tensors say themselves, or how the adapter
was trained. Every other key that is set is refused."""

_KEEPS_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights as they are."""

_MOST_REPEATS, _LONGEST_PATTERN = 3, 200
_REPEAT = re.compile(r"(?<!\\)[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")

Rank = Annotated[int, Field(ge=1, le=1 << 20)]
Scale = Annotated[float, Field(allow_inf_nan=False)]


class PeftConfig(BaseModel):
    """adapter_config.json, as far as it says what the adapter computes.

    Attributes:
        r, lora_alpha: rank, and what B·A is multiplied by, times the rank; of its square root with `use_rslora`.
        rank_pattern, alpha_pattern: others for the modules whose names end as a regular expression says.
        base_model_name_or_path: the model that it was trained on, as the trainer called it.
        init_lora_weights: what it began from; some beginnings change the base model too.
        use_qalora, qalora_group_size: of QA-LoRA, whose adapters see the mean of so many inputs each.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: Rank
    lora_alpha: Scale = 8
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, Scale] = Field(default_factory=dict)
    base_model_name_or_path: str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    use_qalora: bool = False
    qalora_group_size: Rank = 16

    @model_validator(mode="before")
    @classmethod
    def _null_patterns_are_empty(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or not key.endswith("_pattern")}

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def factor(self, module: str) -> float:
        """What a module's B·A is multiplied by.

        Source: peft 0.21, tuners/lora/layer.py.
        """
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLayer:
    """What is added to one weight matrix: factor · B · A.

    Attributes:
        module: that holds the matrix, such as "model.layers.0.mlp.down_proj".
        lora_A: (rank, input) float32.
        lora_B: (output, rank) float32.
    """

    module: str
    lora_A: NDArray[np.float32]
    lora_B: NDArray[np.float32]
    factor: float

    @property
    def rank(self) -> int:
        """Of B·A, at most."""
        return len(self.lora_A)

    @property
    def folded(self) -> Self:
        """The same sum with a factor of 1: lora_B takes it in."""
        lora_b = (self.lora_B.astype(np.float64) * self.factor).astype(np.float32)
        return type(self)(module=self.module, lora_A=self.lora_A, lora_B=lora_b, factor=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapter:
    """A LoRA adapter.

    Attributes:
        name: the folder that it was read from, for messages.
        base: the model that it was trained on, as the trainer called it; None where that is not known.
        layers: by the modules' names, sorted.
        pooled_inputs: of QA-LoRA, the inputs whose mean is one of the adapters' own; None where they see each input.
    """

    name: str
    base: str | None
    layers: tuple[AdaptedLayer, ...]
    pooled_inputs: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a plain LoRA that PEFT saved.

        Raises:
            ArtifactError: a file is missing or damaged, the tensors are a pickle, or they are not what the
                configuration says.
            UnsupportedModelError: it is no plain LoRA of Linear layers.
        """
        adapter = cls.read_any(folder)
        if adapter.pooled_inputs is not None:
            raise UnsupportedModelError(
                f"{folder}: a QA-LoRA adapter, which changes the zero points of the 4-bit model that it was trained "
                f"on; absorb it with ovexport convert {folder} --model that model"
            )
        return adapter

    @classmethod
    def read_any(cls, folder: Path) -> Self:
        """Read a plain LoRA or a QA-LoRA that PEFT saved.

        Raises:
            ArtifactError, UnsupportedModelError: as `read`.
        """
        config = read_config(folder)
        return cls(
            name=str(folder),
            base=config.base_model_name_or_path,
            layers=_read_layers(folder, config),
            pooled_inputs=config.qalora_group_size if config.use_qalora else None,
        )

    def write(self, folder: Path) -> None:
        """Write it so that PEFT and openvino-genai apply the same sum: each factor is folded into lora_B, PEFT's
        lora_alpha is the rank, and openvino-genai's alpha is the 1.0 that it takes by default."""
        folder.mkdir(parents=True, exist_ok=True)
        layers = [layer.folded for layer in self.layers]
        tensors = {f"{PEFT_PREFIX}{layer.module}.lora_A.weight": layer.lora_A for layer in layers}
        tensors |= {f"{PEFT_PREFIX}{layer.module}.lora_B.weight": layer.lora_B for layer in layers}
        write_tensors(tensors, folder / ADAPTER_TENSORS)
        write_text(json.dumps(_config_of(layers, self.base), indent=2) + "\n", folder / ADAPTER_CONFIG)


def is_peft_adapter(path: Path) -> bool:
    """Whether a path is a folder of PEFT's, by the name of a file in it."""
    return (path / ADAPTER_CONFIG).is_file()


def is_qalora(path: Path) -> bool:
    """Whether a path is a folder of PEFT's whose configuration says that it is a QA-LoRA."""
    if not is_peft_adapter(path):
        return False
    try:
        return bool(parse_json(read_text(path / ADAPTER_CONFIG, LARGEST_CONFIG_BYTES)).get("use_qalora"))
    except (AttributeError, OSError, ValueError):
        return False  # damaged: the reader of a plain LoRA says what is wrong with it


def read_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter, of a kind that is read.

    Raises:
        ArtifactError: it is missing or damaged.
        UnsupportedModelError: it is no plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; give one with {ADAPTER_CONFIG}, as PEFT saves an adapter")
    try:
        values = parse_json(read_text(path, LARGEST_CONFIG_BYTES))
        peft_type = values.get("peft_type") if isinstance(values, dict) else None
        if isinstance(peft_type, str) and peft_type != "LORA":
            raise UnsupportedModelError(f"{path}: peft_type is {shortened(peft_type)}; only LORA is read")
        config = PeftConfig.model_validate(values, strict=True)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; give the folder that PEFT saved the adapter to") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path}: {shortened(where)}: {first['msg']}; copy the adapter again") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: can't be read ({error}); copy the adapter again") from error
    _require_plain(path, config)
    return config


def _require_plain(path: Path, config: PeftConfig) -> None:
    """Refuse what adds anything but factor · B · A to the base model's weights."""
    if config.bias != "none":
        raise UnsupportedModelError(
            f"{path}: bias={shortened(config.bias)!r} trained the biases too, which are not read; train the adapter "
            'with bias="none"'
        )
    if config.init_lora_weights not in _KEEPS_THE_BASE:
        raise UnsupportedModelError(
            f"{path}: init_lora_weights={shortened(str(config.init_lora_weights))!r} changed the base model's weights, "
            "which are not in this folder; save that model too, set init_lora_weights to true, and give it as the model"
        )
    for key, value in (config.model_extra or {}).items():
        if value and key not in _WITHOUT_EFFECT:
            raise UnsupportedModelError(
                f"{path}: {shortened(key)}={shortened(json.dumps(value), 60)} is not read; only plain LoRA of Linear "
                "layers is, so train the adapter without it"
            )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        _require_cheap(path, pattern)


def _require_cheap(path: Path, pattern: str) -> None:
    """Refuse a regular expression that is none, or could take longer than anybody waits."""
    try:
        repeats = len(_REPEAT.findall(pattern))
        if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or _REPEATED_GROUP.search(pattern):
            raise re.error("it repeats too much")
        _at_end(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{path}: the pattern {shortened(pattern)!r} is not read ({error}); write the modules' names in "
            "rank_pattern and alpha_pattern"
        ) from error


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with.

    Source: peft 0.21, utils/other.py, get_pattern_key.
    """
    return next((value for pattern, value in patterns.items() if _at_end(pattern).match(module)), default)


def _at_end(pattern: str) -> re.Pattern[str]:
    """What finds a pattern at the end of a module's name."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _read_layers(folder: Path, config: PeftConfig) -> tuple[AdaptedLayer, ...]:
    path = folder / ADAPTER_TENSORS
    if not path.is_file() and (folder / _PICKLE).exists():
        raise ArtifactError(
            f"{folder / _PICKLE}: a pickle, which is never loaded; save the adapter again with safe_serialization=True"
        )
    tensors = TensorFile(path)
    sides: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise UnsupportedModelError(
                f"{path}: holds {shortened(name)}, which is no factor of a Linear layer's LoRA; train the adapter "
                "without embeddings, biases, magnitudes and modules_to_save, and save it with "
                "save_embedding_layers=False"
            )
        sides.setdefault(match["module"], {})[match["side"]] = _factor(path, name, tensors)
    if not sides:
        raise ArtifactError(f"{path}: holds no tensor; give the folder of a trained adapter")
    return tuple(_layer(path, module, sides[module], config) for module in sorted(sides))


def _factor(path: Path, name: str, tensors: TensorFile) -> NDArray[np.float32]:
    values = tensors[name]
    if values.ndim != 2 or values.dtype.kind != "f":
        raise UnsupportedModelError(
            f"{path}: {name} is {values.dtype} {values.shape}, no matrix of real numbers; only LoRA of Linear layers "
            "is read"
        )
    if not np.isfinite(values).all():
        raise ArtifactError(f"{path}: {name} holds values that are not finite; train the adapter again")
    return values.astype(np.float32)


def _layer(
    path: Path, module: str, sides: Mapping[Literal["A", "B"] | str, NDArray[np.float32]], config: PeftConfig
) -> AdaptedLayer:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise ArtifactError(f"{path}: {module} has a lora_{other} and no lora_{side}; copy the adapter again")
    lora_a, lora_b, rank = sides["A"], sides["B"], config.rank(module)
    if len(lora_a) != rank or lora_b.shape[1] != rank:
        raise ArtifactError(
            f"{path}: {module} has rank {len(lora_a)} in lora_A and {lora_b.shape[1]} in lora_B, and "
            f"{ADAPTER_CONFIG} says {rank}; copy the adapter again"
        )
    layer = AdaptedLayer(module=module, lora_A=lora_a, lora_B=lora_b, factor=config.factor(module))
    with np.errstate(over="ignore"):
        if not np.isfinite(layer.folded.lora_B).all():
            raise ArtifactError(
                f"{path}: lora_B of {module} times {layer.factor:.3g}, lora_alpha over the rank, is more than float32 "
                "holds; mend lora_alpha"
            )
    return layer


def _config_of(layers: Sequence[AdaptedLayer], base: str | None) -> dict[str, Any]:
    """adapter_config.json of layers whose factor is 1."""
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    others = _others(layers, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [layer.module for layer in layers],
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _others(layers: Iterable[AdaptedLayer], rank: int) -> dict[str, int]:
    """By a pattern of its name, the rank of each module that has another."""
    return {re.escape(layer.module): layer.rank for layer in layers if layer.rank != rank}
