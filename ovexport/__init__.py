"""ovexport: a PyTorch causal language model to an INT4 OpenVINO IR that is proven to be what was tuned."""

__version__ = "0.1.0"
