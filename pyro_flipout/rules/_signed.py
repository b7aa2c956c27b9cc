# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Weights of a loop over time, taken apart into matrices with dense signs.

A weight is a sum of matrices :math:`D_k`, of which the first is its centre, and example n sees
:math:`W_n = \sum_k D_k \circ r_{nk} s_{nk}^\top`. Rows of data are sorted by time as in a
:class:`~torch.nn.utils.rnn.PackedSequence`: a step has the first n examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flipout.rules._product import per_example
from pyro_flipout.tensor import Execution, FlipoutTensor, NoRule, Term

__all__ = [
    "Part",
    "Product",
    "SignPair",
    "StepProduct",
    "explicit_bias",
    "explicit_state",
    "matrices_of",
]

SignPair = tuple[Tensor | None, Tensor | None]
"""Signs of a matrix ``(out, in)``: of its inputs ``(N, in)``, and of its outputs ``(N, out)``."""


# ---------------------------------------------------------------- taking weights apart


def matrices_of(
    weight: Tensor, dtype: torch.dtype, order: Tensor | None = None
) -> tuple[list[Tensor], list[SignPair]]:
    """The matrices in ``dtype`` whose sum a weight ``(out, in)`` is, and their signs.

    :param order: numbers ``(N,)`` of the examples in the order of the rows, here and below.
    :raises NoRule: if the weight is no matrix, or its signs do not factorise.
    """
    if not isinstance(weight, FlipoutTensor):
        return [weight.to(dtype)], [(None, None)]
    if weight.dim() != 2:
        raise NoRule(f"a weight has shape {tuple(weight.shape)} and is no matrix", weight)
    matrices = [weight.center, *(term.delta for term in weight.terms)]
    pairs = [_sign_pair(weight, term, dtype, order) for term in weight.terms]
    return [m.expand(weight.shape).to(dtype) for m in matrices], [(None, None), *pairs]


def _sign_pair(
    weight: FlipoutTensor, term: Term, dtype: torch.dtype, order: Tensor | None
) -> SignPair:
    by_dim: tuple[list[Tensor], list[Tensor]] = [], []
    for codes in term.codes:
        varying = [d for d, size in enumerate(codes.shape, 2 - codes.dim()) if size > 1]
        if len(varying) > 1:
            raise NoRule("the signs of a weight do not factorise along its dimensions", weight)
        by_dim[varying[0] if varying else 0].append(codes)
    outputs, inputs = (
        _dense(weight.execution, codes, size, dtype, order) if codes else None
        for codes, size in zip(by_dim, weight.shape, strict=True)
    )
    return inputs, outputs


def _dense(
    execution: Execution,
    factors: Sequence[Tensor],
    size: int,
    dtype: torch.dtype,
    order: Tensor | None,
) -> Tensor:
    """The signs ``(N, size)`` that are the product of those of some codes."""
    assert execution.num_examples is not None
    out = torch.ones(execution.num_examples, size, dtype=dtype, device=factors[0].device)
    for codes in factors:
        out = execution.factored_signs(codes.flatten(), dtype).times(out, 0, 1)
    return out if order is None else out[order]


def explicit_bias(bias: Tensor, num_examples: int, order: Tensor | None = None) -> Tensor:
    """The bias ``(N, out)`` that every example sees."""
    if not isinstance(bias, FlipoutTensor):
        return bias.expand(num_examples, -1)
    if bias.dim() != 1:
        raise NoRule(f"a bias has shape {tuple(bias.shape)} and is no vector", bias)
    out = bias.center.expand(num_examples, -1)
    for term in bias.terms:
        signs = _dense(bias.execution, term.codes, len(bias), term.delta.dtype, order)
        out = out + term.delta * signs
    return out


def explicit_state(state: Tensor, dim: int, order: Tensor | None = None) -> Tensor:
    """A first state whose dimension ``dim`` counts the examples; it may be a weight."""
    if not isinstance(state, FlipoutTensor):
        return state
    from_right = state.dim() - dim
    for term in state.terms:
        if any(c.dim() >= from_right and c.size(-from_right) > 1 for c in term.codes):
            raise NoRule("the signs of a first state vary along its example dimension", state)
    explicit = per_example(state, state.dim(), dim)
    return explicit if order is None or not state.terms else explicit.index_select(dim, order)


