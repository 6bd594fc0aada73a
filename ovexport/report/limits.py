"""What the machine allows at best, beside what was measured."""

from ovexport.report.table import PRODUCT, TITLES, with_interval
from ovexport.reports import BenchmarkReport


def promise(benchmark: BenchmarkReport) -> str | None:
    """Whether the product is as fast as its bytes promise; None where the limits were not measured."""
    reference = next(iter(benchmark.models))
    ratios = benchmark.ratios.get(f"{PRODUCT}/{reference}")
    models = benchmark.models
    if ratios is None or (limit := models[PRODUCT].limit) is None or (base := models[reference].limit) is None:
        return None
    ratio, share = ratios.time_per_output_token, limit.bytes_per_token / base.bytes_per_token
    title = TITLES.get(reference, reference)
    told = "slower than its bytes promise" if ratio.ci95[0] > share else "as fast as its bytes promise, or faster"
    return (
        f"For each token the product reads {share:.2f} of the bytes that {title} reads, and takes "
        f"{with_interval(ratio.median, ratio.ci95, '.2f')} of its time: {told}."
    )
