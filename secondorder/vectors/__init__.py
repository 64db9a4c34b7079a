"""Tuples of tensors and flat vectors, trees, arguments: what all else passes around."""
