"""How much arithmetic rounding with calibration text takes: for `ovexport plan`."""

from collections.abc import Sequence

from ovexport.compress.moments import LARGEST_OUTPUTS
from ovexport.recipe import CompressSpec
from ovexport.weights.layer import LayerFormat
from ovexport.weights.policy import candidate_formats


def operations(layers: Sequence[LayerFormat], spec: CompressSpec, parameters: int, tokens: int) -> float:
    """Operations on numbers that the stage needs at least, a product and its sum counted as two; 0 where nothing is
    rounded with text.

    With both sides: 6 per parameter and token for the passes through the model (two forward, one back to the inputs);
    the second moments; then a layer's rounding, once for each format that a budget may give it. GPTQ needs the forward
    passes and the inputs' side alone.

    Args:
        layers: in the recipe's own format.
        parameters: of the model.
        tokens: of calibration text.
    """
    if not spec.rounds:
        return 0.0
    both = spec.rounding == "two_sided" or spec.budget is not None
    formats = candidate_formats(layers, spec) if spec.budget else {}
    total = (6.0 if both else 4.0) * parameters * tokens
    for layer in layers:
        if layer.encoding and layer.kind == "linear":
            total += tokens * _entries_of_moments(layer, both=both)
            total += len(formats.get(layer.name, (layer,))) * _rounding(layer, both=both)
    return total


def _entries_of_moments(layer: LayerFormat, *, both: bool) -> int:
    outputs = layer.out_features**2 if both and layer.out_features <= LARGEST_OUTPUTS else 0
    return layer.in_features**2 + outputs


def _rounding(layer: LayerFormat, *, both: bool) -> float:
    """What the errors of other entries add to the targets."""
    return float(layer.out_features * layer.in_features * (layer.in_features + (layer.out_features if both else 0)))
