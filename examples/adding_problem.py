"""Train a recurrent network to add two numbers that it saw twenty to forty steps before.

    python examples/adding_problem.py                        # a table, and adding_problem.png, in 100 s
    python examples/adding_problem.py --length 60 --seconds 40

A sequence holds numbers between 0 and 1, of which two are marked: one among the first, the other before the
middle. The network sees one number at a time and must say their sum at the end (Hochreiter and Schmidhuber,
1997), so what it needs lies half a sequence and more back. A network that has not learnt it says 1, with a
mean square error of 1/6. The units are plain tanh, without gates; all optimizers have the same start, data
and seconds, and a run ends where the error on new sequences is below 0.01.
"""

import argparse
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import optim

# What an answer of 1 has, and what counts as solved.
GUESS, SOLVED = 1 / 6, 1e-2
OPTIMIZERS = {
    "HessianFree": optim.HessianFree,
    "LBFGS": lambda parameters: torch.optim.LBFGS(
        parameters, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    ),
    "Adam 1e-3": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "Adam 3e-3": lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    "Adam 1e-2": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
}
STYLES = (("black", "-"), ("C0", "--"), ("C1", ":"), ("C3", "-."), ("C2", (0, (5, 1, 1, 1, 1, 1))))


class Run(NamedTuple):
    """A curve of (seconds, gradients, test error); when it was solved, None where it was not."""

    name: str
    curve: list[tuple[float, float, float]]
    solved: float | None


class Recurrent(nn.Module):
    """15 weights a unit are not zero, with a spectral radius of 1.1 (Sutskever et al., 2013)."""

    def __init__(self, units):
        super().__init__()
        self.rnn, self.linear = nn.RNN(2, units, batch_first=True), nn.Linear(units, 1)
        weight = self.rnn.weight_hh_l0
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.1) if parameter.ndim == 2 else parameter.zero_()
            weight.normal_()
            weight *= torch.rand_like(weight).argsort(1) < 15
            weight *= 1.1 / torch.linalg.eigvals(weight).abs().max()

    def forward(self, x):
        return self.linear(self.rnn(x)[0][:, -1])


def additions(count, length, seed):
    """Sequences (count, length, 2) and sums (count, 1)."""
    generator = torch.Generator().manual_seed(seed)
    numbers, marks = torch.rand(count, length, generator=generator), torch.zeros(count, length)
    for low, high in ((0, length // 10), (length // 10, length // 2)):
        marks[range(count), torch.randint(low, high, (count,), generator=generator)] = 1.0
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)


def train(name, options):
    torch.manual_seed(options.seed)
    net = Recurrent(options.units)
    (inputs, sums), (others, wanted) = (
        additions(count, options.length, seed) for count, seed in ((options.sequences, 1), (1000, 2))
    )
    optimizer = OPTIMIZERS[name](net.parameters())
    gradients, spent, curve, begin = 0.0, 0.0, [], time.process_time()

    def closure():
        nonlocal gradients
        gradients += 1
        optimizer.zero_grad()
        loss = F.mse_loss(net(inputs), sums)
        loss.backward()
        return loss

    # No bar where there is no terminal.
    form = "{percentage:3.0f}%|{bar:20}| {desc}"
    with tqdm(total=options.seconds, bar_format=form, disable=None) as bar:
        while True:
            if not curve or spent - curve[-1][0] >= 0.01 * options.seconds:
                with torch.no_grad():
                    error = float(F.mse_loss(net(others), wanted))
                curve.append((spent, gradients, error))
                bar.set_description_str(f"{name:<12} mean square error {error:.2e}", refresh=False)
                bar.update(min(spent, options.seconds) - bar.n)
                if error <= SOLVED or spent >= options.seconds:
                    return Run(name, curve, spent if error <= SOLVED else None)
                # What measuring took does not count.
                begin = time.process_time() - spent
            work = gradients
            optimizer.step(closure)
            report = getattr(optimizer, "report", None)
            if report is not None:
                # Its steps also evaluate the loss and multiply by the curvature.
                gradients = work + report.gradient_equivalents
            spent = time.process_time() - begin


def print_row(run):
    seconds, gradients, error = run.curve[-1]
    words = f"solved after {run.solved:.1f} s" if run.solved is not None else f"not solved in {seconds:.1f} s"
    print(f"{run.name:<14}{error:>12.2e}{gradients:>11.0f}   {words}", flush=True)


def plot(runs, options):
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in ((axes[0], 0, "CPU seconds"), (axes[1], 1, "gradients of all the data")):
        for run, (color, style) in zip(runs, STYLES, strict=True):
            points = [(point[column], point[2]) for point in run.curve]
            axis.plot(*zip(*points, strict=True), color=color, linestyle=style, label=run.name, linewidth=1.8)
        axis.axhline(GUESS, color="0.6", linewidth=1)
        axis.text(0.99, 1.9 * GUESS, "always saying 1", transform=axis.get_yaxis_transform(), ha="right")
        axis.set(yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean square error on new sequences")
    axes[1].legend(loc="lower left", framealpha=0.9)
    figure.suptitle(f"two of {options.length} numbers to be added, {options.units} tanh units")
    figure.savefig(options.plot, dpi=80)
    print(f"\nplot saved as {options.plot}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--length", type=int, default=40, help="of the sequences")
    parser.add_argument("--units", type=int, default=32, help="of the network")
    parser.add_argument("--sequences", type=int, default=2000, help="to learn from")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of the CPU, for each run that is not done"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--plot", default="adding_problem.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    print(f"{'optimizer':<14}{'test error':>12}{'gradients':>11}")
    runs = []
    for name in OPTIMIZERS:
        runs.append(train(name, options))
        print_row(runs[-1])
    plot(runs, options)
    return runs


if __name__ == "__main__":
    main()
