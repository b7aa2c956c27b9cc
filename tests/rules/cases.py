"""The oracle's case table: for every torch function with a rule, how it is called.

A case is ``(op, label, check)``; ``check()`` runs :func:`pyro_flipout.testing.check_rule`.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout import flip
from pyro_flipout.tensor import Execution
from pyro_flipout.testing import check_rule, constant, random_weight

N = 5
CASES = []


def data(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def const(*shape):
    return constant(torch.randn(*shape, dtype=torch.float64))


def weights(*shapes):
    execution = Execution()
    return [
        random_weight(*shape, execution=execution, site=f"w{i}", seed=i)
        for i, shape in enumerate(shapes)
    ]


def case(op, label, make, fn=None, table=CASES, **options):
    """Adds a case; ``make()`` gives the arguments, positional or a pair with keywords."""

    def check():
        args = make()
        args, kwargs = args if isinstance(args[-1], dict) else (args, {})
        args = args if isinstance(args, tuple) else (args,)
        check_rule(fn or op, *args, **kwargs, **options)

    table.append((op, label, check))


# ------------------------------------------------------------------------ dense

W = random_weight

case(F.linear, "2d", lambda: (data(N, 3), W(2, 3)))
case(F.linear, "one example", lambda: (data(1, 3), W(2, 3)))
case(F.linear, "no examples", lambda: (data(0, 3), W(2, 3)))
case(F.linear, "time", lambda: (data(N, 7, 3), W(2, 3)))
case(F.linear, "4d", lambda: (data(N, 2, 7, 3), W(2, 3)))
case(F.linear, "one output", lambda: (data(N, 3), W(1, 3)))
case(F.linear, "one input", lambda: (data(N, 1), W(3, 1)))
case(F.linear, "vector weight", lambda: (data(N, 3), W(3)))
case(F.linear, "both", lambda: (data(N, 3), *weights((2, 3), (2,))))
case(F.linear, "plain bias", lambda: (data(N, 3), W(2, 3), const(2)))
case(F.linear, "bias by keyword", lambda: ((data(N, 3), W(2, 3)), {"bias": const(2)}))
case(F.linear, "only the bias", lambda: (data(N, 3), const(2, 3), W(2)))


def beside_a_shared_weight(op, data_shape, weight_shape):
    """The weight fell back to its shared draw before, the bias did not."""

    def make():
        w, b = weights(weight_shape, (weight_shape[0],))
        w.draws[0].shared = True
        return data(*data_shape), w, b

    case(op, "beside a shared weight", make)


beside_a_shared_weight(F.linear, (N, 3), (2, 3))
beside_a_shared_weight(F.conv1d, (N, 3, 5), (2, 3, 2))
case(F.linear, "all by keyword", lambda: ((), {"input": data(N, 3), "weight": W(2, 3)}))
case(F.linear, "strided data", lambda: (data(3, N).t().detach().requires_grad_(), W(2, 3)))
case(F.linear, "time-major", lambda: (data(7, N, 3), tm(W, 2, 3)), example_dim=1)
case(F.linear, "many examples", lambda: (data(37, 3), W(2, 3)))

case(F.bilinear, "both", lambda: (data(N, 3), data(N, 4), *weights((2, 3, 4), (2,))))
case(F.bilinear, "plain bias", lambda: (data(N, 3), data(N, 4), W(2, 3, 4), const(2)))
case(F.bilinear, "only the bias", lambda: (data(N, 3), data(N, 4), const(2, 3, 4), W(2)))
case(F.bilinear, "time", lambda: (data(N, 6, 3), data(N, 6, 4), W(2, 3, 4)))


def tm(make, *shape):
    return make(*shape, execution=Execution(example_dim=1))


# ----------------------------------------------------------------- convolutions

for op, nd in ((F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3)):
    size = (6, 5, 4)[:nd]
    ker = (3, 2, 1)[:nd]

    def conv_case(
        label, cin=4, cout=6, groups=1, bias="none", op=op, nd=nd, size=size, ker=ker, **kw
    ):
        def make():
            w_shape = (cout, cin // groups, *ker)
            options = {"groups": groups, **kw}
            if bias == "flipped":
                w, b = weights(w_shape, (cout,))
            else:
                w, b = W(*w_shape), None
            if bias == "plain":
                b = const(cout)
            if bias == "only":
                w, b = const(*w_shape), W(cout)
            return (data(N, cin, *size), w, b), options

        case(op, label, make)

    conv_case("plain")
    conv_case("bias", bias="flipped")
    conv_case("plain bias", bias="plain")
    conv_case("only the bias", bias="only")
    conv_case("stride", stride=2)
    conv_case("padding", padding=1)
    if nd == 1:
        conv_case("padding same", padding="same")  # odd kernels only: torch warns of a copy
    conv_case("padding valid", padding="valid")
    conv_case("dilation", dilation=(2, 1, 1)[:nd])
    conv_case("groups", groups=2, bias="flipped")
    conv_case("depthwise", cin=4, cout=8, groups=4)
    conv_case("one channel", cin=1, cout=1)

# --------------------------------------------------------------------- products

for op in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
    case(op, "data first", lambda: (data(N, 3), W(3, 2)))
    case(op, "data first, time", lambda: (data(N, 7, 3), W(3, 2)))
    case(op, "weight first", lambda: (W(2, 3), data(N, 3, 4)))
    case(op, "weight vector last", lambda: (data(N, 4, 3), W(3)))
    case(op, "weight vector first", lambda: (W(3), data(N, 3, 4)))
    case(op, "heads", lambda: (data(N, 2, 7, 3), W(2, 3, 4)))
    case(op, "heads, weight first", lambda: (W(2, 4, 3), data(N, 2, 3, 7)))
    case(op, "weight broadcasts", lambda: (data(N, 7, 3), W(1, 3, 4)))
case(Tensor.__rmatmul__, "reflected", lambda: (W(3, 2), data(N, 3)))
case(torch.matmul, "square", lambda: (data(N, 3), W(3, 3)))
case(torch.inner, "square", lambda: (data(N, 3), W(3, 3)))
case(torch.matmul, "columns are examples", lambda: (tm(W, 2, 3), data(3, N)), example_dim=1)
for op in (torch.mm, Tensor.mm):
    case(op, "data first", lambda: (data(N, 3), W(3, 2)))
    case(op, "columns are examples", lambda: (tm(W, 2, 3), data(3, N)), example_dim=1)
for op in (torch.bmm, Tensor.bmm):
    case(
        op,
        "a weight repeated for each example",
        lambda: (data(N, 7, 3), W(3, 2)),
        fn=lambda x, w, op=op: op(x, w.expand(x.size(0), 3, 2)),
    )
    case(op, "heads", lambda: (data(2, N, 3), tm(W, 2, 3, 4)), example_dim=1)
for op in (torch.mv, Tensor.mv):
    case(op, "data first", lambda: (data(N, 3), W(3)))
for op in (torch.inner, Tensor.inner):
    case(op, "data first", lambda: (data(N, 7, 3), W(2, 3)))
    case(op, "vector", lambda: (data(N, 3), W(3)))
for op in (torch.addmm, Tensor.addmm):
    case(op, "plain", lambda: (const(2), data(N, 3), W(3, 2)))
    case(op, "flipped summand", lambda: (W(2), data(N, 3), const(3, 2)))
    case(
        op,
        "both",
        lambda: (data(N, 3), *weights((2,), (3, 2))),
        fn=lambda x, b, w, op=op: op(b, x, w),
    )
    case(
        op,
        "factors",
        lambda: ((const(2), data(N, 3), W(3, 2)), {"beta": 0.5, "alpha": 2.0}),
    )
for op in (torch.baddbmm, Tensor.baddbmm):
    case(
        op,
        "heads",
        lambda: (
            constant(torch.randn(2, 1, 4, dtype=torch.float64)),
            data(2, N, 3),
            tm(W, 2, 3, 4),
        ),
        example_dim=1,
    )
for op in (torch.addmv, Tensor.addmv):
    case(op, "weight vector", lambda: (data(N), data(N, 3), W(3)))

case(torch.tensordot, "one dimension", lambda: ((data(N, 3), W(3, 2)), {"dims": 1}))
case(torch.tensordot, "pairs", lambda: ((data(N, 4, 3), W(3, 2, 4)), {"dims": ([1, 2], [2, 0])}))
case(
    torch.tensordot,
    "weight first",
    lambda: ((W(2, 3), data(N, 3)), {"dims": ([1], [1])}),
    out_example_dim=1,
)

for label, shapes, pairs in (
    ("a weight broadcasts", ((N, 3), (1, 2)), ([1], [0])),
    ("a weight broadcasts, last", ((N, 3), (2, 1)), ([1], [1])),
    ("data broadcast", ((N, 1), (3, 2)), ([1], [0])),
    ("data broadcast, two", ((N, 3, 1), (3, 2, 4)), ([1, 2], [0, 2])),
    ("both broadcast", ((N, 3, 1), (1, 2, 4)), ([1, 2], [0, 2])),
):
    case(
        torch.tensordot,
        label,
        lambda shapes=shapes, pairs=pairs: (
            (data(*shapes[0]), W(*shapes[1])),
            {"dims": pairs},
        ),
    )
for equation, shapes in {
    "ni,io->no": ((N, 3), (1, 2)),
    "ni,oi->no": ((N, 1), (2, 3)),
}.items():
    case(
        torch.einsum,
        f"broadcast {equation}",
        lambda equation=equation, shapes=shapes: (equation, data(*shapes[0]), W(*shapes[1])),
    )

for equation, shapes in {
    "bi,oi->bo": ((N, 3), (2, 3)),
    "bti,oi->bto": ((N, 7, 3), (2, 3)),
    "...i,oi->...o": ((N, 7, 3), (2, 3)),
    "bi,io": ((N, 3), (3, 2)),
    "bhi,hio->bho": ((N, 2, 3), (2, 3, 4)),
    "bi,bi,i->b": ((N, 3), (N, 3), (3,)),
    "bi,oij,bj->bo": ((N, 3), (2, 3, 4), (N, 4)),
}.items():
    which = 1 if equation.count(",") == 1 or "oij" in equation else 2

    def einsum_args(equation=equation, shapes=shapes, which=which):
        return (equation, *(W(*s) if i == which else data(*s) for i, s in enumerate(shapes)))

    case(torch.einsum, equation, einsum_args)
for equation in ("ni,io->no", "ni,oi->no", "io,nti->nto"):
    case(
        torch.einsum,
        f"square {equation}",
        lambda equation=equation, first="io" in equation.split(",")[0]: (
            (equation, W(3, 3), data(N, 7, 3)) if first else (equation, data(N, 3), W(3, 3))
        ),
    )
for equation, third in (("ni,oi,o->no", 2), ("ni,oi,i->no", 3), ("ni,io,no->no", (N, 2))):
    case(
        torch.einsum,
        f"three factors {equation}",
        lambda equation=equation, third=third: (
            equation,
            data(N, 3),
            W(3, 2) if "io" in equation else W(2, 3),
            data(*third) if isinstance(third, tuple) else const(third),
        ),
    )
case(torch.einsum, "weight first", lambda: ("oi,bi->bo", W(2, 3), data(N, 3)))

# -------------------------------------------------------------------- arithmetic

for op in (torch.add, torch.sub, torch.subtract, torch.mul, torch.multiply, torch.div):
    case(op, "data first", lambda: (data(N, 3), W(3)))
    case(op, "weight first", lambda: (W(3), data(N, 3)))
for op in (torch.divide, torch.true_divide, torch.rsub):
    case(op, "data first", lambda: (data(N, 3), W(3)))
for name in [
    "add",
    "sub",
    "subtract",
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "mul",
    "multiply",
    "__mul__",
    "__rmul__",
    "div",
    "divide",
    "true_divide",
    "__truediv__",
    "__rtruediv__",
]:
    case(getattr(Tensor, name), "data first", lambda: (data(N, 3), W(3)))
    case(getattr(Tensor, name), "time", lambda: (data(N, 7, 3), W(3)))
    if name not in ("__rtruediv__",):
        case(getattr(Tensor, name), "constant", lambda: (W(2, 3), const(3)), num_examples=N)
        case(getattr(Tensor, name), "number", lambda: (W(2, 3), 1.5), num_examples=N)
case(torch.add, "alpha", lambda: ((data(N, 3), W(3)), {"alpha": 0.5}))
case(torch.sub, "alpha, weight first", lambda: ((W(3), data(N, 3)), {"alpha": 0.5}))
case(torch.add, "alpha, constant", lambda: ((W(2, 3), const(3)), {"alpha": 0.5}), num_examples=N)
case(torch.add, "a matrix", lambda: (data(N, 2, 3), W(2, 3)))
case(torch.add, "a row", lambda: (data(N, 3), W(1, 3)))
case(torch.add, "a scalar weight", lambda: (data(N, 3), W()))
case(torch.mul, "a scalar weight, data (N,)", lambda: (data(N), W()))
case(
    torch.sub,
    "a weight expanded over the examples",
    lambda: (data(N), W()),
    fn=lambda x, w: x - w.expand(x.shape),
)
case(torch.add, "channels", lambda: (data(N, 3, 4, 4), W(3, 1, 1)))
case(torch.add, "two weights", lambda: tuple(weights((2, 3), (2, 3))), num_examples=N)
case(torch.add, "two weights that broadcast", lambda: tuple(weights((3,), (2, 3))), num_examples=N)
case(torch.sub, "two weights", lambda: tuple(weights((2, 1), (2, 3))), num_examples=N)
case(torch.mul, "two weights", lambda: tuple(weights((2, 3), (2, 3))), num_examples=N)
case(torch.mul, "two weights that broadcast", lambda: tuple(weights((), (2, 3))), num_examples=N)
case(torch.mul, "constant that expands", lambda: (W(2, 1), const(2, 3)), num_examples=N)
case(torch.mul, "time-major", lambda: (data(7, N, 3), tm(W, 3)), example_dim=1)
for name in ("add_", "__iadd__", "sub_", "__isub__", "mul_", "__imul__", "div_", "__itruediv__"):
    case(
        getattr(Tensor, name),
        "data changed in place",
        lambda: (data(N, 3), W(3)),
        fn=lambda x, w, op=getattr(Tensor, name): op(x.clone(), w),
    )
for op in (torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__):
    case(op, "weight", lambda: (W(2, 3),), num_examples=N)
case(F.prelu, "one slope", lambda: (data(N, 3, 4), W(1)))
case(F.prelu, "channels", lambda: (data(N, 3, 4), W(3)))

# ----------------------------------------------------------------- normalisation

case(F.layer_norm, "both", lambda: (data(N, 3), (3,), *weights((3,), (3,))))
case(F.layer_norm, "matrix", lambda: (data(N, 2, 3), (2, 3), *weights((2, 3), (2, 3))))
case(F.layer_norm, "tokens", lambda: (data(N, 7, 3), (3,), W(3)))
case(F.layer_norm, "only the bias", lambda: (data(N, 3), (3,), const(3), W(3)))
case(F.rms_norm, "weight", lambda: (data(N, 7, 3), (3,), W(3)))
case(F.group_norm, "both", lambda: (data(N, 4, 6), 2, *weights((4,), (4,))))
case(F.group_norm, "images", lambda: (data(N, 4, 3, 3), 2, W(4), const(4)))


def running(channels):
    return const(channels), constant(torch.rand(channels, dtype=torch.float64) + 0.5)


case(F.batch_norm, "evaluation", lambda: (data(N, 3), *running(3), *weights((3,), (3,))))
case(F.batch_norm, "evaluation, images", lambda: (data(N, 3, 4, 4), *running(3), W(3), const(3)))
case(F.instance_norm, "instances", lambda: (data(N, 3, 4), None, None, *weights((3,), (3,))))
case(F.instance_norm, "images", lambda: (data(N, 3, 4, 4), None, None, const(3), W(3)))


# ------------------------------------------------------------------- linear maps


def maps(label, *ops, make=lambda: W(2, 3), args=(), kwargs=None):
    for op in ops:
        # Twice: the result alone, and used as a weight on data, where it is a matrix.
        case(op, label, lambda: ((make(), *args), kwargs or {}), num_examples=N)


for getter in (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH):
    maps("attribute", getter.__get__)
maps("matrix", torch.t, Tensor.t, torch.adjoint, Tensor.adjoint)
for pair in ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
    maps("pair", getattr(torch, pair), getattr(Tensor, pair), args=(0, 1))
maps("4d", torch.permute, Tensor.permute, make=lambda: W(2, 3, 4), args=((2, 0, 1),))
maps("all", torch.squeeze, Tensor.squeeze, make=lambda: W(2, 1, 3))
maps("dim", torch.squeeze, Tensor.squeeze, make=lambda: W(2, 1, 3), args=(1,))
maps("middle", torch.unsqueeze, Tensor.unsqueeze, args=(1,))
maps("part", torch.narrow, Tensor.narrow, args=(1, 1, 2))
maps("row", torch.select, Tensor.select, args=(0, 1))
for label, index in {
    "row": 1,
    "slice": slice(1, None),
    "column": (slice(None), 2),
    "new axis": (None, slice(None), None),
    "ellipsis": (Ellipsis, 0),
    "mask": constant(torch.tensor([True, False])),
    "tensor": constant(torch.tensor([1, 0, 1])),
    "steps": (slice(None), slice(None, None, 2)),
}.items():
    maps(label, Tensor.__getitem__, args=(index,))
maps("rows", torch.index_select, Tensor.index_select, args=(0, constant(torch.tensor([1, 1, 0]))))
maps("both", torch.flip, Tensor.flip, args=((0, 1),))
maps("columns", torch.roll, Tensor.roll, args=(1, 1))
maps("rows", Tensor.repeat, args=(2, 1))
maps("columns", torch.tile, Tensor.tile, args=((1, 2),))
maps("splits the rows", Tensor.view, make=lambda: W(4, 3), args=(2, 2, 3))
maps("splits the rows", torch.reshape, Tensor.reshape, make=lambda: W(4, 3), args=((2, 2, 3),))
maps("adds a dimension", Tensor.view, args=(2, 1, 3))
maps("like", Tensor.view_as, Tensor.reshape_as, args=(const(1, 2, 3),))
maps("kernel", torch.flatten, Tensor.flatten, make=lambda: W(3, 2, 2, 2), args=(2,))
maps("all of a matrix", torch.flatten, Tensor.flatten, torch.ravel, Tensor.ravel)
maps("rows", torch.unflatten, Tensor.unflatten, make=lambda: W(4, 3), args=(0, (2, 2)))
maps("rows", Tensor.expand, torch.broadcast_to, Tensor.broadcast_to, args=((4, 2, 3),))
maps("rows", Tensor.expand_as, args=(const(4, 2, 3),))
case(
    torch.broadcast_tensors,
    "with constants",
    lambda: (W(3), const(2, 1)),
    fn=lambda w, c: torch.broadcast_tensors(w, c)[0],
    num_examples=N,
)
maps("columns", torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split, args=(2, 1))
maps("columns", torch.split, Tensor.split, args=(2, 1))
maps("rows", torch.unbind, Tensor.unbind)
case(Tensor.__iter__, "rows", lambda: (W(2, 3),), fn=list, num_examples=N)
maps("copy", torch.clone, Tensor.clone, Tensor.contiguous, Tensor.double, Tensor.cpu)
maps("copy", torch.positive, Tensor.positive, Tensor.__pos__)
maps("dtype", Tensor.to, args=(torch.float64,))
maps("like", Tensor.type_as, args=(const(0),))
maps("part", torch.tril, Tensor.tril, torch.triu, Tensor.triu)
maps(
    "part",
    torch.masked_fill,
    Tensor.masked_fill,
    args=(constant(torch.tensor([[True, False, True], [False, True, True]])), 2.0),
)
maps("zeros", F.pad, args=((1, 0, 0, 2),))
maps("value", F.pad, args=((1, 1),), kwargs={"value": 3.0})
for op, dim in itertools.product((torch.cat, torch.concat, torch.concatenate, torch.stack), (0, 1)):
    case(op, f"two weights {dim}", lambda d=dim: (weights((2, 3), (2, 3)), d), num_examples=N)
    case(op, f"with a constant {dim}", lambda d=dim: ([const(2, 3), W(2, 3)], d), num_examples=N)
case(torch.cat, "sizes", lambda: (weights((1, 3), (2, 3)), 0), num_examples=N)


def integers():  # exact in every dtype, as is their sum
    center, delta = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    return flip(center.double() + delta, center.double(), delta.double())


for op in (Tensor.float, Tensor.half, Tensor.bfloat16):
    case(op, "integers", lambda: (integers(),), num_examples=N)
