"""What a curve is fitted to: tensors of the measurements, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .variables import DTYPES


def as_tensor(values: Any, name: str) -> Tensor:
    """A tensor of real numbers of anything that holds numbers, tensors among them."""
    if not isinstance(values, Tensor):
        parts = values if isinstance(values, tuple | list) else ()
        try:
            devices = [part.device for part in parts if isinstance(part, Tensor)]
            values = (
                torch.stack([torch.as_tensor(part, device=devices[0]) for part in parts])
                if devices
                else torch.as_tensor(np.asarray(values), device="cpu")
            )
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name} must be an array of numbers, got {type(values).__name__} that makes none."
            ) from None
    if values.is_complex():
        raise TypeError(f"{name} must be real, got {values.dtype}; fit real and imaginary parts.")
    return values


class Data(NamedTuple):
    """What is fitted: ``y`` of floating point, ``sigma`` of its dtype or None."""

    x: Any
    y: Tensor
    sigma: Tensor | None

    @classmethod
    def of(cls, xdata: Any, ydata: Any, sigma: Any) -> Data:
        """Tensors of one dtype and device, those of ``ydata``."""
        y = as_tensor(ydata, "ydata")
        if y.dtype not in DTYPES:
            y = y.double()
        if y.numel() == 0:
            raise ValueError("ydata must not be empty.")
        is_numbers = isinstance(xdata, tuple | list | int | float) or hasattr(xdata, "__array__")
        if is_numbers and not isinstance(xdata, Tensor):
            xdata = as_tensor(xdata, "xdata").to(y)
        if sigma is None:
            return cls(xdata, y, None)
        sigma, m = as_tensor(sigma, "sigma").to(y), y.numel()
        if sigma.dim() == 0:
            sigma = sigma.expand(m)
        if sigma.shape == y.shape:
            sigma = sigma.reshape(m)
        if sigma.shape not in ((m,), (m, m)):
            raise ValueError(
                f"sigma must have shape ({m},) for standard deviations or ({m}, {m}) for a covariance, got"
                f" {tuple(sigma.shape)}."
            )
        return cls(xdata, y, sigma)

    def without_nan(self) -> Data:
        """The measurements without NaN in ``y`` or in a predictor, flat."""
        keep = ~self.y.flatten().isnan()
        x = self.x
        if isinstance(x, Tensor):
            if x.dim() == 0 or x.shape[-1] != len(keep):
                raise ValueError(
                    f"xdata must have {len(keep)} measurements in its last dimension for nan_policy='omit',"
                    f" got shape {tuple(x.shape)}."
                )
            keep = keep & ~x.isnan().reshape(-1, len(keep)).any(dim=0)
            x = x[..., keep]
        if not bool(keep.any()):
            raise ValueError("ydata must have a measurement without NaN.")
        sigma = self.sigma
        if sigma is not None:
            sigma = sigma[keep] if sigma.dim() == 1 else sigma[keep][:, keep]
        return Data(x, self.y.flatten()[keep], sigma)

    def check_finite(self, or_infinite: bool) -> None:
        """Raise where data hold NaN, or infinity too."""
        for name, values in (("xdata", self.x), ("ydata", self.y), ("sigma", self.sigma)):
            if not isinstance(values, Tensor):
                continue
            is_wrong = ~values.isfinite() if or_infinite else values.isnan()
            if bool(is_wrong.any()):
                raise ValueError(
                    f"{name} must be finite, got NaN or infinity at {int(is_wrong.sum())} of"
                    f" {values.numel()} places. Leave NaN out with nan_policy='omit'."
                )

    def whitening(self) -> Callable[[Tensor], Tensor]:
        """What makes of differences, shape (m, ...), those of independent noise of one unit."""
        sigma = self.sigma
        if sigma is None:
            return lambda r: r
        if sigma.dim() == 1:
            if not bool((sigma > 0).all()):
                raise ValueError(f"sigma must be positive, got {float(sigma.min())}.")
            return lambda r: r / (sigma if r.dim() == 1 else sigma[:, None])
        factor, info = torch.linalg.cholesky_ex(sigma)
        if int(info):
            raise ValueError(
                "sigma must be positive definite, got a matrix whose leading minor of order"
                f" {int(info)} is not."
            )
        return lambda r: torch.linalg.solve_triangular(
            factor, r.reshape(len(factor), -1), upper=False
        ).reshape(r.shape)
