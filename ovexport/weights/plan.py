"""The fate of every weight matrix of a model: a pure function of shapes and the recipe."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from ovexport.errors import OvexportError, RecipeError, UnsupportedModelError
from ovexport.recipe import CompressSpec, LayerMode, TunedMode
from ovexport.weights.group_sizes import computed_rightly
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.policy import (
    LayerPolicy,
    LayerRefused,
    format_layer,
    layer_policies,
    name_matches,
    own_format,
)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of every matrix, and what can't be done.

    Attributes:
        layers: all of them; those that can't be done are in floating point here, and their note says why.
        unsuitable: the names of those.
        problems: each of the recipe's or the model's once, with the layers that it is about.
        held_as_codes: the names of those that the model's checkpoint holds as codes.
    """

    layers: tuple[LayerFormat, ...] = ()
    unsuitable: frozenset[str] = frozenset()
    problems: tuple[OvexportError, ...] = ()
    held_as_codes: frozenset[str] = frozenset()


def plan_layers(matrices: Iterable[WeightMatrix], spec: CompressSpec) -> tuple[LayerFormat, ...]:
    """Decide mode, group size and rank of every matrix.

    Raises:
        RecipeError: `group_size` does not divide some in-features and `fallback` is "error"; all of them are named.
            Or a pattern matches nothing, or a rank of the rank space is above a layer's smaller side.
        PlugInError: the layer policy is a plug-in's and fails.
        UnsupportedModelError: a matrix can't be compressed whatever the recipe says.
    """
    plan = examine_layers(matrices, spec)
    if plan.problems:
        raise type(plan.problems[0])("; ".join(map(str, plan.problems)))
    return plan.layers


def examine_layers(matrices: Iterable[WeightMatrix], spec: CompressSpec) -> LayerPlan:
    """Decide mode, group size and rank of every matrix, and mark those that can't be done."""
    matrices = tuple(matrices)
    try:
        policy = _policy(spec, matrices)
    except OvexportError as error:
        return LayerPlan(problems=(error,))
    problems: dict[str, OvexportError] = {
        str(problem): problem for problem in (*_unmatched(matrices, spec), *_other_codes(matrices, spec))
    }
    refused: dict[tuple[object, ...], tuple[LayerRefused, list[WeightMatrix]]] = {}
    unsuitable: list[str] = []
    layers: list[LayerFormat] = []
    for matrix in matrices:
        try:
            layers.append(_by_engine(_format(matrix, spec, policy), spec))
            continue
        except LayerRefused as error:
            refused.setdefault((error.note, error.before, error.after), (error, []))[1].append(matrix)
            note = error.note
        except OvexportError as error:
            problems[str(error)] = error
            note = str(error)
        layers.append(format_layer(matrix, "float", note=note))
        unsuitable.append(matrix.name)
    problems |= {reason.before + reason.after: reason.problem(group) for reason, group in refused.values()}
    if not problems and not any(layer.encoding for layer in layers):
        problems = {"": _nothing_left(spec)}
    held = frozenset(matrix.name for matrix in matrices if matrix.own)
    return LayerPlan(tuple(layers), frozenset(unsuitable), tuple(problems.values()), held)


def _by_engine(layer: LayerFormat, spec: CompressSpec) -> LayerFormat:
    """The format with the arithmetic of the recipe's engine."""
    return layer.with_values(arithmetic="nncf") if spec.engine == "nncf" and layer.encoding else layer


def _format(matrix: WeightMatrix, spec: CompressSpec, policy: LayerPolicy) -> LayerFormat:
    """The fate of one matrix.

    Raises:
        OvexportError: there is none.
    """
    if matrix.problem:
        raise LayerRefused(note=matrix.problem, after=f": {matrix.problem}", error=UnsupportedModelError)
    if any(name_matches(matrix.name, pattern) for pattern in spec.ignored):
        return format_layer(matrix, "float", note="left out by compress.ignored")
    return policy(matrix) if matrix.own is None else own_format(matrix, matrix.own, spec)


