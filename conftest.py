# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""For tests and doctests alike: each starts with an empty parameter store."""

import importlib.util

import pyro
import pytest

# Modules that import Triton, for the doctests of an installation without it.
collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else [f"pyro_flipout/kernels/{name}.py" for name in ("_launch", "_triton", "triton_linear")]
)


@pytest.fixture(autouse=True)
def empty_param_store():
    """Forgets the guides of the tests before."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
