"""What ``dir`` and ``repr`` show a user."""

import pytest
import torch

import optim
import secondorder
import secondorder.functional
import secondorder.solvers

N = 200


@pytest.mark.parametrize("package", [optim, secondorder.functional, secondorder.solvers])
def test_dir_lists_public_names_only(package):
    assert dir(package) == sorted(package.__all__)


def test_dir_of_the_package_lists_its_wings():
    wings = {"functional", "solvers", "optim", "__version__"}
    assert set(dir(secondorder)) == {*secondorder.__all__, *wings}
    assert all(hasattr(secondorder, name) for name in dir(secondorder))


def results():
    A = torch.diag(torch.linspace(1, 2, N))
    b = torch.ones(N)
    yield "cg", secondorder.cg(A, b)
    yield "block_cg", secondorder.block_cg(A, torch.ones(N, 3))
    yield "eigsh", secondorder.eigsh(A, 40)
    yield "spectral_density", secondorder.spectral_density(A, like=b)
    yield "diagonal", secondorder.diagonal(A, like=b)
    yield "trace", secondorder.trace(A, like=b)
    yield "spectrum", secondorder.spectrum(A, b)
    yield "minimize", optim.minimize(lambda x: (x - 1).square().sum(), torch.zeros(N))


@pytest.mark.parametrize(("name", "result"), [pytest.param(*each, id=each[0]) for each in results()])
def test_results_print_what_happened_and_sizes(name, result):
    text = repr(result)
    assert len(text.splitlines()) <= 11
    assert len(text) < 600
    if hasattr(result, "status"):
        assert result.status in text
    if name != "trace":
        assert f"({N}" in text or f", {N}" in text


def test_short_tensors_are_printed():
    solved = secondorder.cg(torch.eye(2), torch.tensor([1.0, 2.0]))
    assert "tensor([1., 2.])" in repr(solved)
    pairs = secondorder.eigsh(torch.diag(torch.tensor([1.0, 5.0])), 1)
    assert "values: tensor([5.])" in repr(pairs)
