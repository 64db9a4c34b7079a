"""Where second order is worth its price: two networks that first derivatives do not train.

    python examples/main_job.py                              # a table, and main_job.png, in a minute
    python examples/main_job.py --seconds 20 --seed 1

One is physics-informed: it solves ``u'' = f`` with a solution of two scales, 193 parameters in float64; what
counts is the relative error of u. The other is a deep autoencoder of scikit-learn's digits with a code of six
numbers, 10,694 parameters in float32; what counts is the squared error of an image. Each is trained by the
optimizer that is made for it, at its defaults, by LBFGS with a line search, and by Adam with the best of four
rates, on batches of 128 images where those are better. All have the same seconds, of one thread of the CPU.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import optim

TRAINING = 1437
# Of the seconds of a run; all optimizers of a problem have the same.
SHARES = {"poisson": 1.2, "autoencoder": 0.8}
# Errors are measured where the clock stands still, this often in a run.
POINTS = 80


class Task(NamedTuple):
    """A network to train: the loss of an optional batch of samples, and the error that counts."""

    title: str
    unit: str
    net: nn.Module
    loss: Callable
    error: Callable
    samples: int


class Run(NamedTuple):
    """A curve of (seconds, gradients of all the data, error)."""

    title: str
    unit: str
    name: str
    curve: list[tuple[float, float, float]]

    @property
    def best(self):
        return min(point[2] for point in self.curve)


def poisson(seed):
    """``u = sin(2 pi x) + sin(10 pi x) / 10`` on [0, 1], zero at its ends."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise([1, 12, 12, 1]):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        nn.init.normal_(layer.weight, std=inputs**-0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    net = nn.Sequential(*layers[:-1])
    x, many = (torch.linspace(0, 1, n, dtype=torch.float64)[:, None] for n in (200, 501))
    wanted = torch.sin(2 * math.pi * many) + 0.1 * torch.sin(10 * math.pi * many)
    f = -((2 * math.pi) ** 2) * torch.sin(2 * math.pi * x) - 10 * math.pi**2 * torch.sin(10 * math.pi * x)

    def loss(_):
        inside = second_derivative(net, x) - f
        return inside.square().mean() + 100 * net(x[[0, -1]]).square().sum()

    def error():
        return float((net(many) - wanted).norm() / wanted.norm())

    return Task("Poisson's equation by a network", "relative error of the solution", net, loss, error, len(x))


def second_derivative(net, x):
    """Carried forward through the layers with the value and the slope: no graph in a graph."""
    value, first, second = x, torch.ones_like(x), torch.zeros_like(x)
    for layer in net:
        if isinstance(layer, nn.Linear):
            value, first, second = layer(value), first @ layer.weight.T, second @ layer.weight.T
        else:
            value = torch.tanh(value)
            slope = 1 - value.square()
            first, second = slope * first, slope * (second - 2 * value * first.square())
    return second


def autoencoder(seed):
    """Sigmoid units and a linear code of six; 15 weights a unit are not zero (Martens, 2010)."""
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise([64, 48, 32, 16, 6, 16, 32, 48, 64]):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            weight = torch.randn(outputs, inputs)
            layer.weight.copy_(weight * (torch.rand_like(weight).argsort(1) < 15))
            layer.bias.zero_()
        layers += [layer] if outputs in (6, 64) else [layer, nn.Sigmoid()]
    net = nn.Sequential(*layers)
    images = torch.tensor(load_digits().data[:TRAINING] / 16, dtype=torch.float32)

    def loss(batch):
        inputs = images if batch is None else images[batch]
        return F.binary_cross_entropy_with_logits(net(inputs), inputs, reduction="sum") / len(inputs)

    def error():
        return float((net(images).sigmoid() - images).square().sum() / len(images))

    return Task("deep autoencoder of digits", "squared error of an image", net, loss, error, len(images))


def lbfgs(parameters):
    # Its default tolerances would end it early.
    return torch.optim.LBFGS(
        parameters, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    )


class Entry(NamedTuple):
    """Who runs on which problem; ``batch`` is a number of samples, None for all."""

    make: Callable
    name: str
    optimizer: Callable
    batch: int | None = None


