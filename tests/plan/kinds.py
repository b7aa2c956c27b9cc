"""Models of every kind in which rows of data are not one row an example.

Each is a function of the sizes N (examples) and T (frames, atoms, states, players), and of how it
is observed: ``observe(mean, y)`` under a plate or as independent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyro_flipout import examples

D = 3


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    :ivar make: gives the model and its arguments for sizes N, T and a way of observing.
    :ivar shared: sites that have to be left shared; the others are flipped.
    :ivar either: of these, sites that can be flipped exactly if it is found how: example n sees all
        rows with its own weight, ``a[n] @ (x @ w[n])``.
    :ivar sizes: pairs of N and T.
    :ivar was_right: whether the numbers were right without the audit too.
    :ivar enumerated: whether a local variable is enumerated.
    """

    make: Callable[..., Any]
    shared: frozenset[str] = frozenset()
    either: frozenset[str] = frozenset()
    sizes: tuple[tuple[int, int], ...] = ((6, 4), (4, 4), (D, D))
    was_right: bool = False
    enumerated: bool = False
    needs_plate: bool = False


KINDS: dict[str, Kind] = {}


def kind(shared: str = "", **options: Any) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        KINDS[make.__name__] = Kind(make, frozenset(shared.split()), **options)
        return make

    return register


def weight(name: str, *shape: int) -> Any:
    return pyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))


def plate(mean, y, scale=1.0):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale).to_event(mean.dim() - 1), obs=y)


def independent(mean, y, scale=1.0):
    pyro.sample("y", dist.Normal(mean, scale).to_event(mean.dim()), obs=y)


FORMS = {"plate": plate, "to_event": independent}


def _series(n, t):
    return torch.randn(n, t, D), torch.randn(n)


def _rows(n):
    return torch.randn(n, D), torch.randn(n)


def on_series(**options):
    """For a function of data (N, T, D) that gives means (N,)."""

    def register(mean):
        def make(n, t, observe):
            return (lambda x, y: observe(mean(x), y)), _series(n, t)

        make.__name__ = mean.__name__
        kind(**options)(make)
        return mean

    return register


def on_rows(**options):
    """For a function of data (N, D) that gives means (N,)."""

    def register(mean):
        def make(n, t, observe):
            return (lambda x, y: observe(mean(x), y)), _rows(n)

        make.__name__ = mean.__name__
        kind(**{"sizes": ((6, 4), (D, D), (2, 4)), **options})(make)
        return mean

    return register


# ------------------------------------------------------------------- as it should be


@on_series(was_right=True)
def dense(x):
    h = torch.tanh(F.linear(x.mean(1), weight("w", 4, D), weight("b", 4)))
    return F.linear(h, weight("v", 1, 4)).squeeze(-1)


@on_series(was_right=True)
def frames_apart(x):
    return torch.tanh(F.linear(x, weight("w", 4, D))).sum((1, 2))


@on_series(was_right=True)
def loop_over_time(x):
    w, u = weight("w", 4, D), weight("u", 4, 4)
    h = x.new_zeros(len(x), 4)
    for t in range(x.size(1)):
        h = torch.tanh(F.linear(x[:, t], w) + F.linear(h, u))
    return h.sum(-1)


# ----------------------------------------------------------------- folded into blocks


@on_series()
def fold_flatten(x):
    h = torch.tanh(x.flatten(0, 1) @ weight("w", D, 4))
    return h.unflatten(0, x.shape[:2]).sum((1, 2))


@on_series()
def fold_view(x):
    h = torch.tanh(F.linear(x.view(-1, D), weight("w", 4, D), weight("b", 4)))
    return h.view(*x.shape[:2], 4).sum((1, 2))


@on_series()
def fold_reshape_deep(x):
    h = torch.tanh(F.linear(x.reshape(-1, D), weight("w", 4, D), weight("b", 4)))
    h = torch.tanh(F.linear(h, weight("v", 4, 4))) * weight("s", 4)
    return h.reshape(len(x), -1).sum(-1)


@on_series()
def fold_then_pool(x):
    """Frames one by one, then the whole series, each with weights of its own."""
    h = torch.tanh(F.linear(x.reshape(-1, D), weight("w", 4, D)))
    h = h.reshape(*x.shape[:2], 4).mean(1)
    return F.linear(h, weight("v", 1, 4), weight("c", 1)).squeeze(-1)


