"""What would stop the stage, found before any work: ranks that do not suit the adapters."""

from collections.abc import Iterator

from ovexport.checking import Finding, raised
from ovexport.recipe import SearchSpec
from ovexport.weights.ranks import RankSpace


def check(spec: SearchSpec, space: RankSpace | None) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        space: the ranks that the adapters can have; None if that is not known.
    """
    if spec.ranks is not None and space is not None:
        yield from raised(space.chosen, spec.ranks, "search.ranks")
