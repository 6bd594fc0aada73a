"""search.json."""

from ovexport.storage.records import Record


class RankScore(Record):
    """A configuration that the search tried.

    Attributes:
        ranks: one for each unit.
        source: "median", "most frequent", "least loss", "largest", "smallest" or "evolution".
        sample_nll_nats, validation_nll_nats: mean -log p(token) of the right answers on the sample, and on the whole
            validation split; None for one that was no finalist.
        seconds: that its scores took.
    """

    ranks: tuple[int, ...]
    source: str
    sample_nll_nats: float
    validation_nll_nats: float | None = None
    seconds: float


class SearchReport(Record):
    """search.json: how the ranks of FQ_LORA_NLS adapters were chosen.

    Attributes:
        units: the transformer blocks, or Linear layers, that have a rank each.
        scores: best on the sample first.
    """

    units: tuple[str, ...]
    rank_space: tuple[int, ...]
    chosen: tuple[int, ...]
    scores: tuple[RankScore, ...]
    sample_examples: int
    validation_examples: int
    versions: dict[str, str]