@on_series()
def fold_einsum(x):
    return (
        torch.einsum("rd,hd->rh", x.reshape(-1, D), weight("w", 4, D))
        .tanh()
        .view(len(x), -1)
        .sum(-1)
    )


@on_series()
def fold_conv(x):
    h = F.conv1d(x.reshape(-1, 1, D), weight("w", 2, 1, 2), weight("b", 2))
    return torch.tanh(h).reshape(len(x), -1).sum(-1)


@on_series()
def fold_layer_norm(x):
    h = F.layer_norm(x.reshape(-1, D), (D,), weight("w", D), weight("b", D))
    return torch.tanh(h).reshape(len(x), -1).sum(-1)


@on_series()
def fold_elementwise(x):
    return torch.tanh(x.reshape(-1, D) * weight("w", D) + weight("b", D)).view(len(x), -1).sum(-1)


@on_series()
def fold_embedding(x):
    tokens = (x[..., 0] > 0).long().flatten()
    h = torch.tanh(F.embedding(tokens, weight("w", 2, 4)))
    return F.linear(h, weight("v", 1, 4)).view(len(x), -1).sum(-1)


@on_series()
def fold_plate_of_frames(x):
    """Used twice: folded and by example."""
    w = weight("w", D, D)
    h = torch.tanh(F.linear(x.flatten(0, 1), w)).view_as(x).mean(1)
    return torch.tanh(F.linear(h, w)).sum(-1)


@on_series()
def blocks_and_interleaved(x):
    """Two nets, for which the rows are folded in two ways."""
    a = torch.tanh(F.linear(x.flatten(0, 1), weight("w", 4, D)))
    b = torch.tanh(F.linear(x.transpose(0, 1).flatten(0, 1), weight("v", 4, D)))
    return a.view(len(x), -1).sum(-1) + b.view(x.size(1), len(x), 4).sum((0, 2))


# ----------------------------------------------------- time-distributed CNN, then LSTM


def lstm(h, batch_first=True, hidden=2):
    f = h.size(-1)
    flat = [
        weight("w_ih", 4 * hidden, f),
        weight("w_hh", 4 * hidden, hidden),
        weight("b_ih", 4 * hidden),
        weight("b_hh", 4 * hidden),
    ]
    n = h.size(0 if batch_first else 1)
    state = (h.new_zeros(1, n, hidden), h.new_zeros(1, n, hidden))
    return torch.lstm(h, state, flat, True, 1, 0.0, False, False, batch_first)[0]


def gru(h, batch_first=True, hidden=2):
    f = h.size(-1)
    flat = [
        weight("w_ih", 3 * hidden, f),
        weight("w_hh", 3 * hidden, hidden),
        weight("b_ih", 3 * hidden),
        weight("b_hh", 3 * hidden),
    ]
    n = h.size(0 if batch_first else 1)
    return torch.gru(h, h.new_zeros(1, n, hidden), flat, True, 1, 0.0, False, False, batch_first)[0]


@on_series()
def cnn_lstm(x):
    h = torch.tanh(F.conv1d(x.reshape(-1, 1, D), weight("w", 2, 1, 2)))
    return lstm(h.reshape(*x.shape[:2], 4))[:, -1].sum(-1)


@on_series()
def cnn_lstm_time_major(x):
    h = torch.tanh(F.conv1d(x.transpose(0, 1).reshape(-1, 1, D), weight("w", 2, 1, 2)))
    return lstm(h.reshape(x.size(1), x.size(0), 4), batch_first=False)[-1].sum(-1)


@on_series()
def cnn_gru_dense(x):
    h = torch.relu(F.conv1d(x.flatten(0, 1)[:, None], weight("w", 3, 1, D)))
    h = gru(h.unflatten(0, x.shape[:2]).squeeze(-1))[:, -1]
    return F.linear(h, weight("v", 1, 2), weight("c", 1)).squeeze(-1)


# ---------------------------------------------------------------- atoms and patches


@on_series()
def atoms_summed(x):
    h = torch.tanh(F.linear(x.reshape(-1, D), weight("w", 4, D), weight("b", 4)))
    energy = F.linear(h, weight("v", 1, 4)).squeeze(-1)
    owner = torch.arange(len(x)).repeat_interleave(x.size(1))
    return x.new_zeros(len(x)).index_add(0, owner, energy)


