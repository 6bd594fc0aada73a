"""Whether a model is as fast as its bytes promise."""

from ovexport.numbers import with_interval, written
from ovexport.report.names import titles
from ovexport.reports import BenchmarkReport


def promises(benchmark: BenchmarkReport) -> tuple[str, ...]:
    """A sentence for each model that reads fewer bytes for a token than the first one; none, where the limits were not
    measured."""
    reference = next(iter(benchmark.models))
    base = benchmark.models[reference].limit
    called, told = titles(benchmark), []
    for name, model in benchmark.models.items():
        ratios = benchmark.ratios.get(f"{name}/{reference}")
        if base is None or model.limit is None or ratios is None or model.limit.bytes_per_token >= base.bytes_per_token:
            continue
        ratio, share = ratios.time_per_output_token, model.limit.bytes_per_token / base.bytes_per_token
        if ratio.ci95 is None:
            verdict = f"too few sessions to judge that ({ratio.reason})"
        elif ratio.ci95[0] > share:
            verdict = "slower than its bytes promise"
        elif ratio.ci95[1] < share:
            verdict = "faster than its bytes promise"
        else:
            verdict = "the interval holds what its bytes promise"
        told.append(
            f"For each token {called[name]} reads {written(share, '.2f')} of the bytes that "
            f"{called[reference]} reads, and takes {with_interval(ratio.median, ratio.ci95, '.2f')} of "
            f"its time: {verdict}."
        )
    return tuple(told)
