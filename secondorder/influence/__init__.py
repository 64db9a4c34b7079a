"""Influence functions: which training samples moved this prediction."""

from secondorder.influence.scores import InfluenceResult, influence

__all__ = ["InfluenceResult", "influence"]
