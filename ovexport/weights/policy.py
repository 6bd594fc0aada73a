"""Where a layer's bits are decided: a policy gives each weight matrix its format.

The policy of a recipe asks its tables [[compress.layers]], the first that matches, and else its defaults.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Protocol

from ovexport.errors import OvexportError, RecipeError, UnsupportedModelError
from ovexport.recipe import CompressSpec, LayerRule
from ovexport.registry import Registry
from ovexport.weights.encoding import ENCODINGS, Mode
from ovexport.weights.group_sizes import ODD_INT8, WRONG_GROUPS, computed_rightly, group_sizes
from ovexport.weights.layer import AdapterKind, LayerFormat, OwnFormat, WeightMatrix

BUDGET_GROUP_SIZES = (32, 64, 128, -1)
"""Group sizes that a budget chooses from, beside the recipe's own; -1 is one scale per output channel."""


class LayerPolicy(Protocol):
    """Decides the format of a weight matrix from its name, kind and shape.

    The stage compress makes a policy from the recipe's section and all matrices of the model, and calls it once for
    each matrix that `compress.ignored` does not name. `ovexport plan` does the same without the weights. Register a
    class, or a function that makes a policy, by a name that recipes use:

        from ovexport.weights.policy import RecipePolicy, format_layer, layer_policies

        @layer_policies.register("coarse_mlp")         # or an entry point in the group "ovexport.layer_policies"
        class CoarseMlp:
            def __init__(self, spec, matrices):        # CompressSpec, Sequence[WeightMatrix]
                self.recipe = RecipePolicy(spec, matrices)

            def __call__(self, matrix):                # WeightMatrix -> LayerFormat
                if ".mlp." in matrix.name:
                    return format_layer(matrix, "int4_sym", group_size=64, rank=16)
                return self.recipe(matrix)

    What it may return: any mode. 4-bit layers have a group size that divides `in_features` and is a power of two (or
    all of an even `in_features`), and a rank up to the smaller side; with `rank_space` the rank is the largest of it.
    Layers in other modes have one group and rank 0; a matrix whose `kind` is not "linear" has rank 0 in any mode. Equal
    inputs have to give equal formats.
    """

    def __call__(self, matrix: WeightMatrix) -> LayerFormat:
        """The format of a matrix.

        Raises:
            LayerRefused: it can't have the format that the recipe asks for.
        """


layer_policies: Registry[Callable[[CompressSpec, Sequence[WeightMatrix]], LayerPolicy]] = Registry(
    "ovexport.layer_policies", "layer policy"
)
"""By the name in `compress.layer_policy`."""


class LayerRefused(OvexportError):
    """Why a matrix can't be done. Matrices with equal reasons are told of in one line.

    Attributes:
        note: a few words for the table of layers.
        before, after: what is said around the names of the matrices.
        error: what it is to the user.
    """

    def __init__(self, *, note: str, after: str, before: str = "", error: type[OvexportError] = RecipeError) -> None:
        super().__init__(before + after)
        self.note, self.before, self.after, self.error = note, before, after, error

    def problem(self, matrices: Sequence[WeightMatrix]) -> OvexportError:
        """The problem, with the first matrix named and the others counted."""
        first, others = matrices[0].name.removesuffix(".weight"), len(matrices) - 1
        return self.error(f"{self.before}{first}{f' and {others} more' if others else ''}{self.after}")


def format_layer(
    matrix: WeightMatrix,
    mode: Mode,
    *,
    group_size: int = -1,
    rank: int = 0,
    adapter: AdapterKind = "lora",
    adapter_factor: float = 1.0,
    note: str | None = None,
) -> LayerFormat:
    """The format of a matrix; of "int8_asym" and "float" leave out `group_size` and `rank`.

    Args:
        group_size: input channels per scale; -1 for one scale per output channel.
        adapter, adapter_factor: as LayerFormat has them.
        note: why it is not as the recipe asks.
    """
    return LayerFormat(
        name=matrix.name,
        kind=matrix.kind,
        mode=mode,
        out_features=matrix.out_features,
        in_features=matrix.in_features,
        transposed=matrix.transposed,
        group_size=matrix.in_features if group_size == -1 else group_size,
        rank=rank,
        adapter=adapter,
        adapter_factor=adapter_factor,
        note=note,
    )


def name_matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern is of a parameter's name, with ".weight" or without."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


@layer_policies.register("recipe")
class RecipePolicy:
    """The tables [[compress.layers]], the first that matches, and else the recipe's defaults."""

    def __init__(self, spec: CompressSpec, _matrices: Sequence[WeightMatrix]) -> None:
        self._defaults = Defaults(spec)
        self._patterns = [(rule, PatternPolicy(spec, number)) for number, rule in enumerate(spec.layers)]

    def __call__(self, matrix: WeightMatrix) -> LayerFormat:
        """As LayerPolicy."""
        for rule, policy in self._patterns:
            if any(name_matches(matrix.name, pattern) for pattern in rule.pattern):
                return policy(matrix)
        return self._defaults(matrix)