@on_series()
def atoms_of_two_elements(x):
    """A net for each chemical element; the half of the atoms is of one, the other of the other."""
    total = x.new_zeros(len(x))
    for name, part in zip("ho", (x[:, :2], x[:, 2:]), strict=True):
        h = torch.tanh(F.linear(part.reshape(-1, D), weight(f"w_{name}", 4, D)))
        total = total + h.reshape(len(x), -1).sum(-1)
    return total


@on_series()
def patches_summed(x):
    patches = x.unfold(1, 2, 1).reshape(-1, 2 * D)  # (N * (T - 1), 2 * D)
    return torch.tanh(F.linear(patches, weight("w", 4, 2 * D))).view(len(x), -1).sum(-1)


# ------------------------------------------------------------------------ interleaved


@on_series()
def interleaved_linear(x):
    h = torch.tanh(F.linear(x.transpose(0, 1).reshape(-1, D), weight("w", 4, D)))
    return h.reshape(x.size(1), len(x), 4).sum((0, 2))


@on_series()
def interleaved_flatten(x):
    h = torch.tanh(x.transpose(0, 1).flatten(0, 1) @ weight("w", D, 4) + weight("b", 4))
    return h.unflatten(0, (x.size(1), len(x))).sum((0, 2))


@on_series()
def interleaved_conv(x):
    h = F.conv1d(x.permute(1, 0, 2).reshape(-1, 1, D), weight("w", 2, 1, 2), weight("b", 2))
    return torch.tanh(h).reshape(x.size(1), len(x), -1).sum((0, 2))


@on_series()
def siamese_cat(x):
    h = torch.tanh(F.linear(torch.cat([x[:, 0], x[:, 1]]), weight("w", 4, D), weight("b", 4)))
    a, b = h.chunk(2)
    return (a * b).sum(-1)


@on_series()
def siamese_triplet(x):
    h = torch.tanh(F.linear(torch.cat([x[:, 0], x[:, 1], x[:, 2]]), weight("w", 4, D)))
    anchor, near, far = h.split(len(x))
    return (anchor - near).square().sum(-1) - (anchor - far).square().sum(-1)


@on_series()
def siamese_stack(x):
    a, b = torch.tanh(F.linear(torch.stack([x[:, 0], x[:, 1]]), weight("w", 4, D)))
    return (a * b).sum(-1)


@on_series()
def mirrored_inputs(x):
    """Antithetic or augmented copies of the inputs, averaged."""
    both = torch.cat([x[:, 0], -x[:, 0]])
    h = torch.tanh(F.linear(both, weight("w", 4, D), weight("b", 4)))
    return h.view(2, len(x), 4).mean(0).sum(-1)


def _packed_sum(packed, rows):
    return pad_packed_sequence(packed._replace(data=rows), batch_first=True)[0].sum(1)


def _equal(x):
    lengths = torch.full((len(x),), x.size(1))
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


@on_series()
def packed_equal(x):
    packed = _equal(x)
    return _packed_sum(packed, torch.tanh(F.linear(packed.data, weight("w", 4, D))).sum(-1))


@on_series()
def packed_equal_deep(x):
    packed = _equal(x)
    h = torch.tanh(F.linear(packed.data, weight("w", 4, D), weight("b", 4)))
    return _packed_sum(packed, F.linear(h, weight("v", 1, 4)).squeeze(-1))


@on_series()
def packed_equal_embedding(x):
    packed = _equal((x[..., 0] > 0).long())
    h = torch.tanh(F.embedding(packed.data, weight("w", 2, 4)))
    return _packed_sum(packed, h.sum(-1))


# ------------------------------------------------------------------------- time-major


@on_series()
def time_major_linear(x):
    return torch.tanh(F.linear(x.transpose(0, 1), weight("w", 4, D))).sum((0, 2))


@on_series()
def time_major_gru(x):
    return gru(x.transpose(0, 1), batch_first=False)[-1].sum(-1)


@on_series()
def time_major_lstm_dense(x):
    h = lstm(x.transpose(0, 1), batch_first=False)[-1]
    return F.linear(h, weight("v", 1, 2), weight("c", 1)).squeeze(-1)


