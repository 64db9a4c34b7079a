"""The 27 sets of NIST's Statistical Reference Datasets for nonlinear regression, with certified values.

Reference: https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml; the files are as published.

"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "nist"
NUMBER = r"([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)"


class Regression(NamedTuple):
    """A set of data, a model and its certified least-squares fit.

    Attributes:
        x: Predictors, shape (m,), or (2, m) of Nelson's.
        y: Responses, shape (m,).
        starts: Both, the far one first, each of shape (n,).
        parameters: Certified, shape (n,).
        deviations: Their certified standard deviations, shape (n,).
        squares: Certified residual sum of squares.
    """

    name: str
    x: Tensor
    y: Tensor
    starts: tuple[Tensor, Tensor]
    parameters: Tensor
    deviations: Tensor
    squares: float

    def model(self, b: Tensor) -> Tensor:
        """The responses that parameters predict."""
        return MODELS[self.name](b, self.x)

    def residual(self, b: Tensor) -> Tensor:
        """Model minus data."""
        return self.model(b) - self.y


def _exponentials(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (-b[1] * x).exp() + b[2] * (-b[3] * x).exp() + b[4] * (-b[5] * x).exp()


def _peaks(b: Tensor, x: Tensor) -> Tensor:
    first = b[2] * (-((x - b[3]) ** 2) / b[4] ** 2).exp()
    return b[0] * (-b[1] * x).exp() + first + b[5] * (-((x - b[6]) ** 2) / b[7] ** 2).exp()


def _chwirut(b: Tensor, x: Tensor) -> Tensor:
    return (-b[0] * x).exp() / (b[1] + b[2] * x)


def _cubics(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _cycles(b: Tensor, x: Tensor) -> Tensor:
    phase = 2 * math.pi * x
    return (
        b[0]
        + b[1] * (phase / 12).cos()
        + b[2] * (phase / 12).sin()
        + b[4] * (phase / b[3]).cos()
        + b[5] * (phase / b[3]).sin()
        + b[7] * (phase / b[6]).cos()
        + b[8] * (phase / b[6]).sin()
    )


def _saturation(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - (-b[1] * x).exp())


MODELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _saturation,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _cycles,
    "Eckerle4": lambda b, x: b[0] / b[1] * (-0.5 * ((x - b[2]) / b[1]) ** 2).exp(),
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "Gauss3": _peaks,
    "Hahn1": _cubics,
    "Kirby2": lambda b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Lanczos3": _exponentials,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * (b[1] / (x + b[2])).exp(),
    "MGH17": lambda b, x: b[0] + b[1] * (-x * b[3]).exp() + b[2] * (-x * b[4]).exp(),
    "Misra1a": _saturation,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    # Of the logarithm of the response.
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * (-b[2] * x[1]).exp(),
    "Rat42": lambda b, x: b[0] / (1 + (b[1] - b[2] * x).exp()),
    "Rat43": lambda b, x: b[0] / (1 + (b[1] - b[2] * x).exp()) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - (b[2] / (x - b[3])).atan() / math.pi,
    "Thurber": _cubics,
}


def read(name: str) -> Regression:
    """A set by its name."""
    lines = (FOLDER / f"{name}.dat").read_text().splitlines()
    rows, squares = [], math.nan
    for line in lines:
        if found := re.match(r"\s*b\d+\s*=\s*" + r"\s+".join([NUMBER] * 4) + r"\s*$", line):
            rows.append([float(value) for value in found.groups()])
        elif found := re.match(r"Residual Sum of Squares:\s*" + NUMBER, line):
            squares = float(found[1])
    start = max(i for i, line in enumerate(lines) if line.startswith("Data:")) + 1
    data = torch.tensor(
        [[float(value) for value in line.split()] for line in lines[start:] if line.strip()],
        dtype=torch.float64,
    ).T
    columns = torch.tensor(rows, dtype=torch.float64).T
    y, x = data[0], data[1:]
    return Regression(
        name=name,
        x=x if len(x) > 1 else x[0],
        y=y.log() if name == "Nelson" else y,
        starts=(columns[0], columns[1]),
        parameters=columns[2],
        deviations=columns[3],
        squares=squares,
    )


REGRESSIONS = [read(name) for name in MODELS]


def digits(regression: Regression, b: Tensor) -> float:
    """Right digits of the worst parameter, whichever of two equal terms comes first and whatever a sign's."""
    candidates = [b]
    if regression.name in SYMMETRIES:
        candidates = [b[torch.tensor(order)] for order in SYMMETRIES[regression.name]]
    is_even = list(EVEN.get(regression.name, ()))
    certified = regression.parameters
    best = 0.0
    for candidate in candidates:
        candidate = candidate.clone()
        candidate[is_even] = candidate[is_even].abs()
        error = ((candidate - certified) / certified).abs().max()
        best = max(best, -math.log10(max(float(error), 1e-11)) if error.isfinite() else 0.0)
    return best


def _pairs(*orders: tuple[int, ...]) -> list[list[int]]:
    return [[2 * i + j for i in order for j in (0, 1)] for order in orders]


_THREE = _pairs((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_TWO_PEAKS = [list(range(8)), [0, 1, 5, 6, 7, 2, 3, 4]]
# Orders of the parameters, and parameters whose sign is free, under which the model stays the same.
SYMMETRIES = {
    **dict.fromkeys(("Lanczos1", "Lanczos2", "Lanczos3"), _THREE),
    **dict.fromkeys(("Gauss1", "Gauss2", "Gauss3"), _TWO_PEAKS),
    "MGH17": [list(range(5)), [0, 2, 1, 4, 3]],
    "ENSO": [list(range(9)), [0, 1, 2, 6, 7, 8, 3, 4, 5]],
}
EVEN = dict.fromkeys(("Gauss1", "Gauss2", "Gauss3"), (4, 7))
