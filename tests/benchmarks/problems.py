"""What ``test_optimizers.py`` trains: small networks in full batch, each with the losses to reach.

Figures are published for ``PUBLIC``: data, order, initialisation and levels stay, so that figures compare.
``KEPT_BACK`` are others of their kinds, by which no default is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn

Case = tuple[nn.Module, Callable[[], Tensor]]
# Of the 1797 digits; the other 360 are for testing.
TRAINING_DIGITS = 1437


class Problem(NamedTuple):
    """``make()`` gives a network, drawn from torch's generator, and its loss; ``levels`` are losses to reach.

    ``max_gradients`` ends a run; where the figure is time, only the clock does.
    """

    make: Callable[[], Case]
    levels: tuple[float, ...]
    max_gradients: float = 600.0


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images of shape (1797, 64) between 0 and 1, and labels, in an order that mixes the writers."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(data.data, dtype=torch.float32) / 16)[order], torch.tensor(data.target)[order]


def standardised(data) -> Tensor:
    return torch.tensor((data - data.mean(0)) / data.std(0))


def digits_network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def swap() -> Case:
    """One hidden layer: the easiest, and LBFGS's best."""
    net, (images, labels) = digits_network(), digits()
    return net, lambda: F.cross_entropy(net(images), labels)


def mlp() -> Case:
    images, labels = digits()
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return net, lambda: F.cross_entropy(net(images), labels)


def cnn() -> Case:
    images, labels = digits()
    images, labels = images[:600].view(-1, 1, 8, 8), labels[:600]
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    return net, lambda: F.cross_entropy(net(images), labels)


def _sparse_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """15 weights a unit from N(0, 1), the others and the bias zero.

    Reference: Martens (2010), Deep learning via Hessian-free optimization, section 5.
    """
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        for row in layer.weight:
            chosen = torch.randperm(inputs, generator=generator)[:15]
            row[chosen] = torch.randn(len(chosen), generator=generator)
    return layer


def autoencoder() -> Case:
    """Sigmoid units, a linear code of six, logits out; cross-entropy of a pixel summed over the image."""
    images = digits()[0][:TRAINING_DIGITS]
    widths = [64, 48, 32, 16, 6, 16, 32, 48, 64]
    # Not torch's own: the weights that a Linear draws first and drops would shift the numbers.
    generator = torch.Generator().manual_seed(torch.initial_seed())
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers.append(_sparse_linear(widths[i], widths[i + 1], generator))
        if widths[i + 1] not in (6, 64):
            layers.append(nn.Sigmoid())
    net = nn.Sequential(*layers)
    return net, lambda: F.binary_cross_entropy_with_logits(net(images), images, reduction="sum") / len(images)


def logistic(dtype: torch.dtype = torch.float32) -> Case:
    """Breast cancer, 30 features, two outputs, L2 penalty 5e-4 |w|^2: strictly convex."""
    data = load_breast_cancer()
    net, inputs = nn.Linear(30, 2).to(dtype), standardised(data.data).to(dtype)
    labels = torch.tensor(data.target)

    def loss() -> Tensor:
        penalty = 0.5e-3 * sum(p.square().sum() for p in net.parameters())
        return F.cross_entropy(net(inputs), labels) + penalty

    return net, loss


def pinn() -> Case:
    """1-D Poisson, a source of two scales, 200 points; 193 parameters in float64."""
    net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    source = math.pi**2 * torch.sin(math.pi * x) + 0.5 * (4 * math.pi) ** 2 * torch.sin(4 * math.pi * x)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def loss() -> Tensor:
        with torch.enable_grad():
            inside = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(net(inside).sum(), inside, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), inside, create_graph=True)
            residual = (second + source) / (4 * math.pi) ** 2
            return residual.square().mean() + net(ends).square().mean()

    return net, loss


def wine() -> Case:
    """Three classes; 275 parameters in float64, where forming a matrix is dear."""
    data = load_wine()
    inputs, labels = standardised(data.data), torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return net, lambda: F.cross_entropy(net(inputs), labels)


def sine() -> Case:
    """Two periods; 253 parameters in float64."""
    net = nn.Sequential(nn.Linear(1, 14), nn.Tanh(), nn.Linear(14, 14), nn.Tanh(), nn.Linear(14, 1)).double()
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    target = torch.sin(2 * math.pi * x)
    return net, lambda: F.mse_loss(net(x), target)


def diabetes() -> Case:
    """Ten features; what is beyond the noise of the targets is fitted by heart."""
    data = load_diabetes()
    inputs, targets = standardised(data.data).float(), standardised(data.target).float()[:, None]
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    return net, lambda: F.mse_loss(net(inputs), targets)


class Adder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.linear = nn.RNN(2, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0][:, -1])


def rnn(length: int = 10) -> Case:
    """The sum of the two marked of ``length`` numbers.

    Reference: Hochreiter and Schmidhuber (1997), Long short-term memory, section 5.4.
    """
    net, generator = Adder(), torch.Generator().manual_seed(0)
    numbers = torch.rand(256, length, generator=generator)
    marked = torch.rand(256, length, generator=generator).topk(2).indices
    marks = torch.zeros_like(numbers).scatter(1, marked, 1.0)
    inputs, targets = torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)
    return net, lambda: F.mse_loss(net(inputs), targets)


PUBLIC = {
    "swap": Problem(swap, (1e-1, 1e-2, 1e-4)),
    "mlp": Problem(mlp, (1e-1, 1e-2, 1e-4)),
    "cnn": Problem(cnn, (1e-1, 1e-2, 1e-4)),
    "ae": Problem(autoencoder, (25.0, 20.0, 17.0)),
    "log": Problem(logistic, (0.1, 0.054, 0.0535)),
    "pinn": Problem(pinn, (1e-2, 1e-3, 1e-5, 1e-7), math.inf),
}
KEPT_BACK = {
    "wine": Problem(wine, (1e-1, 1e-2, 1e-4)),
    "sine": Problem(sine, (1e-2, 1e-3, 1e-5)),
    "diabetes": Problem(diabetes, (0.4, 0.3, 0.2)),
    "rnn": Problem(rnn, (1e-1, 1e-2, 1e-3)),
}
PROBLEMS = PUBLIC | KEPT_BACK
