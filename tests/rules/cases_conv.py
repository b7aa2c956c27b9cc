"""Oracle cases of transposed convolutions, and of convolutions built of other functions."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from pyro_flipout.testing import random_weight
from tests.rules import cases
from tests.rules.cases import N, const, data

CASES = []
case = functools.partial(cases.case, table=CASES)

# ------------------------------------------------------------------------ transposed

for op, nd in ((F.conv_transpose1d, 1), (F.conv_transpose2d, 2), (F.conv_transpose3d, 3)):
    size, ker = (4, 3, 2)[:nd], (3, 2, 1)[:nd]

    def transposed(label, cin=4, cout=6, groups=1, bias=None, op=op, size=size, ker=ker, **kw):
        def make():
            w_shape = (cin, cout // groups, *ker)
            w = const(*w_shape) if bias == "only" else random_weight(*w_shape)
            b = {"plain": const(cout), "only": random_weight(cout)}.get(bias)
            if bias == "flipped":
                w, b = cases.weights(w_shape, (cout,))
            return (data(N, cin, *size), w, b), {"groups": groups, **kw}

        case(op, label, make)

    transposed("plain")
    transposed("bias", bias="flipped")
    transposed("plain bias", bias="plain")
    transposed("only the bias", bias="only")
    transposed("stride", stride=2)
    transposed("padding", padding=(1, 1, 0)[:nd])
    transposed("output padding", stride=2, output_padding=1)
    transposed("dilation", dilation=(2, 1, 1)[:nd])
    transposed("groups", groups=2, bias="flipped")
    transposed("groups and all options", groups=2, stride=2, output_padding=1, dilation=2)
    transposed("depthwise", cin=4, cout=4, groups=4)
    transposed("depthwise, more channels", cin=4, cout=8, groups=4)
    transposed("one input channel", cin=1, cout=3)
    transposed("one output channel", cin=3, cout=1)
    transposed("one channel", cin=1, cout=1)

case(
    F.conv_transpose1d,
    "a kernel for all input channels",
    lambda: (data(N, 4, 5), random_weight(1, 3, 2)),
    fn=lambda x, w: F.conv_transpose1d(x, w.expand(4, 3, 2), groups=2),
)
case(
    F.conv_transpose1d,
    "a kernel for all output channels",
    lambda: (data(N, 4, 5), random_weight(4, 1, 2)),
    fn=lambda x, w: F.conv_transpose1d(x, w.expand(4, 3, 2), groups=2),
)
case(
    F.conv1d,
    "a kernel for all channels",
    lambda: (data(N, 4, 5), random_weight(1, 1, 2)),
    fn=lambda x, w: F.conv1d(x, w.expand(6, 2, 2), groups=2),
)

# ------------------------------------------------------------------------ composed

case(
    F.conv2d,
    "separable",
    lambda: (data(N, 4, 6, 5), *cases.weights((4, 1, 3, 3), (4,), (6, 4, 1, 1), (6,))),
    fn=lambda x, d, b, p, c: F.conv2d(F.conv2d(x, d, b, padding=1, groups=4), p, c),
)
case(
    F.conv2d,
    "separable, two kernels a channel",
    lambda: (data(N, 4, 6, 5), *cases.weights((8, 1, 3, 3), (6, 8, 1, 1))),
    fn=lambda x, d, p: F.conv2d(F.conv2d(x, d, groups=4), p),
)
case(
    F.conv2d,
    "encoder and decoder with one weight",
    lambda: (data(N, 4, 6, 5), random_weight(3, 4, 3, 2)),
    fn=lambda x, w: F.conv_transpose2d(F.conv2d(x, w), w),
)


def unfolded(x, w):  # w (O, I, kh, kw)
    columns = F.unfold(x, w.shape[2:])  # (N, I * kh * kw, L)
    return w.view(w.size(0), -1) @ columns


def unfolded_transposed(x, w):
    columns = F.unfold(x, w.shape[2:]).transpose(1, 2)
    return columns @ w.flatten(1).t()


def local(x, w):  # a kernel of its own at every position, w (O, I, kh, kw, L)
    columns = F.unfold(x, w.shape[2:4]).unflatten(1, w.shape[1:4])
    return torch.einsum("nijkl,oijkl->nol", columns, w)


def folded(x, w):  # a transposed convolution, w (I, O, kh, kw)
    columns = torch.einsum("nil,ik->nkl", x.flatten(2), w.reshape(w.size(0), -1))
    size = [s + k - 1 for s, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    return F.fold(columns, size, w.shape[2:])


image = lambda: (data(N, 3, 6, 5), random_weight(4, 3, 3, 2))  # noqa: E731
case(torch.matmul, "unfold, kernel first", image, fn=unfolded)
case(torch.matmul, "unfold, kernel last", image, fn=unfolded_transposed)
case(
    torch.einsum,
    "unfold, locally connected",
    lambda: (data(N, 3, 4, 3), random_weight(4, 3, 2, 2, 6)),
    fn=local,
)
case(torch.einsum, "fold", lambda: (data(N, 4, 3, 4), random_weight(4, 3, 2, 2)), fn=folded)
