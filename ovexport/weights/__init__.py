"""Quantized weights: formats, policy, arithmetic."""
