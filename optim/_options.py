"""Checks of the options that the optimizers share."""

from __future__ import annotations

import math

SOLVERS = ("auto", "direct", "cg")


def check_positive(**options: float) -> None:
    """Raise ValueError unless every option is a positive finite number."""
    for name, value in options.items():
        if not (isinstance(value, float | int) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_count(**options: int) -> None:
    """Raise ValueError unless every option is a positive integer."""
    for name, value in options.items():
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def check_choice(choices: tuple[str, ...], **options: str) -> None:
    """Raise ValueError unless every option is one of ``choices``."""
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
