# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Errors and warnings of the package."""

from __future__ import annotations

__all__ = [
    "ExampleDimError",
    "FlipoutError",
    "FlipoutWarning",
    "MissingRuleError",
    "NotSymmetricError",
]


class FlipoutWarning(UserWarning):
    """A weight keeps its shared draw, for a reason the user would want to know.

    The message names the site, the reason and the remedy. A shared draw is
    unbiased too, so training goes on; only the variance is that of plain SVI.
    """


class FlipoutError(Exception):
    """Base class of the package's own errors."""


class MissingRuleError(FlipoutError, NotImplementedError):
    """A flipped weight met a torch function that has no flipout rule.

    Raised under ``flipout(on_missing_rule="error")``.
    """


class ExampleDimError(FlipoutError, ValueError):
    """The dimension declared by ``example_dim`` cannot be the example dimension."""


class NotSymmetricError(FlipoutError, ValueError):
    """A distribution is not symmetric about a centre and factorised by element."""
