"""Text and rows, read and made into token sequences."""
