# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The elementwise part of one recurrent step, forwards and backwards.

A cell gets its pre-activations from the two products of a step, *input* (with the weight
``ih``) and *hidden* (with ``hh``), each of shape ``(n, num_gates * H)`` for the first n
sequences, and works in place on buffers that :mod:`~pyro_flipout.rules._loop` keeps.
Equations and the order of the gates are those of :class:`torch.nn.LSTM`,
:class:`torch.nn.GRU` and :class:`torch.nn.RNN`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GRU", "LSTM", "RNN_RELU", "RNN_TANH", "Cell"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Cell:
    """One kind of step.

    :ivar num_gates: number of gates.
    :ivar num_saved: number of buffers ``(n, H)`` that :meth:`backward` needs of a step.
    :ivar one_product: whether only the sum of input and hidden product counts. Then *hidden* is
        the same buffer as *gates*, and ``d_hidden`` as ``d_input``.
    """

    num_gates: int
    num_saved: int = 0
    one_product: bool = True

    def forward(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None, *saved: Tensor
    ) -> Tensor:
        """Makes a step.

        :param gates: the input product (the sum if :attr:`one_product`), overwritten by the
            activated gates.
        :param hidden: the hidden product.
        :param h: state before the step, ``(n, H)``.
        :param c: cell state, overwritten by that after the step.
        :returns: the state after the step.
        """
        raise NotImplementedError

    def step(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Makes a step as :meth:`forward`, but nothing in place.

        :returns: the state and the cell state after the step.
        """
        raise NotImplementedError

    def backward(
        self,
        dh: Tensor,
        dc: Tensor | None,
        d_input: Tensor,
        d_hidden: Tensor,
        gates: Tensor,
        h: Tensor,
        *saved: Tensor,
    ) -> None:
        """Goes back one step.

        :param dh: gradient of the state after the step, overwritten by that of the state
            before it, without the way through the hidden product.
        :param dc: gradient of the cell state, overwritten likewise.
        :param d_input: receives the gradient of the input product.
        :param d_hidden: receives that of the hidden product.
        """
        raise NotImplementedError

    def output(self, gates: Tensor, *saved: Tensor) -> Tensor:
        """What is projected, of all steps, from activated gates and saved buffers."""
        raise NotImplementedError


class _LSTM(Cell):
    num_gates = 4
    num_saved = 2  # the cell state before the step, and tanh of that after it

    def forward(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None, *saved: Tensor
    ) -> Tensor:
        assert c is not None
        c_before, tanh_c = saved
        size = c.size(1)
        gates[:, : 2 * size].sigmoid_()
        gates[:, 2 * size : 3 * size].tanh_()
        gates[:, 3 * size :].sigmoid_()
        i, f, g, o = gates.split(size, 1)
        c_before.copy_(c)
        c.mul_(f).addcmul_(i, g)
        torch.tanh(c, out=tanh_c)
        return torch.mul(o, tanh_c)

    def step(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert c is not None
        i, f, g, o = gates.split(c.size(1), 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def backward(
        self,
        dh: Tensor,
        dc: Tensor | None,
        d_input: Tensor,
        d_hidden: Tensor,
        gates: Tensor,
        h: Tensor,
        *saved: Tensor,
    ) -> None:
        assert dc is not None
        c_before, tanh_c = saved
        size = dc.size(1)
        i, f, g, o = gates.split(size, 1)
        di, df, dg, do = d_input.split(size, 1)
        torch.mul(dh, tanh_c, out=do)
        _sigmoid_backward(do, o, grad_input=do)
        dc += _tanh_backward(dh.mul_(o), tanh_c, grad_input=dh)
        torch.mul(dc, g, out=di)
        torch.mul(dc, c_before, out=df)
        d_if = d_input[:, : 2 * size]
        _sigmoid_backward(d_if, gates[:, : 2 * size], grad_input=d_if)
        torch.mul(dc, i, out=dg)
        _tanh_backward(dg, g, grad_input=dg)
        dc *= f
        dh.zero_()

    def output(self, gates: Tensor, *saved: Tensor) -> Tensor:
        tanh_c = saved[1]
        return gates[:, -tanh_c.size(1) :] * tanh_c


class _GRU(Cell):
    num_gates = 3
    num_saved = 1  # the hidden product of the new gate
    one_product = False

    def forward(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None, *saved: Tensor
    ) -> Tensor:
        (hidden_n,) = saved
        size = h.size(1)
        gates[:, : 2 * size].add_(hidden[:, : 2 * size]).sigmoid_()
        hidden_n.copy_(hidden[:, 2 * size :])
        r, z, n = gates.split(size, 1)
        n.addcmul_(r, hidden_n).tanh_()
        return torch.lerp(n, h, z)

    def step(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        (r, z, n), (hidden_r, hidden_z, hidden_n) = gates.chunk(3, 1), hidden.chunk(3, 1)
        z = (z + hidden_z).sigmoid()
        n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
        return n + z * (h - n), c

    def backward(
        self,
        dh: Tensor,
        dc: Tensor | None,
        d_input: Tensor,
        d_hidden: Tensor,
        gates: Tensor,
        h: Tensor,
        *saved: Tensor,
    ) -> None:
        (hidden_n,) = saved
        size = h.size(1)
        r, z, n = gates.split(size, 1)
        dr, dz, dn = d_input.split(size, 1)
        torch.mul(dh, h - n, out=dz)
        dh_z = dh * z
        torch.sub(dh, dh_z, out=dn)
        dh.copy_(dh_z)
        _tanh_backward(dn, n, grad_input=dn)
        torch.mul(dn, hidden_n, out=dr)
        d_rz = d_input[:, : 2 * size]
        _sigmoid_backward(d_rz, gates[:, : 2 * size], grad_input=d_rz)
        d_hidden[:, : 2 * size] = d_rz
        torch.mul(dn, r, out=d_hidden[:, 2 * size :])


class _RNN(Cell):
    num_gates = 1

    def __init__(self, nonlinearity: str) -> None:
        self.relu = nonlinearity == "relu"

    def forward(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None, *saved: Tensor
    ) -> Tensor:
        return gates.relu_() if self.relu else gates.tanh_()

    def step(
        self, gates: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return gates.relu() if self.relu else gates.tanh(), c

    def backward(
        self,
        dh: Tensor,
        dc: Tensor | None,
        d_input: Tensor,
        d_hidden: Tensor,
        gates: Tensor,
        h: Tensor,
        *saved: Tensor,
    ) -> None:
        if self.relu:
            torch.mul(dh, gates > 0, out=d_input)
        else:
            _tanh_backward(dh, gates, grad_input=d_input)
        dh.zero_()


LSTM = _LSTM()
GRU = _GRU()
RNN_TANH = _RNN("tanh")
RNN_RELU = _RNN("relu")
