"""What a model is tuned for."""
