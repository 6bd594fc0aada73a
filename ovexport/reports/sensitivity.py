"""sensitivities.json."""

from typing import Annotated, Literal

from pydantic import Field

from ovexport.storage.records import Record
from ovexport.weights.encoding import Mode


class FormatCost(Record):
    """A format that a layer could have.

    Attributes:
        weight_bytes: of the layer in it.
        cost_nats: what the layer's rounding error adds to the divergence per token, by the second moments of its inputs
            and of the slopes at its outputs, times its block's correction.
    """

    mode: Mode
    group_size: int
    weight_bytes: int
    cost_nats: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerSensitivity(Record):
    """A layer, what each of its formats costs, and the one that was chosen, by its place among them."""

    name: str
    formats: tuple[FormatCost, ...]
    chosen: int


class BlockCorrection(Record):
    """A decoder block: its divergence with all of its layers in the recipe's own format, measured on calibration text,
    and what the moments say of it; their ratio corrects the costs of its layers."""

    block: str
    measured_nats: float
    predicted_nats: float


class FrontierPoint(Record):
    """The best choice at a size, by the costs."""

    weight_bytes: int
    cost_nats: float


class HeldOut(Record):
    """The mean divergence per token on the validation text, as rounded: of the choice, and of one format for all layers
    that takes as many bytes or the next fewer.

    Attributes:
        chosen_weight_bytes, uniform_weight_bytes: of all packed matrices.
        uniform_group_size: -1 where each output channel has one scale, as it has with 8 bits.
    """

    chosen_nats: float
    chosen_weight_bytes: int
    uniform_nats: float
    uniform_weight_bytes: int
    uniform_group_size: int


class SensitivityReport(Record):
    """sensitivities.json: how the formats of layers were chosen within a budget.

    Attributes:
        model_id: as the recipe names it.
        weights_sha256: of the names and contents of the model's matrices.
        limit_bytes: of all packed matrices.
        fixed_bytes: of the packed matrices whose format was not a choice, such as embeddings.
        layers: those with a choice.
        left_out: names of those that a budget would choose for and that have no cost, as they are in no block or never
            ran.
        taken: whether the choice was taken, or the uniform format because that was better on held-out text.
        frontier: sizes without the fixed matrices.
    """

    format_version: Literal[1] = 1
    model_id: str
    weights_sha256: str
    limit_bytes: int
    fixed_bytes: int
    layers: tuple[LayerSensitivity, ...]
    left_out: tuple[str, ...]
    blocks: tuple[BlockCorrection, ...]
    frontier: tuple[FrontierPoint, ...]
    held_out: HeldOut
    taken: Literal["chosen", "uniform"]
    versions: dict[str, str]
