"""Stage search: the ranks of elastic adapters."""
