# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Flipout for Pyro: train as if every example had its own weight sample."""

from pyro_flipout import rules as _rules  # noqa: F401  (fills the registry)
from pyro_flipout.errors import (
    ExampleDimError,
    FlipoutError,
    FlipoutWarning,
    MissingRuleError,
    NotSymmetricError,
)
from pyro_flipout.io_arviz import to_arviz
from pyro_flipout.plan.owners import examples
from pyro_flipout.poutine import FlipoutMessenger, flipout
from pyro_flipout.symmetric import is_symmetric, register_symmetric, symmetric_center
from pyro_flipout.tensor import FlipoutTensor, flip, implements

__version__ = "0.1.0"

__all__ = [
    "ExampleDimError",
    "FlipoutError",
    "FlipoutMessenger",
    "FlipoutTensor",
    "FlipoutWarning",
    "MissingRuleError",
    "NotSymmetricError",
    "examples",
    "flip",
    "flipout",
    "implements",
    "is_symmetric",
    "register_symmetric",
    "symmetric_center",
    "to_arviz",
]
