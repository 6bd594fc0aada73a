"""How far tuning has moved the quantized weights."""

import torch

from ovexport.artifacts import Checkpoint
from ovexport.models.student import Student
from ovexport.weights.adapters import load_quantizer
from ovexport.weights.quantizer import Codes


@torch.no_grad()
def moved_fractions(student: Student, start: Checkpoint) -> dict[str, float]:
    """Shares of the codes, scales and zero points that are not those of the starting point.

    Of the parameters as they are, not of their averages, and with the ranks of the next step.

    Returns:
        "codes_moved", "scales_moved" and, where there are any, "zero_points_moved", each from 0 to 1.
    """
    moved: dict[str, int] = {}
    counted: dict[str, int] = {}
    adapters = start.adapters
    for name, quantizer in student.quantizers.items():
        if not quantizer.layer.rank:
            continue
        starting = load_quantizer(quantizer.layer, adapters).to(student.device)
        starting.active_rank = quantizer.active_rank
        weight = student.base_weights[name]
        before, now = _parts(starting.quantize(weight)), _parts(quantizer.quantize(weight))
        for part, values in before.items():
            moved[part] = moved.get(part, 0) + int((values != now[part]).sum())
            counted[part] = counted.get(part, 0) + values.numel()
    return {f"{part}_moved": moved[part] / counted[part] for part in moved if counted[part]}


def _parts(codes: Codes) -> dict[str, torch.Tensor]:
    parts = {"codes": codes.codes, "scales": codes.scale, "zero_points": codes.zero_point}
    return {name: values for name, values in parts.items() if values is not None}
