"""Stage evaluate: how far a model's outputs are from the BF16 model's, token by token and answer by answer."""

from ovexport.evaluate.comparison import evaluate
from ovexport.evaluate.encoder import check_encoder, load_encoder

__all__ = ["check_encoder", "evaluate", "load_encoder"]
