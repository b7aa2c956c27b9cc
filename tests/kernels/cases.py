"""What the fused kernels must do, on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter.

``test_triton_linear.py`` runs this file in a process of its own: the interpreter is chosen before
Triton is imported, for the whole process.
"""

import pytest
import torch
import torch.nn.functional as F

from pyro_flipout import flip, kernels
from pyro_flipout._modes import recording
from pyro_flipout.kernels import _launch, _triton, triton_linear
from pyro_flipout.kernels._launch import Flips
from pyro_flipout.signs import MAX_EXAMPLES, Signs, code_bits, draw_codes, paired_signs
from pyro_flipout.tensor import Draw, Execution, FlipoutTensor, Term
from pyro_flipout.testing import check_rule
from tests.kernels.sign_kernel import signs_of_pairs

INTERPRETED = _triton.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
# On a GPU there is no float64 kernel; full float32 products of 200 terms are good to 1e-4.
DTYPE, TOL = (torch.float64, 1e-10) if INTERPRETED else (torch.float32, 1e-4)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    for name in ("product", "weight_grads", "bias_grads"):

        def spy(*args, _name=name, _kernel=getattr(triton_linear, name), **kwargs):
            names.append(_name)
            return _kernel(*args, **kwargs)

        monkeypatch.setattr(triton_linear, name, spy)
    return names


def data(*shape, dtype=DTYPE):
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()


def weight(*shape, dtype=DTYPE, example_dim=0, execution=None, group_size=1):
    center, delta = data(*shape, dtype=dtype), data(*shape, dtype=dtype)
    execution = execution or Execution(example_dim, group_size=group_size)
    return flip(center + delta, center, delta, execution=execution)