# Adam's rates are the best of 1e-3, 3e-3, 1e-2 and 3e-2 in these seconds; of digits so is the batch of 128.
ENTRIES = (
    Entry(poisson, "GaussNewton", optim.GaussNewton),
    Entry(poisson, "LBFGS", lbfgs),
    Entry(poisson, "Adam 1e-3", lambda parameters: torch.optim.Adam(parameters, lr=1e-3)),
    Entry(autoencoder, "HessianFree", optim.HessianFree),
    Entry(autoencoder, "LBFGS", lbfgs),
    Entry(autoencoder, "Adam 1e-2", lambda parameters: torch.optim.Adam(parameters, lr=1e-2), 128),
)


def batches(task, size):
    """Without end: indices of samples, or None for all of them."""
    order = torch.Generator().manual_seed(1)
    while True:
        yield from [None] if size is None else torch.randperm(task.samples, generator=order).split(size)


def train(entry, seed, seconds):
    """The training loop, the same for every optimizer."""
    task = entry.make(seed)
    optimizer, stream = entry.optimizer(task.net.parameters()), batches(task, entry.batch)
    curve, gradients, spent, begin = [], 0.0, 0.0, time.process_time()
    # No bar where there is no terminal.
    form = "{percentage:3.0f}%|{bar:20}| {desc}"
    with tqdm(total=seconds, bar_format=form, disable=None) as bar:
        while True:
            if spent * POINTS >= len(curve) * seconds:
                with torch.no_grad():
                    error = task.error()
                curve.append((spent, gradients, error))
                bar.set_description_str(f"{entry.name:<12} {task.title}  {error:.2e}", refresh=False)
                bar.update(min(spent, seconds) - bar.n)
                # What measuring took does not count.
                begin = time.process_time() - spent
            if spent >= seconds:
                return Run(task.title, task.unit, entry.name, curve)
            gradients += advance(task, optimizer, next(stream))
            spent = time.process_time() - begin


def advance(task, optimizer, batch):
    """One step; what it cost, in gradients of all the data."""
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    report = getattr(optimizer, "report", None)
    # Steps of second order also evaluate the loss and multiply by the curvature.
    return (
        report.gradient_equivalents if report else calls * (1 if batch is None else len(batch) / task.samples)
    )


def error_at(run, seconds):
    """The least until then."""
    return min(error for spent, _, error in run.curve if spent <= seconds)


def print_table(runs):
    for title, group in itertools.groupby(runs, key=lambda run: run.title):
        ours, *peers = group
        end = min(run.curve[-1][0] for run in (ours, *peers))
        print(f"\n{title}\n{'':<14}{'least error':>12}{'seconds':>10}{'gradients':>11}")
        for run in (ours, *peers):
            print(f"{run.name:<14}{run.best:>12.2e}{run.curve[-1][0]:>10.1f}{run.curve[-1][1]:>11.0f}")
        for peer in peers:
            words = []
            for part in (0.1, 1.0):
                ratio = error_at(peer, part * end) / error_at(ours, part * end)
                where = f"{ratio:.3g} times below" if ratio >= 1 else f"{1 / ratio:.3g} times above"
                words.append(f"after {part * end:.1f} s {where}")
            print(f"{ours.name} beside {peer.name}: {', '.join(words)}")


def plot(runs, path):
    figure = Figure(figsize=(8.6, 5.8), layout="constrained")
    rows = figure.subplots(2, 2, sharey="row")
    tasks = [list(group) for _, group in itertools.groupby(runs, key=lambda run: run.title)]
    for row, group in zip(rows, tasks, strict=True):
        for column, label in enumerate(("CPU seconds", "gradients of all the data")):
            axis = row[column]
            for run, color, style in zip(group, ("black", "C0", "C1"), ("-", "--", ":"), strict=True):
                points = [(point[column], point[2]) for point in run.curve]
                axis.plot(*zip(*points, strict=True), style, color=color, label=run.name, linewidth=1.8)
            axis.set(yscale="log", xlabel=label, title=group[0].title)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(group[0].unit)
        row[1].set_xscale("symlog", linthresh=10)
        row[1].set_xlim(left=0)
        row[0].legend(loc="best", framealpha=0.9)
    figure.savefig(path, dpi=80)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=8.5, help="of the CPU, for each of the six runs; means"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--plot", default="main_job.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    runs = []
    for entry in ENTRIES:
        runs.append(train(entry, options.seed, SHARES[entry.make.__name__] * options.seconds))
        print(f"{runs[-1].title}, {entry.name}: {runs[-1].best:.2e}", flush=True)
    print_table(runs)
    plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
