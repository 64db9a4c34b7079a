"""Kronecker factors with corrected eigenvalues, beside a dense construction and exact solves."""

import pytest
import torch
import torch.nn.functional as F

from secondorder import Influence, Objective
from secondorder.influence.ekfac import Ekfac

# Double precision; eigenvalues that lie close together turn their vectors by more than rounding.
ROUNDING = dict(rtol=1e-6, atol=1e-9)
SHIFT = 0.1


def token_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.out = torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x)))


def network(name):
    """Model, loss, data; and of the weights that are checked, what multiplies them: (N, T, i)."""
    torch.manual_seed(0)
    if name == "tokens":
        x, y = torch.randint(0, 6, (20, 3)), torch.randint(0, 6, (20, 3))
        model = Tokens().double()
        hidden = torch.tanh(model.embed(x)).detach()
        return model, token_loss, (x, y), {"embed.weight": None, "out.weight": hidden}
    y = torch.randint(0, 3, (30,))
    if name == "linear":
        x = torch.randn(30, 6).double()
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        taken = {"0.weight": x[:, None], "2.weight": torch.tanh(model[0](x))[:, None].detach()}
        return model, F.cross_entropy, (x, y), taken
    x = torch.randn(30, 2, 5, 5).double()
    layers = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(100, 3)
    taken = {"0.weight": F.unfold(x, 3, padding=1).mT}
    return torch.nn.Sequential(*layers).double(), F.cross_entropy, (x, y), taken


def gradients(model, x):
    """Of every parameter: columns of ``J^T S`` of every sample, shape (N, columns, *parameter)."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values, x):
        return torch.func.functional_call(model, values, (x,))

    J = torch.func.jacrev(outputs)(values, x)
    z = outputs(values, x)
    p = z.softmax(-1)
    S = torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
    # A mean over tokens.
    S = S / (z[0].numel() / z.shape[-1]) ** 0.5
    found = {}
    for name, j in J.items():
        j = j.flatten(1, z.ndim - 1)
        blocks = torch.stack([torch.block_diag(*s.reshape(-1, *s.shape[-2:])) for s in S])
        found[name] = torch.einsum("no...,noc->nc...", j, blocks)
    return found


@pytest.mark.parametrize("name", ["linear", "convolution", "tokens"])
def test_the_inverse_is_that_of_a_dense_construction(name):
    model, loss, data, taken = network(name)
    objective = Objective(model, loss, data, batch_size=12)
    n = len(data[1])
    found = Ekfac(objective, 1 / n, SHIFT)
    inverse = found @ torch.eye(found.shape[0]).double()
    torch.testing.assert_close(inverse, inverse.T)
    rows, at = gradients(model, data[0]), 0
    for (key, p), blocks in zip(model.named_parameters(), found.blocks, strict=True):
        k, g = p.numel(), rows[key].flatten(0, 1)
        part = inverse[at : at + k, at : at + k]
        at += k
        if p.ndim == 1:
            exact = g.T @ g / n + SHIFT * torch.eye(k).double()
            torch.testing.assert_close(part, torch.linalg.inv(exact), **ROUNDING)
        elif key in taken:
            (block,) = blocks
            left = torch.eye(p.shape[0]).double() if block.left is None else block.left[0]
            right = block.right[0]
            if taken[key] is not None:
                # A linear layer's gradient with respect to its weights is transposed as the graph has it.
                moment = taken[key].flatten(0, 1).T @ taken[key].flatten(0, 1)
                inner = right if len(right) == len(moment) else left
                off = inner.T @ moment @ inner
                assert (off - off.diagonal().diag()).abs().max() < 1e-9 * moment.norm()
            matrix = g.flatten(2) if p.ndim > 2 else g
            entries = torch.arange(k).as_strided(block.spot.shape, block.spot.stride())[0]
            turned = torch.einsum("nx,xab->nab", matrix.flatten(1), _basis(entries, left, right, k))
            values = turned.square().sum(0) / n
            torch.testing.assert_close(block.values[0], values, **ROUNDING)
            Q = _basis(entries, left, right, k).flatten(1)
            expected = Q @ torch.diag(1 / (values.flatten() + SHIFT)) @ Q.T
            torch.testing.assert_close(part, expected, **ROUNDING)
    assert at == found.shape[0]


def _basis(entries, left, right, k):
    """Products of eigenvectors, as vectors of the parameter's entries, shape (k, o, i)."""
    Q = torch.zeros(k, left.shape[1], right.shape[1]).double()
    Q[entries.flatten()] = torch.einsum("oa,ib->oiab", left, right).flatten(0, 1)
    return Q


