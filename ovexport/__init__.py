"""ovexport: a PyTorch causal language model to an INT4 OpenVINO IR that is proven to be what was tuned.

The functions stand in `ovexport.api`, which is imported with the first of them that is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovexport.api import adopt, to_nncf

__version__ = "0.1.0"
__all__ = ["adopt", "to_nncf"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("ovexport.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
