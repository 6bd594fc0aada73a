"""Section [gates], and the grammar of a condition."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BeforeValidator

from ovexport.errors import RecipeError

Operator = Literal["<", "<=", "==", ">=", ">"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A figure and a limit that it has to keep; ovexport.gates knows the figures' names."""

    metric: str
    operator: Operator
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:.12g}"


def _comparisons(condition: str) -> list[tuple[Operator, float]]:
    """The operators and limits of a condition, such as ">=0.9" or ">=0.9, <1".

    Raises:
        ValueError: it is not a condition.
    """
    comparisons: list[tuple[Operator, float]] = []
    for part in condition.split(","):
        match = re.fullmatch(r"\s*(<=|>=|==|<|>)\s*([^\s<>=]+)\s*", part)
        try:
            limit = float(match[2]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            operators = ", ".join(get_args(Operator))
            raise ValueError(
                f'{part.strip()!r} is not a condition; write one of {operators} and a number, as in ">=0.9"'
            )
        comparisons.append((cast(Operator, match[1]), limit))
    return comparisons


def _condition(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{value!r} is not a condition; write an operator too, in quotes, as in ">=0.9"')
    _comparisons(value)
    return value


def _metric(name: str) -> str:
    """The figure's name without blanks, which are of no account: "int4 - plain.kl_mean_nats"."""
    bare = "".join(name.split())
    if not bare or any(character in "<>=," for character in bare):
        raise ValueError(f"{name!r} is not the name of a figure; write one such as similarity")
    return bare


def dotted_names(table: Any) -> Any:
    """TOML reads an unquoted `plain.kl_mean_nats` as a table in a table; here the name is the whole path."""
    return dict(_leaves(table, "")) if isinstance(table, dict) else table


def _leaves(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


Metric = Annotated[str, AfterValidator(_metric)]
Condition = Annotated[str, BeforeValidator(_condition)]


def parse_gates(texts: Iterable[str]) -> dict[str, str]:
    """What `--gate` options say, as a recipe's section [gates].

    Args:
        texts: a figure's name and its condition each, such as "similarity>=0.9".

    Raises:
        RecipeError: with every problem at once.
    """
    conditions: dict[str, list[str]] = {}
    problems = []
    for text in texts:
        name = re.split("[<>=]", text, maxsplit=1)[0]
        try:
            conditions.setdefault(_metric(name), []).append(_condition(text[len(name) :]))
        except ValueError as error:
            problems.append(f'--gate "{text}": {error}')
    if problems:
        raise RecipeError("; ".join(problems))
    return {metric: ", ".join(texts) for metric, texts in conditions.items()}


def list_gates(gates: Mapping[str, str]) -> tuple[Gate, ...]:
    """Each limit of a section [gates]."""
    return tuple(
        Gate(metric=metric, operator=operator, limit=limit)
        for metric, condition in gates.items()
        for operator, limit in _comparisons(condition)
    )
