"""The products with a gradient of their own: first and second derivatives, what they save."""

import pytest
import torch
import torch.nn.functional as F

from pyro_flipout.tensor import Draw, Execution, FlipoutTensor, Term

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
    """A function of data, centre, perturbation and bias, with fixed signs."""
    execution = Execution()
    draw = Draw("w", torch.empty(weight_shape), execution)

    def fn(x, center, delta, bias):
        term = Term(delta, (draw,))
        return op(x, FlipoutTensor.build(center + delta, center, (term,), execution), bias)

    return fn


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name):
    op, data, weight = CASES[name]
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (data, weight, weight, (2,))
    ]
    fn = product(op, weight)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


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
