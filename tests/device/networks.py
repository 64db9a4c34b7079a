"""Networks and data for tests on a device, made on the CPU from a seed and moved."""

import torch
from torch import nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.states, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.states(x)[0][:, -1])


MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(24, 5)),
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)),
        torch.randn(24, 1, 6, 6),
    ),
    "gru": lambda: (Recurrent(), torch.randn(24, 4, 4)),
}


class Case:
    """A model, a batch and a loss on a device; the numbers are the same on each."""

    def __init__(self, name, device="cpu", dtype=torch.float32, loss="cross_entropy"):
        torch.manual_seed(0)
        model, x = MODELS[name]()
        y = torch.randint(3, (len(x),))
        self.model, self.x = model.to(device, dtype), x.to(device, dtype)
        is_squares = loss == "mse_loss"
        self.y = (F.one_hot(y, 3).to(dtype) if is_squares else y).to(device)
        self.parameters = list(self.model.parameters())
        self.calls, self.loss_of = 0, getattr(F, loss)

    def loss(self):
        self.calls += 1
        return self.loss_of(self.model(self.x), self.y)

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])
