"""Fit the length, the amplitude and the noise of a Gaussian process by Newton's method.

    python examples/gaussian_process.py                      # a table, and gaussian_process.png, in seconds
    python examples/gaussian_process.py --points 12 --seed 3

Their logarithms are fitted to the marginal likelihood of a few measurements. It may have two maxima: the same
data are a wiggly curve with little noise, or a smooth one with much. ``multistart=True`` finds the different
ones from a grid of starts in one call; the Hessian there says how well each is determined. Drawn are the
likelihood, for each length and noise at the best of many amplitudes, the steps of Newton's method from two
starts, and the two explanations of the data.
"""

import argparse
import math
import time
import warnings
from functools import partial

import torch
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from tqdm import tqdm

import optim
from secondorder.functional import hessian

NAMES = ("length", "amplitude", "noise")
TRUTH = (1.0, 1.0, 0.2)
# Where the measurements lie.
SPAN = 15.0
# Less noise beside more amplitude makes the covariance singular in rounding.
LOWER, UPPER = (0.1, 0.05, 0.02), (50.0, 50.0, 5.0)
STARTS = torch.cartesian_prod(
    torch.tensor([0.3, 1.0, 3.0, 10.0]), torch.tensor([1.0]), torch.tensor([0.1, 0.3, 1.0])
)
# Starts of the two drawn paths.
DRAWN = ([12.0, 0.5, 0.8], [0.3, 1.0, 0.3])


def correlations(x, z, length):
    return torch.exp(-0.5 * ((x[:, None] - z) / length).square())


def covariance(x, p):
    length, amplitude, noise = p.exp()
    return amplitude**2 * correlations(x, x, length) + noise**2 * torch.eye(len(x), dtype=x.dtype)


def measure(points, seed):
    """A draw from the process with the true parameters, at random places."""
    generator = torch.Generator().manual_seed(seed)
    x = SPAN * torch.rand(points, dtype=torch.float64, generator=generator).sort().values - SPAN / 2
    K = covariance(x, torch.tensor(TRUTH, dtype=torch.float64).log())
    return x, torch.linalg.cholesky(K) @ torch.randn(points, dtype=torch.float64, generator=generator)


def negative_log_likelihood(p, x, y):
    """Of the logarithms of length, amplitude and noise, shape (3,); in nats."""
    L = torch.linalg.cholesky(covariance(x, p))
    white = torch.linalg.solve_triangular(L, y[:, None], upper=False)
    return 0.5 * white.square().sum() + L.diagonal().log().sum() + 0.5 * len(x) * math.log(2 * math.pi)


def predict(p, x, y, z):
    """Mean and standard deviation of the curve at z, without the noise."""
    length, amplitude, _ = p.exp()
    L = torch.linalg.cholesky(covariance(x, p))
    across = amplitude**2 * correlations(x, z, length)
    mean = across.T @ torch.cholesky_solve(y[:, None], L).squeeze(1)
    explained = torch.linalg.solve_triangular(L, across, upper=False).square().sum(0)
    return mean, (amplitude**2 - explained).clamp(min=0).sqrt()


def likelihoods(x, y, size):
    """On a grid of lengths and noises, at the best of 40 amplitudes: (lengths, noises, values)."""
    grids = (
        torch.linspace(math.log(LOWER[k]), math.log(UPPER[k]), n) for k, n in enumerate((size, 40, size))
    )
    lengths, amplitudes, noises = (grid.double() for grid in grids)
    of_grid = torch.vmap(partial(negative_log_likelihood, x=x, y=y))
    values = torch.empty(size, size, dtype=torch.float64)
    # No bar where there is no terminal.
    for i, length in enumerate(tqdm(lengths, desc="likelihood", disable=None)):
        p = torch.cartesian_prod(length[None], amplitudes, noises)
        values[:, i] = of_grid(p).view(40, size).min(0).values
    return lengths.exp(), noises.exp(), values


def newton_path(start, x, y, bounds):
    """Points of one descent, shape (points, 3)."""
    points = [torch.tensor(start, dtype=torch.float64).log()]
    optim.minimize(
        negative_log_likelihood,
        points[0],
        (x, y),
        bounds=bounds,
        callback=lambda result: points.append(result.x.clone()),
    )
    return torch.stack(points).exp()


