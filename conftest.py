# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""For tests and doctests alike: each starts with an empty parameter store."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def empty_param_store():
    """Forgets the guides of the tests before."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