def _policy(spec: CompressSpec, matrices: Sequence[WeightMatrix]) -> LayerPolicy:
    """The recipe's policy; what a plug-in's returns is checked.

    Raises:
        RecipeError: there is none of that name.
        PlugInError: it fails.
    """
    registered = layer_policies.load(spec.layer_policy, "compress.layer_policy")
    with registered.guarded():
        policy = registered.thing(spec, matrices)
    if registered.provider is None:
        return policy

    def checked(matrix: WeightMatrix) -> LayerFormat:
        with registered.guarded():
            layer = policy(matrix)
        problem = _problem(layer, matrix, spec)
        if problem:
            name = matrix.name.removesuffix(".weight")
            raise registered.failure(f"its format of {name} {problem}")
        return layer

    return checked


def _problem(layer: LayerFormat, matrix: WeightMatrix, spec: CompressSpec) -> str | None:
    """Why a format that a plug-in gives can't be a matrix's; None where it can."""
    if not isinstance(layer, LayerFormat):
        return f"is a {type(layer).__name__}, not a LayerFormat"
    expected = format_layer(matrix, "float")
    same = ("name", "kind", "out_features", "in_features", "transposed", "arithmetic", "active_rank")
    if any(getattr(layer, key) != getattr(expected, key) for key in same):
        return "is another matrix's; make it with format_layer"
    if layer.mode not in get_args(LayerMode):
        return f"has mode {layer.mode}; the modes are {', '.join(get_args(LayerMode))}"
    if layer.mode in get_args(TunedMode):
        return _problem_of_tuned(layer, matrix, spec)
    whole = layer.group_size == matrix.in_features and layer.rank == 0
    return None if whole else f"has mode {layer.mode}, which takes no group_size and no rank"


def _problem_of_tuned(layer: LayerFormat, matrix: WeightMatrix, spec: CompressSpec) -> str | None:
    if matrix.kind != "linear" and layer.rank:
        return f"has rank={layer.rank}; what is no Linear layer takes no adapter"
    if matrix.in_features % layer.group_size or not computed_rightly(layer.group_size, matrix.in_features):
        return f"has group_size={layer.group_size}, which does not suit in_features={matrix.in_features}"
    if spec.rank_space and matrix.kind == "linear":
        largest = max(spec.rank_space)
        return None if layer.rank == largest else f"has rank={layer.rank}, and the largest of rank_space is {largest}"
    largest = min(matrix.out_features, matrix.in_features)
    return None if 0 <= layer.rank <= largest else f"has rank={layer.rank}, which is not from 0 to {largest}"


def _unmatched(matrices: Sequence[WeightMatrix], spec: CompressSpec) -> Iterator[OvexportError]:
    """Patterns that no layer's name matches."""
    names = ", ".join(matrix.name.removesuffix(".weight") for matrix in matrices[:3])
    patterns = [("compress.ignored", pattern) for pattern in spec.ignored]
    patterns += [
        (f"compress.layers.{number}.pattern", pattern)
        for number, rule in enumerate(spec.layers)
        for pattern in rule.pattern
    ]
    for key, pattern in patterns:
        if not any(name_matches(matrix.name, pattern) for matrix in matrices):
            yield RecipeError(f"{key}={pattern!r}: no layer has such a name; they read like {names}")


def _other_codes(matrices: Sequence[WeightMatrix], spec: CompressSpec) -> Iterator[OvexportError]:
    """Starting points that would give a layer other codes than its checkpoint has."""
    if not any(matrix.own for matrix in matrices):
        return
    for key in ("starting_point", "awq", "scale_estimation"):
        if value := getattr(spec, key):
            yield RecipeError(
                f"compress.{key}={value!r}: the model's weights are 4-bit codes already, which it would change; leave "
                "it out, or give the model that they were made from"
            )


def _nothing_left(spec: CompressSpec) -> RecipeError:
    keys = [f"compress.ignored={list(spec.ignored)}"] if spec.ignored else []
    keys += ["compress.layers"] if spec.layers else []
    keys += [f"compress.layer_policy={spec.layer_policy!r}"] if spec.layer_policy != "recipe" else []
    return RecipeError(f"{' and '.join(keys)} leaves nothing to compress; name fewer layers")
