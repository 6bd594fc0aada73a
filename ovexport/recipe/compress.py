"""Section [compress]."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ovexport.recipe.spec import Positive, PositiveReal, Spec

TunedMode = Literal["int4_asym", "int4_asym_f16zp", "int4_sym"]
LayerMode = Literal[TunedMode, "int8_asym", "float"]
"""What a recipe can ask of a layer."""


_BUDGETS = ("bits_per_weight", "size_mb", "at_most_slower")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("0 channels; give a divisor of the layers' in-features, or -1 for one scale a channel")
    return value


def _tables(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("one table; write [[compress.layers]] in double brackets, once for each pattern")
    return value


GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]


class LayerRule(Spec):
    """A table [[compress.layers]]: the format of the layers that a pattern matches.

    Attributes:
        pattern: a shell pattern of layers' names, such as "*.down_proj", or a list of patterns. The first table that
            matches a layer is used, so put the narrower pattern first.
        mode: 4 bits with zero points ("int4_asym", "int4_asym_f16zp") or without ("int4_sym"), 8 bits ("int8_asym"; one
            scale per output channel, not tuned), or floating point ("float"). `compress.mode` unless given, which
            embeddings and head don't take: for 4 bits they need a table that gives a mode.
        group_size: as `compress.group_size`, which is used unless given.
        rank: adapter rank of "fq_lora"; `compress.rank` unless given. Embeddings and head have no adapter.
    """

    pattern: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    mode: LayerMode | None = None
    group_size: GroupSize | None = None
    rank: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mode is None and self.group_size is None and self.rank is None:
            raise ValueError("sets nothing; give a mode, a group_size or a rank, or remove the table")
        tuned = self.mode is None or self.mode in get_args(TunedMode)
        if not tuned and (self.group_size is not None or self.rank is not None):
            raise ValueError(f'mode="{self.mode}" takes no group_size and no rank; leave them out')
        return self


class CompressSpec(Spec):
    """How the weights are quantized.

    Attributes:
        mode: 4-bit codes with a zero point per group ("int4_asym") or without zero points ("int4_sym"); with method =
            "qalora" also with zero points in float16 ("int4_asym_f16zp"). Embeddings and head take 8 bits unless a
            table in `layers` gives them 4.
        group_size: input channels that share a scale: a power of two, or -1 for one scale per output channel.
        engine: who compresses, and whose arithmetic is tuned: "ovexport", or "nncf" for nncf.compress_weights and
            NNCF's quantizers, exactly as its documentation has them.
        method: what the adapters are added to: "fq_lora" to the weights before they are rounded, scales and zero points
            tuned with them; "qalora" to the zero points of the groups (QA-LoRA), codes and scales frozen; "lora" to the
            layers' outputs, codes frozen, and the adapter lies beside the IR for the runtime to add.
        format: of method = "fq_lora": "fq_lora" for adapters of one rank; "fq_lora_nls" for elastic adapters, whose
            ranks are searched within `rank_space` after tuning.
        rank: adapter rank; a layer with a smaller side, or with fewer groups in "qalora", takes that.
        alpha: with method = "qalora" or "lora", the adapter's product is multiplied with alpha / rank; `rank` unless
            given.
        init: with method = "lora", what the adapters begin with: "zero" adds nothing; "loftq" what approximates the
            uncompressed weights best together with the codes (LoftQ).
        loftq_iterations: how often "loftq" rounds what the adapters leave, and fits the adapters to what rounding
            leaves.
        rank_space: the ranks that "fq_lora_nls" chooses from, such as [32, 24, 16].
        rank_by: what has a rank of its own with "fq_lora_nls": each transformer block, or each Linear.
        starting_point: what tuning begins from, by name: "rounding", "gptq", "two_sided", "awq", "scale_estimation",
            "awq_scale_estimation", or a plug-in's. Takes the place of the three keys that follow.
        awq: start from NNCF's AWQ, on calibration text.
        scale_estimation: start from NNCF's Scale Estimation, on calibration text.
        rounding: "nearest" rounds each weight alone; "gptq" spreads the error of each input channel over the remaining
            ones, as far as the layer's inputs tell; "two_sided" minds what the layer's outputs do to the predictions
            too, fits the scales and rounds embeddings and head with the same care. The last two need calibration text
            and work on the scales of `awq` and `scale_estimation` if they are on. "nearest" unless given where
            `starting_point`, init = "loftq" or engine = "nncf" round by themselves.
        device: where "two_sided" computes; "auto" takes the GPU if there is one.
        bits_per_weight: a budget: bits that each weight of the packed matrices takes on average, scales and zero points
            included, such as 4.6. Each Linear layer gets a group size of 32, 64, 128 or `group_size`, one scale per
            output channel, or 8 bits, so that the measured divergence is least. A table in `layers` keeps its layers
            out of the choice.
        size_mb: the same budget as megabytes (10^6 bytes) of the packed matrices.
        at_most_slower: the same budget as the weights that a generated token reads, in multiples of what it would read
            in the recipe's own format, such as 1.05.
        sensitivities: with a budget, the sensitivities.json of another run of the same model: what formats cost is
            taken from there and not measured again.
        calibration_sequences: sequences of the training text that a starting point uses if it needs text.
        layer_policy: what decides the format of each layer, by name: "recipe" for the keys of this section, or a
            plug-in's.
        layers: tables [[compress.layers]] with formats of their own for some layers.
        ignored: shell patterns of the names of layers that stay in floating point.
        fallback: what to do with a layer that `group_size` does not suit, because it does not divide the layer's
            in-features or because the CPU runtime computes groups of that size wrongly: "error" refuses the run,
            "smaller_group" takes the largest smaller size that suits (at least 4), "per_channel" one scale per output
            channel, "int8" 8 bits.
    """

    mode: TunedMode = "int4_asym"
    group_size: GroupSize = 64
    engine: Literal["ovexport", "nncf"] = "ovexport"
    method: Literal["fq_lora", "qalora", "lora"] = "fq_lora"
    format: Literal["fq_lora", "fq_lora_nls"] = "fq_lora"
    rank: Positive = 64
    alpha: PositiveReal | None = None
    init: Literal["zero", "loftq"] = "zero"
    loftq_iterations: Positive = 5
    rank_space: tuple[Positive, ...] | None = None
    rank_by: Literal["block", "linear"] = "block"
    starting_point: Annotated[str, Field(min_length=1)] | None = None
    awq: bool = False
    scale_estimation: bool = False
    rounding: Literal["nearest", "gptq", "two_sided"] = "two_sided"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bits_per_weight: PositiveReal | None = None
    size_mb: PositiveReal | None = None
    at_most_slower: PositiveReal | None = None
    sensitivities: Annotated[str, Field(min_length=1)] | None = None
    calibration_sequences: Positive = 128
    layer_policy: Annotated[str, Field(min_length=1)] = "recipe"
    layers: Annotated[tuple[LayerRule, ...], BeforeValidator(_tables)] = ()
    ignored: tuple[str, ...] = ()
    fallback: Literal["error", "smaller_group", "per_channel", "int8"] = "error"

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded with calibration text by `rounding`."""
        return self.rounding != "nearest"

    @property
    def budget(self) -> str | None:
        """The key that says how many bytes the layers may take, for their formats to be chosen; None without one."""
        return next((key for key in _BUDGETS if getattr(self, key) is not None), None)

    @property
    def has_own_formats(self) -> bool:
        """Whether some layers may have formats of their own, beside the mode and group size of the section."""
        return bool(self.layers) or self.layer_policy != "recipe" or self.budget is not None

    @model_validator(mode="before")
    @classmethod
    def _left_to_another(cls, values: Any) -> Any:
        """Rounding to nearest, unless another is given, where another key says who rounds."""
        if not isinstance(values, dict) or "rounding" in values:
            return values
        others = values.get("starting_point") or values.get("init") == "loftq" or values.get("engine") == "nncf"
        return values | {"rounding": "nearest"} if others else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_engine()
        self._check_method()
        self._check_budget()
        if (self.format == "fq_lora_nls") != (self.rank_space is not None):
            raise ValueError('rank_space and format = "fq_lora_nls" go together; set both or neither')
        if self.rank_space is not None and len(self.rank_space) == 0:
            raise ValueError("rank_space=[] holds no rank; list some, such as [32, 24, 16]")
        for number, rule in enumerate(self.layers):
            if rule.rank is not None and self.rank_space is not None:
                raise ValueError(f"layers.{number}.rank: with rank_space every adapter has its ranks; remove the key")
        if self.starting_point is not None and (self.awq or self.scale_estimation or self.rounds):
            raise ValueError(
                f'starting_point="{self.starting_point}" takes the place of awq, scale_estimation and rounding; '
                "set one or the other"
            )
        return self

    def _check_engine(self) -> None:
        """Refuse what NNCF's engine does not do."""
        if self.engine == "ovexport":
            return
        defaults = type(self).model_construct(rounding="nearest")
        others = ("method", "starting_point", "rounding", "layer_policy", "layers", "fallback", "init", *_BUDGETS)
        given = [name for name in others if getattr(self, name) != getattr(defaults, name)]
        if given:
            raise ValueError(f'{given[0]} does not go with engine = "nncf"; leave it out, or set engine = "ovexport"')

    def _check_method(self) -> None:
        """Refuse what does not go with the method."""
        modes = {"mode": self.mode, **{f"layers.{i}.mode": rule.mode for i, rule in enumerate(self.layers)}}
        if self.method != "fq_lora" and self.format != "fq_lora":
            raise ValueError(f'format="{self.format}" is of method = "fq_lora"; leave it out')
        self._check_init()
        if self.method == "qalora":
            symmetric = [key for key, mode in modes.items() if mode == "int4_sym"]
            if symmetric:
                raise ValueError(
                    f'{symmetric[0]}="int4_sym" has no zero points, which method = "qalora" adds its adapters to; use '
                    '"int4_asym" or "int4_asym_f16zp"'
                )
            return
        floats = [key for key, mode in modes.items() if mode == "int4_asym_f16zp"]
        if floats:
            raise ValueError(f'{floats[0]}="int4_asym_f16zp" goes with method = "qalora"; use "int4_asym"')
        if self.alpha is not None and self.method == "fq_lora":
            raise ValueError(f'alpha={self.alpha:g} goes with method = "qalora" or "lora"; leave it out')

    def _check_budget(self) -> None:
        """Refuse budgets that do not go together, or not with who decides the formats."""
        given = [key for key in _BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets; give one of them")
        if self.sensitivities is not None and not given:
            raise ValueError(
                f"sensitivities={self.sensitivities!r} goes with a budget; give one of {', '.join(_BUDGETS)}"
            )
        if given and self.layer_policy != "recipe":
            raise ValueError(f"{given[0]} chooses the formats itself; leave layer_policy out")

    def _check_init(self) -> None:
        """Refuse a beginning of the adapters that does not go with the other keys."""
        if self.init != "loftq":
            if "loftq_iterations" in self.model_fields_set and self.loftq_iterations != type(self)().loftq_iterations:
                raise ValueError(f'loftq_iterations={self.loftq_iterations} goes with init = "loftq"; leave it out')
            return
        if self.method != "lora":
            raise ValueError('init="loftq" goes with method = "lora", whose adapters are not rounded; set both')
        others = {"awq": self.awq, "scale_estimation": self.scale_estimation, "rounding": self.rounds}
        others["starting_point"] = self.starting_point not in (None, "rounding")
        given = [name for name, value in others.items() if value]
        if given:
            raise ValueError(f'init="loftq" rounds the weights itself; leave {", ".join(given)} out')