SHAPES = {  # data, weight, example_dim; blocks of the interpreter are 16 x 16 x 16
    "ragged rows and outputs": ((35, 2), (17, 2), 0),
    "ragged inputs": ((3, 35), (2, 35), 0),
    "whole blocks": ((16, 32), (16, 32), 0),
    "two examples of one": ((2, 1), (1, 1), 0),
    "two examples": ((2, 3), (2, 3), 0),
    "one input": ((5, 1), (3, 1), 0),
    "one output": ((5, 3), (1, 3), 0),
    "time": ((5, 7, 3), (2, 3), 0),
    "two further dimensions": ((3, 2, 3, 4), (2, 4), 0),
    "time-major": ((4, 5, 3), (2, 3), 1),
    "between further dimensions": ((2, 5, 2, 3), (2, 3), 1),
    "rows in several parts, numbers of 9 bits": ((150, 2), (2, 2), 0),
}
if not INTERPRETED:
    SHAPES |= {
        "large": ((300, 200), (150, 200), 0),
        "wide": ((5, 333), (257, 333), 0),
        "many rows": ((70, 30, 65), (33, 65), 0),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_oracle(name, launches):
    """Output and all gradients, against explicit weights example by example."""
    x, shape, dim = SHAPES[name]
    w, bias = weight(*shape, example_dim=dim), data(shape[0])
    check_rule(lambda x, w: F.linear(x, w, bias), data(*x), w, example_dim=dim, tol=TOL)
    assert launches == ["product", "product", "weight_grads"]


def test_one_example_needs_no_kernel(launches):
    bias = data(2)
    check_rule(lambda x, w: F.linear(x, w, bias), data(1, 3), weight(2, 3), tol=TOL)
    assert launches == []


BIASED = ["product", "product", "weight_grads", "bias_grads"]


@pytest.mark.parametrize("name", SHAPES)
def test_flipped_bias(name, launches):
    x, shape, dim = SHAPES[name]
    w = weight(*shape, example_dim=dim)
    bias = weight(shape[0], execution=w.execution)
    check_rule(F.linear, data(*x), w, bias, example_dim=dim, tol=TOL)
    assert launches == BIASED


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_groups(name, size, launches):
    x, shape, dim = SHAPES[name]
    w = weight(*shape, example_dim=dim, group_size=size)
    bias = weight(shape[0], execution=w.execution)
    check_rule(F.linear, data(*x), w, bias, example_dim=dim, tol=TOL)
    assert launches == ([] if x[dim] <= size else BIASED)


def test_bias_that_is_added_apart(launches):
    """A bias with signs of more than one kind, and one of another dtype."""
    w = weight(2, 3)
    both = weight(2, execution=w.execution) + weight(2, execution=w.execution)
    check_rule(F.linear, data(4, 3), w, both, tol=TOL)
    assert launches == ["product", "product", "weight_grads"]


def test_strided_arguments(launches):
    """Transposed weights, every second column, data with rows apart, a gradient that is a view."""
    center, delta = data(3, 5).t(), data(3, 10)[:, ::2].t()
    w = flip(center + delta, center, delta)
    x = data(4, 6)[:, ::2]
    check_rule(lambda x, w: F.linear(x, w).t(), x, w, out_example_dim=1, tol=TOL)
    repeated = data(7, 1, 3).expand(7, 4, 3).transpose(0, 1)  # data (4, 7, 3), with a stride of 0
    check_rule(F.linear, repeated, weight(2, 3), tol=TOL)
    leaves = data(4, 3), data(2, 3), data(2, 3)
    out = product((2, 3))(*leaves, None)
    for a, b in zip(
        torch.autograd.grad(out.sum(), leaves, retain_graph=True),  # expands a single number
        torch.autograd.grad(out, leaves, torch.ones_like(out)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert launches.count("product") == 7


def test_signs_of_one_factor(launches):
    """A weight that lost the signs of its outputs, or those of its inputs, to a sum."""
    for position in (0, 1):
        w = weight(2, 3)
        w.draws[0].drop({w.draws[0].factors[position][0]})
        check_rule(F.linear, data(4, 3), w, tol=TOL)
    assert len(launches) == 6


@pytest.mark.parametrize("dtype", [*DTYPES, *([torch.float64] if INTERPRETED else [])])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signs(bits, dtype):
    """Signs formed in registers, against those of the library."""
    codes = torch.randint(-(2**31), 2**31, (16,), dtype=torch.int32, device=DEVICE)
    examples = torch.tensor([0, 1, 2, 3, 63, 64, 100, 127], device=DEVICE)
    examples = torch.cat([examples, examples + (0 if bits == 8 else 2 ** (bits - 2) - 128)])
    signs = signs_of_pairs(examples.to(torch.int32), codes, bits, dtype)
    expected = paired_signs(codes, examples.unsqueeze(1), torch.float32)
    assert torch.equal(signs.float(), expected)


@pytest.mark.parametrize("examples", [1, 128, 129, 2**15, 2**15 + 1, MAX_EXAMPLES])
def test_enough_bits(examples):
    found = Flips(None, None, None, examples, 1).arguments()["BITS"]
    assert code_bits(examples) <= found <= max(2 * code_bits(examples), 8)
    assert Flips(None, None, None, 2 * examples, 1, 2).arguments()["BITS"] == found


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(dtype):
    """Every dtype is as good as its rounding of the inputs, with sums in float32."""
    x, w, bias = data(6, 20, dtype=dtype), weight(17, 20, dtype=dtype), data(17, dtype=dtype)
    out = F.linear(x, w, bias)
    assert out.dtype == dtype
    exact = torch.einsum("ni,noi->no", x.double(), w.materialize().double()) + bias.double()
    leaves = [x, w._center, w._terms[0].delta, bias]
    seed = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, seed, retain_graph=True)
    expected = torch.autograd.grad(exact, leaves, seed.double())
    eps = torch.finfo(dtype).eps
    for a, b in zip([out, *grads], [exact, *expected], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=4 * eps, atol=20 * eps)


def test_autocast(launches):
    x, w, bias = data(6, 5), weight(3, 5), data(3)
    x, bias = x.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    center, delta = (t.detach().float().requires_grad_() for t in (w._center, w.delta))
    term = Term(delta, w.draws)
    w = FlipoutTensor.build(center + delta, center, (term,), w.execution)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = F.linear(x, w, bias)
    assert out.dtype == torch.bfloat16
    assert launches == ["product"]
    grads = torch.autograd.grad(out.float().square().sum(), [x, center, delta, bias])
    exact = torch.einsum("ni,noi->no", x, w.materialize()) + bias
    expected = torch.autograd.grad(exact.square().sum(), [x, center, delta, bias])
    for a, b in zip([out.float(), *grads], [exact, *expected], strict=True):
        assert b.dtype == a.dtype == torch.float32
        assert (a - b).norm() < 2**-6 * b.norm()


def product(shape, group_size=1):
    """A function of data, centre, perturbation and bias, with fixed signs."""
    execution = Execution(group_size=group_size)
    draws = [
        Draw(n, torch.empty(s, device=DEVICE), execution) for n, s in ((0, shape), (1, shape[:1]))
    ]

    def flipped(draw, center, delta):
        return FlipoutTensor.build(center + delta, center, (Term(delta, (draw,)),), execution)

    def fn(x, center, delta, bias, beta=None):
        bias = bias if beta is None else flipped(draws[1], bias, beta)
        return F.linear(x, flipped(draws[0], center, delta), bias)

    return fn


@pytest.mark.parametrize("frozen", range(5))
def test_only_the_gradients_that_are_needed(frozen, launches):
    fn, inputs = product((2, 3)), [data(4, 3), data(2, 3), data(2, 3), data(2), data(2)]
    expected = torch.autograd.grad(fn(*inputs).sum(), inputs)
    some = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    del launches[:]
    fn(*some).sum().backward()
    assert launches.count("product") == (1 if frozen == 0 else 2)
    for i, (t, grad) in enumerate(zip(some, expected, strict=True)):
        if i == frozen:
            assert t.grad is None
        else:
            torch.testing.assert_close(t.grad, grad)


def test_saves_no_signs():
    """For backward: the data, the weights and the codes, and nothing of the data's size more."""
    x, center, delta = data(40, 3), data(2, 3), data(2, 3)
    out = product((2, 3))(x, center, delta, None)
    saved = {t.data_ptr() for t in out.grad_fn.saved_tensors}
    assert saved == {t.data_ptr() for t in (x, center, delta)}
    codes = [t for t in out.grad_fn.flips if isinstance(t, torch.Tensor)]
    assert sorted(t.numel() for t in codes) == [2, 3]


@pytest.mark.parametrize("group_size", [1, 3])
def test_second_derivatives(group_size, launches, monkeypatch):
    """Gradients that are differentiated again agree with those of the library calls."""
    fn = product((2, 3), group_size)
    inputs = [data(4, 2, 3), data(2, 3), data(2, 3), data(2), data(2)]

    def penalty():
        out = fn(*inputs)
        grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    fused = penalty()
    assert "product" in launches
    del launches[:]
    monkeypatch.setenv("PYRO_FLIPOUT_TRITON", "0")
    for a, b in zip(fused, penalty(), strict=True):
        torch.testing.assert_close(a, b, atol=TOL, rtol=TOL)
    assert not launches


# ------------------------------------------------- signs for products by library calls


LAYOUTS = {  # shape, example_dim, dim, memory
    "last": ((5, 7), 0, 1, None),
    "wide": ((3, 300), 0, 1, None),
    "many rows": ((300, 5), 0, 1, None),
    "time": ((5, 2, 7), 0, 2, None),
    "time-major": ((2, 5, 7), 1, 2, None),
    "channels": ((5, 7, 2, 3), 0, 1, None),
    "channels of wide images": ((2, 3, 9, 9), 0, 1, None),
    "channels after time": ((5, 2, 7, 3), 0, 2, None),
    "channels last": ((5, 7, 2, 3), 0, 1, torch.channels_last),
    "channels last, 3d": ((5, 7, 2, 3, 2), 0, 1, torch.channels_last_3d),
    "transposed": ((5, 7), 0, 1, "transposed"),
    "one code": ((5, 1), 0, 1, None),
    "examples last": ((7, 5), 1, 0, None),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in LAYOUTS),
        *((n, d) for n in ("time", "channels") for d in (*DTYPES[1:], torch.float64)),
    ],
)
def test_one_pass(name, dtype, monkeypatch):
    """Signs formed in registers, against factors of signs: data, sums and biases."""
    shape, example_dim, dim, memory = LAYOUTS[name]

    def make():
        x = torch.randn(shape, device=DEVICE).to(dtype)
        if memory == "transposed":
            return x.t().contiguous().t()
        return x if memory is None else x.to(memory_format=memory)

    found = []
    right = kernels.signs_available
    count, examples = shape[dim], shape[example_dim]
    for size in (1, 2):
        codes, own = (draw_codes((count,), DEVICE) for _ in range(2))
        x, out = make(), make()
        center, delta = (torch.randn(count, device=DEVICE).to(dtype) for _ in range(2))
        for mode in (True, False):
            monkeypatch.setattr(
                kernels, "signs_available", lambda *t, mode=mode: mode and right(*t)
            )
            signs, of_bias = (Signs(c, examples, dtype, size) for c in (codes, own))
            where, bias = (example_dim, dim), (center, delta, of_bias)
            flat = (
                x.movedim(where, (0, 1)).flatten(2).sum(2)
                if x.dim() > 2
                else x.movedim(where, (0, 1))
            )
            found.append(
                [
                    signs.times(x, *where),
                    signs.times(x.clone(), *where, out=torch.empty_like(x)),
                    signs.add_times(out.clone(), x.clone(), *where),
                    signs.add_times(out.clone(), x.clone(), *where, bias),
                    of_bias.add_vectors(out.clone(), center, delta, *where),
                    signs.sum_times(flat.contiguous()),
                ]
            )
            assert ("low" in vars(signs)) is (not mode or name in ("transposed", "examples last"))
    eps = torch.finfo(dtype).eps
    for kernel, library in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(kernel[0], library[0])
        for a, b in zip(kernel, library, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, atol=40 * eps, rtol=4 * eps)


