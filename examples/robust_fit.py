"""Bundle adjustment with mismatched points: cameras and a scene from pictures, by a robust loss.

    python examples/robust_fit.py                            # a table, and robust_fit.png, in seconds
    python examples/robust_fit.py --wrong 0.2

Six cameras look at forty points; each picture gives the places of the points in pixels, with a noise of half
a pixel, and one match in ten is wrong, by some forty pixels. Unknown are the points and the cameras' turns
and places, 149 numbers; the first camera fixes the frame, and one coordinate of the second the scale.
``least_squares`` takes the unknowns as a dict. Beside squares stand the losses of Huber, Cauchy and Tukey,
the last from where Cauchy's ended, and squares of the right matches alone, which in practice nobody knows.
"""

import argparse
import time

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import optim

# Pixels.
FOCAL, NOISE, MISMATCH = 800.0, 0.5, 40.0
CAMERAS = 6
# The biweight forgets what is far off, right or wrong: it wants a start that is near.
LOSSES = {"squares": "linear", "huber": "huber", "cauchy": "cauchy", "tukey after cauchy": "tukey"}
RIGHT = "right matches alone"


def rotate(turns, points):
    """Rodrigues' formula: turns (cameras, 1, 3), the axis times the angle, of points (points, 3)."""
    angle = turns.square().sum(-1, keepdim=True).add(1e-30).sqrt()
    axis, points = torch.broadcast_tensors(turns / angle, points)
    along = (axis * points).sum(-1, keepdim=True) * axis
    return along + (points - along) * angle.cos() + torch.linalg.cross(axis, points) * angle.sin()


def whole(unknowns):
    """Turns and places of all the cameras, (cameras, 3) each: the first at zero, the second at x = 1."""
    zero = unknowns["turns"].new_zeros(1, 3)
    beside = torch.cat([zero[0, :1] + 1.0, unknowns["second"]])[None]
    turns = torch.cat([zero, unknowns["turns"]])
    return turns, torch.cat([zero, beside, unknowns["places"]])


def project(unknowns):
    """Pixels, shape (cameras, points, 2)."""
    turns, places = whole(unknowns)
    seen = rotate(turns[:, None], unknowns["points"] - places[:, None])
    return FOCAL * seen[..., :2] / seen[..., 2:]


def scene(points, seed):
    """The true unknowns: points in a room in front of a row of cameras that look at its middle; metres."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(points, 3, dtype=torch.float64, generator=generator) * 4 - 2
    points[:, 2] += 7.0
    x = torch.arange(CAMERAS, dtype=torch.float64)
    places = torch.stack([x, 0.3 * torch.sin(2 * x), 0.2 * x], dim=1)
    turns = torch.stack([0 * x, torch.atan2(places[:, 0], 7.0 - places[:, 2]), 0.03 * x], dim=1)
    # Of the second camera one number is given.
    return {"turns": turns[1:], "second": places[1, 1:], "places": places[2:], "points": points}


def look(true, wrong, seed):
    """Measured pixels, and which of them, (cameras, points), are wrong."""
    generator = torch.Generator().manual_seed(seed + 1)
    exact = project(true)
    pixels = exact + NOISE * torch.randn(exact.shape, dtype=exact.dtype, generator=generator)
    is_wrong = torch.rand(exact.shape[:2], generator=generator) < wrong
    off = MISMATCH * torch.randn(exact.shape, dtype=exact.dtype, generator=generator)
    return pixels + is_wrong[..., None] * off, is_wrong


def guess(true, seed):
    """A start off the truth by decimetres and degrees, as odometry gives it."""
    generator = torch.Generator().manual_seed(seed + 2)
    off = {"turns": 0.03, "second": 0.1, "places": 0.1, "points": 0.4}
    return {
        name: value + off[name] * torch.randn(value.shape, dtype=value.dtype, generator=generator)
        for name, value in true.items()
    }


def fit(start, pixels, keep, loss):
    def residual(unknowns):
        return (project(unknowns) - pixels)[keep] / NOISE

    begin = time.process_time()
    # Beyond three deviations a residual counts less; the biweight forgets it beyond seven.
    scale = {"huber": 1.5, "cauchy": 2.5, "tukey": 7.0}.get(loss, 1.0)
    result = optim.least_squares(residual, start, loss=loss, f_scale=scale)
    return result, time.process_time() - begin


def distances(found, true):
    """Of the points, in centimetres."""
    return 100 * (found["points"] - true["points"]).norm(dim=1)


def print_row(name, result, seconds, true):
    off = distances(result.x, true)
    places = 100 * (whole(result.x)[1] - whole(true)[1]).norm(dim=1)
    print(
        f"{name:<22}{float(off.median()):>12.2f}{float(off.max()):>10.1f}{float(places.max()):>14.2f}"
        f"{result.nit:>8}{seconds:>9.2f}  {result.status}"
    )


def plot(true, fits, path):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = (("squares", "C3", "x"), ("tukey after cauchy", "C0", "+"))
    left.plot(true["points"][:, 0], true["points"][:, 2], "o", color="0.6", markersize=6, label="true points")
    left.plot(*whole(true)[1][:, [0, 2]].T, "^", color="black", markersize=8, label="cameras")
    for name, color, mark in shown:
        points = fits[name].x["points"]
        left.plot(points[:, 0], points[:, 2], mark, color=color, markersize=6, label=name)
    left.set(xlabel="x (m)", ylabel="z (m)", title="the scene from above")
    left.legend(loc="upper right", fontsize="small")
    styles = ("-", "--", ":", "-.", (0, (1, 3)))
    share = torch.linspace(0, 1, len(true["points"]) + 1)[1:]
    for (name, result), style in zip(fits.items(), styles, strict=True):
        right.plot(distances(result.x, true).sort().values, share, linestyle=style, label=name, linewidth=1.8)
    right.set(xscale="log", xlabel="error of a point (cm)", ylabel="share of the points with less")
    # Room for the legend.
    right.set(xlim=(0.5, 2e4), title="errors of the points")
    right.legend(loc="lower right", fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"\nplot saved as {path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--points", type=int, default=40, help="of the scene")
    parser.add_argument("--wrong", type=float, default=0.1, help="share of the matches that are")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the scene and the noise")
    parser.add_argument("--plot", default="robust_fit.png", help="where the plot is saved")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    true = scene(options.points, options.seed)
    pixels, is_wrong = look(true, options.wrong, options.seed)
    start, everything = guess(true, options.seed), torch.ones_like(is_wrong)
    print(f"{is_wrong.sum()} of {is_wrong.numel()} matches are wrong; errors in centimetres")
    print(f"{'':<22}{'median point':>12}{'worst':>10}{'worst camera':>14}{'steps':>8}{'seconds':>9}")
    fits = {}
    # No bar where there is no terminal.
    for name in tqdm((*LOSSES, RIGHT), desc="fits", disable=None):
        keep = ~is_wrong if name == RIGHT else everything
        first = fits["cauchy"].x if "after" in name else start
        fits[name], seconds = fit(first, pixels, keep, LOSSES.get(name, "linear"))
        print_row(name, fits[name], seconds, true)
    plot(true, fits, options.plot)
    return fits, true


if __name__ == "__main__":
    main()
