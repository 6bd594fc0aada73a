"""How many values a bootstrap needs before its percentiles may be called a 95 % interval."""

FEWEST_VALUES = 5
"""Of 2 or 3 values the percentiles are hardly more than the least and the largest. Of so few they are still somewhat
narrow: of normal values they cover the true mean in 80 % of trials at 4, 84 % at 5, 89 % at 8 and 93 % at 24."""


def too_few(count: int, what: str) -> str | None:
    """Why there is no interval over so many values; None where there are enough.

    Args:
        what: the values are, such as "sessions".
    """
    if count >= FEWEST_VALUES:
        return None
    if count == 1:
        return f"1 {what.removesuffix('s')} is too few for an interval"
    return f"{count} {what} are too few for an interval"
