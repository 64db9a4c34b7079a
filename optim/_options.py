"""Checks of options: each takes a dict of options and the names to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SOLVERS = ("auto", "direct", "cg")


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``lr`` is a finite number that is not negative, or such a tensor."""
    if not 0 <= float(options["lr"]) < math.inf:
        raise ValueError(f"lr must be a non-negative number, got {options['lr']!r}.")


def check_positive(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a positive finite number."""
    for name in names:
        value = options[name]
        if not (isinstance(value, float | int) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_count(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a positive integer."""
    for name in names:
        value = options[name]
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def check_choice(options: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the option is one of ``choices``."""
    if options[name] not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {options[name]!r}.")