class PatternPolicy:
    """One table of [[compress.layers]]; what it leaves out is as the defaults have it.

    Args:
        number: of the table, from 0.
    """

    def __init__(self, spec: CompressSpec, number: int) -> None:
        self._rule: LayerRule = spec.layers[number]
        self._key = f"compress.layers.{number}"
        given = {"mode", "group_size", "rank"} & self._rule.model_fields_set
        own = {key: value for key in given if (value := getattr(self._rule, key)) is not None}
        self._defaults = Defaults(spec.model_copy(update=own), self._key if "group_size" in own else "compress")

    def __call__(self, matrix: WeightMatrix) -> LayerFormat:
        """As LayerPolicy."""
        mode = self._rule.mode
        if mode is not None and mode not in ENCODINGS:
            return format_layer(matrix, mode, note=f"left in floating point by {self._key}")
        if mode is not None and ENCODINGS[mode].bits == 8:
            return format_layer(matrix, mode, note=ODD_INT8 if matrix.in_features % 2 else None)
        if matrix.kind != "linear" and (mode is None or self._rule.rank):
            raise LayerRefused(
                note="needs a mode, and no rank",
                before=f"{self._key}: matches ",
                after=", no Linear layer, so it takes 8 bits unless a mode is given, and no adapter; narrow the "
                "pattern, or set mode and no rank",
            )
        return self._defaults.packed(matrix)


def own_format(matrix: WeightMatrix, own: OwnFormat, spec: CompressSpec) -> LayerFormat:
    """The format of a matrix that its checkpoint holds as codes: theirs, with the rank that the recipe gives it.

    QA-LoRA's adapters need zero points, which symmetric codes get: the middle of the codes, unsigned.

    Raises:
        LayerRefused: the runtime computes its group size wrongly, or the rank space is above its smaller side.
    """
    if not computed_rightly(own.group_size, matrix.in_features):
        after = f": its group size in the checkpoint is {own.group_size}, and {WRONG_GROUPS}; give another checkpoint"
        raise LayerRefused(note=f"group size {own.group_size}", after=after, error=UnsupportedModelError)
    if matrix.kind != "linear":
        return format_layer(matrix, own.mode, group_size=own.group_size, note=own.note)
    ranks = [rule.rank for rule in spec.layers if any(name_matches(matrix.name, one) for one in rule.pattern)][:1]
    given = {"rank": ranks[0]} if ranks and ranks[0] is not None else {}
    mode = spec.mode if spec.method == "qalora" else own.mode
    return _with_rank(matrix, spec.model_copy(update={"mode": mode, **given}), own.group_size, own.note)


def _with_rank(matrix: WeightMatrix, spec: CompressSpec, group_size: int, note: str | None) -> LayerFormat:
    if matrix.kind != "linear":
        mode = "int4_asym" if spec.mode == "int4_asym_f16zp" else spec.mode  # no adapter moves its zero points
        return format_layer(matrix, mode, group_size=group_size, note=note)
    if spec.method == "qalora":
        return _with_pooled_adapter(matrix, spec, group_size, note)
    rank = max(spec.rank_space) if spec.rank_space else spec.rank
    largest = min(matrix.out_features, matrix.in_features)
    if rank > largest and spec.rank_space:
        above = f"{rank} is above the smaller side, {largest}"
        raise LayerRefused(note=f"rank {above}", before=f"compress.rank_space: {above}, of ", after="; lower it")
    rank, note = _clamped(rank, largest, note)
    beside = spec.method == "lora"
    return format_layer(
        matrix,
        spec.mode,
        group_size=group_size,
        rank=rank,
        adapter="beside" if beside else "lora",
        adapter_factor=(spec.alpha or spec.rank) / spec.rank if beside else 1.0,
        note=note,
    )


def _with_pooled_adapter(matrix: WeightMatrix, spec: CompressSpec, group_size: int, note: str | None) -> LayerFormat:
    """A format whose adapter sees the means of the groups; PEFT multiplies them with alpha / rank and the number of
    groups."""
    size = matrix.in_features if group_size == -1 else group_size
    groups = matrix.in_features // size
    rank, note = _clamped(spec.rank, min(matrix.out_features, groups), note)
    return format_layer(
        matrix,
        spec.mode,
        group_size=group_size,
        rank=rank,
        adapter="qalora",
        adapter_factor=(spec.alpha or spec.rank) / spec.rank * groups / size,
        note=note,
    )


