# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of numbers that a user gives."""

from __future__ import annotations

import math
import numbers
from typing import Any

__all__ = ["checked_integer", "is_integer", "is_number"]


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, of Python or NumPy, and not a bool."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_integer(value: Any, least: int) -> bool:
    """Whether it is an integer of Python or NumPy, no bool, and at least ``least``."""
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return integral and value >= least


def checked_integer(caller: str, name: str, value: Any, least: int) -> int:
    """The value as an ``int``.

    :param caller: the public function or class, for the message.
    :param name: of its argument.
    :param least: the smallest value allowed.
    :raises ValueError: if it is no integer, or smaller.
    """
    if not is_integer(value, least):
        raise ValueError(f"{caller}: got {name}={value!r}, expected an integer >= {least}")
    return int(value)