@on_series()
def time_major_matmul(x):
    h = torch.tanh(x.transpose(0, 1) @ weight("w", D, 4) + weight("b", 4))
    return h.mean(0).sum(-1)


@on_series(was_right=True)
def time_major_attention(x):
    q = x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        q, q, q, D, 1, weight("in", 3 * D, D), weight("in_b", 3 * D), None, None, False, 0.0,
        weight("out", D, D), weight("out_b", D), need_weights=False,
    )  # fmt: skip
    return torch.tanh(out).sum((0, 2))


# ----------------------------------------------------------------------------- ragged


def _owner(n, t):
    """Numbers of rows from 1 to t, in the order of the examples."""
    return torch.arange(n).repeat_interleave(1 + torch.arange(n) % t)


def ragged(**options):
    """For a function of rows and their owners that gives a number for each row."""

    def register(net):
        def make(n, t, observe):
            owner = _owner(n, t)

            def model(rows, y):
                with examples(owner, n):
                    h = net(rows)
                observe(rows.new_zeros(n).index_add(0, owner, h), y)

            return model, (torch.randn(len(owner), D), torch.randn(n))

        make.__name__ = net.__name__
        kind(**{"was_right": True, **options})(make)
        return net

    return register


@ragged()
def ragged_linear(rows):
    return torch.tanh(F.linear(rows, weight("w", 4, D), weight("b", 4))).sum(-1)


@ragged()
def ragged_deep(rows):
    h = torch.tanh(rows @ weight("w", D, 4) + weight("b", 4))
    return F.linear(h, weight("v", 1, 4)).squeeze(-1)


@ragged()
def ragged_conv(rows):
    return torch.tanh(F.conv1d(rows[:, None], weight("w", 2, 1, 2), weight("b", 2))).sum((1, 2))


@ragged()
def ragged_embedding(rows):
    return torch.tanh(F.embedding((rows[:, 0] > 0).long(), weight("w", 2, 4))).sum(-1)


@ragged()
def ragged_layer_norm(rows):
    return torch.tanh(F.layer_norm(rows, (D,), weight("w", D), weight("b", D))).sum(-1)


@ragged()
def ragged_elementwise(rows):
    return torch.tanh(rows * weight("w", D) + weight("b", D)).sum(-1)


@ragged()
def ragged_attention(rows):
    """Over the features of one row."""
    q = rows[:, :, None] * weight("q", 4)  # (R, D, 4)
    out = F.scaled_dot_product_attention(q, q * weight("k", 4), q)
    return torch.tanh(out).sum((1, 2))


@kind(was_right=True)
def ragged_packed(n, t, observe):
    lengths = (1 + torch.arange(n) % t).flip(0)

    def model(x, y):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        with examples(packed):
            h = torch.tanh(F.linear(packed.data, weight("w", 4, D), weight("b", 4)))
        observe(_packed_sum(packed, h.sum(-1)), y)

    return model, _series(n, t)


@kind(was_right=True)
def ragged_and_context(n, t, observe):
    """Rows by owner, then what is one row an example, in and out of the block."""
    owner = _owner(n, t)

    def model(rows, y):
        v = weight("v", 1, 4)
        with examples(owner, n):
            h = torch.tanh(F.linear(rows, weight("w", 4, D)))
            pooled = rows.new_zeros(n, 4).index_add(0, owner, h)
        observe(F.linear(pooled, v, weight("c", 1)).squeeze(-1), y)

    return model, (torch.randn(len(owner), D), torch.randn(n))


@kind(shared="w b")
def ragged_unnamed(n, t, observe):
    """Nobody says whose the rows are."""
    owner = _owner(n, t)

    def model(rows, y):
        h = torch.tanh(F.linear(rows, weight("w", 4, D), weight("b", 4))).sum(-1)
        observe(rows.new_zeros(n).index_add(0, owner, h), y)

    return model, (torch.randn(len(owner), D), torch.randn(n))


@kind(shared="w", sizes=((6, 4), (6, 3)))
def ragged_unnamed_packed(n, t, observe):
    lengths = (1 + torch.arange(n) % t).flip(0)

    def model(x, y):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        observe(
            _packed_sum(
                packed,
                F.embedding((packed.data[:, 0] > 0).long(), weight("w", 2, 4)).tanh().sum(-1),
            ),
            y,
        )

    return model, _series(n, t)