class Defaults:
    """The keys of [compress]: Linear layers in its 4-bit mode, embeddings and the head in 8 bits.

    Args:
        key: the table that `group_size` is in, for messages.
    """

    def __init__(self, spec: CompressSpec, key: str = "compress") -> None:
        self._spec = spec
        self._key = key

    def __call__(self, matrix: WeightMatrix) -> LayerFormat:
        """As LayerPolicy."""
        return self.packed(matrix) if matrix.kind == "linear" else format_layer(matrix, "int8_asym")

    def packed(self, matrix: WeightMatrix) -> LayerFormat:
        """The 4-bit format of a matrix, without an adapter where it is no Linear layer.

        Raises:
            LayerRefused: as LayerPolicy.
        """
        reason = self._reason_against(matrix)
        return (
            self._with_rank(matrix, self._spec.group_size, None) if reason is None else self._fallback(matrix, reason)
        )

    def _reason_against(self, matrix: WeightMatrix) -> str | None:
        """Why a matrix can't have the group size; None where it can."""
        size = matrix.in_features if self._spec.group_size == -1 else self._spec.group_size
        if matrix.in_features % size:
            return f"group size {size} does not divide {matrix.in_features}"
        return None if computed_rightly(size, matrix.in_features) else f"group size {size} is computed wrongly"

    def _fallback(self, matrix: WeightMatrix, reason: str) -> LayerFormat:
        """The format of a matrix that can't have the group size."""
        size = matrix.in_features
        match self._spec.fallback:
            case "int8":
                return format_layer(matrix, "int8_asym", note=f"{reason}: INT8" + (f"; {ODD_INT8}" if size % 2 else ""))
            case "per_channel" if computed_rightly(size, size):
                return self._with_rank(matrix, -1, f"{reason}: one scale per channel")
            case "smaller_group" if smaller := group_sizes(size, below=self._spec.group_size):
                return self._with_rank(matrix, smaller[-1], f"{reason}: group size {smaller[-1]}")
        raise self._undivided(matrix, reason)

    def _with_rank(self, matrix: WeightMatrix, group_size: int, note: str | None) -> LayerFormat:
        return _with_rank(matrix, self._spec, group_size, note)

    def _undivided(self, matrix: WeightMatrix, reason: str) -> LayerRefused:
        columns, size = matrix.in_features, self._spec.group_size
        sizes = [str(each) for each in group_sizes(columns, below=columns)][-3:]
        sizes += ["-1"] if size != -1 and computed_rightly(columns, columns) else []
        other = 'compress.fallback = "int8"' if self._spec.engine == "ovexport" else 'compress.engine = "ovexport"'
        cure = (f"use {' or '.join(sizes)}, or " if sizes else "") + f"set {other}"
        cure += f" ({ODD_INT8})" if columns % 2 else ""
        key = f"{self._key}.group_size={size}"
        if size == -1 or columns % size == 0:
            before, after = f"{key} for in_features={columns} of ", f": {WRONG_GROUPS}; {cure}"
        else:
            before, after = f"{key} does not divide in_features={columns} of ", f"; {cure}"
        return LayerRefused(note=reason, before=before, after=after)


def _clamped(rank: int, largest: int, note: str | None) -> tuple[int, str | None]:
    """The rank that a layer can have, and the note that says so where it is smaller than asked."""
    if rank <= largest:
        return rank, note
    return largest, "; ".join(filter(None, (note, f"rank {rank} clamped to {largest}")))


def candidate_formats(
    layers: Iterable[LayerFormat], spec: CompressSpec, fixed: Collection[str] = ()
) -> dict[str, tuple[LayerFormat, ...]]:
    """By name, the formats that a budget chooses from: the recipe's mode with groups of 32, 64, 128 and the recipe's
    own size, and with one scale per output channel, as far as they suit, and 8 bits.

    Linear layers have a choice, unless a table [[compress.layers]] or the model's checkpoint says what they are.
    Embeddings and head have none: an error of the head costs the more, the less sure the model is, so a text that it
    knows well, as a text that it was trained on, makes 4 bits look cheap there.

    Args:
        layers: in the recipe's own format.
        fixed: names of those that the model's checkpoint holds as codes.
    """
    sizes = sorted({*BUDGET_GROUP_SIZES, spec.group_size})
    policies = [Defaults(spec.model_copy(update={"group_size": size, "fallback": "error"})) for size in sizes]
    found: dict[str, tuple[LayerFormat, ...]] = {}
    for layer in layers:
        ruled = any(name_matches(layer.name, pattern) for rule in spec.layers for pattern in rule.pattern)
        if layer.kind != "linear" or ruled or layer.name in fixed or layer.encoding is None:
            continue
        matrix = WeightMatrix(
            name=layer.name,
            kind=layer.kind,
            out_features=layer.out_features,
            in_features=layer.in_features,
            transposed=layer.transposed,
        )
        formats = [layer]
        for policy in policies:
            with suppress(LayerRefused):
                formats.append(policy(matrix))
        formats.append(format_layer(matrix, "int8_asym", note=ODD_INT8 if matrix.in_features % 2 else None))
        found[layer.name] = tuple({(each.mode, each.group_size): each for each in reversed(formats)}.values())
    return found


def looked_up(layers: Iterable[LayerFormat]) -> set[str]:
    """Names of the embeddings of which a token reads a row; without a head of its own, the largest is the head too."""
    layers = tuple(layers)
    embeddings = sorted(
        (layer.out_features * layer.in_features, layer.name) for layer in layers if layer.kind == "embedding"
    )
    if not any(layer.kind == "head" for layer in layers):
        embeddings = embeddings[:-1]
    return {name for _, name in embeddings}
