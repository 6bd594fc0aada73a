"""Where a model's divergence comes from: its weights, the KV cache, dynamic quantization, or activations.

Each step runs the model with one of the runtime's approximations more than none, against the reference with none; the
last one as the runtime and the IR have it by themselves. The reference under the same settings stands beside it, as
what an approximation costs any model is no fault of 4-bit weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.evaluate.divergence import Resampling, TokenFigures, compare, perplexity
from ovexport.openvino.runtime import ACCURATE, PIECE_TOKENS, LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.progress import Listener
from ovexport.reports import IsolationStep

_KEPT_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    name: str
    settings: Mapping[str, Any]
    needs: str | None = None


_STEPS = (
    _Step(name="weights", settings=ACCURATE),
    _Step(name="kv_cache", settings={**ACCURATE, "KV_CACHE_PRECISION": "u8"}),
    _Step(name="dynamic_quantization", settings={**ACCURATE, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}),
    _Step(name="activations", settings={**ACCURATE, "INFERENCE_PRECISION_HINT": "bf16"}, needs="BF16"),
    _Step(name="deployment", settings={}),
)


class KeptRunner(LogitsRunner):
    """Keeps the logits that it gave and gives them again, as far as they fit into `kept_bytes`."""

    def __init__(self, graph: ov.Model, name: str, kept_bytes: int = _KEPT_BYTES) -> None:
        super().__init__(graph, name)
        self._free_bytes = kept_bytes
        self._kept: dict[tuple[bytes, int], list[NDArray[np.float32]]] = {}

    def pieces(self, tokens: NDArray[np.int64], longest: int) -> Iterator[NDArray[np.float32]]:
        """As a LogitsRunner's."""
        asked, size = (tokens.tobytes(), longest), tokens.size * self.vocabulary * np.dtype(np.float32).itemsize
        if asked not in self._kept and size > self._free_bytes:
            return super().pieces(tokens, longest)
        if asked not in self._kept:
            self._free_bytes -= size
            self._kept[asked] = [logits.copy() for logits in super().pieces(tokens, longest)]
        return iter(self._kept[asked])


def isolate(
    models: Mapping[str, IR],
    reference: str,
    tokens: NDArray[np.int32],
    batch_size: int,
    resampling: Resampling,
    listener: Listener,
) -> dict[str, tuple[IsolationStep, ...]]:
    """The steps of every model but the reference.

    Args:
        tokens: (sequences, length).
    """
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    by_model: dict[str, list[IsolationStep]] = {name: [] for name in models if name != reference}
    exact = KeptRunner(running_graph(models[reference]), reference)
    for step in _STEPS:
        asked = {name: str(value) for name, value in step.settings.items()}
        if step.needs is not None and step.needs not in capabilities:
            reason = f"this processor has no instructions for {step.needs}"
            for steps in by_model.values():
                steps.append(IsolationStep(name=step.name, settings=asked, reason=reason))
            continue
        approximate = {name: LogitsRunner(running_graph(ir), name, step.settings) for name, ir in models.items()}
        runners = {"": exact} | approximate
        figures = compare(runners, "", tokens, batch_size, listener, piece=PIECE_TOKENS, task=f"isolating {step.name}")
        for name, steps in by_model.items():
            steps.append(_measured(step.name, asked, approximate[name], figures[name], figures[reference], resampling))
    return {name: tuple(steps) for name, steps in by_model.items()}


def _measured(
    name: str,
    settings: dict[str, str],
    runner: LogitsRunner,
    figures: TokenFigures,
    of_reference: TokenFigures,
    resampling: Resampling,
) -> IsolationStep:
    kl = figures.joined("kl")
    return IsolationStep(
        name=name,
        settings=settings,
        runtime=runner.properties,
        kl_mean_nats=float(kl.mean()),
        kl_mean_ci95=resampling.interval(resampling.means(kl)[:, 0]),
        same_top1=float(figures.joined("same_top1").mean()),
        perplexity=perplexity(figures),
        reference_kl_mean_nats=float(of_reference.joined("kl").mean()),
    )
