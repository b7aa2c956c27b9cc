"""The oracle's cases of the recurrent functions, in every option they have."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyro_flipout.tensor import Execution
from pyro_flipout.testing import check_rule, constant, random_weight

N, T, I, H, P = 5, 4, 3, 2, 1  # noqa: E741
GATES = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}
LENGTHS = (4, 4, 3, 1, 1)
CASES = []


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def shapes(op, layers=1, directions=1, bias=True, proj=False):
    """Shapes of the weights, in the order of ``flat_weights``."""
    gates, out = GATES[op] * H, P if proj else H
    result = []
    for layer in range(layers):
        size = I if layer == 0 else directions * out
        own = [(gates, size), (gates, out)] + [(gates,)] * 2 * bias + [(P, H)] * proj
        result += own * directions
    return result


def make_weights(all_shapes, execution, plain=()):
    """Flipped weights, but for the positions ``plain``."""
    return [
        constant(torch.randn(shape, dtype=torch.float64))
        if i in plain
        else random_weight(*shape, execution=execution, site=f"w{i}", seed=i)
        for i, shape in enumerate(all_shapes)
    ]


def recurrent_case(
    op,
    label,
    layers=1,
    directions=1,
    bias=True,
    proj=False,
    batch_first=True,
    lengths=None,
    dropout=0.0,
    train=False,
    plain=(),
    zero_state=False,
    flipped_state=False,
    state_name="given",
    n=N,
    join=None,
):
    count = layers * directions
    sizes = [P if proj else H, H] if op is torch.lstm else [H]

    def call(x, length, states, params):  # all with the examples in dimension 0
        # cuDNN has gradients in training mode only, which without dropout is the same.
        options = (bias, layers, dropout, train or x.is_cuda, directions == 2)
        params = list(params) if join is None else join(params)
        states = tuple(s.expand(len(x), -1, -1).transpose(0, 1) for s in states)
        hx = states if op is torch.lstm else states[0]
        if lengths is None:
            x = x if batch_first else x.transpose(0, 1)
            out, *ends = op(x, hx, params, *options, batch_first)
            out = out if batch_first else out.transpose(0, 1)
        else:
            packed = pack_padded_sequence(x, length, batch_first=True)
            rows, *ends = op(packed.data, packed.batch_sizes, hx, params, *options)
            out = PackedSequence(rows, packed.batch_sizes)
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=T)
        return out, *(end.transpose(0, 1) for end in ends)

    def check():
        execution = Execution(example_dim=0 if batch_first else 1)
        all_shapes = shapes(op, layers, directions, bias, proj) * (1 if join is None else 2)
        params = make_weights(all_shapes, execution, plain)
        if flipped_state:
            states = [random_weight(1, count, s, execution=execution, site=f"h{s}") for s in sizes]
        elif zero_state:
            states = [torch.zeros(n, count, s, dtype=torch.float64) for s in sizes]
        else:
            states = [data(n, count, s) for s in sizes]
        length = torch.tensor((lengths or LENGTHS)[:n], device="cpu")
        check_rule(call, data(n, T, I), length, states, params)

    CASES.append((op, label, check))


def both_halves(combine):
    """Weights combined from two flipped ones each, so that they have several terms."""
    return lambda params: [
        combine(a, b)
        for a, b in zip(params[: len(params) // 2], params[len(params) // 2 :], strict=True)
    ]


for op in GATES:
    recurrent_case(op, "plain")
    recurrent_case(op, "default state", zero_state=True)
    recurrent_case(op, "flipped state", flipped_state=True)
    recurrent_case(op, "time-major", batch_first=False)
    recurrent_case(op, "no bias", bias=False)
    recurrent_case(op, "layers", layers=3)
    recurrent_case(op, "bidirectional", directions=2)
    recurrent_case(
        op, "layers, bidirectional, time-major", layers=2, directions=2, batch_first=False
    )
    recurrent_case(op, "evaluation with dropout", layers=2, dropout=0.5)
    recurrent_case(op, "everything dropped", layers=2, dropout=1.0, train=True)
    recurrent_case(op, "no dropout after the last layer", dropout=0.9, train=True)
    recurrent_case(op, "packed", lengths=LENGTHS)
    recurrent_case(op, "packed, layers, bidirectional", lengths=LENGTHS, layers=2, directions=2)
    recurrent_case(op, "packed, time-major execution", lengths=LENGTHS, batch_first=False)
    recurrent_case(op, "one example", n=1)
    recurrent_case(op, "only the input kernel", plain=(1, 2, 3))
    recurrent_case(op, "only the recurrent kernel", plain=(0, 2, 3))
    recurrent_case(op, "only the biases", plain=(0, 1))
    recurrent_case(op, "only the second layer", layers=2, plain=(0, 1, 2, 3))
    recurrent_case(
        op, "only the first layer, packed", layers=2, plain=(4, 5, 6, 7), lengths=LENGTHS
    )
    recurrent_case(op, "only one direction", directions=2, plain=(0, 1, 2, 3))
    recurrent_case(op, "only the state", flipped_state=True, plain=(0, 1, 2, 3))
    recurrent_case(op, "sums of weights", join=both_halves(torch.add))
    recurrent_case(op, "products of weights", join=both_halves(torch.mul), directions=2)
recurrent_case(torch.lstm, "projection", proj=True)
recurrent_case(torch.lstm, "projection, no bias", proj=True, bias=False)
recurrent_case(torch.lstm, "projection, all", proj=True, layers=2, directions=2, lengths=LENGTHS)
recurrent_case(torch.lstm, "only the projection", proj=True, plain=(0, 1, 2, 3))
recurrent_case(torch.lstm, "sums of projections", proj=True, join=both_halves(torch.add))


def cell_case(op, gates, label, bias=True, plain=(), execution_dim=0, steps=1, flipped_state=False):
    num_states = 2 if op is torch.lstm_cell else 1

    def call(xs, states, params):  # (N, steps, I), every (N, H)
        states = tuple(s.expand(len(xs), -1) for s in states)
        for x in xs.unbind(1):
            hx = states if num_states == 2 else states[0]
            states = op(x, hx, *params)
            states = states if num_states == 2 else (states,)
        return states

    def check():
        execution = Execution(example_dim=execution_dim)
        own = [(gates * H, I), (gates * H, H), *[(gates * H,)] * 2 * bias]
        params = make_weights(own, execution, plain)
        if flipped_state:
            states = [
                random_weight(1, H, execution=execution, site=f"h{k}") for k in range(num_states)
            ]
        else:
            states = [data(N, H) for _ in range(num_states)]
        check_rule(call, data(N, steps, I), states, params)

    CASES.append((op, label, check))


CELLS = {torch.lstm_cell: 4, torch.gru_cell: 3, torch.rnn_tanh_cell: 1, torch.rnn_relu_cell: 1}
for op, gates in CELLS.items():
    cell_case(op, gates, "plain")
    cell_case(op, gates, "no bias", bias=False)
    cell_case(op, gates, "steps", steps=4)
    cell_case(op, gates, "time-major execution", execution_dim=1, steps=2)
    cell_case(op, gates, "only the recurrent kernel", plain=(0, 2, 3))
    cell_case(op, gates, "only the second bias", plain=(0, 1, 2))
    cell_case(op, gates, "flipped state", flipped_state=True, steps=2)
