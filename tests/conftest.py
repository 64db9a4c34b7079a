from __future__ import annotations

import os

import pytest
import torch
import zoo
from hypothesis import settings

# Otherwise torch gives each of its warnings once a process, and only one test would fail of it.
torch.set_warn_always(True)
# Workers of pytest-xdist share the cores.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=zoo.PROBLEMS, ids=lambda problem: problem.name)
def problem(request) -> zoo.Problem:
    return request.param


@pytest.fixture(params=list(zoo.NETWORKS))
def network_case(request) -> zoo.NetworkCase:
    return zoo.network(request.param)


@pytest.fixture
def spd_system():
    return zoo.spd_matrix(30, 1e3, seed=1), zoo.vector(30, seed=2)


@pytest.fixture
def indefinite_system():
    return zoo.indefinite_matrix(30, seed=1), zoo.vector(30, seed=2)


@pytest.fixture(params=zoo.SYSTEMS)
def system(request) -> zoo.System:
    return zoo.SYSTEMS[request.param]