def test_one_pass_keeps_the_memory_format():
    x = torch.randn(5, 7, 2, 3, device=DEVICE).to(memory_format=torch.channels_last)
    signs = Signs(draw_codes((7,), DEVICE), 5, x.dtype)
    assert signs.times(x, 0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", [F.linear, F.conv2d])
def test_library_products_flip_in_one_pass(op, monkeypatch):
    """Forward, the output's signs and those of its bias; backward, data and gradient."""
    monkeypatch.setattr(kernels, "available", lambda *args: False)
    calls = []
    right = _launch.flip
    monkeypatch.setattr(_launch, "flip", lambda *a, **k: (calls.append(k), right(*a, **k)))
    more = () if op is F.linear else (2, 2)
    w = weight(3, 4, *more)
    bias = weight(3, execution=w.execution)
    check_rule(op, data(5, 4, *more), w, bias, tol=TOL)
    assert len(calls) == 5
    assert [k.get("bias") is not None for k in calls] == [False, True, False, False, False]


# ------------------------------------------------------------------- the choice


def test_left_to_library_calls(launches, monkeypatch):
    x, w = data(5, 3), weight(2, 3)
    args = (x, w._center, w._terms[0].delta)
    assert kernels.available(*args, data(2))
    assert not kernels.available(*args, data(3))
    assert not kernels.available(x[:0], *args[1:])
    assert not kernels.available(x, args[1], args[2][:1])
    assert not kernels.available(x.to(torch.bfloat16), *args[1:])
    found = []
    torch.func.grad(lambda x: (found.append(kernels.available(x, *args[1:])), x.sum())[1])(x)
    torch.jit.trace(
        lambda x: (found.append(kernels.available(x, *args[1:])), x)[1], x, check_trace=False
    )
    with recording(False):  # what a kernel writes is not recorded
        found.append(kernels.available(*args))
    assert found == [False, False, False]

    class Own(Execution):
        """Might number its examples in its own way."""

    F.linear(x, weight(2, 3, execution=Own()))
    F.linear(x, w + weight(2, 3, execution=w.execution))  # two terms
    monkeypatch.setenv("PYRO_FLIPOUT_TRITON", "0")
    F.linear(x, w)
    assert not launches


def test_the_kernel_that_is_tried_first():
    kernels._try_kernel(torch.device(DEVICE))


def test_auto_is_not_the_interpreter(monkeypatch):
    monkeypatch.delenv("PYRO_FLIPOUT_TRITON")
    x, w = data(5, 3, dtype=torch.bfloat16), weight(2, 3, dtype=torch.bfloat16)
    assert kernels.available(x, w._center, w._terms[0].delta) is not INTERPRETED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 2)}, "got shapes"),
        ({"bias": torch.ones(3)}, "got shapes"),
        ({"delta": torch.ones(2, 3).half()}, "one dtype"),
        ({"into_data": torch.ones(2, dtype=torch.int32)}, "into_data are"),
        ({"into_out": torch.ones(2)}, "into_out are"),
        ({"bias_delta": torch.ones(3), "of_bias": torch.ones(3).int()}, "got shapes"),
        ({"bias_delta": torch.ones(2), "of_bias": torch.ones(2)}, "of_bias are"),
        ({"bias_delta": torch.ones(2)}, r"bias_delta \(2,\), of_bias None"),
        ({"group_size": 0}, "group_size 0"),
        ({"example_dim": 1}, "example_dim is 1"),
    ],
)
def test_errors(change, message):
    args = {"x": torch.ones(4, 3), "center": torch.ones(2, 3), "delta": torch.ones(2, 3)}
    args |= {"bias": None, "into_data": None, "into_out": None} | change
    args = {k: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for k, t in args.items()}
    with pytest.raises(ValueError, match=message):
        triton_linear.flipped_linear(**args)


