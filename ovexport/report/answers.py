"""Two answers side by side: what they have in common, and where they part."""

import re
from dataclasses import dataclass

from ovexport.reports import WorstAnswer


@dataclass(frozen=True, slots=True)
class Parted:
    """A text cut where it first differs from another.

    Attributes:
        common: what both begin with.
        different: from the first difference to the end of that word; empty where the text ends there.
        rest: what follows.
    """

    common: str
    different: str
    rest: str


def part(answer: WorstAnswer) -> tuple[Parted, Parted]:
    """The reference's answer and the candidate's."""
    return _cut(answer.reference, answer.first_difference), _cut(answer.candidate, answer.first_difference)


def _cut(text: str, where: int) -> Parted:
    word = re.compile(r"\s*\S*").match(text, where)
    end = word.end() if word else len(text)
    return Parted(common=text[:where], different=text[where:end], rest=text[end:])
