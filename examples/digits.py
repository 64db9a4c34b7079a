"""Train one network on real handwritten digits with each optimizer, and compare.

    python examples/digits.py                              # all of them, eight seconds each
    python examples/digits.py --optimizer hessian-free     # one of them

The data are scikit-learn's digits: 1797 images of 8 x 8 pixels, part of the package. The network, the
training loop and the closure are the same for all; only the line that makes the optimizer differs. Adam is
run with three learning rates. At the end a table is printed, and a plot saved.
"""

import argparse
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optim

OPTIMIZERS = {
    "hessian-free": optim.HessianFree,
    "gauss-newton": optim.GaussNewton,
    "newton": optim.Newton,
    # Its default tolerances would stop it at a loss of 1e-7.
    "lbfgs": lambda parameters: torch.optim.LBFGS(
        parameters, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    ),
    "adam 1e-3": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adam 3e-3": lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    "adam 1e-2": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
}
CHOICES = ("hessian-free", "gauss-newton", "newton", "lbfgs", "adam")
# Smallest loss that the plot shows: the logits' rounding in float32 hides what is below.
FLOOR = 1e-10
# A loss that needs no more digits: the seconds to reach it are printed.
SMALL = 1e-6


class Run(NamedTuple):
    """One training run: a row of the table, and a curve as (seconds, gradients, train loss)."""

    name: str
    train_loss: float
    accuracy: float
    curve: list[tuple[float, float, float]]


def load(device):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return [part.to(device) for part in split]


def build(device, seed):
    torch.manual_seed(seed)
    layers = [
        torch.nn.Linear(64, 32),
        torch.nn.Tanh(),
        torch.nn.Linear(32, 32),
        torch.nn.Tanh(),
        torch.nn.Linear(32, 10),
    ]
    return torch.nn.Sequential(*layers).to(device)


def train(name, model, images, labels, seconds):
    """The training loop, the same for every optimizer; returns its curve."""
    optimizer = OPTIMIZERS[name](model.parameters())
    gradients = 0.0

    def closure():
        nonlocal gradients
        gradients += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    curve, elapsed, start = [], 0.0, time.perf_counter()
    # No bar where there is no terminal.
    with tqdm(total=seconds, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", disable=None) as bar:
        while elapsed < seconds:
            work = gradients
            loss = float(optimizer.step(closure).detach())
            # The loss is the one before the step: it belongs to the time and the work before it.
            curve.append((elapsed, work, loss))
            report = getattr(optimizer, "report", None)
            if report is not None:
                # Second-order steps also evaluate the loss and multiply by the curvature.
                gradients = work + report.gradient_equivalents
            elapsed = time.perf_counter() - start
            text = f"{name:<12}  step {len(curve)}  loss {loss:.2e}"
            show(bar, min(elapsed, seconds), text, report)
    curve.append((elapsed, gradients, float(closure().detach())))
    return curve


def show(bar, elapsed, text, report):
    if bar.disable or (elapsed - bar.n < 0.1 and elapsed < bar.total):
        return
    if report is not None:
        size = f"damping {report.damping:.1e}" if report.damping else f"radius {report.radius:.1e}"
        text += f"  rho {report.rho:5.2f}  {size}  products {report.products}"
    bar.set_description_str(text, refresh=False)
    bar.update(elapsed - bar.n)


def run(name, data, device, seconds, seed):
    train_images, test_images, train_labels, test_labels = data
    model = build(device, seed)
    curve = train(name, model, train_images, train_labels, seconds)
    with torch.no_grad():
        train_loss = float(F.cross_entropy(model(train_images), train_labels))
        accuracy = float((model(test_images).argmax(1) == test_labels).float().mean())
    return Run(name, train_loss, accuracy, curve)


def print_table(runs):
    heads = ("train loss", "test accuracy", "steps", "grad-equiv", "seconds")
    print(f"\n{'optimizer':<14}" + "".join(f"{head:>{len(head) + 2}}" for head in heads))
    for row in runs:
        seconds, gradients, _ = row.curve[-1]
        print(
            f"{row.name:<14}{row.train_loss:>12.2e}{row.accuracy:>15.1%}{len(row.curve) - 1:>7}"
            f"{gradients:>12.0f}{seconds:>9.1f}"
        )
    adams = [row for row in runs if row.name.startswith("adam")]
    if adams:
        best = min(adams, key=lambda row: row.train_loss)
        print(f"\nbest learning rate of Adam: {best.name.split()[1]}")
        compare([row for row in runs if row not in adams], best, "Adam's")
    # LBFGS is the one to beat here. In the end all are at rounding, so what counts is when they are there.
    for row in runs:
        if row.name in CHOICES:
            reached = next((seconds for seconds, _, loss in row.curve if loss <= SMALL), None)
            words = "not reached" if reached is None else f"after {reached:.2f} s"
            print(f"train loss of {SMALL:.0e} by {row.name}: {words}")


def compare(rows, peer, whose):
    for row in rows:
        ratio = peer.train_loss / max(row.train_loss, FLOOR)
        words = f"{ratio:.3g} times below" if ratio >= 1 else f"{1 / ratio:.3g} times above"
        print(f"train loss of {row.name}: {words} {whose} after the same seconds")


def plot(runs, path):
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    styles = {"adam 1e-3": ":", "adam 3e-3": "-.", "adam 1e-2": "--"}
    colors = {name: f"C{index}" for index, name in enumerate(CHOICES)}
    for axis, column, label in ((axes[0], 0, "seconds"), (axes[1], 1, "gradient-equivalents")):
        for row in runs:
            points = [(point[column], max(point[2], FLOOR)) for point in row.curve]
            color = colors[row.name.split()[0]]
            style = styles.get(row.name, "-")
            axis.plot(*zip(*points, strict=True), label=row.name, color=color, linestyle=style, linewidth=1.5)
        axis.set(xlabel=label, yscale="log", ylim=(FLOOR / 2, None))
        axis.grid(alpha=0.3)
    axes[1].set_xscale("symlog", linthresh=10)
    axes[1].set_xlim(left=0)
    axes[0].set_ylabel("train loss (mean cross-entropy)")
    axes[1].legend(loc="lower left", framealpha=0.9)
    figure.suptitle("Digits, 64-32-32-10 tanh network, full batch")
    figure.savefig(path, dpi=80)
    print(f"plot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--optimizer", choices=("all", *CHOICES), default="all")
    parser.add_argument("--seconds", type=float, default=8.0, help="training time of each run")
    parser.add_argument("--device", default="cpu")
    # One thread is as fast as two for a network this small, and does not wait for a busy second core.
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--plot", default="digits.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    data = load(options.device)
    names = [name for name in OPTIMIZERS if options.optimizer in ("all", name.split()[0])]
    runs = [run(name, data, options.device, options.seconds, options.seed) for name in names]
    print_table(runs)
    plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
