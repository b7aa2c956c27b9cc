# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The effect handlers, in Pyro's own form."""

from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger
from pyro_flipout.poutine.handlers import flipout, independent, local_reparameterization
from pyro_flipout.poutine.independent_messenger import IndependentMessenger
from pyro_flipout.poutine.local_reparameterization_messenger import (
    LocalReparameterizationMessenger,
)

__all__ = [
    "FlipoutMessenger",
    "IndependentMessenger",
    "LocalReparameterizationMessenger",
    "flipout",
    "independent",
    "local_reparameterization",
]
