# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Recurrent layers and cells: one weight for each sequence, at all its time steps.

Every weight and bias has signs of its own, and sequence n is computed with
:math:`W_n = \bar W + \Delta W \circ r_n s_n^\top` from its first step to its last.

Under autocast the products are computed in its lower precision; gates, states and results
stay in that of the weights, as for torch's own cells.

A ``PackedSequence`` made with ``enforce_sorted=False`` comes here sorted by length, without its
permutation, which is read off the frame of ``nn.LSTM.forward`` or its like: the examples are
numbered as in the mini-batch, so that all uses of a site agree on them. Rows that were sorted by
hand are numbered as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flipout.errors import ExampleDimError
from pyro_flipout.rules import _cells
from pyro_flipout.rules._product import calling_frame
from pyro_flipout.rules._scan import scan
from pyro_flipout.rules._signed import explicit_state
from pyro_flipout.tensor import (
    FlipoutTensor,
    NoRule,
    NotExamples,
    describe,
    implements,
    queries,
    unwrap,
)

CELLS: dict[Callable[..., Any], _cells.Cell] = {
    torch.lstm: _cells.LSTM,
    torch.gru: _cells.GRU,
    torch.rnn_tanh: _cells.RNN_TANH,
    torch.rnn_relu: _cells.RNN_RELU,
    torch.lstm_cell: _cells.LSTM,
    torch.gru_cell: _cells.GRU,
    torch.rnn_tanh_cell: _cells.RNN_TANH,
    torch.rnn_relu_cell: _cells.RNN_RELU,
}
FLIPS = "outputs and inputs of every weight, every bias; the same signs at all steps"
LIMITS = "second derivatives with torch.func only; batched particles: no rule"

queries(torch._cudnn_rnn_flatten_weight)  # nn.LSTM aligns its weights in memory


# ----------------------------------------------------------------------- layers


