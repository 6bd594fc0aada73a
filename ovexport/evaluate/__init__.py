"""Stage evaluate: how far a model's outputs are from the BF16 model's, token by token and answer by answer."""

from ovexport.evaluate.check import check
from ovexport.evaluate.comparison import evaluate
from ovexport.evaluate.encoder import check_encoder, load_encoder
from ovexport.evaluate.ground_truth import read_ground_truth
from ovexport.evaluate.prompts import choose_prompts

__all__ = ["check", "check_encoder", "choose_prompts", "evaluate", "load_encoder", "read_ground_truth"]
