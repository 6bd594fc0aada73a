"""What a model is called in tables and plots: how its weights are stored, and whether tuning changed them.

The names in a report, "bf16", "plain" and "int4", are those of a run's folders and say neither; its conditions do.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ovexport.artifacts import MODELS
from ovexport.reports import BenchmarkReport, EvaluationReport

NOT_TUNED = "it took no step, or no step validated better than the starting point"
"""Why a product is not tuned."""

PRODUCT = MODELS[-1]
PLAIN = "plain"
_UNDESCRIBED = {"bf16": "uncompressed", PLAIN: "INT4, not tuned", PRODUCT: "INT4", "torch": "in torch"}
_TUNING = {None: "", 0: ", not tuned"}

AnyReport = EvaluationReport | BenchmarkReport


class Titles(dict[str, str]):
    """What models are called, by their names in the reports; any other name is its own title."""

    def __missing__(self, name: str) -> str:
        return name


def titles(*reports: AnyReport | None) -> Titles:
    """What stands for the models of a run's reports; models of other names keep them. No two are called the same."""
    described = _described(reports)
    by_name = {name: _title(name, described.get(name, {})) for name in dict.fromkeys((*_UNDESCRIBED, *described))}
    named = dict.fromkeys(name for report in reports if report for name in report.models)
    given = [by_name[name] for name in named if name in by_name]
    doubled = {title for title in given if given.count(title) > 1}
    return Titles({name: f"{title} ({name})" if title in doubled else title for name, title in by_name.items()})


def tuned(*reports: AnyReport | None) -> bool | None:
    """Whether tuning is in the product's weights; None where the reports do not say."""
    steps = _described(reports).get(PRODUCT, {}).get("tuning_steps")
    return None if steps is None else steps > 0


def _described(reports: Iterable[AnyReport | None]) -> dict[str, Mapping[str, Any]]:
    """What each model is, as ovexport.openvino.identity says."""
    return {name: one for report in reports if report for name, one in report.conditions.get("models", {}).items()}


def _title(name: str, one: Mapping[str, Any]) -> str:
    if name not in _UNDESCRIBED:
        return name
    if not one:
        return _UNDESCRIBED[name]
    beside = " and adapter" if "adapter" in one else ""
    return f"{one['weights']}{beside}{_TUNING.get(one.get('tuning_steps'), ', tuned')}"
