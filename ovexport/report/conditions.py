"""Conditions as rows that a person reads, and what differs between those of several runs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ovexport.report.table import NOT_MEASURED, ComparisonRow, Findings


def condition_rows(conditions: Mapping[str, Any]) -> dict[str, str]:
    """Each condition with its text; nested ones have names such as "runtime.int4.KV_CACHE_PRECISION"."""
    rows: dict[str, str] = {}
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            rows |= {f"{name}.{inner}": text for inner, text in condition_rows(value).items()}
        else:
            rows[name] = value if isinstance(value, str) else json.dumps(value)
    return rows


def conditions_of(findings: Findings) -> dict[str, dict[str, str]]:
    """The conditions of a run, by what was measured under them."""
    reports = {"quality": findings.evaluation, "speed and memory": findings.benchmark}
    return {name: condition_rows(report.conditions) for name, report in reports.items() if report}


def differing_conditions(runs: Sequence[Findings]) -> tuple[ComparisonRow, ...]:
    """The conditions and versions that are not the same in all the runs that have them."""
    flat = [_all_conditions(findings) for findings in runs]
    names = dict.fromkeys(name for rows in flat for name in rows)
    rows = [ComparisonRow(name, tuple(run.get(name, NOT_MEASURED) for run in flat)) for name in names]
    return tuple(row for row in rows if len(set(row.values)) > 1)


def _all_conditions(findings: Findings) -> dict[str, str]:
    measured = {
        f"{section}: {name}": text for section, rows in conditions_of(findings).items() for name, text in rows.items()
    }
    reports = (findings.evaluation, findings.benchmark)
    return measured | {
        f"version: {name}": text for report in reports if report for name, text in report.versions.items()
    }
