"""Figures as text: the one home of how a number is written, for terminal, page, card and gates."""

from math import floor, isfinite, log10

_SIGNIFICANT = 2
_MOST_DECIMALS = 8
_LARGEST_WHOLE = 1e15


def written(value: float, form: str) -> str:
    """A figure in a form such as ".2f" or ".1%", with more decimals where fewer than two significant digits were left.

    So 0.0000123 in ".5f" is "0.000012", never "0.00000"; what takes more than eight decimals is "1.2e-09".

    Args:
        form: "." with the number of decimals, and "f", or "%" for a share.
    """
    decimals, unit = int(form[1:-1]), form[-1]
    scaled = abs(value) * (100 if unit == "%" else 1)
    if scaled and isfinite(scaled):
        decimals = max(decimals, _SIGNIFICANT - 1 - floor(log10(max(scaled, round(scaled, decimals)))))
    if decimals <= _MOST_DECIMALS:
        text = format(value, f".{decimals}{unit}")
    else:
        text = f"{100 * value:.1e}%" if unit == "%" else f"{value:.1e}"
    return f"−{text[1:]}" if text.startswith("-") else text


def with_interval(value: float, ci95: tuple[float, float] | None, form: str) -> str:
    """A figure and its 95 % interval, where there is one, such as "0.61 (0.59–0.64)"."""
    if ci95 is None:
        return written(value, form)
    return f"{written(value, form)} ({between(*(written(end, form) for end in ci95))})"


def number(value: float) -> str:
    """A figure of any kind: whole numbers whole, others with six significant digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < _LARGEST_WHOLE else f"{value:.6g}"


def number_with_interval(value: float, ci95: tuple[float, float] | None) -> str:
    """A figure of any kind and its 95 % interval, whose ends have four significant digits."""
    return number(value) if ci95 is None else f"{number(value)} ({between(*(f'{end:.4g}' for end in ci95))})"


def between(low: str, high: str) -> str:
    """The two ends of an interval with a dash between them, or "to" where the dash could be taken for a minus."""
    return f"{low} to {high}" if low.startswith(("-", "−")) else f"{low}–{high}"
