"""A model's loss over a dataset."""
