"""``python -m secondorder``: what a user of a new machine runs first."""

from __future__ import annotations

import pytest
import torch

from secondorder import __main__ as main


@pytest.mark.slow
def test_all_checks_pass_here(capsys):
    assert main.main() == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in said
    assert "cpu, torch.float64" in said
    assert said.count("ok  ") == len(main.CHECKS) * len(main.devices())
    assert said.endswith("all checks passed\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["Hessian product", "hvp", "Gauss-Newton product", "cg"])
def test_checks_of_products(name, dtype):
    check, _ = main.CHECKS[name]
    assert check(torch.device("cpu"), dtype) <= main.TOLERANCES[dtype][0]


def test_failures_are_counted_and_the_others_go_on(monkeypatch, capsys):
    def raises(*_):
        raise RuntimeError("no kernel image is available")

    checks = {"wrong": (lambda *_: 0.5, False), "not finite": (lambda *_: float("nan"), False)}
    monkeypatch.setattr(
        main, "CHECKS", {"broken": (raises, False), **checks, "right": (lambda *_: 0.0, True)}
    )
    assert main.main() == 3 * len(main.devices())
    said = capsys.readouterr().out
    assert "FAIL broken: RuntimeError: no kernel image is available" in said
    assert "FAIL wrong: relative error 5.0e-01" in said
    assert "ok   right" in said