def test_with_one_sample_position_the_factors_are_the_whole_of_a_linear_model():
    """For squared error of one linear layer the matrix is a Kronecker product: nothing is approximated."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 6).double(), torch.randn(50, 4).double()
    model = torch.nn.Linear(6, 4, bias=False).double()
    objective = Objective(model, F.mse_loss, (x, y), l2=0.1)
    approximate, exact = (Influence(objective, solver=solver) for solver in ("ekfac", "dense"))
    test = (x[:5], y[:5])
    found = approximate.scores(test)
    torch.testing.assert_close(found.scores, exact.scores(test).scores, rtol=1e-9, atol=1e-12)
    assert found.status == "approximate"
    assert found.residual_norm < 1e-10
    assert "approximation by name" in found.summary()


def encoder():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 8), layer, torch.nn.Linear(8, 7)).double().eval()
    return model, (torch.randint(0, 7, (20, 5)), torch.randint(0, 7, (20, 5)))


def test_preconditioned_cg_is_exact():
    model, data = encoder()
    objective = Objective(model, token_loss, data, l2=1e-2, batch_size=8)
    test = (data[0][:3], data[1][:3])
    exact = Influence(objective, solver="dense").scores(test).scores
    options = dict(solver="block_cg", preconditioner="ekfac", rtol=1e-9)
    found = Influence(objective, **options).scores(test)
    assert found.status == "converged"
    torch.testing.assert_close(found.scores, exact, rtol=1e-6, atol=1e-8)
    approximate = Influence(objective, solver="ekfac").scores(test).scores
    assert torch.corrcoef(torch.stack([approximate.flatten(), exact.flatten()]))[0, 1] > 0.85


def test_damping_without_an_l2_term_is_a_tenth_of_the_mean_eigenvalue():
    model, loss, data, _ = network("linear")
    objective = Objective(model, loss, data)
    influence = Influence(objective, solver="ekfac")
    matrix = objective.gauss_newton().dense()
    expected = 0.1 * float(matrix.trace()) / len(matrix)
    assert f"damping={expected:.3g}" in repr(influence)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.embed(x)), self.embed.weight)


def test_tied_weights_have_a_diagonal():
    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randint(0, 6, (20, 3)), torch.randint(0, 6, (20, 3))
    objective = Objective(model, token_loss, (x, y))
    found = Ekfac(objective, 1 / 20, SHIFT) @ torch.eye(24).double()
    diagonal = objective.gauss_newton().diagonal()
    torch.testing.assert_close(found, torch.diag(1 / (diagonal + SHIFT)), **ROUNDING)


class Squared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3).double())

    def forward(self, x):
        return torch.cumsum(x * 1.0, 1) @ torch.cumsum(self.weight, 0)[:, None]


def test_refused_by_name():
    x, y = torch.randn(5, 3).double(), torch.randn(5, 1).double()
    objective = Objective(Squared(), F.mse_loss, (x, y), l2=0.1)
    with pytest.raises(ValueError, match="got 'weight' in"):
        Influence(objective, solver="ekfac")
    with pytest.raises(ValueError, match="approximates curvature='ggn'"):
        Influence(objective, solver="ekfac", curvature="hessian")
    with pytest.raises(ValueError, match="preconditioner needs solver='block_cg'"):
        Influence(objective, preconditioner="ekfac")
    with pytest.raises(ValueError, match="preconditioner must be 'ekfac' or None"):
        Influence(objective, solver="block_cg", preconditioner="kfac")