# -------------------------------------------------------------------------- constants


def _constant(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@on_rows(shared="theta")
def qr_matrix(x):
    return x @ (torch.linalg.inv(torch.linalg.qr(_constant(5, D))[1]) @ weight("theta", D))


@on_rows()
def scaled_by_a_constant(x):
    return x @ (weight("mu") * torch.tensor([1.0, 2.0, 0.5]))


@on_rows()
def hypernetwork(x):
    return torch.tanh(x @ F.linear(_constant(D, 2), weight("w", 4, 2))).sum(-1)


@on_rows(shared="eps")
def tril_times_eps(x):
    return x @ (_constant(D, D).tril() @ weight("eps", D))


@on_rows()
def table_by_weight(x):
    """A table of features of D classes, times a weight: a layer for all examples."""
    logits = x @ (_constant(D, 4) @ weight("w", 4, D)).T
    return torch.tanh(logits).sum(-1)


@on_rows(shared="w", was_right=True)
def position_dependent(x):
    """A parameter as input, beside the data."""
    inducing = torch.nn.Parameter(_constant(D, D))
    basis = torch.tanh(inducing @ weight("w", D))
    return torch.tanh(x @ inducing.detach()) @ basis


@on_series()
def positional_encoding(x):
    t = x.size(1)
    h = x + F.linear(_constant(t, 2), weight("w", D, 2))
    return torch.tanh(h).sum((1, 2))


@on_series(was_right=True)
def positional_encoding_first(x):
    h = F.embedding(torch.arange(x.size(1)), weight("w", x.size(1), D)) + x
    return torch.tanh(F.linear(h, weight("v", 1, D))).sum((1, 2))


@on_rows(shared="scale")
def latent_not_flipped(x):
    """A latent vector with a prior that is not symmetric, times a flipped matrix."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0).expand([D]).to_event(1))
    return x @ (weight("w", D, D) @ scale)


# ------------------------------------------------------------------------ enumeration


def _states(z, n):
    """A code of the state of each example, states in front where they are enumerated."""
    code = F.one_hot(z, 4).to(torch.get_default_dtype())
    return code.expand(*code.shape[:-2], n, 4)


def enumerated(**options):
    """For a decoder of codes (K, N, 4) and data (N, D)."""

    def register(mean):
        def make(n, t, observe):
            def model(x, y):
                net = mean()
                with pyro.plate("data", n):
                    z = pyro.sample(
                        "z", dist.Categorical(torch.ones(t)), infer={"enumerate": "parallel"}
                    )
                    code = _states(z, n)
                    loc = net(torch.cat([code, x.expand(*code.shape[:-1], D)], -1))
                    pyro.sample("y", dist.Normal(loc, 0.5), obs=y)

            return model, _rows(n)

        make.__name__ = mean.__name__
        sizes = ((6, 2), (3, 3), (4, 4), (2, 3))
        kind(enumerated=True, needs_plate=True, **{"sizes": sizes, **options})(make)
        return mean

    return register


@enumerated()
def decoder_of_states():
    w = weight("w", 4, 4 + D)
    return lambda h: torch.tanh(F.linear(h, w)).sum(-1)


@enumerated()
def decoder_of_two_layers():
    w, b, v = weight("w", 4, 4 + D), weight("b", 4), weight("v", 1, 4)
    return lambda h: F.linear(torch.tanh(F.linear(h, w, b)), v).squeeze(-1)


@enumerated()
def decoder_by_matmul():
    w, s = weight("w", 4 + D, 4), weight("s", 4)
    return lambda h: (torch.tanh(h @ w) * s).sum(-1)


# -------------------------------------------------------------- one example is a graph


@on_series(was_right=True)
def graphs(x):
    """Graphs of T nodes each: message passing in a graph."""
    a = torch.full((x.size(1),) * 2, 1 / x.size(1)) + torch.eye(x.size(1))
    h = torch.tanh(a @ F.linear(x, weight("w", 4, D)))
    return (a @ F.linear(h, weight("v", 1, 4))).sum((1, 2))


@on_series()
def graphs_folded(x):
    """The nets of the nodes folded, messages inside of each graph."""
    a = torch.full((x.size(1),) * 2, 1 / x.size(1)) + torch.eye(x.size(1))
    h = torch.tanh(F.linear(x.flatten(0, 1), weight("w", 4, D))).unflatten(0, x.shape[:2])
    h = (a @ h).flatten(0, 1)
    return F.linear(h, weight("v", 1, 4)).view(len(x), -1).sum(-1)


@on_series(was_right=True)
def attention_in_a_series(x):
    w = weight("w", 3 * D, D)
    q, k, v = F.linear(x, w).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v).sum((1, 2))


@kind(was_right=True)
def block_diagonal_batch(n, t, observe):
    """PyTorch Geometric's way: one big graph of N components, nodes named by their graph."""
    owner = torch.arange(n).repeat_interleave(t)
    adjacency = (owner[:, None] == owner).to(torch.get_default_dtype()) / t

    def model(x, y):
        with examples(owner, n):
            h = torch.tanh(adjacency @ F.linear(x.flatten(0, 1), weight("w", 4, D)))
            h = F.linear(h, weight("v", 1, 4)).squeeze(-1)
        observe(x.new_zeros(n).index_add(0, owner, h), y)

    return model, _series(n, t)


@kind(sizes=((6, 4), (4, 4)), was_right=True)
def series_with_ar_errors(n, t, observe):
    """AR(1) errors along each series, series are the examples."""

    def model(x, y):
        mean = F.linear(x, weight("w", 1, D), weight("b", 1)).squeeze(-1)  # (N, T)
        before = F.pad((y - mean)[:, :-1], (1, 0))
        observe(mean + 0.5 * before, y)

    return model, (torch.randn(n, t, D), torch.randn(n, t))


# ------------------------------------------------------------------------ true mixing


@on_rows(shared="w", either=frozenset("w"))
def graph_over_nodes(x):
    return (torch.full((len(x),) * 2, 1 / len(x)) @ (x @ weight("w", D, 6))).sum(-1)


@on_rows(shared="w v", either=frozenset("v"))
def graph_of_two_layers(x):
    ring = torch.eye(len(x)) + torch.eye(len(x)).roll(1, 0)
    h = torch.tanh(ring @ F.linear(x, weight("w", 4, D)))
    return (ring @ F.linear(h, weight("v", 1, 4))).squeeze(-1)


@on_rows(shared="w")
def graph_by_index(x):
    source, target = torch.arange(len(x)), torch.arange(len(x)).roll(1)
    h = F.linear(x, weight("w", 4, D))
    return torch.tanh(h.index_add(0, target, h[source])).sum(-1)


@on_rows(shared="w")
def graph_two_components(x):
    """Neighbours in pairs, as n and n + 1."""
    h = F.linear(x, weight("w", 4, D))
    swapped = h[torch.arange(len(x)).bitwise_xor(1).clamp(max=len(x) - 1)]
    return torch.tanh(h + swapped).sum(-1)


@on_rows(shared="k v")
def attention_over_examples(x):
    """The query of a row is its own."""
    q, k, v = (x @ weight(name, D, 4) for name in "qkv")
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].sum(-1)


