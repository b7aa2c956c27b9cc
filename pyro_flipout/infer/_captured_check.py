# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Comparison of a replay with the program that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flipout.errors import FlipoutError

__all__ = ["CHANGED", "COMPILED", "Result", "Rewind", "equal", "need_close", "need_equal"]

Result = tuple[Tensor, list[Tensor | None]]
"""Loss, shape ``()``, and the gradient of each parameter, None where it has no part."""

CHANGED = (
    "Something that is neither a tensor nor drawn by torch changes from call to call (a counter, "
    "a Python or NumPy random number, a number that is annealed, an attribute that is set anew): "
    "make it a tensor that is changed in place, or an argument; or train this program without "
    "captured()"
)
COMPILED = (
    "What torch.compile makes of the program computes something else: use captured(elbo) without "
    "compile=True"
)


class Rewind:
    """Puts tensors and torch's generator back into the state that they were in."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.generator = torch.get_rng_state()
        self.before = [(t, t.clone()) for t in tensors]

    def __call__(self) -> None:
        torch.set_rng_state(self.generator)
        with torch.no_grad():
            for tensor, value in self.before:
                tensor.copy_(value)


def need_close(names: Sequence[str], got: Result, expected: Result, why: str) -> None:
    """Compares results up to the rounding of other kernels, which sum in another order.

    :param names: what loss and gradients are called.
    :param why: what to say where they differ.
    :raises FlipoutError: if they differ by more than half of the digits.
    """
    _need(names, got, expected, why, _half)


def need_equal(names: Sequence[str], got: Result, expected: Result, why: str) -> None:
    """Compares results of the same kernels; parameters as in :func:`need_close`.

    :raises FlipoutError: if they differ by more than the last bits.
    """
    _need(names, got, expected, why, _last_bits)


def equal(got: Result, expected: Result) -> bool:
    """Whether all digits agree but for the last bits."""
    pairs = zip(_flat(got), _flat(expected), strict=True)
    return all(_agree(ours, theirs, _last_bits) for ours, theirs in pairs)


def _half(eps: float) -> float:
    return eps**0.5  # type: ignore[no-any-return]


def _last_bits(eps: float) -> float:
    """A few units in the last place.

    The same kernel on the same numbers gives the same bits, but that a library of matrix products
    may sum in another order where its operands lie otherwise in memory.
    """
    return 4 * eps


def _need(
    names: Sequence[str],
    got: Result,
    expected: Result,
    why: str,
    error: Callable[[float], float],
) -> None:
    for name, ours, theirs in zip(names, _flat(got), _flat(expected), strict=True):
        if not _agree(ours, theirs, error):
            raise FlipoutError(
                f"captured: replayed, {name} is {_size(ours)}, but the program gives "
                f"{_size(theirs)}{_apart(ours, theirs)}. {why}"
            )


def _flat(result: Result) -> list[Tensor | None]:
    return [result[0], *result[1]]


def _agree(got: Tensor | None, expected: Tensor | None, error: Callable[[float], float]) -> bool:
    """Whether they are equal, up to an error relative to their norm."""
    if got is None or expected is None:
        return got is expected
    if bool(torch.isclose(got, expected, rtol=0, atol=0, equal_nan=True).all()):
        return True
    allowed = error(torch.finfo(expected.dtype).eps) * expected.norm()
    return bool((got - expected).norm() <= allowed)


def _size(x: Tensor | None) -> str:
    if x is None:
        return "missing"
    return f"{float(x):.9g}" if x.dim() == 0 else f"of norm {float(x.norm()):.9g}"


def _apart(a: Tensor | None, b: Tensor | None) -> str:
    return "" if a is None or b is None else f", a difference of {float((a - b).norm()):.3g}"
