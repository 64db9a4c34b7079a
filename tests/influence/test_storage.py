"""Scores in a file: the numbers of those in memory, whatever stops the writer."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import optim
from secondorder import Influence, Objective
from secondorder.influence import table
from secondorder.influence.samples import Samples

# Both solve the same systems; columns of a product are summed in another order.
ROUNDING = dict(rtol=1e-9, atol=1e-13)


def problem(l2=0.1, seed=0, shift=0.0):
    torch.manual_seed(seed)
    x, y = torch.randn(40, 3).double(), torch.randn(40, 1).double()
    x_test, y_test = torch.randn(11, 3).double() + shift, torch.randn(11, 1).double()
    model = torch.nn.Linear(3, 1).double()
    optimizer = optim.Newton(model.parameters())

    def closure():
        return F.mse_loss(model(x), y) + l2 / 2 * sum(p.square().sum() for p in model.parameters())

    for _ in range(3):
        optimizer.step(closure)
    objective = Objective(model, F.mse_loss, (x, y), l2=l2, batch_size=16)
    return Influence(objective), (x_test, y_test)


@pytest.fixture
def rows_of_three(monkeypatch):
    monkeypatch.setattr(table, "ROWS", 3)


@pytest.mark.parametrize("order", [1, "newton", "refit"])
@pytest.mark.parametrize("train", [None, [30, 2, 2, 17]])
def test_a_file_holds_the_scores_of_memory(tmp_path, rows_of_three, order, train):
    influence, test = problem()
    out = tmp_path / "scores.npy"
    found, expected = (
        influence.scores(test, train, order=order, out=out),
        influence.scores(test, train, order=order),
    )
    torch.testing.assert_close(found.scores, expected.scores, **ROUNDING)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), found.scores, rtol=0, atol=0)
    assert found.train.tolist() == expected.train.tolist()
    assert found.status == expected.status
    assert found.statuses == expected.statuses
    for name in ("leverage", "indicator"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-6, atol=1e-9)


def test_a_measure_of_one_number_is_one_row(tmp_path):
    influence, test = problem()

    def gap(outputs, targets):
        return (outputs - targets).mean()

    found = influence.scores(test, measure=gap, out=tmp_path / "scores.npy")
    torch.testing.assert_close(found.scores, influence.scores(test, measure=gap).scores, **ROUNDING)


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_stopped_run_goes_on_and_ends_identical(tmp_path, rows_of_three, monkeypatch, stop):
    influence, test = problem()
    whole = influence.scores(test, out=tmp_path / "whole.npy").scores
    real, calls = Samples.derivatives, []

    def derivatives(self, batch, X):
        calls.append(batch)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(self, batch, X)

    monkeypatch.setattr(Samples, "derivatives", derivatives)
    with pytest.raises(KeyboardInterrupt):
        influence.scores(test, out=tmp_path / "stopped.npy")
    before = len(calls)
    found = influence.scores(test, out=tmp_path / "stopped.npy")
    assert torch.equal(found.scores, whole)
    # Three batches for each of four blocks of rows; finished blocks are not computed again.
    assert len(calls) - before == 12 - 3 * ((stop - 1) // 3)
    influence.scores(test, out=tmp_path / "stopped.npy")
    assert len(calls) - before == 12 - 3 * ((stop - 1) // 3)


def test_half_a_line_of_the_map_is_no_line(tmp_path, rows_of_three):
    influence, test = problem()
    out, done = tmp_path / "scores.npy", tmp_path / "scores.npy.done"
    whole = influence.scores(test, out=out).scores.clone()
    done.write_bytes(done.read_bytes()[:-5])
    array = np.load(out, mmap_mode="r+")
    array[9:] = 0
    array.flush()
    assert torch.equal(influence.scores(test, out=out).scores, whole)


def test_another_problem_is_refused(tmp_path):
    influence, test = problem()
    out = tmp_path / "scores.npy"
    influence.scores(test, out=out)
    with pytest.raises(ValueError, match=r"parameters.* differ; choose another name"):
        problem(l2=0.2)[0].scores(test, out=out)
    with pytest.raises(ValueError, match="its test data, values differ"):
        influence.scores(problem(shift=1.0)[1], out=out)
    with pytest.raises(ValueError, match="training indices, shape differ"):
        influence.scores(test, [1, 2], out=out)
    with pytest.raises(ValueError, match="its options differ"):
        influence.scores(test, order="newton", out=out)
    outputs = [lambda o, t: o[:, 0], lambda o, t: 2 * o[:, 0]]
    influence.scores(test, measure=outputs[0], out=tmp_path / "measured.npy")
    with pytest.raises(ValueError, match="its values differ"):
        influence.scores(test, measure=outputs[1], out=tmp_path / "measured.npy")


def test_a_file_without_its_map_is_left_alone(tmp_path):
    influence, test = problem()
    out = tmp_path / "scores.npy"
    np.save(out, np.ones(3))
    with pytest.raises(ValueError, match="out must be a new file"):
        influence.scores(test, out=out)
    assert np.load(out).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="top_k must be None with out"):
        influence.scores(test, top_k=2, out=tmp_path / "other.npy")


def test_writing_to_the_result_leaves_the_file(tmp_path):
    influence, test = problem()
    out = tmp_path / "scores.npy"
    found = influence.scores(test, out=out)
    before = np.load(out)
    found.scores.zero_()
    assert np.array_equal(np.load(out), before)


SCRIPT = """
import sys, time
sys.path[:0] = sys.argv[2:]
import test_storage
from secondorder.influence import storage, table
table.ROWS = 1
finish = storage.Store.finish
def slow(self, *args, **notes):
    finish(self, *args, **notes)
    time.sleep(0.3)
storage.Store.finish = slow
influence, test = test_storage.problem()
influence.scores(test, out=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS", 1)
    influence, test = problem()
    whole = influence.scores(test, out=tmp_path / "whole.npy").scores
    out = tmp_path / "killed.npy"
    done = tmp_path / "killed.npy.done"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out), os.path.dirname(__file__), *sys.path]
    process = subprocess.Popen(command)
    until = time.monotonic() + 120
    while not (done.exists() and len(done.read_bytes().splitlines()) > 3) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = len(done.read_bytes().splitlines()) - 1
    assert 3 <= left < 11
    assert torch.equal(influence.scores(test, out=out).scores, whole)
