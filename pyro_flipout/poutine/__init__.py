# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The effect handler, in Pyro's own form."""

from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger
from pyro_flipout.poutine.handlers import flipout

__all__ = ["FlipoutMessenger", "flipout"]