@on_rows(shared="w")
def attention_by_hand(x):
    h = x @ weight("w", D, 4)
    return (torch.softmax(h @ h.T, -1) @ h).sum(-1)


@on_rows(shared="w", sizes=((6, 4), (D, D)))
def attention_to_the_others(x):
    h = torch.tanh(x @ weight("w", D, 4))
    score = (h @ h.T).masked_fill(torch.eye(len(x), dtype=torch.bool), -1e9)
    return torch.softmax(score, -1).square().sum(-1)


@on_rows(shared="w", sizes=((6, 4), (D, D)))
def batch_statistics(x):
    h = F.batch_norm(F.linear(x, weight("w", 4, D)), None, None, training=True)
    return torch.tanh(h).sum(-1)


@on_rows(shared="w", sizes=((6, 4), (D, D)))
def batch_statistics_of_a_layer(x):
    """What comes after the statistics is each row's own."""
    h = torch.tanh(F.linear(x, weight("w", 4, D)))
    h = F.batch_norm(h, None, None, weight("gamma", 4), weight("beta", 4), training=True)
    return torch.tanh(h).sum(-1)


@on_rows(shared="w", sizes=((6, 4), (D, D)))
def standardised_by_hand(x):
    h = x @ weight("w", D, 4)
    return torch.tanh((h - h.mean(0)) / (h.std(0) + 1)).sum(-1)


