"""The PyTorch side: loading a causal LM, its matrices, and the student that is tuned."""
