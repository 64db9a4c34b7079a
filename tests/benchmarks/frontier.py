"""What ``test_frontier.py`` trains: problems that are hard for first-order methods, or for LBFGS.

Each is a function of a seed, that of the initialisation alone: data and the order of batches are those of
every optimizer and every seed.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import random
import tarfile
import typing
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from problems import TRAINING_DIGITS, autoencoder, digits
from torch import Tensor, nn


class Task(NamedTuple):
    """A network to train.

    Attributes:
        net: The network.
        loss: Of the present batch.
        errors: What is reported; measured where no clock runs.
        residual: The vector of which ``loss`` is the sum of squares; None where it is of none.
        draw: Moves on to the next batch; None where the only batch is all of the data.
    """

    net: nn.Module
    loss: Callable[[], Tensor]
    errors: Callable[[], tuple[float, ...]]
    residual: Callable[[], Tensor] | None = None
    draw: Callable[[], None] | None = None


def fit(net: nn.Module, residual: Callable[[], Tensor], errors: Callable[[], tuple[float, ...]]) -> Task:
    return Task(net, lambda: residual().square().sum(), errors, residual)


def network(widths: list[int], seed: int) -> nn.Sequential:
    """Tanh units in float64; weights from N(0, 1 / inputs), biases zero (Glorot's without its outputs)."""
    generator, layers = torch.Generator().manual_seed(seed), []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            # Drawn as (inputs, outputs), the order of the published figures.
            weight = torch.randn(inputs, outputs, dtype=torch.float64, generator=generator)
            layer.weight.copy_(weight.T / math.sqrt(inputs))
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Jet(NamedTuple):
    """A function of points with its derivatives along some coordinates: each of shape (points, outputs)."""

    value: Tensor
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]


def jet(net: nn.Sequential, points: Tensor, coordinates: tuple[int, ...]) -> Jet:
    """The network and its derivatives, carried forward through layers: no graph in a graph."""
    value, zero = points, torch.zeros_like(points)
    first = tuple(zero.index_fill(1, torch.tensor([i]), 1.0) for i in coordinates)
    second = tuple(zero for _ in coordinates)
    for layer in net:
        if isinstance(layer, nn.Linear):
            value = layer(value)
            first, second = (tuple(d @ layer.weight.T for d in ds) for ds in (first, second))
        else:
            value = torch.tanh(value)
            slope = 1 - value.square()
            second = tuple(slope * (dd - 2 * value * d.square()) for d, dd in zip(first, second, strict=True))
            first = tuple(slope * d for d in first)
    return Jet(value, first, second)


def digits_autoencoder(seed: int, size: int = TRAINING_DIGITS) -> Task:
    """10,694 parameters in float32, from batches of ``size``; squared errors of training and test digits."""
    torch.manual_seed(seed)
    net, _ = autoencoder()
    images = digits()[0]
    training, test = images[:TRAINING_DIGITS], images[TRAINING_DIGITS:]
    order = torch.Generator().manual_seed(1)
    batches: list[Tensor] = []

    def draw() -> None:
        del batches[:1]
        if not batches or len(batches[0]) < size:
            batches[:] = training[torch.randperm(len(training), generator=order)].split(size)

    def error(inputs: Tensor) -> float:
        return float((net(inputs).sigmoid() - inputs).square().sum() / len(inputs))

    def loss() -> Tensor:
        inputs = batches[0]
        return F.binary_cross_entropy_with_logits(net(inputs), inputs, reduction="sum") / len(inputs)

    draw()
    is_whole = size == len(training)
    return Task(net, loss, lambda: (error(training), error(test)), draw=None if is_whole else draw)


def poisson(seed: int) -> Task:
    """``u'' = f`` on [0, 1] with ``u = sin(2 pi x) + sin(10 pi x) / 10``: 193 parameters, 202 residuals.

    The error is that of ``u``, relative, in L2.
    """

    def solution(x: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * x) + 0.1 * torch.sin(10 * math.pi * x)

    net = network([1, 12, 12, 1], seed)
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    f = -((2 * math.pi) ** 2) * torch.sin(2 * math.pi * x) - 10 * math.pi**2 * torch.sin(10 * math.pi * x)
    ends, many = x[[0, -1]], torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]

    def residual() -> Tensor:
        inside = (jet(net, x, (0,)).second[0] - f) / math.sqrt(len(x))
        return torch.cat([inside, 10 * net(ends)]).flatten()

    return fit(net, residual, lambda: (float((net(many) - solution(many)).norm() / solution(many).norm()),))


