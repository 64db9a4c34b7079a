"""Choose two regularisation strengths by the derivative of what they lead to, and compare with a grid.

    python examples/hyperparameters.py                       # a table, and hyperparameters.png, in seconds
    python examples/hyperparameters.py --grid 20

A logistic regression on scikit-learn's breast cancer data: one strength for its 30 features, one for their
squares. A fit is a function of the strengths, and ``minimize(..., implicit=True)`` gives its derivatives, the
second ones too. So the loss of samples that are kept back can be minimised by Newton's method, over the
strengths, in a few fits. A grid takes the square of its fineness.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optim

# Decimal logarithms of the strengths, from and to.
RANGE = (-4.0, 1.0)
START = (-0.5, -0.5)


def load(seed):
    """Training, validation and test data, each (inputs, labels)."""
    features, labels = load_breast_cancer(return_X_y=True)
    inputs = torch.tensor((features - features.mean(0)) / features.std(0))
    squares = inputs.square()
    inputs = torch.cat([inputs, (squares - squares.mean(0)) / squares.std(0)], dim=1)
    labels = torch.tensor(labels, dtype=torch.float64)
    rest, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    training, validation = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])
    return [(inputs[part], labels[part]) for part in (training, validation, test)]


def mean_loss(w, data):
    inputs, labels = data
    return F.binary_cross_entropy_with_logits(inputs @ w[:-1] + w[-1], labels)


class Outer:
    """The validation loss as a function of the strengths' logarithms; counts and remembers fits."""

    def __init__(self, training, validation):
        self.training, self.validation = training, validation
        self.fits, self.w = 0, torch.zeros(training[0].shape[1] + 1, dtype=torch.float64)

    def inner(self, w, logs):
        first, second = 10**logs
        half = (len(w) - 1) // 2
        penalty = first * w[:half].square().sum() + second * w[half:-1].square().sum()
        return mean_loss(w, self.training) + penalty

    def __call__(self, logs):
        result = optim.minimize(self.inner, self.w, (logs,), implicit=True)
        self.fits += 1
        # The next fit is near.
        self.w = result.x.detach()
        return mean_loss(result.x, self.validation)


def by_derivatives(outer):
    """Newton's method over the strengths: its result, and (logarithms, fits) on the way."""
    path = [(torch.tensor(START, dtype=torch.float64), 0)]
    # A loss is known to fewer digits than the fits' tolerance; the strengths are not needed to any.
    result = optim.minimize(
        outer,
        path[0][0],
        bounds=RANGE,
        gtol=1e-6,
        callback=lambda result: path.append((result.x.clone(), outer.fits)),
    )
    return result, path


def by_grid(outer, size):
    """Losses on a grid, shape (size, size): rows are strengths of the squares."""
    axis = torch.linspace(*RANGE, size, dtype=torch.float64)
    losses = torch.empty(size, size, dtype=torch.float64)
    # No bar where there is no terminal.
    with tqdm(total=size * size, desc="grid", disable=None) as bar, torch.no_grad():
        for i in range(size):
            for j in range(size):
                losses[i, j] = outer(torch.stack([axis[j], axis[i]]))
                bar.update()
    return axis, losses


def print_row(name, logs, loss, test, fits, seconds):
    first, second = (10 ** float(value) for value in logs)
    print(f"{name:<14}{first:>12.3g}{second:>12.3g}{loss:>17.6f}{test:>12.4f}{fits:>7}{seconds:>10.2f}")


def plot(axis, losses, path, picture):
    figure = Figure(figsize=(6.6, 5), layout="constrained")
    axes = figure.subplots()
    values = (losses - losses.min() + 1e-4).log10()
    image = axes.contourf(10**axis, 10**axis, values, levels=20, cmap="Greys")
    figure.colorbar(image, ax=axes, label="log10 of the validation loss above the grid's least (nats)")
    points = torch.stack([10**logs for logs, _ in path])
    axes.plot(points[:, 0], points[:, 1], "o-", color="C3", markersize=5, label="steps by derivatives")
    axes.plot(points[-1, 0], points[-1, 1], "*", color="C3", markersize=16, markeredgecolor="white")
    row, column = divmod(int(losses.argmin()), len(axis))
    best = 10 ** axis[column], 10 ** axis[row]
    axes.plot(*best, "s", color="white", markeredgecolor="black", markersize=8, label="best of the grid")
    axes.set(xscale="log", yscale="log", xlabel="strength on features", ylabel="strength on their squares")
    axes.legend(loc="upper left")
    figure.savefig(picture, dpi=80)
    print(f"\nplot saved as {picture}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--grid", type=int, default=15, help="values of each strength")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--plot", default="hyperparameters.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    training, validation, test = load(options.seed)
    heads = (("on features", 26), ("on squares", 12), ("validation loss", 17), ("test loss", 12))
    print("".join(f"{head:>{width}}" for head, width in (*heads, ("fits", 7), ("seconds", 10))))
    outer, begin = Outer(training, validation), time.perf_counter()
    result, path = by_derivatives(outer)
    seconds = time.perf_counter() - begin
    print_row("derivatives", result.x, result.fun, float(mean_loss(outer.w, test)), outer.fits, seconds)
    outer, begin = Outer(training, validation), time.perf_counter()
    axis, losses = by_grid(outer, options.grid)
    seconds = time.perf_counter() - begin
    row, column = divmod(int(losses.argmin()), options.grid)
    best = torch.stack([axis[column], axis[row]])
    fits = outer.fits
    with torch.no_grad():
        outer(best)
    print_row("grid", best, float(losses.min()), float(mean_loss(outer.w, test)), fits, seconds)
    plot(axis, losses, path, options.plot)
    return result, losses


if __name__ == "__main__":
    main()
