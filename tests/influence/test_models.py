"""Scores of models that are awkward to differentiate by sample, against dense derivatives in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optim
from secondorder import Influence, MatrixOperator, Objective

L2 = 0.5


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.core, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.core(x)[0][:, -1])


class Tokens(nn.Module):
    """Logits of shape (n, T, V)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))


class Bag(nn.Module):
    """Torch has no second derivative of its bag; the reference takes the plain mean instead."""

    is_plain = False

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.embedding(x, self.bag.weight).mean(1) if self.is_plain else self.bag(x))


class Branches(nn.Module):
    """Each sample takes its own way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        rows = [self.first(row) if float(row[0].detach()) > 0 else self.second(row).tanh() for row in x]
        return torch.stack(rows)


class Named(nn.Module):
    """Keyword inputs and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_scale = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, a, b):
        return {"mean": self.mean(a), "log_scale": self.log_scale(b)}


def gaussian(outputs, y):
    scaled = (outputs["mean"][:, 0] - y) * (-outputs["log_scale"][:, 0]).exp()
    return (scaled.square() / 2 + outputs["log_scale"][:, 0]).mean()


def token_loss(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def case(name):
    """Model, loss, inputs, targets, curvature."""
    x, y = torch.randn(12, 5, 3).double(), torch.randint(2, (12,))
    flat = x[:, 0]
    if name in ("GRU", "LSTM"):
        return Recurrent(getattr(nn, name)), F.cross_entropy, x, y
    if name == "tokens":
        words = torch.randint(7, (12, 6))
        return Tokens(), token_loss, words[:, :5], words[:, 1:]
    if name == "bag":
        return Bag(), F.cross_entropy, torch.randint(9, (12, 4)), y
    if name == "batchnorm":
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        model[1].running_mean.fill_(0.3)
        return model, F.cross_entropy, flat, y
    if name == "convolution":
        model = nn.Sequential(nn.Conv1d(5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))
        return model, F.cross_entropy, x, y
    if name == "branches":
        return Branches(), F.cross_entropy, flat, y
    return Named(), gaussian, {"a": flat, "b": x[:, 1, :2]}, torch.randn(12).double()


def cut(inputs, part):
    return {k: v[part] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[part]


def dense(objective, test):
    """Order one from single samples and double backward passes."""
    model, loss, parameters = objective.model, objective.loss, objective.parameters
    inputs, targets = objective.data

    def rows(data):
        found = []
        for i in range(len(data[1])):
            x = cut(data[0], slice(i, i + 1))
            outputs = model(**x) if isinstance(x, dict) else model(x)
            grads = torch.autograd.grad(loss(outputs, data[1][i : i + 1]), parameters, materialize_grads=True)
            found.append(torch.cat([g.reshape(-1) for g in grads]))
        return torch.stack(found)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        grads = torch.autograd.grad(
            loss(outputs, targets), parameters, create_graph=True, materialize_grads=True
        )
        flat = torch.cat([g.reshape(-1) for g in grads])
        columns = [
            torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat
        ]
    H = torch.stack([torch.cat([c.reshape(-1) for c in column]) for column in columns])
    H = H + objective.l2 * torch.eye(len(H)).double()
    return rows(test) @ torch.linalg.solve(H, rows((inputs, targets)).T) / len(targets)


NAMES = ("GRU", "LSTM", "tokens", "bag", "batchnorm", "convolution", "branches", "dicts")


@pytest.mark.parametrize("batch_size", [5, 12])
@pytest.mark.parametrize("name", NAMES)
def test_models(name, batch_size):
    torch.manual_seed(0)
    model, loss, inputs, targets = case(name)
    model = model.double().eval()
    test = cut(inputs, slice(3)), targets[:3].flip(0)
    objective = Objective(model, loss, (inputs, targets), l2=L2, batch_size=batch_size)
    model.is_plain = True
    expected = dense(objective, test)
    model.is_plain = False
    buffers = [b.clone() for b in model.buffers()]
    for solver in ("dense", "block_cg"):
        influence = Influence(objective, curvature="hessian", damping=0.0, solver=solver, rtol=1e-10)
        found = influence.scores(test)
        assert found.status in ("converged", "negative_curvature")
        torch.testing.assert_close(found.scores, expected, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_removals_of_awkward_models_come_near_refits(name):
    torch.manual_seed(0)
    model, loss, inputs, targets = case(name)
    objective = Objective(model.double().eval(), loss, (inputs, targets), l2=L2)
    optimizer = optim.Newton(objective.parameters)

    def closure():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return loss(outputs, targets) + L2 / 2 * sum(p.square().sum() for p in objective.parameters)

    for _ in range(60):
        optimizer.step(closure)
    influence, test = Influence(objective, curvature="hessian"), (cut(inputs, slice(3)), targets[:3])
    real = influence.scores(test, [1, 5], order="refit")
    close = influence.scores(test, [1, 5], order="newton", steps=4).scores
    assert set(real.statuses) <= {"converged", "stagnated"}
    assert (close - real.scores).norm() <= 0.05 * real.scores.norm()


class OnceSquare(torch.autograd.Function):
    """Its backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(nn.Module):
    def __init__(self, square):
        super().__init__()
        self.layer, self.square = nn.Linear(3, 1).double(), square

    def forward(self, x):
        return self.square(self.layer(x))[:, 0]


def test_a_function_that_is_differentiable_once_needs_a_curvature():
    torch.manual_seed(0)
    x, y = torch.randn(9, 3).double(), torch.randn(9).double()
    model = Once(torch.square)
    expected = Influence(Objective(model, F.mse_loss, (x, y), l2=L2)).scores((x[:2], y[:2])).scores
    G = Objective(model, F.mse_loss, (x, y), l2=L2).gauss_newton().dense()
    model.square = OnceSquare.apply
    from_matrix = Influence(Objective(model, F.mse_loss, (x, y)), curvature=MatrixOperator(G))
    torch.testing.assert_close(from_matrix.scores((x[:2], y[:2])).scores, expected)
