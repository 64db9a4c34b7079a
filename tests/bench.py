"""What the benchmarks share: three networks, and interleaved timing."""

import statistics
import time

import torch
from torch import nn

ROUNDS = 15


def mlp():
    model = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10))
    return model, torch.randn(512, 784), torch.randint(10, (512,))


def cnn():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )
    return model, torch.randn(128, 1, 28, 28), torch.randint(10, (128,))


class Block(nn.Module):
    """A transformer block with attention written out: the fused kernels have no second derivative."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind()
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.out(attention.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


def transformer():
    model = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(16 * 64, 10))
    return model, torch.randn(64, 16, 64), torch.randint(10, (64,))


def interleaved(functions, rounds=ROUNDS, calls=1):
    """Median seconds of each function: in each round, each is called ``calls`` times in a row.

    A first call finds cold memory; solvers call products in a row.
    """
    seconds = {name: [] for name in functions}
    for round_number in range(rounds + 2):
        for name, function in functions.items():
            for _ in range(calls):
                start = time.perf_counter()
                function()
                if round_number >= 2:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


BUILDERS = (mlp, cnn, transformer)
