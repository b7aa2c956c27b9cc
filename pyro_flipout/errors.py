# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Errors and warnings of the package."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

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


def warn(message: str, at: tuple[str, int] | None = None) -> None:
    """Emits a :class:`FlipoutWarning` that points at the user's line of code.

    :param at: file and line, from :func:`users_line`; that of the caller if omitted.
    """
    file, line = at or users_line()
    warnings.warn_explicit(f"flipout: {message}", FlipoutWarning, file, line)


def users_line() -> tuple[str, int]:
    """File and line of the innermost call that is not torch's, Pyro's or ours."""
    frame: FrameType | None = sys._getframe(1)
    last = frame
    while frame is not None and is_library(frame.f_code.co_filename):
        last, frame = frame, frame.f_back
    found = frame or last
    assert found is not None, "somebody calls"
    return found.f_code.co_filename, found.f_lineno


def is_library(filename: str) -> bool:
    """Whether a line of code is torch's, Pyro's or ours, and not the user's."""
    parts = os.path.normpath(filename).split(os.sep)
    inside = {"pyro_flipout", "pyro", "torch"} & set(parts[-6:-1])
    return bool(inside) and "tests" not in parts and "tutorials" not in parts