# ----------------------------------------------------------------- planted bugs


def wrong_bit(arguments):
    arguments["in_codes"] = arguments["in_codes"] ^ 2


def wrong_side(arguments):
    arguments["in_codes"], arguments["out_codes"] = arguments["out_codes"], arguments["in_codes"]


def no_groups(arguments):
    arguments["group_size"] = 1


def rows_as_examples(arguments):
    arguments["rows_each"], arguments["examples"] = 1, 2**20


def examples_last(arguments):
    arguments["rows_each"] = 1


def no_signs_in_data(arguments):
    arguments["HAS_IN"] = False


@pytest.mark.parametrize(
    "bug",
    [None, wrong_bit, wrong_side, no_groups, rows_as_examples, examples_last, no_signs_in_data],
)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_planted_bug(bug, where, monkeypatch):
    """The oracle refuses kernels that are given the wrong signs, in either direction."""
    original = Flips.arguments
    calls = []

    def arguments(flips):
        found = original(flips)
        calls.append(where)
        if bug is not None and (where == "forward") == (len(calls) == 1):
            bug(found)
        return found

    monkeypatch.setattr(Flips, "arguments", arguments)
    x, w = data(6, 3, 8), weight(8, 8, group_size=2)
    if bug is None:
        check_rule(F.linear, x, w, tol=TOL)
        return
    with pytest.raises(AssertionError, match="output" if where == "forward" else "gradient"):
        check_rule(F.linear, x, w, tol=TOL)