@on_rows(shared="w")
def centring(x):
    m = x @ weight("w", D)
    return m - m.mean()


@on_rows(shared="w")
def centring_by_matrix(x):
    h = torch.eye(len(x)) - 1 / len(x)
    return h @ (x @ weight("w", D))


@on_rows(shared="w b")
def softmax_over_examples(x):
    return torch.softmax(x @ weight("w", D) + weight("b"), 0)


@on_rows(shared="w", sizes=((6, 4), (5, 4)))
def smoothed(x):
    m = x @ weight("w", D)
    return F.avg_pool1d(m[None, None], 3, 1, 1)[0, 0]


@on_rows(shared="w")
def cumulated(x):
    return (x @ weight("w", D)).cumsum(0)


@on_rows(shared="w")
def sorted_means(x):
    return torch.tanh(x @ weight("w", D)).sort().values


def joint(shared="w", **options):
    """For a model of data (N, D) that observes them in its own way."""

    def register(model):
        def make(n, t, observe):
            return (lambda x, y: model(x, y, t, observe)), _rows(n)

        make.__name__ = model.__name__
        sizes = ((6, 4), (D, D), (4, 4))
        kind(**{"shared": shared, "sizes": sizes, **options})(make)
        return model

    return register


@joint()
def ar1_errors(x, y, t, observe):
    m = x @ weight("w", D)
    observe(m + 0.5 * F.pad((y - m)[:-1], (1, 0)), y)


@joint()
def ar2_errors(x, y, t, observe):
    m = F.linear(x, weight("w", 1, D)).squeeze(-1)
    e = y - m
    observe(m + 0.5 * F.pad(e[:-1], (1, 0)) - 0.2 * F.pad(e[:-2], (2, 0)), y)


@joint()
def ar1_by_matrix(x, y, t, observe):
    m = x @ weight("w", D)
    lag = torch.diag(torch.full((len(x) - 1,), 0.5), -1)
    observe(m + lag @ (y - m), y)


@joint()
def lag_two(x, y, t, observe):
    """Rows of one kind that mix: n and n + 2."""
    m = x @ weight("w", D)
    observe(m + F.pad(m[:-2], (2, 0)), y)


@joint(needs_plate=True)
def pairs(x, y, t, observe):
    m = x @ weight("w", D)
    with pyro.plate("pairs", len(x) - 1):
        pyro.sample("y", dist.Normal(m[1:] - m[:-1], 1.0), obs=y[1:])


@joint(sizes=((6, 4), (4, 4)))
def all_pairs(x, y, t, observe):
    m = torch.tanh(x @ weight("w", D))
    observe((m[:, None] * m).flatten(), (y[:, None] * y).flatten())


@kind(shared="w", sizes=((6, 8), (5, 5), (4, 6)), needs_plate=True)
def bradley_terry(n, t, observe):
    """t games of n players."""

    def model(x, y):
        s = x @ weight("w", D)
        i, j = torch.arange(t) % n, (torch.arange(t) * 3 + 1) % n
        with pyro.plate("games", t):
            pyro.sample("y", dist.Bernoulli(logits=s[i] - s[j]), obs=y)

    return model, (torch.randn(n, D), (torch.rand(t) < 0.5).to(torch.get_default_dtype()))


@kind(shared="w", sizes=((6, 8), (5, 5), (4, 6)))
def score_differences(n, t, observe):
    def model(x, y):
        s = torch.tanh(F.linear(x, weight("w", 1, D))).squeeze(-1)
        i, j = torch.arange(t) % n, (torch.arange(t) * 3 + 1) % n
        observe(s[i] - s[j], y)

    return model, (torch.randn(n, D), torch.randn(t))


@joint()
def plackett_luce(x, y, t, observe):
    """The ranking of all rows, a factor."""
    s = x @ weight("w", D)
    rest = s.flip(0).logcumsumexp(0).flip(0)
    pyro.factor("ranking", (s - rest).sum())


