import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one torch thread for each xdist worker

import pyro
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", help="where tensors are made: pytest tests/rules --device cuda")


def pytest_configure(config):
    if config.getoption("--device"):
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _fresh_pyro():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    yield
    pyro.clear_param_store()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
