"""Stage search: the ranks of elastic adapters (FQ_LORA_NLS) are chosen."""

from ovexport.search.check import check
from ovexport.search.stage import search

__all__ = ["check", "search"]
