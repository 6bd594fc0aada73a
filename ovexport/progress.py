"""How long work tells how far it is: stages call a listener, and the command line draws it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A moment of long work.

    Attributes:
        task: what is done, in a word or two.
        done, total: in units of the task.
        figures: what is worth showing now, with the unit in the name, such as {"tokens_per_s": 5100.0}.
    """

    task: str
    done: int
    total: int
    figures: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A listener that shows nothing."""
