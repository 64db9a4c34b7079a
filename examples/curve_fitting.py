"""Fit two curves to data of NIST, with standard errors and confidence bands, and one beside an outlier.

    python examples/curve_fitting.py                         # a table, and curve_fitting.png
    python examples/curve_fitting.py --plot elsewhere.png

The data are two of the Statistical Reference Datasets, for which NIST certifies parameters and standard
deviations to eleven digits (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml): Thurber (the mobility
of electrons in silicon) and Rat43 (the growth of onions). The starts are theirs as well. The bands say where
the curve lies with a probability of 95 percent, in the linear approximation: their variance is ``J C J^T``
with the covariance ``C`` of the parameters and the derivatives ``J`` of the curve.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student

import optim
import secondorder.functional

CONFIDENCE = 0.95
# Of the spoiled measurement, in the units of Rat43, and where a residual begins to be an outlier.
OUTLIER, ORDINARY = 400.0, 30.0


class Dataset(NamedTuple):
    """Data, model and what NIST certifies."""

    name: str
    axes: tuple[str, str]
    model: Callable
    start: list[float]
    certified: list[float]
    deviations: list[float]
    x: list[float]
    y: list[float]


class Fit(NamedTuple):
    """A fitted curve on a grid: parameters, covariance, the curve and half the width of its band."""

    popt: torch.Tensor
    pcov: torch.Tensor
    x: torch.Tensor
    curve: torch.Tensor
    band: torch.Tensor


def mobility(x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + b2 * x + b3 * x**2 + b4 * x**3) / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def growth(x, b1, b2, b3, b4):
    return b1 / (1 + torch.exp(b2 - b3 * x)) ** (1 / b4)


# fmt: off
THURBER = Dataset(
    "Thurber", ("log10 of the density of electrons", "mobility of electrons"), mobility,
    [1000.0, 1000.0, 400.0, 40.0, 0.7, 0.3, 0.03],
    [1288.1396800, 1491.0792535, 583.23836877, 75.416644291, 0.96629502864, 0.39797285797, 0.049727297349],
    [4.6647963344, 39.571156086, 28.698696102, 5.5675370270, 0.031333340687, 0.014984928198, 0.0065842344623],
    [-3.067, -2.981, -2.921, -2.912, -2.840, -2.797, -2.702, -2.699, -2.633, -2.481, -2.363, -2.322, -1.501,
     -1.460, -1.274, -1.212, -1.100, -1.046, -0.915, -0.714, -0.566, -0.545, -0.400, -0.309, -0.109, -0.103,
     0.010, 0.119, 0.377, 0.790, 0.963, 1.006, 1.115, 1.572, 1.841, 2.047, 2.200],
    [80.574, 84.248, 87.264, 87.195, 89.076, 89.608, 89.868, 90.101, 92.405, 95.854, 100.696, 101.060,
     401.672, 390.724, 567.534, 635.316, 733.054, 759.087, 894.206, 990.785,
     1090.109, 1080.914, 1122.643, 1178.351,
     1260.531, 1273.514, 1288.339, 1327.543, 1353.863, 1414.509, 1425.208, 1421.384, 1442.962, 1464.350,
     1468.705, 1447.894, 1457.628],
)
RAT43 = Dataset(
    "Rat43", ("time", "dry weight of onions"), growth,
    [100.0, 10.0, 1.0, 1.0],
    [699.64151270, 5.2771253025, 0.75962938329, 1.2792483859],
    [16.302297817, 2.0828735829, 0.19566123451, 0.68761936385],
    [float(week) for week in range(1, 16)],
    [16.08, 33.83, 65.80, 97.20, 191.55, 326.20, 386.87, 520.53, 590.03, 651.92, 724.93, 699.56, 689.96,
     637.56, 717.41],
)
# fmt: on


def fit(data, y, loss="linear"):
    """By ``curve_fit``; the band comes from the covariance that it returns."""
    x = torch.tensor(data.x, dtype=torch.float64)
    popt, pcov = optim.curve_fit(data.model, x, y, data.start, loss=loss, f_scale=ORDINARY)
    margin = 0.03 * (x[-1] - x[0])
    grid = torch.linspace(float(x[0] - margin), float(x[-1] + margin), 300, dtype=torch.float64)
    J = secondorder.functional.jacobian(lambda p: data.model(grid, *p), popt)
    deviations = (J @ pcov * J).sum(dim=1).sqrt()
    quantile = student.ppf(0.5 + CONFIDENCE / 2, len(y) - len(popt))
    return Fit(popt, pcov, grid, data.model(grid, *popt), quantile * deviations)


def digits(value, certified):
    """How many agree, at most the eleven that are certified."""
    error = abs(value - certified) / abs(certified)
    return 11.0 if error == 0 else min(11.0, -float(torch.log10(torch.tensor(error, dtype=torch.float64))))


def print_table(data, found, seconds):
    print(f"\n{data.name}: {len(data.x)} measurements, {1e3 * seconds:.0f} ms")
    print(f"{'':<6}{'estimate':>16}{'standard error':>18}{'certified':>18}{'digits':>8}{'of error':>10}")
    errors = found.pcov.diagonal().sqrt()
    rows = zip(found.popt.tolist(), errors.tolist(), data.certified, data.deviations, strict=True)
    for index, (value, error, certified, deviation) in enumerate(rows, 1):
        print(
            f"b{index:<5}{value:>16.9g}{error:>18.6g}{certified:>18.11g}{digits(value, certified):>8.1f}"
            f"{digits(error, deviation):>10.1f}"
        )


def draw_fit(axis, data, y, found):
    axis.fill_between(
        found.x,
        found.curve - found.band,
        found.curve + found.band,
        color="C0",
        alpha=0.25,
        linewidth=0,
        label="95 percent band",
    )
    axis.plot(found.x, found.curve, color="C0", label="fit")
    axis.plot(data.x, y, "o", color="black", markersize=3.5, label="data")
    axis.set(title=data.name, xlabel=data.axes[0], ylabel=data.axes[1])


def plot(fits, spoiled, path):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (data, y, found) in zip(axes, fits, strict=False):
        draw_fit(axis, data, y, found)
        axis.legend(loc="lower right", fontsize="small")
    (data, y, clean), (bad, plain, robust) = fits[1], spoiled
    axis = axes[2]
    axis.plot(clean.x, clean.curve, color="0.6", linewidth=4, label="fit without the outlier")
    axis.plot(plain.x, plain.curve, color="C3", linestyle="--", label="least squares")
    axis.plot(robust.x, robust.curve, color="C0", label='loss="soft_l1"')
    is_bad = bad != y
    axis.plot(torch.tensor(data.x)[~is_bad], bad[~is_bad], "o", color="black", markersize=3.5, label="data")
    axis.plot(torch.tensor(data.x)[is_bad], bad[is_bad], "x", color="C3", markersize=8, label="outlier")
    axis.set(title=f"{data.name}, one measurement spoiled", xlabel=data.axes[0], ylabel=data.axes[1])
    axis.legend(loc="upper left", fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--plot", default="curve_fitting.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    fits = []
    for data in (THURBER, RAT43):
        y, begin = torch.tensor(data.y, dtype=torch.float64), time.perf_counter()
        found = fit(data, y)
        print_table(data, found, time.perf_counter() - begin)
        fits.append((data, y, found))
    spoiled = fits[1][1].clone()
    spoiled[12] -= OUTLIER
    plain, robust = fit(RAT43, spoiled), fit(RAT43, spoiled, "soft_l1")
    print("\nRat43 with one measurement spoiled: the upper limit b1 of the growth")
    for name, found in (("least squares", plain), ("soft_l1", robust), ("not spoiled", fits[1][2])):
        print(f"{name:<16}{float(found.popt[0]):8.1f} +- {float(found.pcov[0, 0]) ** 0.5:.1f}")
    plot(fits, (spoiled, plain, robust), options.plot)
    return fits


if __name__ == "__main__":
    main()
