"""Which weight matrices a model has and what becomes of each: a pure function of shapes and the recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ovexport.errors import OvexportError, RecipeError, UnsupportedModelError
from ovexport.recipe import CompressSpec
from ovexport.weights.layer import LayerFormat, WeightMatrix

SMALLEST_GROUP = 4
_WRONG = (
    "the CPU runtime computes INT4 wrongly unless groups are a power of two, or one scale spans a row of even length"
)
_ODD_INT8 = (
    "the CPU runtime computes INT8 of odd in-features wrongly in bfloat16; run it with INFERENCE_PRECISION_HINT f32, "
    "or keep the layer in floating point with compress.ignored"
)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of every matrix, and what can't be done.

    Attributes:
        layers: all of them; those that can't be done are in floating point here, and their note says why.
        unsuitable: the names of those.
        problems: each of the recipe's or the model's once, with the layers that it is about.
    """

    layers: tuple[LayerFormat, ...] = ()
    unsuitable: frozenset[str] = frozenset()
    problems: tuple[OvexportError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """Why a matrix can't be done: its note, and what is said of all matrices that share it, around their names."""

    note: str
    before: str = ""
    after: str
    error: type[OvexportError] = RecipeError

    def problem(self, matrices: Sequence[WeightMatrix]) -> OvexportError:
        """The problem, with the first matrix named and the others counted."""
        first, others = matrices[0].name.removesuffix(".weight"), len(matrices) - 1
        return self.error(f"{self.before}{first}{f' and {others} more' if others else ''}{self.after}")


def plan_layers(matrices: Iterable[WeightMatrix], spec: CompressSpec) -> tuple[LayerFormat, ...]:
    """Decide mode, group size and rank of every matrix.

    Raises:
        RecipeError: `group_size` does not divide some in-features and `fallback` is "error"; all of them are named.
            Or an `ignored` pattern matches nothing, or a rank of the rank space is above a layer's smaller side.
        UnsupportedModelError: a matrix can't be compressed whatever the recipe says.
    """
    found = examine_layers(matrices, spec)
    if found.problems:
        raise type(found.problems[0])("; ".join(map(str, found.problems)))
    return found.layers


def examine_layers(matrices: Iterable[WeightMatrix], spec: CompressSpec) -> LayerPlan:
    """Decide mode, group size and rank of every matrix, and mark those that can't be done."""
    matrices = tuple(matrices)
    problems = _unmatched(matrices, spec)
    layers: list[LayerFormat] = []
    refused: dict[_Refusal, list[WeightMatrix]] = {}
    for matrix in matrices:
        layer = _format(matrix, spec)
        if isinstance(layer, _Refusal):
            refused.setdefault(layer, []).append(matrix)
            layer = _layer(matrix, "float", matrix.in_features, note=layer.note)
        layers.append(layer)
    unsuitable = frozenset(matrix.name for group in refused.values() for matrix in group)
    problems += [refusal.problem(group) for refusal, group in refused.items()]
    if not problems and all(layer.encoding is None for layer in layers):
        problems = [RecipeError(f"compress.ignored={list(spec.ignored)} leaves nothing to compress; name fewer layers")]
    return LayerPlan(tuple(layers), unsuitable, tuple(problems))


def check_group_sizes(layers: Iterable[LayerFormat], origin: str) -> None:
    """Refuse layers of a checkpoint whose 4-bit groups the runtime would compute wrongly.

    Args:
        origin: the checkpoint, for the message.

    Raises:
        UnsupportedModelError: naming the first such layer and how many there are.
    """
    wrong = [
        layer
        for layer in layers
        if layer.encoding and layer.encoding.bits == 4 and not computed_rightly(layer.group_size, layer.in_features)
    ]
    if wrong:
        first, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UnsupportedModelError(
            f"{origin}: has group size {first.group_size} in {first.name.removesuffix('.weight')}{more}, and {_WRONG}; "
            "tune it with another one"
        )


def computed_rightly(group_size: int, in_features: int) -> bool:
    """Whether the CPU plugin of OpenVINO 2026.4 computes 4-bit weights of this group size rightly.

    It does where the size is a power of two, and where one scale spans a whole row of even length. Any other size,
    depending on the row's length, the instruction set and the inference precision, gives logits that are off by as much
    as the logits themselves (measured, tests/test_layers.py).
    """
    if group_size == in_features:
        return in_features % 2 == 0
    return group_size > 1 and group_size & (group_size - 1) == 0


def _unmatched(matrices: Sequence[WeightMatrix], spec: CompressSpec) -> list[OvexportError]:
    """Patterns of `ignored` that no layer's name matches."""
    names = ", ".join(matrix.name.removesuffix(".weight") for matrix in matrices[:3])
    return [
        RecipeError(f"compress.ignored={pattern!r}: no layer has such a name; they read like {names}")
        for pattern in spec.ignored
        if not any(_matches(matrix.name, pattern) for matrix in matrices)
    ]


def _format(matrix: WeightMatrix, spec: CompressSpec) -> LayerFormat | _Refusal:
    """The fate of one matrix, or why the recipe leaves none."""
    if matrix.problem:
        return _Refusal(note=matrix.problem, after=f": {matrix.problem}", error=UnsupportedModelError)
    if any(_matches(matrix.name, pattern) for pattern in spec.ignored):
        return _layer(matrix, "float", matrix.in_features, note="left out by compress.ignored")
    if matrix.kind != "linear":
        return _layer(matrix, "int8_asym", matrix.in_features)
    reason = _reason_against(matrix, spec)
    if reason is None:
        return _with_rank(matrix, spec, matrix.in_features if spec.group_size == -1 else spec.group_size, note=None)
    return _fallback(matrix, spec, reason)


def _reason_against(matrix: WeightMatrix, spec: CompressSpec) -> str | None:
    """Why a matrix can't have the recipe's group size; None where it can."""
    size = matrix.in_features if spec.group_size == -1 else spec.group_size
    if matrix.in_features % size:
        return f"group size {size} does not divide {matrix.in_features}"
    return None if computed_rightly(size, matrix.in_features) else f"group size {size} is computed wrongly"


def _fallback(matrix: WeightMatrix, spec: CompressSpec, reason: str) -> LayerFormat | _Refusal:
    """The fate of a matrix that can't have the recipe's group size, or why there is none."""
    size = matrix.in_features
    match spec.fallback:
        case "int8":
            return _layer(matrix, "int8_asym", size, note=f"{reason}: INT8" + (f"; {_ODD_INT8}" if size % 2 else ""))
        case "per_channel" if computed_rightly(size, size):
            return _with_rank(matrix, spec, size, note=f"{reason}: one scale per channel")
        case "smaller_group" if smaller := group_sizes(size, below=spec.group_size):
            return _with_rank(matrix, spec, smaller[-1], note=f"{reason}: group size {smaller[-1]}")
    return _undivided(matrix, spec, reason)


def group_sizes(in_features: int, *, below: int) -> list[int]:
    """The group sizes from `SMALLEST_GROUP` up to `below` (exclusive) that divide `in_features` and are computed
    rightly."""
    sizes = range(SMALLEST_GROUP, min(below, in_features + 1))
    return [size for size in sizes if in_features % size == 0 and computed_rightly(size, in_features)]


def _with_rank(matrix: WeightMatrix, spec: CompressSpec, group_size: int, note: str | None) -> LayerFormat | _Refusal:
    rank = max(spec.rank_space) if spec.rank_space else spec.rank
    largest = min(matrix.out_features, matrix.in_features)
    if rank > largest and spec.rank_space:
        above = f"{rank} is above the smaller side, {largest}"
        return _Refusal(note=f"rank {above}", before=f"compress.rank_space: {above}, of ", after="; lower it")
    if rank > largest:
        note = "; ".join(filter(None, (note, f"rank {rank} clamped to {largest}")))
    return _layer(matrix, spec.mode, group_size, rank=min(rank, largest), note=note)


def _layer(
    matrix: WeightMatrix,
    mode: Literal["int4_asym", "int4_sym", "int8_asym", "float"],
    group_size: int,
    *,
    rank: int = 0,
    note: str | None = None,
) -> LayerFormat:
    return LayerFormat(
        name=matrix.name,
        kind=matrix.kind,
        mode=mode,
        out_features=matrix.out_features,
        in_features=matrix.in_features,
        transposed=matrix.transposed,
        group_size=group_size,
        rank=rank,
        note=note,
    )


def _undivided(matrix: WeightMatrix, spec: CompressSpec, reason: str) -> _Refusal:
    columns, size = matrix.in_features, spec.group_size
    sizes = [str(each) for each in group_sizes(columns, below=columns)][-3:]
    sizes += ["-1"] if size != -1 and computed_rightly(columns, columns) else []
    cure = (f"use {' or '.join(sizes)}, or " if sizes else "") + 'set compress.fallback = "int8"'
    cure += f" ({_ODD_INT8})" if columns % 2 else ""
    if size == -1 or columns % size == 0:
        before, after = f"compress.group_size={size} for in_features={columns} of ", f": {_WRONG}; {cure}"
    else:
        before, after = f"compress.group_size={size} does not divide in_features={columns} of ", f"; {cure}"
    return _Refusal(note=reason, before=before, after=after)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
