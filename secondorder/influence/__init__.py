"""Influence functions: which training samples moved this prediction."""