def sinc(seed: int) -> Task:
    """``sinc(10 x)`` by 20 units at 20,000 points: the example of torch-levenberg-marquardt, in float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.linspace(-1, 1, 20_000, dtype=torch.float64)[:, None]
    y = torch.sinc(10 * x)

    def residual() -> Tensor:
        return (net(x) - y).flatten() / math.sqrt(len(x))

    return fit(net, residual, lambda: (float(residual().square().sum()),))


def collocation(inside: int, edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points (x, t) uniform in [-1, 1] x [0, 1]; at t = 0; and at x = -1 and 1: shapes (., 2)."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([2.0, 1.0], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0], dtype=torch.float64)
    points, start, sides = (
        torch.rand(n, 2, dtype=torch.float64, generator=generator) * scale - shift
        for n in (inside, edge, edge)
    )
    start[:, 1] = 0
    sides[:, 0] = sides[:, 0].sign()
    return points, start, sides


def evolution(seed: int, equation: Callable[[Jet], Tensor], initial: Callable[[Tensor], Tensor]) -> Task:
    """A field that is zero at x = -1 and 1: 3,297 parameters, 1,000 collocation points and 200 on the edges.

    Args:
        seed: Of the network.
        equation: What is to vanish, of a jet along x and t.
        initial: The field at t = 0.
    """
    net, (points, start, sides) = network([2, 32, 32, 32, 32, 1], seed), collocation(1000, 100)
    values = initial(start[:, :1])

    def residual() -> Tensor:
        parts = equation(jet(net, points, (0, 1))), net(start) - values, net(sides)
        return torch.cat([part.flatten() / math.sqrt(len(part)) for part in parts])

    return fit(net, residual, lambda: (float(residual().square().sum()),))


def burgers(seed: int) -> Task:
    """``u_t + u u_x = (0.01 / pi) u_xx``, ``u = -sin(pi x)`` at t = 0: a shock at x = 0.

    Reference: Raissi, Perdikaris and Karniadakis (2019), Physics-informed neural networks, section 3.1.
    """

    def equation(u: Jet) -> Tensor:
        (u_x, u_t), (u_xx, _) = u.first, u.second
        return u_t + u.value * u_x - 0.01 / math.pi * u_xx

    return evolution(seed, equation, lambda x: -torch.sin(math.pi * x))


def heat(seed: int) -> Task:
    """``pi^2 u_t = u_xx``, two modes of which one decays 16 times as fast."""

    def equation(u: Jet) -> Tensor:
        return u.first[1] - u.second[0] / math.pi**2

    return evolution(seed, equation, lambda x: torch.sin(math.pi * x) + 0.5 * torch.sin(4 * math.pi * x))


class Recurrent(nn.Module):
    """Tanh units; 15 weights a unit are not zero, with a spectral radius of 1.1; others from N(0, 0.01).

    Reference: Sutskever, Martens, Dahl and Hinton (2013), On the importance of initialization and momentum in
        deep learning, table 4.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.rnn, self.linear = nn.RNN(inputs, units, batch_first=True), nn.Linear(units, 1)
        weight, into = self.rnn.weight_hh_l0, self.rnn.weight_ih_l0
        with torch.no_grad():
            for bias in (self.rnn.bias_hh_l0, self.rnn.bias_ih_l0, self.linear.bias):
                bias.zero_()
            weight.normal_()
            weight *= torch.rand_like(weight).argsort(1) < 15
            weight *= 1.1 / torch.linalg.eigvals(weight).abs().max()
            for other in (into, self.linear.weight):
                other.normal_(std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0][:, -1])


def additions(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences of numbers in [0, 1] and marks, (count, length, 2), and the sum of two marked: (count, 1).

    One is marked in the first tenth, the other in the rest of the first half.

    Reference: Hochreiter and Schmidhuber (1997), Long short-term memory, section 5.4.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers, marks = torch.rand(count, length, generator=generator), torch.zeros(count, length)
    for low, high in ((0, length // 10), (length // 10, length // 2)):
        marks[range(count), torch.randint(low, high, (count,), generator=generator)] = 1.0
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)


def adding(seed: int, units: int = 32, count: int = 4000, length: int = 50) -> Task:
    """The sum of two of 50 numbers by 32 units, from 4,000 sequences; the mean square error is on others."""
    torch.manual_seed(seed)
    net = Recurrent(2, units)
    (inputs, sums), (others, wanted) = additions(count, length, 1), additions(2000, length, 0)

    def error() -> tuple[float, ...]:
        return (float(F.mse_loss(net(others), wanted)),)

    return Task(net, lambda: F.mse_loss(net(inputs), sums), error)


@cache
def text() -> Tensor:
    """Source of Python's library, ASCII without tabs, as numbers from 0 to 95: shape (characters,)."""
    source = "".join(inspect.getsource(module) for module in (argparse, inspect, random, tarfile, typing))
    codes = torch.tensor(list(source.encode("ascii", "ignore")))
    codes = codes[(codes >= 32) | (codes == 10)]
    return torch.where(codes == 10, 95, codes - 32).clamp(max=95)


class Block(nn.Module):
    """Causal attention and two layers, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class CharacterModel(nn.Module):
    """Of 96 characters, from 64 before: two blocks of width 64 with four heads, 117,000 parameters."""

    def __init__(self, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(96, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4), nn.LayerNorm(width))
        self.head = nn.Linear(width, 96)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(codes) + self.places.weight))


def characters(seed: int, count: int = 64, length: int = 64) -> Task:
    """Cross-entropy of the next character, 4,096 a batch; the error is that of text that is kept back."""
    torch.manual_seed(seed)
    net, codes, order = CharacterModel(length=length), text(), torch.Generator().manual_seed(1)
    training, test = codes[: -len(codes) // 10], codes[-len(codes) // 10 :].unfold(0, length + 1, length)
    batch = torch.empty(0)

    def cross_entropy(rows: Tensor) -> Tensor:
        return F.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def draw() -> None:
        nonlocal batch
        starts = torch.randint(len(training) - length, (count, 1), generator=order)
        batch = training[starts + torch.arange(length + 1)]

    draw()
    return Task(net, lambda: cross_entropy(batch), lambda: (float(cross_entropy(test[:256])),), draw=draw)
