"""How many tokens a model reads at once, as its configuration says. Needs no torch: an IR has a config.json too."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ovexport.artifacts import IR
from ovexport.errors import RecipeError
from ovexport.storage.bounded import parse_json, read_bytes

_NAMES = ("max_position_embeddings", "n_positions")


def readable_tokens(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model can read at once; None where its configuration sets no limit."""
    text = config.get("text_config")
    values = text if isinstance(text, Mapping) else config
    positions = next((values[name] for name in _NAMES if values.get(name) is not None), None)
    if type(positions) is not int or positions < 1:
        return None
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        return positions
    original = scaling.get("original_max_position_embeddings")
    return max(positions, int(factor * (original if isinstance(original, int) else positions)))


def readable_by_all(models: Iterable[IR]) -> int | None:
    """The least of what the models can read, by the config.json of each; None where none of them has a limit."""
    known = [limit for ir in models if (limit := _of(ir)) is not None]
    return min(known, default=None)


def require_readable(tokens: int, positions: int | None, what: str) -> None:
    """Refuse more tokens than a model can read.

    Args:
        what: they are, with the settings to lower.

    Raises:
        RecipeError: they are too many.
    """
    if positions is not None and tokens > positions:
        raise RecipeError(f"{what}: {tokens} tokens, and the model reads {positions} at most; lower it")


def _of(ir: IR) -> int | None:
    try:
        config = parse_json(read_bytes(ir.path / "config.json"))
    except (OSError, ValueError):
        return None  # an IR of another tool may have none, and nothing is known then
    return readable_tokens(config) if isinstance(config, dict) else None