def of_scikit_learn(x, y):
    """Its L-BFGS from the same starts: the least negative log likelihood, and seconds."""
    begin, least = time.process_time(), math.inf
    for length, amplitude, noise in STARTS.tolist():
        kernel = ConstantKernel(amplitude**2) * RBF(length) + WhiteKernel(noise**2)
        with warnings.catch_warnings():
            # It warns where a parameter ends at a bound.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = GaussianProcessRegressor(kernel).fit(x[:, None].numpy(), y.numpy())
        least = min(least, -model.log_marginal_likelihood_value_)
    return least, time.process_time() - begin


def print_table(minima, x, y, result, seconds):
    lower, upper = (torch.tensor(ends, dtype=x.dtype).log() for ends in (LOWER, UPPER))
    print(f"{len(x)} measurements, {len(STARTS)} starts, {len(minima)} different maxima: {seconds:.2f} s")
    for number, minimum in enumerate(minima, 1):
        H = hessian(partial(negative_log_likelihood, x=x, y=y), minimum.x)
        free = (minimum.x > lower) & (minimum.x < upper)
        # Of a logarithm it is the relative error; of one at a bound there is none.
        errors = torch.full_like(minimum.x, math.nan)
        errors[free] = torch.linalg.inv(H[free][:, free]).diagonal().sqrt()
        print(f"\nmaximum {number}: log likelihood {-minimum.fun:.4f}, from {minimum.starts} starts")
        for name, value, error, true in zip(NAMES, minimum.x.exp(), errors, TRUTH, strict=True):
            print(f"{name:<12}{float(value):>10.3g} +- {float(error):.0%}    (drawn with {true})")
    least, others = of_scikit_learn(x, y)
    print(
        f"\nscikit-learn, L-BFGS from the same starts: {-least:.4f} in {others:.2f} s; ours {-result.fun:.4f}"
    )


def plot(minima, paths, grid, data, path):
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths, noises, values = grid
    x, y = data
    best = minima[0].fun
    levels = [best + d for d in (0.1, 0.3, 1, 2, 3, 5, 8, 12, 20)]
    left.contour(lengths, noises, values, levels=levels, cmap="Greys_r", linewidths=1)
    for points, color, style in zip(paths, ("C0", "C3"), ("o-", "s--"), strict=True):
        left.plot(points[:, 0], points[:, 2], style, color=color, markersize=4, label="Newton's steps")
    for minimum, mark in zip(minima, ("*", "P"), strict=False):
        p = minimum.x.exp()
        left.plot(p[0], p[2], mark, color="black", markersize=13, label="maximum")
    left.set(xscale="log", yscale="log", xlabel="length (unit of x)", ylabel="noise (unit of y)")
    left.set_title("marginal likelihood: lines at 0.1 to 20 nats below")
    left.legend(loc="lower right", fontsize="small")
    z = torch.linspace(-SPAN / 2 - 1, SPAN / 2 + 1, 300, dtype=torch.float64)
    for minimum, color, style in zip(minima, ("C0", "C3"), ("-", "--"), strict=False):
        mean, deviation = predict(minimum.x, x, y, z)
        length, _, noise = minimum.x.exp().tolist()
        right.plot(z, mean, style, color=color, label=f"length {length:.2g}, noise {noise:.2g}")
        right.fill_between(
            z, mean - 2 * deviation, mean + 2 * deviation, color=color, alpha=0.15, linewidth=0
        )
    right.plot(x, y, "o", color="black", markersize=4, label="measurements")
    right.set(xlabel="x (its unit)", ylabel="y (its unit)", title="the curve, within two standard deviations")
    right.set_ylim(top=4.4)
    right.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=80)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--points", type=int, default=10, help="measurements")
    parser.add_argument("--grid", type=int, default=60, help="lengths, and noises, of the drawn likelihood")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=4, help="of the measurements")
    parser.add_argument("--plot", default="gaussian_process.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    x, y = measure(options.points, options.seed)
    bounds = [(math.log(low), math.log(high)) for low, high in zip(LOWER, UPPER, strict=True)]
    begin = time.process_time()
    result = optim.minimize(
        negative_log_likelihood, STARTS.double().log(), (x, y), bounds=bounds, multistart=True
    )
    seconds = time.process_time() - begin
    minima = sorted(result.minima, key=lambda minimum: float(minimum.fun))
    print_table(minima, x, y, result, seconds)
    paths = [newton_path(start, x, y, bounds) for start in DRAWN]
    plot(minima, paths, likelihoods(x, y, options.grid), (x, y), options.plot)
    return minima


if __name__ == "__main__":
    main()
