"""Stage report: what a run found, for a person: report.html and the model card, from the run's files alone."""

from ovexport.report.compare import write_comparison
from ovexport.report.page import write_report
from ovexport.report.table import ComparisonRow, comparison

__all__ = ["ComparisonRow", "comparison", "write_comparison", "write_report"]
