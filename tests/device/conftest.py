"""Tests on a device: the simulated one where there is a compiler, and CUDA where there is one."""

from __future__ import annotations

import pytest
import simulated
import torch

SIMULATED = simulated.register() if simulated.compiler() else None


@pytest.fixture(params=[pytest.param("simulated"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "simulated" and SIMULATED is None:
        pytest.skip("needs a C++ compiler")
    return torch.device(request.param, 0)


@pytest.fixture
def counted() -> torch.device:
    """Where launches, uploads and reads are counted."""
    if SIMULATED is None:
        pytest.skip("needs a C++ compiler")
    return SIMULATED


@pytest.fixture
def same(device):
    """Whether what is on the device is what the CPU has: exactly, where the CPU computed it."""

    def compare(there, here):
        exact = {"rtol": 0.0, "atol": 0.0} if device.type == "simulated" else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(there, here, check_device=False, equal_nan=True, **exact)

    return compare
