"""Which training images moved a prediction, and by how much: digits.

    python examples/influence_digits.py                     # tables, and influence_digits.png

Softmax regression on handwritten digits. For three test images it shows the training images that help and
harm their loss most; predicted changes beside those of real refits, coloured by the indicator of the
prediction's error; what happens when whole groups are removed, one part of a class each; and how well flipped
labels are found by the leave-one-out loss, beside the plain loss.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optim
from secondorder import Influence, Objective

L2 = 1e-3
TESTS, SHOWN = 3, 4
# Part of the labels that are flipped.
FLIPPED = 0.05


class Data(NamedTuple):
    """Images of 64 pixels from 0 to 1, and their digits."""

    images: torch.Tensor
    labels: torch.Tensor


def digits(count):
    """So many training images, and the rest."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:count], order[count:]
    return Data(images[train], labels[train]), Data(images[test], labels[test])


def fitted(data):
    """Influence at the minimiser of the loss over ``data``."""
    model = torch.nn.Linear(64, 10).double()
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    parameters = list(model.parameters())
    optimizer = optim.Newton(parameters)

    def closure():
        value = F.cross_entropy(model(data.images), data.labels)
        return value + L2 / 2 * sum(p.square().sum() for p in parameters)

    for _ in range(40):
        optimizer.step(closure)
        if optimizer.report.gradient_norm < 1e-10:
            break
    return model, Influence(Objective(model, F.cross_entropy, tuple(data), l2=L2))


def hardest(model, test):
    """Test images of the largest loss."""
    with torch.no_grad():
        losses = F.cross_entropy(model(test.images), test.labels, reduction="none")
    places = losses.topk(TESTS).indices
    return Data(test.images[places], test.labels[places])


def show(axes, image, title):
    axes.imshow(image.view(8, 8).numpy(), cmap="gray_r")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_images(figure, influence, train, test):
    """A row for each test image: it, the most helpful ones, the most harmful ones."""
    grid = figure.subplots(TESTS, 1 + 2 * SHOWN)
    result = influence.scores(tuple(test), order=1)
    for i, row in enumerate(grid):
        show(row[0], test.images[i], f"test: {int(test.labels[i])}")
        helpful, harmful = result.top(i, SHOWN), result.top(i, SHOWN, harmful=True)
        for axes, entry in zip(row[1:], (*helpful, *harmful), strict=True):
            show(axes, train.images[entry.train], f"{int(train.labels[entry.train])}: {entry.change:+.3f}")
    figure.suptitle(
        f"change of the test loss without the image, first order: {SHOWN} most helpful, {SHOWN} most harmful",
        fontsize=9,
    )


def draw_scatter(figure, influence, train, test, count):
    """Newton steps and the first order beside refits; the first half of the points are the largest."""
    first = influence.scores(tuple(test))
    largest = first.scores.abs().amax(0).topk(count // 2).indices.tolist()
    points = largest + [i for i in range(len(train.labels)) if i not in largest][: count - count // 2]
    real = influence.scores(tuple(test), points, order="refit").scores
    newton = influence.scores(tuple(test), points, order="newton")
    axes = figure.subplots()
    ends = [float(real.min()), float(real.max())]
    axes.plot(ends, ends, color="0.7", linewidth=1)
    axes.scatter(
        real.numpy(), first.scores[:, points].numpy(), s=10, marker="x", color="0.5", label="first order"
    )
    colour = newton.indicator.expand_as(real).numpy()
    found = axes.scatter(
        real.numpy(), newton.scores.numpy(), s=14, c=colour, cmap="viridis", label="Newton step"
    )
    figure.colorbar(found, label="indicator of the error")
    axes.set_xlabel("real change of the test loss, refitted")
    axes.set_ylabel("predicted")
    axes.legend()
    for name, scores in (("first order", first.scores[:, points]), ("Newton step", newton.scores)):
        pearson = torch.corrcoef(torch.stack([scores.flatten(), real.flatten()]))[0, 1]
        error = (scores - real).abs().sum() / real.abs().sum()
        print(f"{name:12} beside {len(points)} refits: Pearson {pearson:.3f}, relative error {error:.3f}")
    return newton


def groups_of(train):
    """Of each class the images with the most ink: one corner of it."""
    ink, found = train.images.sum(1), []
    for digit in range(10):
        own = torch.nonzero(train.labels == digit)[:, 0]
        found.append(own[ink[own].argsort(descending=True)[: len(own) // 3]].tolist())
    return found


def print_groups(influence, train, test):
    groups = groups_of(train)
    predicted = influence.group(groups, tuple(test)).scores
    real = influence.group(groups, tuple(test), order="refit").scores
    print("\nthe third of a class with the most ink removed: change of the first test image's loss")
    for digit, group in enumerate(groups):
        changes = f"predicted {predicted[0, digit]:+.4f}, refitted {real[0, digit]:+.4f}"
        print(f"  {digit}: {len(group):3} images, {changes}")


def print_flipped(train):
    """Precision among the images ranked highest, as many as were flipped."""
    generator = torch.Generator().manual_seed(1)
    count = max(1, int(FLIPPED * len(train.labels)))
    places = torch.randperm(len(train.labels), generator=generator)[:count]
    labels = train.labels.clone()
    labels[places] = (labels[places] + torch.randint(1, 10, (count,), generator=generator)) % 10
    data = Data(train.images, labels)
    model, influence = fitted(data)
    with torch.no_grad():
        plain = F.cross_entropy(model(data.images), labels, reduction="none")
    without = influence.loo_loss()
    rankings = {"plain loss": plain, "leave-one-out loss": without.losses}
    print(f"\n{count} flipped labels: precision among the {count} ranked highest")
    for name, values in rankings.items():
        hits = torch.isin(values.topk(count).indices, places).sum()
        print(f"  {name:20} {float(hits) / count:.2f}")
    print("  (one draw of labels: a few points apart is no difference)")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="training images")
    parser.add_argument("--refits", type=int, default=40)
    parser.add_argument("--plot", default="influence_digits.png")
    options = parser.parse_args(arguments)
    train, rest = digits(options.count)
    model, influence = fitted(train)
    test = hardest(model, rest)
    figure = Figure(figsize=(9, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    draw_images(upper, influence, train, test)
    result = draw_scatter(lower, influence, train, test, options.refits)
    print(result.summary())
    print_groups(influence, train, test)
    print_flipped(train)
    figure.savefig(options.plot, dpi=120)
    return result


if __name__ == "__main__":
    main()
