"""Checkpoints: what is loaded must fit, and state keeps the precision that it was computed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Options by which an optimizer is told from another, torch's own and ours, and names of their state.
MARKS = frozenset(
    (
        "alpha",
        "betas",
        "dampening",
        "etas",
        "history_size",
        "lambd",
        "lr_decay",
        "momentum",
        "nesterov",
        "rho",
    )
) | {"radius", "damping_growth", "progress"}


class Kept:
    """A tensor of the state on its way through torch, which would cast it to the dtype of its parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpacked(self, parameter: Tensor) -> Tensor:
        """On the parameter's device; in its dtype, but in single precision at least."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return self.tensor.to(device=parameter.device, dtype=dtype)


def packed(
    state_dict: Mapping[str, Any], name: str, defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The checkpoint, checked, with state that torch leaves as it is.

    Args:
        state_dict: What is loaded.
        name: Of the optimizer, for errors.
        defaults: Its options.
        groups: Its parameter groups.

    Raises:
        ValueError: it is no checkpoint of an optimizer, or one of another optimizer, or of another model.
    """
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(
            f"state_dict must be that of an optimizer, but lacks {_listed(missing)}, and has"
            f" {_listed(state_dict)}."
        )
    for group in state_dict["param_groups"]:
        missing, foreign = defaults.keys() - group.keys(), MARKS & group.keys() - defaults.keys()
        if missing and foreign:
            raise ValueError(
                f"state_dict must be that of a {name}, but its groups have {_listed(foreign)} and lack"
                f" {_listed(missing)}."
            )
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    # Where they are not as many, torch says so.
    state = dict(state_dict["state"])
    for index, parameter in zip(saved, parameters, strict=False):
        if index in state:
            state[index] = {
                key: _fitting(index, key, value, parameter) for key, value in state[index].items()
            }
    return {**state_dict, "state": state}


def _fitting(index: Any, key: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Or a vector of the parameter's shape for each direction of a space.
    if parameter.shape not in (value.shape, value.shape[1:]):
        raise ValueError(
            f"state_dict must be of a model of the same shapes, but {key} of parameter {index} has shape"
            f" {tuple(value.shape)} and the parameter {tuple(parameter.shape)}."
        )
    return Kept(value)


def unpack(state: Mapping[Any, Any]) -> None:
    """Make tensors of what was packed."""
    for parameter, values in state.items():
        if isinstance(parameter, Tensor):
            values.update((k, v.unpacked(parameter)) for k, v in values.items() if isinstance(v, Kept))


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names)))