@dataclass
class Call:
    """Arguments of ``torch.lstm``, ``torch.gru`` and so on, padded or packed."""

    op: Callable[..., Any]
    input: Tensor  # (N, T, in), (T, N, in), or packed (rows, in)
    hx: Any  # (num_layers * D, N, P), for an LSTM with the cell state (num_layers * D, N, H)
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool = False
    batch_sizes: Tensor | None = None

    @staticmethod
    def bind(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Tells the two overloads apart by the second argument, ``batch_sizes`` or a state."""
        names = ["input", "hx", *list(Call.__dataclass_fields__)[3:-1]]
        second = args[1] if len(args) > 1 else kwargs.get("batch_sizes")
        if isinstance(second, Tensor) and not second.is_floating_point():
            names = ["input", "batch_sizes", *names[1:-1]]
            kwargs = {"input" if name == "data" else name: kwargs[name] for name in kwargs}
        return Call(op, **dict(zip(names, args, strict=False)), **kwargs)

    @property
    def num_sequences(self) -> int:
        """Size of the batch."""
        if self.batch_sizes is not None:
            return int(self.batch_sizes[0])
        return self.input.size(0 if self.batch_first else 1)

    def rows(self) -> tuple[Tensor, list[int]]:
        """The input as rows sorted by time, and the number of sequences of each step."""
        if self.batch_sizes is not None:
            return self.input, self.batch_sizes.tolist()
        time_major = self.input.transpose(0, 1) if self.batch_first else self.input
        return time_major.flatten(0, 1), [self.num_sequences] * time_major.size(0)

    def output(self, rows: Tensor) -> Tensor:
        """Undoes :meth:`rows`."""
        if self.batch_sizes is not None:
            return rows
        length = self.input.size(1 if self.batch_first else 0)
        out = rows.reshape(length, self.num_sequences, rows.size(1))
        return out.transpose(0, 1) if self.batch_first else out


@implements(
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    flips=FLIPS,
    limits=f"{LIMITS}; torch.lstm called on packed rows numbers the examples in their sorted order",
)
def recurrent(op: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = Call.bind(op, args, kwargs)
    states = call.hx if isinstance(call.hx, (tuple, list)) else (call.hx,)
    _check_layout(call)
    _count((call.params, states), call.input, call.num_sequences)
    if all(weight.execution.is_single for weight in _flipped((call.params, states))):
        return op(*unwrap(args), **unwrap(kwargs))  # type: ignore[no-any-return]
    order = _order(call)
    states = [explicit_state(state, 1, order) for state in states]
    rows, sizes = call.rows()
    num_directions = 2 if call.bidirectional else 1
    ends = []
    for layer, params in enumerate(_chunks(call.params, call.num_layers)):
        own = [state[layer * num_directions :][:num_directions] for state in states]
        rows, *end = _layer(call, rows, sizes, own, params, order)
        ends.append(end)
        if call.train and layer < call.num_layers - 1:
            rows = F.dropout(rows, call.dropout)
    return call.output(rows), *(torch.cat(end) for end in zip(*ends, strict=True))


def _layer(
    call: Call,
    rows: Tensor,
    sizes: list[int],
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    order: Tensor | None,
) -> tuple[Tensor, ...]:
    """All directions of one layer: rows of the output, last states ``(D, N, ...)``."""
    if not any(isinstance(p, FlipoutTensor) and p.terms for p in params):
        params = [p.plain if isinstance(p, FlipoutTensor) else p for p in params]
        first, *more = (s.contiguous() for s in states)  # cuDNN asks for it
        options = call.has_biases, 1, 0.0, call.train, call.bidirectional
        hx, batch_sizes = (first, *more) if more else first, torch.tensor(sizes, device="cpu")
        return tuple(call.op(rows, batch_sizes, hx, params, *options))
    results = [
        scan(
            CELLS[call.op], rows, sizes, [s[d] for s in states], own, call.has_biases, d == 1, order
        )
        for d, own in enumerate(_chunks(params, len(states[0])))
    ]
    out, *ends = zip(*results, strict=True)
    return torch.cat(out, -1), *(torch.stack(end) for end in ends)


_FORWARDS = {layer.forward.__code__ for layer in (nn.LSTM, nn.GRU, nn.RNN)}


def _order(call: Call) -> Tensor | None:
    """The examples in the order of the packed rows, None if that is how they are numbered."""
    frame = None if call.batch_sizes is None else calling_frame(_FORWARDS)
    if frame is None or frame.f_locals.get("input") is not call.input:
        return None
    order: Tensor | None = frame.f_locals.get("sorted_indices")
    return order


def _chunks(params: Sequence[Tensor], count: int) -> Iterator[Sequence[Tensor]]:
    size = len(params) // count
    return (params[start : start + size] for start in range(0, len(params), size))


# ------------------------------------------------------------------------ cells


@implements(torch.lstm_cell, flips=FLIPS, limits=LIMITS)
def lstm_cell(
    op: Callable[..., Any], input: Tensor, hx: Sequence[Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    return _step(op, input, hx, *args, **kwargs)


@implements(torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell, flips=FLIPS, limits=LIMITS)
def cell(op: Callable[..., Any], input: Tensor, hx: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _step(op, input, (hx,), *args, **kwargs)[0]


def _step(
    op: Callable[..., Any],
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, ...]:
    biases = [b for b in (b_ih, b_hh) if b is not None]
    weights = [w_ih, w_hh, *biases]
    _count((weights, hx), input, input.size(0))
    states = [explicit_state(state, 0) for state in hx]
    return scan(CELLS[op], input, [input.size(0)], states, weights, bool(biases))[1:]


# ------------------------------------------------------------- examples and signs


def _check_layout(call: Call) -> None:
    """Compares the layer's batch dimension with the execution's ``example_dim``."""
    if call.batch_sizes is not None:
        return
    dim = 0 if call.batch_first else 1
    name, shape = describe(call.op), tuple(call.input.shape)
    for weight in _flipped((call.params, call.hx)):
        if weight.execution.example_dim == dim:
            continue
        if call.num_sequences == 1:
            raise NotExamples(
                f"input of shape {shape} is one sequence, and has no examples in dimension "
                f"{weight.execution.example_dim}; add an example dimension to unbatched input"
            )
        message = (
            f"input of shape {shape} has the sequences in dimension {dim} "
            f"(batch_first={call.batch_first}), but the examples are expected in dimension "
            f"{weight.execution.example_dim}; set example_dim, as in flipout(example_dim={dim}), "
            f"or make the layer with batch_first={not call.batch_first} and transpose its input"
        )
        if weight.execution.example_dim_given:
            raise ExampleDimError(f"flipout: site '{weight.site}' in {name}: {message}")
        raise NotExamples(message)


def _count(weights: Any, input: Tensor, num_sequences: int) -> None:
    if isinstance(input, FlipoutTensor):
        raise NoRule("the input is itself a flipped weight")
    if input.dim() > 1 and num_sequences and not input.numel():
        raise NotExamples(f"input of shape {tuple(input.shape)} has no steps")
    for weight in _flipped(weights):
        known = weight.execution.num_examples
        if known not in (None, num_sequences):
            raise NotExamples(
                f"the input is a batch of {num_sequences} sequences, but this execution has "
                f"{known} examples; give it one sequence for each example"
            )
        weight.execution.count(num_sequences, f"data of shape {tuple(input.shape)}")


def _flipped(obj: Any) -> Iterator[FlipoutTensor]:
    if isinstance(obj, FlipoutTensor):
        if obj.terms:
            yield obj
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from _flipped(item)
