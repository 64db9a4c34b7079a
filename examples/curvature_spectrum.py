"""The eigenvalues of the curvature of a network, before and after training.

    python examples/curvature_spectrum.py                    # a table, and curvature_spectrum.png, in seconds
    python examples/curvature_spectrum.py --hidden 64

A network of scikit-learn's digits, trained by ``HessianFree``. Products with the Hessian of all the data give
its largest eigenvalues (``eigsh``) and the density of all of them (``spectral_density``); it is never formed.
After training most eigenvalues are near zero and a few stand apart, which the Gauss-Newton matrix explains.
The network is small enough to form the matrix once, and to compare.
"""

import argparse
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import optim
import secondorder

L2 = 1e-3
TOP = 12


class Spectrum(NamedTuple):
    """Of one network: Hessian's and Gauss-Newton's top eigenvalues, the density, products and seconds."""

    name: str
    top: torch.Tensor
    gauss_newton: torch.Tensor
    density: object
    products: int
    seconds: float


def objective_of(net, data):
    return secondorder.Objective(net, F.cross_entropy, data, l2=L2, batch_size=len(data[0]))


def analyse(name, net, data, seed):
    generator = torch.Generator().manual_seed(seed)
    begin = time.process_time()
    objective = objective_of(net, data)
    H = objective.hessian()
    top = secondorder.eigsh(H, TOP, which="LA", generator=generator)
    density = secondorder.spectral_density(H, num_probes=4, steps=60, generator=generator)
    of_gauss_newton = secondorder.eigsh(objective.gauss_newton(), TOP, which="LA", generator=generator)
    seconds = time.process_time() - begin
    largest = (result.values.sort(descending=True).values for result in (top, of_gauss_newton))
    return Spectrum(name, *largest, density, top.products + density.products, seconds)


def train(net, data, steps):
    images, labels = data
    optimizer = optim.HessianFree(net.parameters(), weight_decay=L2)

    def closure():
        return F.cross_entropy(net(images), labels)

    # No bar where there is no terminal.
    bar = tqdm(range(steps), desc="training", disable=None)
    for _ in bar:
        loss = optimizer.step(closure)
        bar.set_postfix(loss=f"{float(loss.detach()):.2e}", refresh=False)


def share(density, low, high):
    """Of the eigenvalues between low and high."""
    return density.mean(lambda values: ((values >= low) & (values < high)).to(values.dtype))[0]


def print_table(spectra, exact):
    for spectrum in spectra:
        print(f"\n{spectrum.name}: {spectrum.products} products with the Hessian, {spectrum.seconds:.1f} s")
        below, small = (share(spectrum.density, low, high) for low, high in ((-1e9, -1e-6), (-0.01, 0.01)))
        print(f"negative: {below:.0%}; within 0.01 of zero: {small:.0%}")
        for name, values in (("Hessian", spectrum.top), ("Gauss-Newton", spectrum.gauss_newton)):
            print(f"{name:<14}" + " ".join(f"{value:8.3f}" for value in values.tolist()))
    trained = spectra[-1]
    off = (trained.top - exact[-TOP:].flip(0)).abs().max() / exact[-1]
    density = trained.density
    mean = density.mean(lambda values: values)[0]
    print("\ntrained, beside the eigenvalues of the matrix itself:")
    print(f"top ones differ by {float(off):.1e} of the largest")
    print(f"mean {mean:.4f}, {float(exact.mean()):.4f} exactly")
    negative = float((exact < -1e-6).double().mean())
    print(f"negative {share(density, -1e9, -1e-6):.0%}, {negative:.0%} exactly")


def plot(spectra, exact, path):
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for spectrum, color, style in zip(spectra, ("C1", "C0"), ("--", "-"), strict=True):
        low = min(float(spectrum.density.nodes.min()), 0.0)
        high = float(spectrum.density.nodes.max())
        grid = torch.linspace(1.1 * low - 0.02, 1.05 * high, 2000, dtype=torch.float64)
        density = spectrum.density.evaluate(grid, width=0.01 * high).clamp(min=1e-7)
        left.plot(grid, density, style, color=color, label=spectrum.name)
    left.plot(
        exact[-TOP:], torch.full((TOP,), 3e-5), "|", color="black", markersize=12, label="exact, top ones"
    )
    left.set(yscale="log", ylim=(1e-5, None), xlabel="eigenvalue of the Hessian (nats per squared weight)")
    left.set(ylabel="density (share per unit of eigenvalue)", title="all eigenvalues")
    left.legend(loc="upper right", fontsize="small")
    numbers = range(1, TOP + 1)
    for spectrum, color in zip(spectra, ("C1", "C0"), strict=True):
        right.plot(numbers, spectrum.top, "o-", color=color, label=f"{spectrum.name}, Hessian")
        right.plot(
            numbers,
            spectrum.gauss_newton,
            "s--",
            color=color,
            fillstyle="none",
            label=f"{spectrum.name}, Gauss-Newton",
        )
    right.set(yscale="log", xlabel="rank, the largest first", ylabel="eigenvalue (nats per squared weight)")
    right.set_title("the largest")
    right.legend(loc="upper right", fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=16, help="units of the hidden layer")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the probes")
    parser.add_argument("--plot", default="curvature_spectrum.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images / 16), torch.tensor(labels)
    net = nn.Sequential(nn.Linear(64, options.hidden), nn.Tanh(), nn.Linear(options.hidden, 10)).double()
    spectra = [analyse("before training", net, data, options.seed)]
    train(net, data, options.steps)
    spectra.append(analyse("trained", net, data, options.seed))
    exact = torch.linalg.eigvalsh(objective_of(net, data).hessian().dense())
    print_table(spectra, exact)
    plot(spectra, exact, options.plot)
    return spectra, exact


if __name__ == "__main__":
    main()
