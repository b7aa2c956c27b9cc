"""Oracle cases of embeddings."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from pyro_flipout.tensor import Execution
from pyro_flipout.testing import constant, random_weight
from tests.rules import cases
from tests.rules.cases import N, data

CASES = []
case = functools.partial(cases.case, table=CASES)
W = random_weight
V, D = 7, 3


def tokens(*shape):
    return torch.randint(V, shape)


def known(make):
    """Lets the execution count the examples before."""

    def with_examples():
        args = make()
        weight = next(arg for arg in args if hasattr(arg, "execution"))
        weight.execution.count(N, "")
        return args

    return with_examples


embedding = functools.partial(case, F.embedding)
embedding("tokens", lambda: (tokens(N, 6), W(V, D)))
embedding("one token", lambda: (tokens(N), W(V, D)))
embedding("blocks", lambda: (tokens(N, 2, 6), W(V, D)))
embedding("one example", lambda: (torch.tensor([[3, 3, 1]]), W(V, D)))
embedding("no examples", lambda: (tokens(0, 6), W(V, D)))
embedding("many examples", lambda: (tokens(37, 2), W(V, D)))
embedding("one row", lambda: (tokens(N, 2).zero_(), W(1, D)))
embedding("one column", lambda: (tokens(N, 6), W(V, 1)))
embedding("padding", lambda: ((tokens(N, 6), W(V, D)), {"padding_idx": 2}))
embedding("padding, from the end", lambda: ((tokens(N, 6), W(V, D)), {"padding_idx": -2}))
embedding("time-major", lambda: (tokens(6, N), W(V, D, execution=Execution(1))), example_dim=1)
embedding(
    "one step of a time-major model",
    known(lambda: (tokens(N), W(V, D, execution=Execution(1)))),
    fn=lambda x, w: F.embedding(x.squeeze(), w).reshape(-1, 1, D).transpose(0, 1),
    num_examples=N,
    example_dim=0,
    out_example_dim=1,
)
embedding("positions", lambda: (constant(torch.arange(6)), W(V, D)), num_examples=N)
embedding("positions in a row", lambda: (constant(torch.arange(6)[None]), W(V, D)), num_examples=N)
embedding(
    "positions in a column",
    lambda: (constant(torch.arange(6)[:, None]), W(V, D, execution=Execution(1))),
    num_examples=N,
)
embedding("other rows than examples", known(lambda: (constant(tokens(4)), W(V, D))), num_examples=N)
embedding(
    "tokens and positions",
    lambda: (tokens(N, 6), *cases.weights((V, D), (V, D))),
    fn=lambda x, w, p: F.embedding(torch.arange(6), p) + F.embedding(x, w),
)
embedding(
    "as many positions as examples",
    lambda: (tokens(N, N), *cases.weights((V, D), (V, D))),
    fn=lambda x, w, p: F.embedding(x, w) + F.embedding(torch.arange(N), p),
)
embedding(
    "tied to the output layer",
    lambda: (tokens(N, 6), W(V, D)),
    fn=lambda x, w: F.linear(F.embedding(x, w), w),
)
embedding(
    "part of a table",
    lambda: (tokens(N, 6), W(V + 2, 2 * D)),
    fn=lambda x, w: F.embedding(x, w[2:, :D]),
)
embedding(
    "one-hot", lambda: (tokens(N, 6), W(V, D)), fn=lambda x, w: F.one_hot(x, V).to(w.dtype) @ w
)
embedding(
    "low rank",
    lambda: (tokens(N, 6), *cases.weights((V, 2), (2, D))),
    fn=lambda x, u, v: F.embedding(x, u @ v),
)

bag = functools.partial(case, F.embedding_bag)
SIZES = (2, 0, 3, 1, 4)  # of N bags


class Bags:
    """``F.embedding_bag`` of 1-D input with offsets, as a function of the bags' numbers."""

    def __init__(self, include_last_offset=False, scaled=False, **options):
        self.tokens = [tokens(size) for size in SIZES]
        self.scales = [torch.randn(size, dtype=torch.float64) for size in SIZES]
        self.last = include_last_offset
        self.scaled = scaled
        self.options = options

    def __call__(self, numbers, weight):
        sizes = torch.tensor([SIZES[i] for i in numbers])
        offsets = F.pad(sizes.cumsum(0), (1, 0))
        return F.embedding_bag(
            torch.cat([self.tokens[i] for i in numbers]),
            weight,
            offsets if self.last else offsets[:-1],
            per_sample_weights=torch.cat([self.scales[i] for i in numbers])
            if self.scaled
            else None,
            include_last_offset=self.last,
            **self.options,
        )


for mode in ("sum", "mean", "max"):
    bag(f"{mode}", lambda mode=mode: ((tokens(N, 6), W(V, D)), {"mode": mode}))
    bag(
        f"{mode}, padding",
        lambda mode=mode: ((tokens(N, 6), W(V, D)), {"mode": mode, "padding_idx": -2}),
    )
    bag(f"{mode}, one row", lambda mode=mode: ((tokens(N, 6) * 0, W(1, D)), {"mode": mode}))
    for last in (False, True):
        bag(
            f"{mode}, offsets, last {last}",
            lambda: (torch.arange(N), W(V, D)),
            fn=Bags(mode=mode, include_last_offset=last),
        )
    bag(
        f"{mode}, offsets, padding",
        lambda: (torch.arange(N), W(V, D)),
        fn=Bags(mode=mode, padding_idx=2),
    )
bag("default", lambda: (tokens(N, 6), W(V, D)))
bag(
    "weighted",
    lambda: ((tokens(N, 6), W(V, D)), {"per_sample_weights": data(N, 6), "mode": "sum"}),
)
bag(
    "weighted, padding",
    lambda: (
        (tokens(N, 6), W(V, D)),
        {"per_sample_weights": data(N, 6), "mode": "sum", "padding_idx": 1},
    ),
)
bag("weighted, offsets", lambda: (torch.arange(N), W(V, D)), fn=Bags(mode="sum", scaled=True))
bag(
    "weighted, one row",
    lambda: ((tokens(N, 6) * 0, W(1, D)), {"per_sample_weights": data(N, 6), "mode": "sum"}),
)
