"""What is said of a run before any work: problems, which stop it, and cautions, which do not."""

from collections.abc import Callable, Iterable, Iterator
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


def sorted_problems(findings: Iterable[Finding]) -> list[OvexportError]:
    """The problems, each once, in the order of their exit codes."""
    problems = {str(finding): finding for finding in findings if isinstance(finding, OvexportError)}
    return sorted(problems.values(), key=lambda problem: problem.exit_code)


def require_runnable(findings: Iterable[Finding]) -> None:
    """Refuse what has problems.

    Raises:
        OvexportError: with every problem at once, of the class of the first.
    """
    problems = sorted_problems(findings)
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))
