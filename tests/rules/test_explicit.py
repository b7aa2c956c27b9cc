"""Products by the weights of the examples themselves: when, how exactly, and their derivatives."""

import pytest
import torch
import torch.nn.functional as F

from pyro_flipout.rules import _explicit, _fused_product
from pyro_flipout.tensor import Execution, flip
from tests.rules.test_kernels import CASES, product
from tests.rules.test_oracle import always_explicit, groups_of


@pytest.fixture
def made(monkeypatch):
    """How many weights were made at once, for each product by explicit weights."""
    counts = []

    def spy(plan, *args):
        counts.append(plan.at_once)
        return _explicit.explicit_product(plan, *args)

    monkeypatch.setattr(_fused_product, "explicit_product", spy)
    return counts


def weights(*shapes, group_size=1, example_dim=0, dtype=torch.float32):
    execution = Execution(example_dim, group_size=group_size)
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [flip(v, v / 2, site=f"w{i}", execution=execution) for i, v in enumerate(values)]


def conv(x, w):
    return F.conv2d(x, w, stride=2)


@pytest.mark.parametrize(
    ("op", "data", "weight", "options", "at_once"),
    [
        (F.linear, (5, 63, 3), (2, 3), {}, None),
        (F.linear, (5, 64, 3), (2, 3), {}, 5),
        (F.linear, (2, 64, 600), (600, 600), {}, 1),
        (F.linear, (64, 5, 3), (2, 3), {"example_dim": 1}, 5),
        (F.linear, (5, 64, 3), (2, 3), {"dtype": torch.bfloat16}, None),
        (F.linear, (100, 3), (2, 3), {}, None),
        (F.linear, (200, 3), (2, 3), {"group_size": 63}, None),
        (F.linear, (200, 3), (2, 3), {"group_size": 64}, 4),
        (torch.matmul, (5, 64, 3), (3, 2), {}, 5),
        (conv, (5, 3, 20, 22), (2, 3, 1, 1), {}, None),
        (conv, (5, 3, 22, 24), (2, 3, 1, 1), {}, 5),
        (F.conv_transpose1d, (5, 3, 128), (3, 2, 1), {}, 5),
        (F.conv1d, (0, 3, 128), (2, 3, 1), {}, None),
    ],
)
def test_where_they_pay(op, data, weight, options, at_once, made):
    (w,) = weights(weight, **options)
    op(torch.randn(data, dtype=w.dtype), w)
    assert made == ([] if at_once is None else [at_once])


def test_none_under_autocast(made):
    """Its dtype would round the perturbation away."""
    (w,) = weights((2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(5, 64, 3), w).dtype == torch.bfloat16
    assert not made


@pytest.mark.parametrize(("size", "buffer"), [(1, 2**18), (1, 1), (2, 2**18)])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, size, buffer, monkeypatch):
    groups_of(size, monkeypatch)
    always_explicit(monkeypatch, plans := [])
    monkeypatch.setattr(_explicit, "_BUFFER", buffer)
    op, data, weight = CASES[name]
    shapes = data, weight, weight, (2,), (2,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    fn = product(op, weight)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)
    assert bool(plans[0]) == (name != "conv1d")  # its groups have signs of their own


@pytest.mark.parametrize("frozen", range(4))
def test_only_the_gradients_that_are_needed(frozen, monkeypatch):
    always_explicit(monkeypatch, [])
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((5, 4, 3), (2, 3), (2, 3), (2,))]
    fn = product(F.linear, (2, 3))
    wanted = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(fn(*wanted).sin().sum(), wanted)
    some = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    fn(*some).sin().sum().backward()
    for i, (t, grad) in enumerate(zip(some, expected, strict=True)):
        assert t.grad is None if i == frozen else torch.equal(t.grad, grad)


@pytest.mark.parametrize("layout", ["weight", "data", "gradient"])
def test_layouts(layout, monkeypatch):
    """Transposed weights, strided data, and a gradient that is one number everywhere."""
    always_explicit(monkeypatch, [])
    x, center, delta = (torch.randn(s, dtype=torch.float64) for s in ((5, 4, 3), (2, 3), (2, 3)))
    if layout == "weight":
        center, delta = center.t().contiguous().t(), delta.t().contiguous().t()
    if layout == "data":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [t.requires_grad_() for t in (x, center, delta)]
    w = flip(center + delta, center, delta)
    out = F.linear(x, w)
    loss = out.sum() if layout == "gradient" else out.sin().sum()
    explicit = torch.einsum("nti,noi->nto", x, w.materialize())
    other = explicit.sum() if layout == "gradient" else explicit.sin().sum()
    found, expected = (torch.autograd.grad(t, leaves) for t in (loss, other))
    torch.testing.assert_close(out, explicit)
    torch.testing.assert_close(found, expected)


def test_a_convolution_in_channels_last(made):
    x = torch.randn(5, 3, 12, 12).to(memory_format=torch.channels_last)
    (w,) = weights((2, 3, 3, 3))
    out = F.conv2d(x, w, padding=1)
    expected = [F.conv2d(x[n : n + 1], w.materialize()[n], padding=1) for n in range(5)]
    torch.testing.assert_close(out, torch.cat(expected))
    assert made


def test_weights_that_cancel_give_zero(made):
    """DropConnect: an output whose weights are all dropped is exactly 0."""
    execution = Execution()
    center = torch.randn(50, 3)
    weight = flip(center * 2, center, center, execution=execution)
    bias = flip(center[:, 0] * 2, center[:, 0], center[:, 0], execution=execution)
    out = F.linear(torch.randn(20, 64, 3), weight, bias)
    zero = (weight.materialize() == 0).all(-1) & (bias.materialize() == 0)
    assert zero.any()
    assert made
    assert (out.transpose(1, 2)[zero] == 0).all()


def test_saves_nothing_more_of_the_datas_size(made):
    x, center, delta = torch.randn(50, 64, 30), torch.randn(20, 30), torch.randn(20, 30)
    leaves = [t.requires_grad_() for t in (x, center, delta)]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        product(F.linear, (20, 30))(*leaves, None)
    assert made
    assert sum(saved.values()) <= x.numel() + center.numel() + delta.numel()