# --------------------------------------------------------------------------- product


@dataclass(frozen=True)
class Part:
    """A matrix ``(in, out)`` with the signs of its inputs and outputs."""

    matrix: Tensor
    before: Tensor | None
    after: Tensor | None


class Product:
    r"""The map :math:`x_n \mapsto \sum_k r_{nk} \circ D_k (s_{nk} \circ x_n)`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    @property
    def transpose(self) -> Product:
        """The map of gradients, from those of the results to those of the data."""
        return Product([Part(p.matrix.t(), p.after, p.before) for p in self.parts])

    def of(self, x: Tensor) -> Tensor:
        """The results ``(n, out)`` for the data ``(n, in)`` of one step, with autograd."""
        total: Tensor | None = None
        for part in self.parts:
            y = x if part.before is None else x * part.before[: len(x)]
            y = (y.to(part.matrix.dtype) @ part.matrix).to(x.dtype)
            y = y if part.after is None else y * part.after[: len(x)]
            total = y if total is None else total + y
        assert total is not None, "a product has its centre"
        return total

    def put_block(self, y: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
        """Sets ``y`` ``(rows, out)`` to the results for the data ``x`` of several steps."""
        y.zero_()
        for part in self.parts:
            data = _flip(x, part.before, sizes, part.matrix)
            if part.after is None and data.dtype == y.dtype:
                y.addmm_(data, part.matrix)
            elif part.after is None:  # under autocast
                y += data @ part.matrix
            else:
                for total, term in runs(sizes, y, data @ part.matrix):
                    total.addcmul_(term, part.after[: total.size(1)])

    def add_grads(
        self, grads: Sequence[Tensor], x: Tensor, dy: Tensor, sizes: Sequence[int]
    ) -> None:
        """Adds the gradients of the matrices ``(out, in)`` from several steps."""
        for part, grad in zip(self.parts, grads, strict=True):
            left = _flip(dy, part.after, sizes, part.matrix)
            grad.addmm_(left.t(), _flip(x, part.before, sizes, part.matrix))


class StepProduct:
    """A :class:`Product` for steps of a few examples: with these last, MKL is faster."""

    def __init__(self, product: Product) -> None:
        self.parts = [
            (
                p.matrix.t().contiguous(),
                p.before,
                None if p.after is None else p.after.t().contiguous(),
            )
            for p in product.parts
        ]

    def add(self, y: Tensor, x: Tensor) -> None:
        """Adds to ``y`` ``(n, out)`` the results for the data ``x`` ``(n, in)``."""
        total: Tensor | None = None  # (out, n)
        for matrix, before, after in self.parts:
            data = x.to(matrix.dtype)
            if before is not None:
                data = data * before[: len(x)]
            result = matrix @ data.t()
            after = None if after is None else after[:, : len(x)]
            if total is None:
                total = result if after is None else result.mul_(after)
            elif after is None:
                total += result
            else:
                total.addcmul_(result, after)
        if total is not None:
            y += total.t()


def runs(sizes: Sequence[int], *buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views ``(steps, n, *)`` of the buffers for each run of steps with n examples."""
    counts = [(len(list(run)), n) for n, run in itertools.groupby(sizes)]
    parts = (b.split([steps * n for steps, n in counts]) for b in buffers)
    for count, *rows in zip(counts, *parts, strict=True):
        yield tuple(r.unflatten(0, count) for r in rows)


def _flip(rows: Tensor, signs: Tensor | None, sizes: Sequence[int], like: Tensor) -> Tensor:
    rows = rows.to(like.dtype)
    if signs is None:
        return rows
    out = torch.empty_like(rows)
    for x, y in runs(sizes, rows, out):
        torch.mul(x, signs[: x.size(1)], out=y)
    return out
