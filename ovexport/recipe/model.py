"""Section [model]."""

from typing import Annotated, Literal

from pydantic import Field

from ovexport.recipe.spec import Spec


class ModelSpec(Spec):
    """The model to compress.

    Attributes:
        id: a folder with a transformers checkpoint, or a hub id.
        revision: branch, tag or commit of the hub id.
        dtype: dtype of the weights; "auto" keeps the checkpoint's.
        trust_remote_code: run Python code that comes with the checkpoint.
        adapter: a folder with a LoRA adapter that PEFT saved. It is merged with the model's weights, and the sum is
            what the run takes for the uncompressed model, everywhere.
    """

    id: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False
    adapter: str | None = None
