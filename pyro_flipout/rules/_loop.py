# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The loop over the time steps of one recurrent layer, forwards and backwards, without autograd.

Data of all steps are rows sorted by time, as in a :class:`~torch.nn.utils.rnn.PackedSequence`:
step t has the first ``sizes[t]`` of N sequences. The states of all N are one buffer, of which a
step with n sequences overwrites the first n rows. So a sequence that has ended keeps its last
state there, and one that has not begun its first, in both directions of time.

Steps are taken in blocks. The input products of a block are formed before its steps, and the
gradients of the weights after them, as one product each; what is needed in between stays in the
cache and is not kept. Where torch differentiates it in another way than backwards, once, it is
:func:`run_unrolled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flipout.rules._cells import Cell
from pyro_flipout.rules._signed import Part, Product, SignPair, StepProduct

__all__ = ["Backward", "Plan", "run_forward", "run_unrolled"]

BLOCK_ROWS = 1024
"""Rows of a block; smaller products are slower, larger ones leave the cache."""


@dataclass(frozen=True)
class Plan:
    """What the loop does, apart from tensors with gradients.

    :ivar sizes: number of sequences of every step, not increasing.
    :ivar reverse: whether the last step comes first.
    :ivar signs: for the products with the input, with the state, and with the output if that is
        projected: the signs of every matrix.
    """

    cell: Cell
    sizes: Sequence[int]
    reverse: bool
    signs: Sequence[Sequence[SignPair]]

    def products(self, matrices: Sequence[Tensor]) -> list[Product]:
        """The products of a step, from all their matrices."""
        matrix = iter(matrices)
        return [Product([Part(next(matrix).t(), *p) for p in pairs]) for pairs in self.signs]

    def blocks(self, *buffers: Tensor) -> list[tuple[Any, ...]]:
        """The blocks in turn: the sizes of their steps and their rows in ``buffers``."""
        count = max(1, BLOCK_ROWS // max(1, *self.sizes[:1]))
        blocks = [self.sizes[i : i + count] for i in range(0, len(self.sizes), count)]
        rows = [sum(block) for block in blocks]
        return self._in_turn(blocks, *(b.split(rows) for b in buffers))

    def steps(self, sizes: Sequence[int], *block: Tensor) -> list[tuple[Any, ...]]:
        """The steps of a block in turn: their size and their rows."""
        return self._in_turn(sizes, *(b.split(list(sizes)) for b in block))

    def _in_turn(self, *columns: Sequence[Any]) -> list[tuple[Any, ...]]:
        items = list(zip(*columns, strict=True))
        return items[::-1] if self.reverse else items


def run_forward(
    plan: Plan,
    x: Tensor,
    b_ih: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    *matrices: Tensor,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of :class:`~pyro_flipout.rules._scan.Scan`."""
    cell = plan.cell
    from_input, *others = plan.products(matrices)
    from_state, *projection = (StepProduct(product) for product in others)
    h, c = h0.clone(), None if c0 is None else c0.clone()
    gates = h.new_empty(len(x), b_ih.size(1))
    before, after = (h.new_empty(len(x), h.size(1)) for _ in range(2))
    size = b_ih.size(1) // cell.num_gates
    saved = [h.new_empty(len(x), size) for _ in range(cell.num_saved)]
    for sizes, x_block, *block in plan.blocks(x, gates, before, after, *saved):
        from_input.put_block(block[0], x_block, sizes)
        for n, gate, h_before, h_after, *kept in plan.steps(sizes, *block):
            h_before.copy_(h[:n])
            gate += b_ih[:n]
            hidden = gate if b_hh is None else b_hh[:n].clone()
            from_state.add(hidden, h_before)
            new = cell.forward(gate, hidden, h_before, None if c is None else c[:n], *kept)
            if projection:
                projection[0].add(h_after.zero_(), new)
            else:
                h_after.copy_(new)
            h[:n] = h_after
    return after, h, c, gates, before, *saved


def run_unrolled(
    plan: Plan,
    x: Tensor,
    b_ih: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    *matrices: Tensor,
) -> tuple[Tensor | None, ...]:
    """The same step by step with nothing in place, for derivatives in any mode.

    :returns: output ``(rows, P)``, last state, last cell state.
    """
    from_input, from_state, *projection = plan.products(matrices)
    h, c, out = h0, c0, []
    for n, rows in plan.steps(plan.sizes, x):
        gates = from_input.of(rows.to(h.dtype)) + b_ih[:n]
        hidden = from_state.of(h[:n])
        if b_hh is None:
            gates = hidden = gates + hidden
        else:
            hidden = hidden + b_hh[:n]
        new, new_c = plan.cell.step(gates, hidden, h[:n], None if c is None else c[:n])
        out.append(projection[0].of(new) if projection else new)
        h = torch.cat([out[-1], h[n:]])
        c = None if c is None or new_c is None else torch.cat([new_c, c[n:]])
    return torch.cat(out[::-1] if plan.reverse else out), h, c


class Backward:
    """The loop back, and the gradients that it sums.

    :param matrices: as in :func:`run_forward`.
    :param dh: gradient of the last state ``(N, P)``, becomes that of the first.
    :param dc: gradient of the last cell state ``(N, H)``, likewise.
    """

    def __init__(self, plan: Plan, matrices: Sequence[Tensor], dh: Tensor, dc: Tensor) -> None:
        self.plan = plan
        self.products = plan.products(matrices)
        self.to_input, *others = (product.transpose for product in self.products)
        self.to_state, *self.to_output = (StepProduct(product) for product in others)
        self.dh, self.dc = dh, dc
        shape = len(dh), plan.cell.num_gates * dc.size(1)
        self.db_ih = dh.new_zeros(shape)
        self.db_hh = None if plan.cell.one_product else dh.new_zeros(shape)
        self.d_matrices = [torch.zeros_like(matrix) for matrix in matrices]

    def run(
        self, x: Tensor, d_after: Tensor, dx: Tensor | None, gates: Tensor, *buffers: Tensor
    ) -> None:
        """Goes through all steps.

        :param d_after: gradient of the output ``(rows, P)``.
        :param dx: receives that of ``x`` ``(rows, in)``.
        :param gates: buffer that :func:`run_forward` has left, as the others.
        """
        into = x if dx is None else dx
        blocks = self.plan.blocks(x, into, d_after, gates, *buffers)
        for sizes, x_block, dx_block, d_out, gate_block, before, *saved in reversed(blocks):
            d_input, d_hidden = torch.empty_like(gate_block), None
            d_hidden = d_input if self.db_hh is None else torch.empty_like(d_input)
            d_new = d_out.clone()  # gradient of the states, all told
            self._steps(sizes, d_new, d_input, d_hidden, gate_block, before, *saved)
            data = [(x_block, d_input), (before, d_hidden)]
            if len(self.products) > 2:
                data.append((self.plan.cell.output(gate_block, *saved), d_new))
            self._add_grads(sizes, data)
            if dx is not None:
                self.to_input.put_block(dx_block, d_input, sizes)

    def _steps(self, sizes: Sequence[int], *block: Tensor) -> None:
        for n, d_new, d_in, d_hid, *kept in reversed(self.plan.steps(sizes, *block)):
            dh = self.dh[:n]
            d_new += dh
            if self.to_output:
                d_output = d_new.new_zeros(n, self.dc.size(1))
                self.to_output[0].add(d_output, d_new)
                dh.zero_()
            else:
                d_output = dh.copy_(d_new)
            self.plan.cell.backward(d_output, self.dc[:n], d_in, d_hid, *kept)
            self.to_state.add(dh, d_hid)
            self.db_ih[:n] += d_in
            if self.db_hh is not None:
                self.db_hh[:n] += d_hid

    def _add_grads(self, sizes: Sequence[int], data: Sequence[tuple[Tensor, Tensor]]) -> None:
        d_matrix = iter(self.d_matrices)
        for product, (x, dy) in zip(self.products, data, strict=True):
            product.add_grads([next(d_matrix) for _ in product.parts], x, dy, sizes)
