"""Removed samples of small networks, beside real refits from where the network is."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import optim
from secondorder import Influence, Objective

N, STEPS = 300, 8


def trained(seed, l2):
    torch.manual_seed(seed)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16), torch.tensor(y)
    order = torch.randperm(len(y))
    train, test = [(x[part], y[part]) for part in (order[:N], order[400:430])]
    model = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)).double()
    parameters = list(model.parameters())
    optimizer = optim.Newton(parameters)

    def closure():
        norm = sum(p.square().sum() for p in parameters)
        return F.cross_entropy(model(train[0]), train[1]) + l2 / 2 * norm

    for _ in range(200):
        optimizer.step(closure)
        if optimizer.report.gradient_norm < 1e-12:
            break
    return model, train, test


def correlation(p, a):
    return float(torch.corrcoef(torch.stack([p.flatten(), a.flatten()]))[0, 1])


@pytest.mark.slow
# Of the six runs of two penalties and three seeds, the quicker three.
@pytest.mark.parametrize(("seed", "l2"), [(0, 1e-2), (1, 1e-2), (2, 3e-3)])
def test_chord_steps_come_closer_to_refits_than_first_order(seed, l2):
    model, train, test = trained(seed, l2)
    influence = Influence(Objective(model, F.cross_entropy, train, l2=l2), curvature="hessian")
    losses = F.cross_entropy(model(train[0]), train[1], reduction="none")
    hard = losses.topk(15).indices.tolist()
    easy = [i for i in torch.randperm(N).tolist() if i not in hard][:15]
    real = influence.scores(test, hard + easy, order="refit")
    assert set(real.statuses) <= {"converged", "stagnated"}
    assert real.indicator.max() < 1e-6
    first = influence.scores(test, hard + easy)
    close = influence.scores(test, hard + easy, order="newton", steps=STEPS)
    errors = [(result.scores - real.scores).abs().sum(0) for result in (first, close)]
    # Measured over the six runs: errors of 0.01 to 0.61 of the changes, where first order has 0.39 to 0.77;
    # correlations 0.72 to 1.00. Refits of some hard samples end in another basin, which no step foresees:
    # there, in two runs, first order correlates by 0.01 and 0.03 more.
    assert errors[1].sum() < 0.85 * errors[0].sum()
    assert correlation(close.scores, real.scores) > correlation(first.scores, real.scores) - 0.05
    assert correlation(close.scores, real.scores) > 0.7
    assert spearmanr(close.indicator, errors[1]).statistic >= 0.8


def test_ten_thousand_parameters_in_single_precision():
    """Block CG at its default tolerance, beside the same systems solved to 1e-10 in double."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16).float(), torch.tensor(y)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimizer.step()
    test = x[1000:1020], y[1000:1020]
    found = Influence(Objective(model, F.cross_entropy, (x[:1000], y[:1000]), l2=1e-3)).scores(test)
    assert found.status == "converged"
    model.double()
    objective = Objective(model, F.cross_entropy, (x[:1000].double(), y[:1000]), l2=1e-3)
    exact = Influence(objective, rtol=1e-10).scores((test[0].double(), test[1]))
    assert correlation(found.scores.double(), exact.scores) >= 0.9999
