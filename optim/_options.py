"""Checks of options: each takes a dict of options and the names to look at."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

SOLVERS = ("auto", "direct", "cg")


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``lr`` is a finite number that is not negative, or such a tensor."""
    if getattr(options["lr"], "shape", None) and options["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0 <= float(options["lr"]) < math.inf:
        raise ValueError(f"lr must be a non-negative number, got {options['lr']!r}.")


def check_positive(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a positive finite number."""
    for name in names:
        value = options[name]
        if not (isinstance(value, float | int) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_not_negative(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a finite number that is not negative."""
    for name in names:
        value = options[name]
        if not (isinstance(value, float | int) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a non-negative number, got {value!r}.")


# Options of torch's first-order optimizers, and why these optimizers lack them.
_REASONS = {
    "fused": "the step is a solve of a linear system, not one kernel over the parameters",
    "foreach": "the parameters are one flat vector already",
    "capturable": "a step decides on the host whether to take what it solved for, which no CUDA graph can",
    "differentiable": "a step keeps no graph of itself",
}


def refuse(optimizer: type, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that are not the optimizer's; those at torch's defaults pass."""
    for name, value in options.items():
        if name not in _REASONS:
            known = list(inspect.signature(optimizer).parameters)[1:-1]
            raise TypeError(
                f"{optimizer.__name__} got an unexpected option {name!r}; it takes {', '.join(known)}."
            )
        if value:
            raise TypeError(f"{optimizer.__name__} does not support {name}={value!r}: {_REASONS[name]}.")


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
