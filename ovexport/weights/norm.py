"""A normalization layer's weight or bias that was tuned: what a checkpoint records of it."""

from typing import Literal

from ovexport.storage.records import Record


class TunedNorm(Record):
    """A tuned parameter of an RMSNorm or LayerNorm, which stays in float32.

    Attributes:
        name: the parameter in the PyTorch model, such as "model.layers.0.input_layernorm.weight".
        shape: of the parameter.
        added: what the model adds to the parameter before it is used: 1 in Gemma's (1 + weight), 0 elsewhere. The graph
            holds the sum, rounded to float32.
        base_digest: SHA-256 of that sum's bytes in the base model.
    """

    name: str
    shape: tuple[int, ...]
    added: Literal[0, 1]
    base_digest: str
