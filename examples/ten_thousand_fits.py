"""Fit ten thousand decays at once: the relaxation times of an image.

    python examples/ten_thousand_fits.py                     # a table, and ten_thousand_fits.png
    python examples/ten_thousand_fits.py --device cuda

A magnetic resonance scanner images the same slice at a row of echo times. In each pixel the signal decays as
``amplitude * exp(-t / T2)``; the relaxation time T2 tells tissues apart. The image here is synthetic: a head
of ellipses whose maps are known, 100 x 100 pixels, 12 echoes, Gaussian noise. All its pixels are fitted by
one call. The errors are then compared with the standard errors that the fit predicts: their ratio should have
a spread of one.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from matplotlib.figure import Figure

import optim

SIZE = 100
# Milliseconds.
ECHOES = torch.arange(1, 13, dtype=torch.float64) * 15.0
# Centre, half axes, angle in degrees, amplitude, T2 in milliseconds: later ones cover earlier ones.
ELLIPSES = [
    ((0.0, 0.0), (0.92, 0.96), 0, 0.55, 45.0),  # scalp
    ((0.0, 0.0), (0.78, 0.86), 0, 0.75, 95.0),  # grey matter
    ((0.0, 0.02), (0.66, 0.74), 0, 0.70, 70.0),  # white matter
    ((-0.20, 0.05), (0.12, 0.32), 14, 1.00, 160.0),  # ventricles
    ((0.20, 0.05), (0.12, 0.32), -14, 1.00, 160.0),
    ((-0.38, -0.38), (0.10, 0.10), 0, 0.85, 120.0),  # a lesion
    ((0.36, -0.42), (0.05, 0.09), 30, 0.60, 50.0),  # a small one
]
# A bath around the head: air has no signal to fit.
OUTSIDE = (0.40, 35.0)
# Of how many pixels SciPy is timed.
SAMPLE = 100


class Maps(NamedTuple):
    """Amplitude and T2 of each pixel, shape (pixels,) each."""

    amplitude: torch.Tensor
    t2: torch.Tensor


def phantom(size):
    """The true maps."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    amplitude, t2 = torch.full_like(x, OUTSIDE[0]), torch.full_like(x, OUTSIDE[1])
    for (cx, cy), (a, b), degrees, ellipse_amplitude, ellipse_t2 in ELLIPSES:
        angle = torch.deg2rad(torch.tensor(float(degrees)))
        u = (x - cx) * angle.cos() + (y - cy) * angle.sin()
        v = (y - cy) * angle.cos() - (x - cx) * angle.sin()
        inside = (u / a) ** 2 + (v / b) ** 2 <= 1
        amplitude[inside], t2[inside] = ellipse_amplitude, ellipse_t2
    return Maps(amplitude.flatten(), t2.flatten())


def decay(p, t):
    """Of parameters (pixels, 2): amplitude and T2."""
    return p[:, :1] * torch.exp(-t / p[:, 1:])


def measure(maps, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    clean = decay(torch.stack(maps, dim=1), ECHOES)
    return clean + noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)


def standard_errors(p, t, noise):
    """Of each pixel, shape (pixels, 2): the covariance is ``noise^2 (J^T J)^-1``, J the derivatives."""
    e = torch.exp(-t / p[:, 1:])
    J = torch.stack([e, p[:, :1] * e * t / p[:, 1:] ** 2], dim=2)
    covariance = noise**2 * torch.linalg.inv(J.mT @ J)
    return covariance.diagonal(dim1=1, dim2=2).sqrt()


def seconds_of_scipy(signal, start):
    """For one pixel after the other, a pixel."""
    t = ECHOES.numpy()
    begin = time.perf_counter()
    for y, p0 in zip(signal[:SAMPLE].numpy(), start[:SAMPLE].numpy(), strict=True):
        scipy.optimize.curve_fit(lambda t, a, t2: a * np.exp(-t / t2), t, y, p0)
    return (time.perf_counter() - begin) / min(SAMPLE, len(signal))


def print_table(true, p, result, errors, seconds, scipys):
    pixels = len(p)
    print(f"{pixels} fits of 2 parameters to {len(ECHOES)} echoes: {seconds:.2f} seconds in one call,")
    print(f"{1e6 * seconds / pixels:.0f} microseconds a fit; SciPy's curve_fit takes {1e6 * scipys:.0f}.")
    print(f"converged: {float(result.success.double().mean()):.2%}")
    print(f"\n{'map':<12}{'median error':>16}{'predicted':>12}{'spread of error / predicted':>30}")
    for k, (name, unit) in enumerate((("amplitude", ""), ("T2", " ms"))):
        error = p[:, k] - true[k]
        ratio = float((error / errors[:, k]).square().median().sqrt() / 0.6745)
        median, predicted = float(error.abs().median()), float(0.6745 * errors[:, k].median())
        print(f"{name:<12}{f'{median:.3g}{unit}':>16}{f'{predicted:.3g}{unit}':>12}{ratio:>30.2f}")


def plot(true, p, size, path):
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, 3)
    rows = (("T2 (ms)", true.t2, p[:, 1], 180.0, 10.0), ("amplitude", true.amplitude, p[:, 0], 1.1, 0.1))
    for row, (name, truth, fitted, most, off) in zip(axes, rows, strict=True):
        images = [
            (f"true {name}", truth, "magma", 0.0, most),
            (f"fitted {name}", fitted, "magma", 0.0, most),
            ("error", fitted - truth, "RdBu_r", -off, off),
        ]
        for axis, (title, values, colors, low, high) in zip(row, images, strict=True):
            image = axis.imshow(values.view(size, size).numpy(), cmap=colors, vmin=low, vmax=high)
            axis.set(title=title, xticks=[], yticks=[])
            figure.colorbar(image, ax=axis, shrink=0.85)
    figure.savefig(path, dpi=130)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", type=int, default=SIZE, help="pixels in each direction")
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation of the signal's noise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--plot", default="ten_thousand_fits.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    true = phantom(options.size)
    signal = measure(true, options.noise, options.seed)
    # The same T2 everywhere to begin with, and the first echo, corrected by it.
    start = torch.stack([1.2 * signal[:, 0], torch.full_like(signal[:, 0], 80.0)], dim=1)
    scipys = seconds_of_scipy(signal, start)

    t = ECHOES.to(options.device)

    def residual(p, signal):
        """Of the pixels that are left to be solved, shape (pixels, echoes)."""
        return decay(p, t) - signal

    begin = time.perf_counter()
    x0, y = start.to(options.device), signal.to(options.device)
    result = optim.least_squares(residual, x0, (y,), batched=True)
    p = result.x.cpu()
    seconds = time.perf_counter() - begin
    print_table(true, p, result, standard_errors(p, ECHOES, options.noise), seconds, scipys)
    plot(true, p, options.size, options.plot)
    return true, result


if __name__ == "__main__":
    main()
