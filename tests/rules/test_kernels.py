"""The products with a gradient of their own: first and second derivatives, what they save."""

import pytest
import torch
import torch.nn.functional as F

from pyro_flipout import FlipoutError
from pyro_flipout.rules import _fused_product
from pyro_flipout.signs import Signs, dense_signs, draw_codes
from pyro_flipout.tensor import Draw, Execution, FlipoutTensor, Term, flip

N = 3
CASES = {
    "linear": (F.linear, (N, 3), (2, 3)),
    "linear, time": (F.linear, (N, 2, 3), (2, 3)),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, padding="same", groups=2, dilation=2),
        (N, 4, 5),
        (2, 2, 3),
    ),
    "conv2d": (F.conv2d, (N, 2, 3, 3), (2, 2, 2, 2)),
    "conv_transpose1d": (F.conv_transpose1d, (N, 2, 3), (2, 2, 2)),
}


def product(op, weight_shape):
    """A function of data, weight and bias, the last two by centre and perturbation."""
    execution = Execution()
    draws = [
        Draw(name, torch.empty(shape), execution)
        for name, shape in (("w", weight_shape), ("b", (2,)))
    ]

    def flipped(draw, center, delta):
        return FlipoutTensor.build(center + delta, center, (Term(delta, (draw,)),), execution)

    def fn(x, center, delta, bias, beta=None):
        bias = bias if beta is None else flipped(draws[1], bias, beta)
        return op(x, flipped(draws[0], center, delta), bias)

    return fn


@pytest.mark.parametrize("biases", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, biases):
    op, data, weight = CASES[name]
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (data, weight, weight, *[(2,)] * biases)
    ]
    fn = product(op, weight)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize(("num_examples", "parts"), [(5, 5), (150, 5)])
@pytest.mark.parametrize("name", CASES)
def test_a_few_examples_at_a_time_are_all_of_them(name, num_examples, parts, monkeypatch):
    """Large mini-batches go through the caches in parts: of 32 examples, or any number of a few."""
    op, data, weight = CASES[name]
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((num_examples, *data[1:]), weight, weight, (2,), (2,))
    ]
    fn, found = product(op, weight), []
    for size in (2**30, 1):
        monkeypatch.setattr(_fused_product, "_CHUNK_BYTES", size)
        out = fn(*inputs)
        found.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    signs = Signs(draw_codes((3,)), num_examples, out.dtype)
    assert len(list(_fused_product._chunks(inputs[0], out, (signs, 0, 1)))) == parts
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(whole, cut)


