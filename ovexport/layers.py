"""Which weight matrices a model has and what becomes of each: a pure function of shapes and the recipe."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ovexport.artifacts import LayerFormat
from ovexport.errors import RecipeError
from ovexport.recipe import CompressSpec

SMALLEST_GROUP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMatrix:
    """A weight matrix of a model, shape as (output, input); see LayerFormat for the fields."""

    name: str
    kind: Literal["linear", "embedding", "head"]
    out_features: int
    in_features: int
    transposed: bool = False


def plan_layers(matrices: Iterable[WeightMatrix], spec: CompressSpec) -> tuple[LayerFormat, ...]:
    """Decide mode, group size and rank of every matrix.

    Raises:
        RecipeError: `group_size` does not divide some in-features and `fallback` is "error"; all of them are named.
            Or an `ignored` pattern matches nothing, or a rank of the rank space is above a layer's smaller side.
    """
    matrices = tuple(matrices)
    for pattern in spec.ignored:
        if not any(_matches(matrix.name, pattern) for matrix in matrices):
            names = ", ".join(matrix.name.removesuffix(".weight") for matrix in matrices[:3])
            raise RecipeError(f"compress.ignored={pattern!r}: no layer has such a name; they read like {names}")
    formats: list[LayerFormat] = []
    undivided: dict[int, list[WeightMatrix]] = {}
    for matrix in matrices:
        layer = _format(matrix, spec)
        if layer is None:
            undivided.setdefault(matrix.in_features, []).append(matrix)
        else:
            formats.append(layer)
    if undivided:
        raise RecipeError("; ".join(_problem(group, spec) for group in undivided.values()))
    if all(layer.mode == "float" for layer in formats):
        raise RecipeError(f"compress.ignored={list(spec.ignored)} leaves nothing to compress; name fewer layers")
    return tuple(formats)


def _format(matrix: WeightMatrix, spec: CompressSpec) -> LayerFormat | None:
    """The fate of one matrix; None where the recipe leaves none."""
    if any(_matches(matrix.name, pattern) for pattern in spec.ignored):
        return _layer(matrix, "float", matrix.in_features, note="left out by compress.ignored")
    if matrix.kind != "linear":
        return _layer(matrix, "int8_asym", matrix.in_features)
    if spec.group_size == -1:
        return _with_rank(matrix, spec, matrix.in_features, note=None)
    if matrix.in_features % spec.group_size == 0:
        return _with_rank(matrix, spec, spec.group_size, note=None)
    return _fallback(matrix, spec)


def _fallback(matrix: WeightMatrix, spec: CompressSpec) -> LayerFormat | None:
    """The fate of a matrix that the group size does not divide."""
    reason = f"group size {spec.group_size} does not divide {matrix.in_features}"
    match spec.fallback:
        case "int8":
            return _layer(matrix, "int8_asym", matrix.in_features, note=f"{reason}: INT8")
        case "per_channel":
            return _with_rank(matrix, spec, matrix.in_features, note=f"{reason}: one scale per channel")
        case "smaller_group" if smaller := divisors(matrix.in_features, below=spec.group_size):
            return _with_rank(matrix, spec, smaller[-1], note=f"{reason}: group size {smaller[-1]}")
    return None


def divisors(in_features: int, *, below: int) -> list[int]:
    """The group sizes from `SMALLEST_GROUP` up to `below` (exclusive) that divide `in_features`."""
    return [size for size in range(SMALLEST_GROUP, min(below, in_features + 1)) if in_features % size == 0]


def _with_rank(matrix: WeightMatrix, spec: CompressSpec, group_size: int, note: str | None) -> LayerFormat:
    rank = max(spec.rank_space) if spec.rank_space else spec.rank
    largest = min(matrix.out_features, matrix.in_features)
    if rank > largest and spec.rank_space:
        raise RecipeError(
            f"compress.rank_space: {rank} is above the smaller side, {largest}, of "
            f"{matrix.name.removesuffix('.weight')}; lower it"
        )
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


def _problem(matrices: list[WeightMatrix], spec: CompressSpec) -> str:
    """What to say of layers with the same in-features, which the group size does not divide."""
    first, others = matrices[0], len(matrices) - 1
    sizes = [str(size) for size in divisors(first.in_features, below=first.in_features)]
    cure = f"use {' or '.join(sizes[-3:])}, or set" if sizes else "set"
    more = f" and {others} more" if others else ""
    return (
        f"compress.group_size={spec.group_size} does not divide in_features={first.in_features} of "
        f'{first.name.removesuffix(".weight")}{more}; {cure} compress.fallback = "int8"'
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
