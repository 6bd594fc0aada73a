"""What a bootstrap needs before its percentiles may be called an interval.

From few values there are few resamples, and their percentiles are hardly more than the least and the largest value:
from two, the interval is those two.
"""

FEWEST_VALUES = 5


def too_few(count: int, what: str) -> str | None:
    """Why there is no interval over so many values; None where there are enough.

    Args:
        what: the values are, such as "sessions".
    """
    if count >= FEWEST_VALUES:
        return None
    return f"{count} {what.removesuffix('s') if count == 1 else what}: a 95 % interval takes {FEWEST_VALUES}"