@pytest.mark.parametrize("size", [2**30, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_cancel_give_zero(dtype, size, monkeypatch):
    """DropConnect: an output whose weights are all dropped is 0, where a ReLU has no slope."""
    monkeypatch.setattr(_fused_product, "_CHUNK_BYTES", size)
    torch.manual_seed(0)
    execution = Execution()

    def dropped(site, *shape):
        center = torch.randn(shape, dtype=dtype)
        delta = center * (2 * torch.randint(2, shape) - 1)
        return flip(center + delta, center, delta, site=site, execution=execution)

    weight, bias = dropped("w", 50, 3), dropped("b", 50)
    out = F.linear(torch.randn(200, 3, dtype=dtype), weight, bias)  # (N, 6)
    zero = (weight.materialize() == 0).all(-1) & (bias.materialize() == 0)
    assert zero.sum() > 200
    assert (out[zero] == 0).all()


def test_what_torch_refuses():
    x, fn = torch.randn(5, 3, 8), product(F.conv1d, (2, 3, 3))
    weight = torch.randn(2, 3, 3)
    fn(x, weight, weight, None)
    strided = product(lambda *args: F.conv1d(*args, padding="same", stride=2), weight.shape)
    with pytest.raises(RuntimeError, match="padding='same' is not supported for strided"):
        strided(x, weight, weight, None)


@pytest.mark.parametrize("name", CASES)
def test_one_example_sees_the_shared_draw(name):
    op, data, weight = CASES[name]
    inputs = [torch.randn(shape) for shape in ((1, *data[1:]), weight, weight, (2,), (2,))]
    x, center, delta, bias, beta = inputs
    assert torch.equal(product(op, weight)(*inputs), op(x, center + delta, bias + beta))


@pytest.mark.parametrize("name", CASES)
def test_one_example_under_autocast(name):
    op, data, weight = CASES[name]
    inputs = [torch.randn(shape) for shape in ((1, *data[1:]), weight, weight, (2,), (2,))]
    x, center, delta, bias, beta = inputs
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = product(op, weight)(*inputs), op(x, center + delta, bias + beta)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("frozen", range(4))
def test_only_the_gradients_that_are_needed(frozen):
    torch.manual_seed(0)
    fn = product(F.linear, (2, 3))
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((N, 3), (2, 3), (2, 3), (2,))]
    wanted = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(fn(*wanted).sum(), wanted)
    some = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    fn(*some).sum().backward()
    for i, (t, grad) in enumerate(zip(some, expected, strict=True)):
        if i == frozen:
            assert t.grad is None
        else:
            torch.testing.assert_close(t.grad, grad)


@pytest.mark.parametrize("name", CASES)
def test_saves_nothing_more_of_the_datas_size(name):
    """For backward: the data, the centre and the perturbation; the signs are formed again."""
    op, data, weight = CASES[name]
    big = (512, *data[1:])
    x, center, delta = torch.randn(big), torch.randn(weight), torch.randn(weight)
    leaves = [t.requires_grad_() for t in (x, center, delta)]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        product(op, weight)(*leaves, None)
    assert sum(saved.values()) <= x.numel() + center.numel() + delta.numel()


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_torch_func(name):
    op, data, weight = CASES[name]
    shapes = data, weight, weight, (2,), (2,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    fn = product(op, weight)

    def total(*inputs):
        return fn(*inputs).sin().sum()

    expected = torch.autograd.grad(total(*inputs), inputs)
    for every, grad in enumerate(torch.func.grad(total, argnums=tuple(range(5)))(*inputs)):
        torch.testing.assert_close(grad, expected[every])
    x, center, *others = (t.detach() for t in inputs)
    several = torch.stack([x, 2 * x]), torch.stack([center, -center])
    mapped = torch.func.vmap(lambda x, c: fn(x, c, *others))(*several)
    for k in range(2):
        torch.testing.assert_close(mapped[k], fn(several[0][k], several[1][k], *others))


def test_first_use_inside_torch_func_leaves_nothing_behind():
    x, center, delta = torch.randn(N, 3), torch.randn(2, 3), torch.randn(2, 3)
    weight = flip(center + delta, center, delta)
    grad = torch.func.grad(lambda x: F.linear(x, weight).sin().sum())(x)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, weight.draws[0].codes))
    leaf = x.clone().requires_grad_()
    F.linear(leaf, weight).sin().sum().backward()
    torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_no_two_draws_share_a_code(count):
    execution = Execution()
    weights = [flip(v, v, execution=execution) for v in (torch.zeros(count, 2), torch.zeros(3)) * 3]
    codes = torch.cat([c.flatten() for w in weights for c in w.draws[0].codes])
    assert len(codes) == 3 * (count + 2 + 3)
    assert len(codes.unique()) == len(codes)


@pytest.mark.parametrize("num_examples", [1, 5, 128, 129, 1000])
@pytest.mark.parametrize("shapes", [[(3, 4), (3,)], [(40, 100), (200, 30), (2,)]])
def test_signs_of_codes_that_were_drawn_together(shapes, num_examples):
    """Small draws share a vector of codes, whose signs are formed at once."""
    execution = Execution()
    execution.count(num_examples, "data")
    for _ in range(2):  # the second time with codes that were drawn after the first
        draws = [Draw("w", torch.empty(shape), execution) for shape in shapes]
        for codes in (c.flatten() for draw in draws for c in draw.codes):
            signs = execution.factored_signs(codes, torch.float64)
            found = signs.times(torch.ones(num_examples, len(codes), dtype=torch.float64), 0, 1)
            assert torch.equal(found, dense_signs(codes, num_examples, torch.float64))


def test_weights_made_inside_torch_func():
    """Codes and all: nothing of it may be asked for its address there, or stay."""
    x, center, delta = (torch.randn(s, dtype=torch.float64) for s in ((N, 3), (2, 3), (2, 3)))
    execution = Execution()
    flip(center, center, site="before", execution=execution)  # codes are left over from outside

    def total(center, delta):
        torch.manual_seed(1)
        weight = flip(center + delta, center, delta, execution=execution)
        return F.linear(x, weight).sin().sum()

    found = torch.func.grad(total, argnums=(0, 1))(center, delta)
    torch.manual_seed(1)
    apart = [t.requires_grad_() for t in (center, delta)]
    weight = flip(center + delta, center, delta)  # of an execution that has no codes left over
    expected = torch.autograd.grad(F.linear(x, weight).sin().sum(), apart)
    for ours, grad in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, grad)
    after = flip(center, center, site="after", execution=execution)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, after.draws[0].codes))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_weights_made_inside_vmap(randomness):
    x, center, delta = torch.randn(4, N, 3), torch.randn(2, 3), torch.randn(2, 3)

    def fn(x):
        return F.linear(x, flip(center + delta, center, delta))

    mapped = torch.func.vmap(fn, randomness=randomness)
    if randomness == "different":
        with pytest.raises(FlipoutError, match=r'randomness="same"'):
            mapped(x)
        return
    torch.manual_seed(2)
    found = mapped(x)
    for k in range(4):
        torch.manual_seed(2)
        torch.testing.assert_close(found[k], fn(x[k]))
