"""Section [model]."""

from typing import Literal

from ovexport.recipe.spec import Spec


class ModelSpec(Spec):
    """The model to compress.

    Attributes:
        id: a folder with a transformers checkpoint, or a hub id.
        revision: branch, tag or commit of the hub id.
        dtype: the weights' type; "auto" keeps the checkpoint's.
        trust_remote_code: run Python code that the checkpoint carries.
    """

    id: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
