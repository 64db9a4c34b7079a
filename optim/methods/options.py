"""Checks of options: each takes a dict of options and the names to look at."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Options that groups may differ in: of the rest there is one, as there is one model for all parameters.
OF_GROUPS = ("lr", "weight_decay", "damping_scale")
FLAGS = ("maximize", "strict", "history", "acceleration")


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Options among the ``locals()`` of a constructor."""
    others = ("self", "params", "unsupported", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


def as_number(value: Any) -> float | int | None:
    """A number, NumPy's or in a tensor of one element too, as Python's; None for all else, also Booleans."""
    if type(value) in (float, int):
        # What no float holds is as good as infinite.
        return value if type(value) is float or value.bit_length() < 1024 else math.inf
    if hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()
        return value if type(value) in (float, int) else None
    return None


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``lr`` is a finite number that is not negative, or such a tensor."""
    if getattr(options["lr"], "shape", None) and math.prod(options["lr"].shape) != 1:
        raise ValueError("Tensor lr must be 1-element")
    check_not_negative(options, "lr")


def check_positive(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a positive finite number."""
    for name in names:
        number = as_number(options[name])
        if number is None or not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {options[name]!r}.")


def check_optional(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a positive finite number or None."""
    check_positive(options, *(name for name in names if options[name] is not None))


def check_tolerances(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a finite number that is not negative, or None."""
    check_not_negative(options, *(name for name in names if options[name] is not None))


def check_unused(options: Mapping[str, Any], name: str, by: str) -> None:
    """Raise ValueError where an option is given that another one's value makes no use of."""
    if options[name] is not None:
        raise ValueError(f"{name} must be None with {by}={options[by]!r}, got {options[name]!r}.")


def check_shared(options: Mapping[str, Any]) -> None:
    """Check the options that all optimizers have.

    Raises:
        ValueError: one is out of range.
    """
    check_lr(options)
    check_not_negative(options, "weight_decay")
    check_positive(options, "damping_scale", "memory", "gain", "max_extension")
    check_optional(options, "rtol")
    check_count(options, "max_iter", "max_trials")


def check_not_negative(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a finite number that is not negative."""
    for name in names:
        number = as_number(options[name])
        if number is None or not 0 <= number < math.inf:
            raise ValueError(f"{name} must be a non-negative number, got {options[name]!r}.")


def check_fraction(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a number from 0 to 1."""
    for name in names:
        number = as_number(options[name])
        if number is None or not 0 <= number <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {options[name]!r}.")


def check_flags(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless the options that switch something are Booleans."""
    for name in FLAGS:
        if type(options.get(name, False)) is not bool:
            raise ValueError(f"{name} must be True or False, got {options[name]!r}.")


def check_groups(
    groups: Sequence[dict[str, Any]], names: Iterable[str], check: Callable[[dict[str, Any]], None]
) -> None:
    """Check groups that users may write to, and make their numbers Python's, which checkpoints hold.

    Raises:
        ValueError: an option of ``names`` is missing, out of range, or differs from that of the first group
            where there is one for all.
    """
    for index, group in enumerate(groups):
        missing = [name for name in names if name not in group]
        if missing:
            raise ValueError(f"param_groups[{index}] must have every option, but lacks {', '.join(missing)}.")
        check_flags(group)
        check(group)
        make_plain(group, names)
        for name in names:
            check_joint(groups[0], name, group[name])


def check_joint(first: Mapping[str, Any], name: str, value: Any) -> None:
    """Raise ValueError where an option of which there is one differs from that of the first group."""
    if name not in OF_GROUPS and value != first[name]:
        raise ValueError(
            f"{name} must be the same in all parameter groups (there is one model for all parameters), got"
            f" {first[name]!r} and {value!r}."
        )


def make_plain(options: dict[str, Any], names: Iterable[str]) -> None:
    """Make numbers Python's; ``lr`` may stay a tensor, which schedulers write into."""
    for name in names:
        number = as_number(options.get(name))
        if number is not None and not (name == "lr" and isinstance(options[name], Tensor)):
            options[name] = number


# Options of torch's first-order optimizers, and why these optimizers lack them.
_REASONS = {
    "fused": "the step is a solve of a linear system, not one kernel over the parameters",
    "foreach": "the parameters are one flat vector already",
    "capturable": "a step decides on the host whether to take what it solved for, which no CUDA graph can",
    "differentiable": "a step keeps no graph of itself",
}


# Options that loops for LBFGS, Adam or SGD have.
_OF_OTHERS = frozenset(
    (
        *("amsgrad", "betas", "dampening", "eps", "history_size", "line_search_fn", "max_eval", "momentum"),
        *("nesterov", "tolerance_change", "tolerance_grad"),
    )
)
_FOREIGN = " Leave it out: a step finds its own direction and length."


def refuse(optimizer: type, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that are not the optimizer's; those at torch's defaults pass."""
    for name, value in options.items():
        if name not in _REASONS:
            known = list(inspect.signature(optimizer).parameters)[1:-1]
            close = [f" Did you mean {other}?" for other in difflib.get_close_matches(name, known, n=1)]
            remedy = _FOREIGN if name in _OF_OTHERS else "".join(close)
            text = f"{optimizer.__name__} got an unexpected option {name!r}; it takes {', '.join(known)}."
            raise TypeError(text + remedy)
        if value:
            raise TypeError(f"{optimizer.__name__} does not support {name}={value!r}: {_REASONS[name]}.")


def refuse_arguments(func: Callable[..., Any], given: Mapping[str, Any], instead: Mapping[str, str]) -> None:
    """Raise TypeError for arguments that a function does not take, with the remedy where one is known."""
    for name in given:
        known = list(inspect.signature(func).parameters)[2:-1]
        close = [f"Did you mean {other}?" for other in difflib.get_close_matches(name, known, n=1)]
        text = f"{func.__name__} got an unexpected argument {name!r}; it takes {', '.join(known)}."
        raise TypeError(" ".join([text, *([instead[name]] if name in instead else close)]))


def check_count(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError unless every option is a positive integer."""
    for name in names:
        number = as_number(options[name])
        if not (isinstance(number, int) and number >= 1):
            raise ValueError(f"{name} must be a positive integer, got {options[name]!r}.")


def check_choice(options: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the option is one of ``choices``."""
    if options[name] not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {options[name]!r}.")
