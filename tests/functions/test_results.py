"""The result: attributes, keys, copies, and what is printed."""

import copy
import pickle

import pytest
import torch
import zoo
from scipy.optimize import OptimizeResult as Scipys

import optim


@pytest.fixture(scope="module")
def result():
    return optim.minimize(zoo.PROBLEMS[0].func, zoo.PROBLEMS[0].x0())


def test_attributes_are_keys(result):
    assert list(result) == list(result.keys())
    assert all(getattr(result, name) is result[name] for name in result)
    assert {"x", "fun", "jac", "success", "message", "nit", "nfev", "njev", "nhev"} <= set(result)
    assert Scipys(result)["fun"] == result.fun
    assert "x" in dir(result)


def test_nothing_is_set(result):
    with pytest.raises(AttributeError, match="OptimizeResult is immutable, got 'x' to set"):
        result.x = None
    with pytest.raises(AttributeError, match="OptimizeResult has no 'hess_inv'; it has x, fun, jac"):
        _ = result.hess_inv
    with pytest.raises(KeyError):
        result["hess_inv"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_hold_the_same(result, copied):
    other = copied(result)
    assert torch.equal(other.x, result.x)
    assert repr(other) == repr(result)
    assert str(other.history) == str(result.history)


def test_history_is_the_way(result):
    values = [record.fun for record in result.history]
    assert values[0] == pytest.approx(24.2)
    assert values[-1] == result.fun
    assert values == sorted(values, reverse=True)
    assert result.history[-1].grad_norm == float(result.jac.abs().max())
    assert all(record.step_norm > 0 for record in result.history[1:])


def test_long_vectors_are_summed_up():
    text = repr(optim.minimize(lambda x: (x - 2).square().sum(), torch.zeros(1000)))
    assert "(1000,) float32, from 2 to 2" in text
    assert max(map(len, text.splitlines())) < 300