@joint()
def partial_likelihood(x, y, t, observe):
    """Cox's, which compares each with all who are still at risk."""
    s = x @ weight("w", D)
    at_risk = y[:, None] <= y
    with pyro.plate("data", len(x)):
        pyro.factor("cox", s - torch.where(at_risk, s, -1e9).logsumexp(-1))


@joint()
def roughness(x, y, t, observe):
    m = x @ weight("w", D)
    observe(m, y)
    pyro.factor("rough", -(m[1:] - m[:-1]).square().sum())


@joint()
def roughness_by_row(x, y, t, observe):
    m = F.linear(x, weight("w", 1, D)).squeeze(-1)
    observe(m, y)
    with pyro.plate("rough_data", len(x) - 1):
        pyro.factor("rough", -(m[1:] - m[:-1]).square())


@joint()
def variance_penalty(x, y, t, observe):
    m = torch.tanh(x @ weight("w", D))
    observe(m, y)
    pyro.factor("spread", -m.var())


@joint()
def contrastive(x, y, t, observe):
    h = F.normalize(x @ weight("w", D, 4) + 0.1, dim=-1)
    logits = h @ F.normalize(_constant(len(x), 4), dim=-1).T
    logits = logits + (h @ h.T)
    pyro.factor("nce", -F.cross_entropy(logits, torch.arange(len(x)), reduction="sum"))


@joint(shared="v", either=frozenset("v"))
def contrastive_two_towers(x, y, t, observe):
    a, b = x @ weight("w", D, 4), x.flip(-1) @ weight("v", D, 4)
    with pyro.plate("data", len(x)):
        pyro.sample("match", dist.Categorical(logits=a @ b.T), obs=torch.arange(len(x)))


@joint()
def supervised_contrastive(x, y, t, observe):
    h = torch.tanh(x @ weight("w", D, 4))
    same = (y[:, None] > 0) == (y > 0)
    with pyro.plate("data", len(x)):
        pyro.factor("near", -(torch.cdist(h, h) * same).sum(-1))


@joint()
def joint_normal(x, y, t, observe):
    cov = torch.eye(len(x)) + 0.5
    pyro.sample("y", dist.MultivariateNormal(x @ weight("w", D), cov), obs=y)


@joint()
def joint_low_rank(x, y, t, observe):
    m = F.linear(x, weight("w", 1, D)).squeeze(-1)
    fn = dist.LowRankMultivariateNormal(m, torch.ones(len(x), 1), torch.ones(len(x)))
    pyro.sample("y", fn, obs=y)


@joint()
def gaussian_process_mean(x, y, t, observe):
    k = torch.exp(-torch.cdist(x, x)) + torch.eye(len(x))
    m = torch.tanh(x @ weight("w", D))
    pyro.sample("y", dist.MultivariateNormal(m, scale_tril=torch.linalg.cholesky(k)), obs=y)


@joint()
def deep_kernel(x, y, t, observe):
    h = torch.tanh(x @ weight("w", D, 2))
    k = torch.exp(-(h[:, None] - h).square().sum(-1)) + torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), k), obs=y)


@kind(shared="w", sizes=((12, 4), (6, 2), (4, 4)))
def bags_summed(n, t, observe):
    """Groups of rows of which the sum is observed, of unequal sizes."""
    bag = torch.arange(n) * t // n
    bag = torch.where(torch.arange(n) == n - 1, 0, bag)

    def model(x, y):
        observe(x.new_zeros(t).index_add(0, bag, x @ weight("w", D)), y)

    return model, (torch.randn(n, D), torch.randn(t))


@kind(shared="w", sizes=((12, 5), (7, 2), (7, 3)))
def bags_of_unequal_sizes(n, t, observe):
    bag = torch.arange(n) * t // n

    def model(x, y):
        h = torch.tanh(F.linear(x, weight("w", 4, D)))
        observe(x.new_zeros(t, 4).index_add(0, bag, h).sum(-1), y)

    return model, (torch.randn(n, D), torch.randn(t))


@kind(sizes=((12, 4), (6, 2), (4, 4)))
def bags_of_equal_sizes(n, t, observe):
    """Neighbouring rows summed: the bag is the example."""

    def model(x, y):
        h = torch.tanh(F.linear(x, weight("w", 4, D)))
        observe(h.view(t, -1).sum(-1), y)

    return model, (torch.randn(n, D), torch.randn(t))
