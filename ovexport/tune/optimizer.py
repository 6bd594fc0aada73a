"""AdamW with a learning rate for each group of parameters, and moving averages of what it makes of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ovexport.recipe import TuneSpec

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over adapters, quantization ranges, zero points and norms, with the recipe's warm-up and schedule.

    Attributes:
        learning_rate: of the adapters, before warm-up and schedule.
        updates: how often the parameters were changed.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], spec: TuneSpec, learning_rate: float, steps: int
    ) -> None:
        """An optimizer that has done nothing yet.

        Args:
            parameters: by "LAYER.PARAMETER"; a norm by its own name.
            steps: over which the schedule goes.
        """
        self.learning_rate = learning_rate
        self.updates = 0
        self._parameters = parameters
        self._spec = spec
        self._steps = steps
        groups = [group for group in _groups(parameters, spec, learning_rate) if group["params"]]
        self.adamw = torch.optim.AdamW(groups or [{"params": [torch.zeros(0)]}])
        self._base_rates = [group["lr"] for group in self.adamw.param_groups]

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the step that was scheduled last, by group."""
        return {str(group.get("name")): float(group["lr"]) for group in self.adamw.param_groups}

    def schedule(self, step: int) -> None:
        """Set the learning rates of a step."""
        factor = self._spec.learning_rate_factor(step, self._steps)
        for group, rate in zip(self.adamw.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    def clip_gradients(self) -> float:
        """Scale the gradients down to the recipe's norm.

        Returns:
            Their norm before that.
        """
        graded = [value for value in self._parameters.values() if value.grad is not None]
        return float(nn.utils.clip_grad_norm_(graded, self._spec.max_gradient_norm))

    def update(self) -> None:
        """Change the parameters by their gradients."""
        self.adamw.step()
        self.updates += 1

    def moments(self) -> dict[str, Tensor]:
        """AdamW's two moments of each parameter, by "MOMENT/LAYER.PARAMETER"; none before the first update."""
        tensors: dict[str, Tensor] = {}
        for key, value in self._parameters.items():
            state = self.adamw.state.get(value, {})
            tensors |= {f"{moment}/{key}": state[moment] for moment in _MOMENTS if moment in state}
        return tensors

    def moment_names(self, updates: int) -> list[str]:
        """What `moments` holds after so many updates."""
        return [f"{moment}/{key}" for moment in _MOMENTS for key in self._parameters] if updates else []

    def restore(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Go on after so many updates, with what `moments` gave then."""
        self.updates = updates
        if not updates:
            return
        for key, parameter in self._parameters.items():
            state = {moment: moments[f"{moment}/{key}"] for moment in _MOMENTS}
            self.adamw.state[parameter] = {"step": torch.tensor(float(updates)), **state}


class MovingAverages:
    """Moving averages of parameters; of none where the recipe wants none.

    Attributes:
        values: by "LAYER.PARAMETER".
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.values = {key: value.detach().clone() for key, value in parameters.items()} if decay else {}

    def follow(self, updates: int) -> None:
        """Take in the parameters after so many updates; the decay rises from 0.1, so the start is soon forgotten."""
        decay = min(self._decay, updates / (9 + updates))
        for key, average in self.values.items():
            average.lerp_(self._parameters[key].detach(), 1 - decay)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go on with averages that were saved."""
        for key, average in self.values.items():
            average.copy_(values[key])


def _groups(parameters: Mapping[str, nn.Parameter], spec: TuneSpec, learning_rate: float) -> list[dict[str, Any]]:
    """Adapters, ranges, zero points and norms, each with its learning rate and weight decay."""
    scale_rate = learning_rate / 10 if spec.scale_learning_rate is None else spec.scale_learning_rate
    rates = {
        "adapters": (learning_rate, spec.weight_decay),
        "scales": (scale_rate, 0.0),
        "zero_points": (spec.zero_point_learning_rate, 0.0),
        "norms": (spec.norm_learning_rate, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for key, value in parameters.items():
        members[_group_of(key)].append(value)
    return [
        {"name": name, "params": members[name], "lr": rate, "weight_decay": decay}
        for name, (rate, decay) in rates.items()
    ]


def _group_of(key: str) -> str:
    if ".lora_" in key:
        return "adapters"
    if key.endswith((".weight", ".bias")):
        return "norms"
    return "zero_points" if key.endswith(".zero_point") else "scales"
