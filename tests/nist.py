"""The 27 sets of nonlinear regression of NIST's Statistical Reference Datasets, with their certified values.

The models are written as in the header of each file, of which the parameters ``b1, b2, ...`` are arguments.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, pi

FOLDER = Path(__file__).parent / "data" / "nist"
NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
# b1 = start 1, start 2, certified value, certified standard deviation.
PARAMETER = re.compile(rf"^ *b\d+ *= +({NUMBER}) +({NUMBER}) +({NUMBER}) +({NUMBER}) *$", re.MULTILINE)
SUM_OF_SQUARES = re.compile(rf"^ *Residual Sum of Squares: *({NUMBER}) *$", re.MULTILINE)
LEVEL = re.compile(r"(Lower|Average|Higher) Level of Difficulty")


def _misra1a(x, b1, b2):
    return b1 * (1 - torch.exp(-b2 * x))


def _misra1b(x, b1, b2):
    return b1 * (1 - (1 + b2 * x / 2) ** -2)


def _misra1c(x, b1, b2):
    return b1 * (1 - (1 + 2 * b2 * x) ** -0.5)


def _misra1d(x, b1, b2):
    return b1 * b2 * x / (1 + b2 * x)


def _chwirut(x, b1, b2, b3):
    return torch.exp(-b1 * x) / (b2 + b3 * x)


def _lanczos(x, b1, b2, b3, b4, b5, b6):
    return b1 * torch.exp(-b2 * x) + b3 * torch.exp(-b4 * x) + b5 * torch.exp(-b6 * x)


def _gauss(x, b1, b2, b3, b4, b5, b6, b7, b8):
    first, second = (x - b4) ** 2 / b5**2, (x - b7) ** 2 / b8**2
    return b1 * torch.exp(-b2 * x) + b3 * torch.exp(-first) + b6 * torch.exp(-second)


def _danwood(x, b1, b2):
    return b1 * x**b2


def _quadratic_by_quadratic(x, b1, b2, b3, b4, b5):
    return (b1 + b2 * x + b3 * x**2) / (1 + b4 * x + b5 * x**2)


def _cubic_by_cubic(x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + b2 * x + b3 * x**2 + b4 * x**3) / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def _nelson(x, b1, b2, b3):
    """Of the logarithm of y."""
    return b1 - b2 * x[0] * torch.exp(-b3 * x[1])


def _mgh17(x, b1, b2, b3, b4, b5):
    return b1 + b2 * torch.exp(-x * b4) + b3 * torch.exp(-x * b5)


def _mgh09(x, b1, b2, b3, b4):
    return b1 * (x**2 + x * b2) / (x**2 + x * b3 + b4)


def _mgh10(x, b1, b2, b3):
    return b1 * torch.exp(b2 / (x + b3))


def _roszman1(x, b1, b2, b3, b4):
    return b1 - b2 * x - torch.atan(b3 / (x - b4)) / pi


def _enso(x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    year, first, second = 2 * pi * x / 12, 2 * pi * x / b4, 2 * pi * x / b7
    annual = b2 * torch.cos(year) + b3 * torch.sin(year)
    longer = b5 * torch.cos(first) + b6 * torch.sin(first) + b8 * torch.cos(second) + b9 * torch.sin(second)
    return b1 + annual + longer


def _rat42(x, b1, b2, b3):
    return b1 / (1 + torch.exp(b2 - b3 * x))


def _rat43(x, b1, b2, b3, b4):
    return b1 / (1 + torch.exp(b2 - b3 * x)) ** (1 / b4)


def _eckerle4(x, b1, b2, b3):
    return b1 / b2 * torch.exp(-0.5 * ((x - b3) / b2) ** 2)


def _bennett5(x, b1, b2, b3):
    return b1 * (b2 + x) ** (-1 / b3)


MODELS: dict[str, Callable[..., Tensor]] = {
    "Misra1a": _misra1a,
    "Misra1b": _misra1b,
    "Misra1c": _misra1c,
    "Misra1d": _misra1d,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "DanWood": _danwood,
    "Kirby2": _quadratic_by_quadratic,
    "Hahn1": _cubic_by_cubic,
    "Thurber": _cubic_by_cubic,
    "Nelson": _nelson,
    "MGH17": _mgh17,
    "MGH09": _mgh09,
    "MGH10": _mgh10,
    "Roszman1": _roszman1,
    "ENSO": _enso,
    "Rat42": _rat42,
    "Rat43": _rat43,
    "Eckerle4": _eckerle4,
    "BoxBOD": _misra1a,
    "Bennett5": _bennett5,
}

# Other orders of the same terms: the sum of squares is the same, and NIST certifies one of them.
_LANCZOS = [tuple(2 * k + j for k in terms for j in (0, 1)) for terms in itertools.permutations(range(3))]
_GAUSS = [(0, 1, 5, 6, 7, 2, 3, 4)]
ORDERS = {
    "Lanczos1": _LANCZOS,
    "Lanczos2": _LANCZOS,
    "Lanczos3": _LANCZOS,
    "Gauss1": _GAUSS,
    "Gauss2": _GAUSS,
    "Gauss3": _GAUSS,
    "MGH17": [(0, 2, 1, 4, 3)],
    "ENSO": [(0, 1, 2, 6, 7, 8, 3, 4, 5)],
}
# Parameters whose signs change together without a change of the model.
SIGNS = {
    "Gauss1": [(4,), (7,)],
    "Gauss2": [(4,), (7,)],
    "Gauss3": [(4,), (7,)],
    "Eckerle4": [(0, 1)],
    "ENSO": [(3, 5), (6, 8)],
}


class Dataset(NamedTuple):
    """A set with its model, in float64.

    ``x``: shape (m,), or (2, m) where there are two predictors; ``y``: what the model gives at them, (m,).
    """

    name: str
    level: str
    model: Callable[..., Tensor]
    x: Tensor
    y: Tensor
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    deviations: Tensor
    sum_of_squares: float

    def residual(self, b: Tensor) -> Tensor:
        """Model minus data, shape (m,)."""
        return self.model(self.x, *b) - self.y

    def same_fit(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """The certified parameters and deviations in the order and with the signs that ``b`` has."""
        n = len(self.certified)
        candidates = []
        for order in [tuple(range(n)), *ORDERS.get(self.name, [])]:
            values, deviations = self.certified[list(order)], self.deviations[list(order)]
            for group in SIGNS.get(self.name, []):
                flipped = values.clone()
                flipped[list(group)] *= -1
                nearer = (flipped - b)[list(group)].norm() < (values - b)[list(group)].norm()
                values = flipped if nearer else values
            candidates.append((values, deviations))
        return min(candidates, key=lambda pair: float(((pair[0] - b) / pair[0]).abs().max()))


@functools.cache
def dataset(name: str) -> Dataset:
    """Read from its file."""
    text = (FOLDER / f"{name}.dat").read_text(encoding="ascii")
    columns = [[float(field) for field in match] for match in PARAMETER.findall(text)]
    start1, start2, certified, deviations = torch.tensor(columns, dtype=torch.float64).T
    # What follows the line that names the columns, the last to begin with "Data:".
    table = re.split(r"^Data:.*$", text, flags=re.MULTILINE)[-1]
    rows = [[float(field) for field in line.split()] for line in table.splitlines() if line.strip()]
    y, *x = torch.tensor(rows, dtype=torch.float64).T
    sum_of_squares, level = SUM_OF_SQUARES.search(text), LEVEL.search(text)
    assert sum_of_squares
    assert level
    return Dataset(
        name,
        level[1],
        MODELS[name],
        torch.stack(x) if len(x) > 1 else x[0],
        y.log() if name == "Nelson" else y,
        (start1, start2),
        certified,
        deviations,
        float(sum_of_squares[1]),
    )
