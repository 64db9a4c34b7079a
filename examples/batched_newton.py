"""Fit five thousand dose-response curves by maximum likelihood, all at once.

    python examples/batched_newton.py                        # a table, and batched_newton.png, in seconds
    python examples/batched_newton.py --curves 100000 --device cuda

Of each substance eight doses are given to twenty animals each, and those that respond are counted. The chance
is ``base + (1 - base) / (1 + exp(-slope (log10 dose - middle)))``: three unknowns a curve, a likelihood that
is not concave, and no sum of squares. One call of ``minimize(batched=True)`` fits all of them by Newton's
method, each with its own radius and status. The counts are drawn by the script, so errors are known: divided
by those that the Hessian predicts they should have a spread of one.
"""

import argparse
import sys
import time
from functools import partial

import numpy as np
import scipy.optimize
import scipy.special
import torch
from matplotlib.figure import Figure

import optim
from secondorder.functional import batch_hessian

DOSES = torch.linspace(-2, 2, 8, dtype=torch.float64)
ANIMALS = 20
NAMES = ("base (logit)", "middle", "slope (log)")
START = (-2.0, 0.0, 1.0)
# Of how many curves SciPy is timed.
SAMPLE = 50


def chance(p, doses):
    """Of parameters (curves, 3): logit of the base, middle, logarithm of the slope."""
    base = torch.sigmoid(p[:, :1])
    return base + (1 - base) * torch.sigmoid(p[:, 2:].exp() * (doses - p[:, 1:2]))


def negative_log_likelihood(p, counts):
    """Of each curve, shape (curves,); a weak prior holds what eight doses leave undetermined."""
    q = chance(p, DOSES.to(p)).clamp(1e-9, 1 - 1e-9)
    prior = (p - p.new_tensor(START)).square() @ p.new_tensor([0.5, 0.1, 0.5])
    return -(counts * q.log() + (ANIMALS - counts) * (1 - q).log()).sum(1) + prior


def draw(curves, seed):
    """True parameters, from the prior, shape (curves, 3), and counts (curves, doses)."""
    generator = torch.Generator().manual_seed(seed)
    # Variances of the prior above are 1, 5 and 1; the middle is kept among the doses.
    spread = torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64)
    noise = torch.randn(curves, 3, dtype=torch.float64, generator=generator)
    true = torch.tensor(START, dtype=torch.float64) + spread * noise
    q = chance(true, DOSES)[..., None].expand(-1, -1, ANIMALS)
    return true, (torch.rand(q.shape, dtype=q.dtype, generator=generator) < q).sum(2).double()


def seconds_of_scipy(counts):
    """For one curve after the other, by BFGS with differences: a curve."""
    doses, start = DOSES.numpy(), np.array(START)

    def value(p, k):
        base = scipy.special.expit(p[0])
        q = base + (1 - base) * scipy.special.expit(np.exp(p[2]) * (doses - p[1]))
        q = q.clip(1e-9, 1 - 1e-9)
        prior = (p - start) ** 2 @ [0.5, 0.1, 0.5]
        return -(k * np.log(q) + (ANIMALS - k) * np.log(1 - q)).sum() + prior

    begin = time.process_time()
    for k in counts[:SAMPLE].numpy():
        scipy.optimize.minimize(value, start, k, method="BFGS")
    return (time.process_time() - begin) / min(SAMPLE, len(counts))


def print_table(true, x, errors):
    print(f"\n{'parameter':<14}{'median error':>14}{'predicted':>11}{'spread of error / predicted':>29}")
    for k, name in enumerate(NAMES):
        error = x[:, k] - true[:, k]
        ratio = float((error / errors[:, k]).abs().median()) / 0.6745
        predicted = 0.6745 * float(errors[:, k].median())
        print(f"{name:<14}{float(error.abs().median()):>14.3f}{predicted:>11.3f}{ratio:>29.2f}")


def plot(true, counts, x, errors, path):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, centre, right = figure.subplots(1, 3)
    grid = torch.linspace(-2.3, 2.3, 200, dtype=torch.float64)
    order, looks = x[:, 1].argsort(), (("black", "-", "o"), ("C0", "--", "s"), ("C1", ":", "^"))
    for part, (color, style, mark) in zip((0.1, 0.5, 0.9), looks, strict=True):
        i = int(order[int(part * len(order))])
        left.plot(10**grid, chance(x[i : i + 1], grid)[0], style, color=color)
        left.plot(10**DOSES, counts[i] / ANIMALS, mark, color=color, markersize=5)
    left.set(xscale="log", xlabel="dose (mg)", ylabel="share that responds", title="three of the fits")
    centre.plot(true[:, 1], x[:, 1], ".", color="C0", markersize=2, alpha=0.5)
    centre.plot([-2, 2], [-2, 2], color="black", linewidth=1)
    centre.set(xlabel="true middle (decades of dose)", ylabel="fitted middle (decades of dose)")
    centre.set(title="all of them")
    z = (x - true) / errors
    bins = torch.linspace(-4, 4, 41)
    middles = (bins[1:] + bins[:-1]) / 2
    for k, (name, style) in enumerate(zip(NAMES, ("-", "--", ":"), strict=True)):
        heights = torch.histogram(z[:, k].float(), bins=bins, density=True).hist
        right.plot(middles, heights, style, color=f"C{k}", label=name, drawstyle="steps-mid")
    right.plot(middles, torch.exp(-(middles**2) / 2) / (2 * torch.pi) ** 0.5, color="black", label="normal")
    right.set(xlabel="error / predicted error", ylabel="density", title="are the errors as predicted?")
    right.legend(fontsize="small")
    for axis in (left, centre, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--curves", type=int, default=5000, help="problems")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the curves and counts")
    parser.add_argument("--plot", default="batched_newton.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    true, counts = draw(options.curves, options.seed)
    scipys = seconds_of_scipy(counts)
    start = torch.tensor(START, dtype=torch.float64, device=options.device).repeat(options.curves, 1)
    begin, data = time.perf_counter(), counts.to(options.device)
    # A bar shows only where there is a terminal.
    result = optim.minimize(
        negative_log_likelihood, start, (data,), batched=True, progress=sys.stderr.isatty()
    )
    x = result.x.cpu()
    seconds = time.perf_counter() - begin
    print(f"{options.curves} curves: {seconds:.2f} seconds in one call; {result.message}")
    print(f"{1e6 * seconds / len(x):.0f} microseconds a curve; SciPy's BFGS takes {1e6 * scipys:.0f}")
    H = batch_hessian(partial(negative_log_likelihood, counts=counts), x)
    errors = torch.linalg.inv(H).diagonal(dim1=1, dim2=2).sqrt()
    print_table(true, x, errors)
    plot(true, counts, x, errors, options.plot)
    return true, result


if __name__ == "__main__":
    main()
