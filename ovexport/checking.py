"""What is said of a run before any work: problems, which stop it, and cautions, which do not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ovexport.errors import OvexportError


@dataclass(frozen=True, slots=True)
class Caution:
    """What a run does otherwise than its recipe asks, or what could not be looked at."""

    text: str

    def __str__(self) -> str:
        return self.text


Finding = OvexportError | Caution


def raised(check: Callable[..., object], *arguments: object) -> Iterator[OvexportError]:
    """What a check raises, as a finding; nothing when it passes."""
    try:
        check(*arguments)
    except OvexportError as error:
        yield error
