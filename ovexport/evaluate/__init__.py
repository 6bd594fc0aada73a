"""Stage evaluate: how far a model's outputs are from the BF16 model's, token by token and answer by answer."""

from ovexport.evaluate.comparison import evaluate, load_encoder

__all__ = ["evaluate", "load_encoder"]
