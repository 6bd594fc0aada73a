"""The output head: from hidden states to logits, a few tokens at a time."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.errors import UnsupportedModelError

_PROBED_TOKENS = 8


class Head:
    """logits = cap · tanh(factor · (hidden · Wᵀ + bias) / cap), where a model has a factor or a cap.

    Args:
        weight: (vocabulary, hidden size); products are in its type, everything after in float32.
        factor: what Cohere (`logit_scale`) and Granite (`logits_scaling`) multiply the logits with.
        cap: Gemma 2's `final_logit_softcapping`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, factor: float, cap: float | None) -> None:
        self.weight = weight
        self.bias = bias
        self.factor = factor
        self.cap = cap

    @classmethod
    def of(cls, network: PreTrainedModel) -> "Head":
        """The head of a model; it shares the memory of the weights that the model has now."""
        output = network.get_output_embeddings()
        config = network.config.get_text_config()
        factor = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
        bias = getattr(output, "bias", None)
        return cls(
            output.weight.detach(),
            None if bias is None else bias.detach().float(),
            factor,
            getattr(config, "final_logit_softcapping", None),
        )

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head with products in another type."""
        return Head(self.weight.to(dtype), self.bias, self.factor, self.cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, (tokens, vocabulary) float32, of hidden states, (tokens, hidden size)."""
        logits = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        if self.bias is not None:
            logits += self.bias
        if self.factor != 1:
            logits *= self.factor
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the hidden states from that of the logits, which is overwritten.

        Args:
            logits: as they came out, where the model caps them; anything else where it does not.
        """
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap) ** 2
        if self.factor != 1:
            gradient *= self.factor
        return gradient.to(self.weight.dtype) @ self.weight


def hidden_states(network: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the head reads: (sequences, length, hidden size)."""
    states: Tensor = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def gives_logits(head: Head, network: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a model's logits are `head` of its last hidden states and nothing else.

    Args:
        ids: some sequences; the first tokens of the first are looked at.

    Raises:
        UnsupportedModelError: the logits are not finite.
    """
    sample = ids[:1, :_PROBED_TOKENS]
    theirs: Any = network(input_ids=sample, use_cache=False).logits[0].float()
    if not torch.isfinite(theirs).all():
        raise UnsupportedModelError(
            f"{type(network).__name__}: its logits are not finite on the text, so its weights overflow; give a sound "
            "checkpoint"
        )
    ours = head.logits(hidden_states(network, sample)[0])
    tolerance = 1e-2 * float(theirs.abs().max())
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-2, atol=tolerance)
