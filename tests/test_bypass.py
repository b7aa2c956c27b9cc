"""Calls that do not pass ``__torch_function__`` leave a weight shared, gradient included.

The oracle is the bare program on the shared draw, together with one warning; what follows in the
same execution, and from then on, sees the shared draw too. Where no gradient is asked for, a
function by the rules is exact for each example.
"""

import ctypes
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from pyro_flipout import FlipoutError, FlipoutMessenger, FlipoutWarning, MissingRuleError, flip
from pyro_flipout.infer import Exploration, FlipES
from pyro_flipout.nn import weight_noise_
from pyro_flipout.poutine import IndependentMessenger, LocalReparameterizationMessenger
from pyro_flipout.tensor import Execution
from pyro_flipout.testing import random_weight

N = 5

pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------- functions


class Identity(Function):
    @staticmethod
    def forward(ctx, w):
        return w

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reversal(Function):
    @staticmethod
    def forward(ctx, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * grad


class StraightThrough(Function):
    """Its forward function has flipout rules."""

    @staticmethod
    def forward(ctx, w):
        return w.clone() * 2.0

    @staticmethod
    def backward(ctx, grad):
        return grad


class MyLinear(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class InTheMiddle(Function):
    """The weight between other arguments, kept on ``ctx``."""

    @staticmethod
    def forward(ctx, scale, x, w, flag, bias=None):
        ctx.x, ctx.w, ctx.scale = x, w, scale
        return scale * F.linear(x, w, bias)

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.scale * grad @ ctx.w, ctx.scale * grad.t() @ ctx.x, None, None


class SetupContext(Function):
    @staticmethod
    def forward(x, w):
        return F.linear(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class InPlace(Function):
    @staticmethod
    def forward(ctx, w):
        w.mul_(3.0)
        ctx.mark_dirty(w)
        return w

    @staticmethod
    def backward(ctx, grad):
        return 3.0 * grad


class Nested(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return MyLinear.apply(x, w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return MyLinear.apply(grad, w.t()), grad.t() @ x


class Autocast(Function):
    """A decorator casts the weight before the forward function has its frame."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float64)
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class GradInForward(Function):
    """Differentiates inside of its forward function, as implicit layers do."""

    @staticmethod
    def forward(ctx, x, w):
        with torch.enable_grad():
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            out = F.linear(x, w)
            ctx.x, ctx.w, ctx.out = x, w, out
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.out, (ctx.x, ctx.w), grad)


def memory(t):
    """A copy of the memory of a tensor that no function of torch made, as a kernel reads it."""
    with torch._C.DisableTorchFunctionSubclass():
        address, shape = t.data_ptr(), tuple(t.shape)
    count = t.shape.numel()
    values = list((ctypes.c_double * count).from_address(address))
    return torch.tensor(values).view(shape)


class Kernel(Function):
    """The forward function reads memory; the backward function is Python."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return memory(x) @ memory(w).t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class KernelBothWays(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return memory(x) @ memory(w).t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ memory(w), grad.t() @ memory(x)


class Launched(Function):
    """Asks for the address of the memory, as Triton does."""

    @staticmethod
    def forward(ctx, x, w):
        w.data_ptr()
        return KernelBothWays.forward(ctx, x, w)

    backward = KernelBothWays.backward


# --------------------------------------------------------------------------- TorchScript


def script(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in new versions of torch
        return torch.jit.script(function)


def scripted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(torch.matmul(x, w.t())) * 2.0


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w)


def traced(x, w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.ones_like(x), torch.ones(tuple(w.shape))
        function = torch.jit.trace(lambda x, w: x @ w.t(), example)
    return function(x, w)


# ------------------------------------------------------------------------------- oracle

PROGRAMS = {
    "identity": (
        "Function.apply|aten.view.default|aten.alias.default",
        lambda x, w: F.linear(x, Identity.apply(w)),
    ),
    "reversal": ("Reversal.apply", lambda x, w: F.linear(x, Reversal.apply(w))),
    "straight through": ("StraightThrough.apply", lambda x, w: x @ StraightThrough.apply(w).t()),
    "linear": ("MyLinear.apply", lambda x, w: MyLinear.apply(x, w)),
    "in the middle": (
        "InTheMiddle.apply",
        lambda x, w: InTheMiddle.apply(0.5, x, w, True, torch.ones(2)),
    ),
    "setup_context": ("SetupContext.apply", lambda x, w: SetupContext.apply(x, w)),
    "mark_dirty": ("InPlace.apply", lambda x, w: F.linear(x, InPlace.apply(w))),
    "nested": ("MyLinear.apply", lambda x, w: Nested.apply(x, w)),
    "autocast": ("Autocast.apply|Function.apply", lambda x, w: Autocast.apply(x, w)),
    "enable_grad": ("GradInForward.apply", lambda x, w: GradInForward.apply(x, w)),
    "a view": ("MyLinear.apply", lambda x, w: MyLinear.apply(x[:, :2], w.t())),
    "launched": ("Launched.apply", lambda x, w: Launched.apply(x, w)),
    "checkpoint in Python": (
        "use_reentrant=True",
        lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    ),
    "function in a checkpoint": (
        "MyLinear.apply",
        lambda x, w: checkpoint(lambda x: MyLinear.apply(x, w), x, use_reentrant=True),
    ),
    "new function in a checkpoint": (
        "SetupContext.apply",
        lambda x, w: checkpoint(lambda x: SetupContext.apply(x, w), x, use_reentrant=True),
    ),
    "function in another checkpoint": (
        "MyLinear.apply",
        lambda x, w: checkpoint(lambda x: MyLinear.apply(x, w), x, use_reentrant=False),
    ),
    "script": ("aten", lambda x, w: script(scripted)(x, w)),
    "scripted module": ("forward", lambda x, w: script(Scripted())(x, w)),
    "trace": ("aten", traced),
    "vmap": ("aten", lambda x, w: torch.vmap(lambda row: x @ row, out_dims=1)(w)),
    "vmap over columns": (
        "aten",
        lambda x, w: torch.vmap(lambda c, v: c[:, None] * v, in_dims=1)(x, w).sum(0),
    ),
    "func.grad": (
        "aten",
        lambda x, w: x @ torch.func.grad(lambda w: w.pow(3).sum())(w).t(),
    ),
    "func.vjp": (
        "aten",
        lambda x, w: torch.func.vjp(lambda w: F.linear(x, w.sin()), w)[1](torch.ones(N, 2))[0],
    ),
    "func.jacrev": (
        "aten",
        lambda x, w: torch.func.jacrev(lambda w: F.linear(x, w.sin()))(w).sum((2, 3)),
    ),
    "function in func.vmap": (
        "custom_function_call|MyLinear|SetupContext",
        lambda x, w: torch.vmap(lambda row: F.linear(row, ForVmap.apply(w)))(x),
    ),
}


class ForVmap(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w * 2.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def differentiated(program, w, x, leaves):
    """Results of a program and of a plain use after it, and all gradients."""
    out = program(x, w)
    later = F.linear(x, w)
    total = (out.sin() * torch.arange(1.0, out.numel() + 1).view(out.shape)).sum()
    (total + later.exp().sum()).backward()  # as use_reentrant=True wants it
    return out.detach(), later.detach(), *(leaf.grad for leaf in leaves)


def assert_all_close(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def draw():
    torch.manual_seed(0)
    center, delta, x = torch.randn(2, 3), torch.randn(2, 3), torch.randn(N, 3)
    return center.requires_grad_(), delta.requires_grad_(), x.requires_grad_()


def shared(program, exact_delta=True):
    """The program on a flipped weight, and on the bare shared draw; and what was warned of."""
    results = []
    for flipped in (True, False):
        center, delta, x = draw()
        w = center + delta
        if flipped:
            w = flip(w, center, delta if exact_delta else None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(differentiated(program, w, x, (center, delta, x)))
        if flipped:
            told = [str(c.message) for c in caught if issubclass(c.category, FlipoutWarning)]
    return (*results, told)


@pytest.mark.parametrize("exact_delta", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_shared_with_one_warning(name, exact_delta):
    call, program = PROGRAMS[name]
    actual, expected, told = shared(program, exact_delta)
    assert len(told) == 1, told
    assert any(f"in {c}" in told[0] or c in told[0] for c in call.split("|")), told
    assert "site 'weight' keeps its shared draw" in told[0]
    assert "hide" in told[0] or "use_reentrant=False" in told[0]
    assert_all_close(actual, expected)


def test_the_oracle_can_fail():
    """A program by the rules is not the one on the shared draw."""
    actual, expected, told = shared(F.linear)
    assert not told
    assert not torch.allclose(actual[0], expected[0])
    assert not torch.allclose(actual[2], expected[2])


@pytest.mark.parametrize("function", [Kernel, KernelBothWays])
def test_a_kernel_that_calls_nothing_is_noticed_by_its_gradient(function):
    center, delta, x = draw()
    w = flip(center + delta, center, delta)
    out = function.apply(x, w)
    with pytest.warns(FlipoutWarning, match="'weight' keeps its shared draw") as caught:
        actual = torch.autograd.grad(out.sin().sum(), (center, delta, x))
    assert len(caught) == 1
    center, delta, x = draw()
    expected = torch.autograd.grad(F.linear(x, center + delta).sin().sum(), (center, delta, x))
    assert_all_close(actual, expected)
    assert not w.has_signs


@pytest.mark.parametrize("first", [True, False])
def test_a_kernel_that_calls_nothing_beside_the_rules_is_an_error(first):
    center, delta, x = draw()
    w = flip(center + delta, center, delta)
    outs = []
    for use in (KernelBothWays.apply, F.linear) if first else (F.linear, KernelBothWays.apply):
        outs.append(use(x, w))
    with pytest.raises(FlipoutError, match=r"'weight' was used by .*hide the site"):
        sum(outs).sum().backward()


def test_a_function_that_has_no_frame_is_an_error():
    """What is left to notice if a forward function was by the rules after all."""

    class Odd(MyLinear):
        class forward:
            def __new__(cls, ctx, x, w):
                ctx.save_for_backward(x, w)
                return x @ w.t()

    w, x = random_weight(2, 3), torch.randn(N, 3)
    out = Odd.apply(x, w)
    with pytest.raises(FlipoutError, match="'weight' was used by"):
        out.sum().backward()


# --------------------------------------------------------------------- what goes on as it did


class Closure(Function):
    """Finds the weight outside of its arguments: no gradient is expected of it."""

    weight = None

    @staticmethod
    def forward(ctx, x):
        ctx.weight = Closure.weight
        return F.linear(x, Closure.weight)

    @staticmethod
    def backward(ctx, grad):
        return F.linear(grad, ctx.weight.t())


def by_example(w, x):
    return torch.einsum("noi,ni->no", w.materialize(len(x)), x)


def test_a_weight_in_a_closure_is_exact():
    _, _, x = draw()
    w = random_weight(2, 3)
    Closure.weight = w
    out = Closure.apply(x)
    expected = by_example(w, x)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(N, 2)
    (actual,) = torch.autograd.grad((out * cotangent).sum(), x)
    (wanted,) = torch.autograd.grad((expected * cotangent).sum(), x)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # of PyTorch 2.4 itself
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_of_closures_are_exact(use_reentrant):
    center, delta, x = draw()
    w = flip(center + delta, center, delta)
    v = random_weight(3, 2, execution=w.execution)

    def net(x):
        return F.linear(F.linear(x, w).tanh(), v) + F.linear(x, w)[:, :1] * w.detach().mean()

    run = checkpoint(net, x, use_reentrant=use_reentrant).sin().sum()
    leaves = (center, delta, x, v.center)
    for leaf in leaves:
        leaf.grad = None
    run.backward()
    actual = [leaf.grad.clone() for leaf in leaves]
    expected = torch.autograd.grad(net(x).sin().sum(), leaves)
    assert_all_close(actual, expected)


def test_without_gradients_a_function_is_exact():
    center, delta, x = torch.randn(2, 3), torch.randn(2, 3), torch.randn(N, 3)
    w = flip(center + delta, center, delta)
    for function in (MyLinear, SetupContext, Nested):
        torch.testing.assert_close(function.apply(x, w), by_example(w, x))
    with torch.inference_mode():
        torch.testing.assert_close(MyLinear.apply(x, w), by_example(w, x))


def test_no_grad_is_no_function():
    w, x = random_weight(2, 3), torch.randn(N, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(F.linear(x, w), by_example(w, x))


def test_one_example_sees_the_shared_draw_silently():
    w, x = random_weight(2, 3), torch.randn(1, 3, requires_grad=True)
    leaves = (w.center, w.terms[0].delta, x)
    before = F.linear(x, w)
    out = MyLinear.apply(x, w) + before + script(scripted)(x, w)
    plain = leaves[0] + leaves[1]
    expected = 2 * F.linear(x, plain) + scripted(x, plain)
    assert_all_close(
        [out, *torch.autograd.grad(out.sum(), leaves)],
        [expected, *torch.autograd.grad(expected.sum(), leaves)],
    )


# -------------------------------------------------------------------------------- hooks


def hooked(kind, seen):
    def program(x, w):
        if kind == "register_hook":
            w.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        elif kind == "retain_grad":
            w.retain_grad()
            seen.append(w)
        elif kind == "grad_fn":
            w.grad_fn.register_hook(lambda i, o: seen.append(o[0]))
        else:
            edges = [torch.autograd.graph.get_gradient_edge(w).node]
            edges[0].register_prehook(lambda g: seen.append(g[0]))
        return F.linear(x, w)

    return program


@pytest.mark.parametrize("kind", ["register_hook", "retain_grad", "grad_fn", "edge"])
def test_hooks_see_the_gradient_of_the_shared_draw(kind):
    seen = []
    actual, expected, told = shared(hooked(kind, seen))
    assert len(told) == 1
    assert "gradient with respect to a flipped weight is another one for each example" in told[0]
    assert_all_close(actual, expected)
    flipped, bare = [v.grad if kind == "retain_grad" else v for v in seen]
    torch.testing.assert_close(flipped, bare)
    assert flipped.abs().max() > 0.1


def test_hooks_on_leaves():
    center = torch.randn(2, 3)
    value = torch.randn(2, 3, requires_grad=True)
    w, x, seen = flip(value, center), torch.randn(N, 3), []
    with pytest.warns(FlipoutWarning, match="another one for each example"):
        w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    F.linear(x, w).sum().backward()
    torch.testing.assert_close(seen[0], x.sum(0).expand(2, 3))


def test_the_gradient_with_respect_to_a_weight():
    w, x = random_weight(2, 3), torch.randn(N, 3)
    with pytest.warns(FlipoutWarning, match="torch.autograd.grad, .* another one for each"):
        (grad,) = torch.autograd.grad((w.plain * 3.0).sum(), w)
    torch.testing.assert_close(grad, torch.full((2, 3), 3.0))
    w = random_weight(2, 3)
    loss = F.linear(x, w).sum()
    with pytest.raises(FlipoutError, match=r"asked for .* \['weight'\], but the examples"):
        torch.autograd.grad(loss, [w])


def test_reading_memory_is_no_question():
    w = random_weight(2, 3)
    with pytest.warns(FlipoutWarning, match="reads the memory"):
        assert w.data_ptr() == w.plain.data_ptr()


# ------------------------------------------------------------------------- the handlers

CALLS = {
    "MyLinear": lambda x, w: MyLinear.apply(x, w),
    "Reversal": lambda x, w: F.linear(x, Reversal.apply(w)),
    "setup_context": lambda x, w: SetupContext.apply(x, w),
    "script": lambda x, w: script(scripted)(x, w),
    "vmap": lambda x, w: torch.vmap(lambda row: x @ row, out_dims=1)(w),
    "hook": lambda x, w: (
        w.requires_grad and w.register_hook(lambda g: 2 * g),
        F.linear(x, w),
    )[1],
}


def model_of(call):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = call(x, w) + F.linear(x, w) + b
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    return model


def step(model, guide, seed, handler=None):
    """Log-density of the observations under one draw of the guide, and its gradient."""
    pyro.set_rng_seed(seed)
    trace = poutine.trace(guide).get_trace(*ARGS)
    fn = model if handler is None else handler(model)
    found = poutine.trace(poutine.replay(fn, trace=trace)).get_trace(*ARGS)
    found.compute_log_prob()
    total = sum(site["log_prob"].sum() for site in found.nodes.values() if "log_prob" in site)
    return total, torch.autograd.grad(total, list(guide.parameters()))


X = torch.linspace(-1.0, 1.0, 3 * N, dtype=torch.float64).view(N, 3)
ARGS = X, torch.ones(N, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "handler", [FlipoutMessenger, LocalReparameterizationMessenger, IndependentMessenger]
)
@pytest.mark.parametrize("name", CALLS)
def test_handlers_leave_the_site_shared_from_then_on(name, handler):
    bare = poutine.condition(model_of(CALLS[name]), data={"b": torch.ones(2)})
    guide = AutoNormal(bare, init_scale=0.5)
    guide(*ARGS)
    made = handler()
    # Of flipout the audit finds it, before the first step.
    when = "" if handler is FlipoutMessenger else " from now on"
    with pytest.warns(FlipoutWarning, match=f"'w' keeps its shared draw{when}:") as caught:
        actual = step(bare, guide, 1, made)
    assert len(caught) == 1
    assert_all_close(actual[1], step(bare, guide, 1)[1])
    assert made.decisions["w"].startswith("shared: ")
    again = step(bare, guide, 2, made)
    expected = step(bare, guide, 2)
    torch.testing.assert_close(again[0], expected[0])
    assert_all_close(again[1], expected[1])


@pytest.mark.parametrize("name", CALLS)
def test_missing_rules_that_are_errors(name):
    model = model_of(CALLS[name])
    guide = AutoNormal(model)
    guide(*ARGS)
    if name not in ("script", "vmap"):
        with pytest.raises(MissingRuleError, match="site 'w'"):
            step(model, guide, 1, FlipoutMessenger(on_missing_rule="error"))
        return
    # TorchScript raises an error of its own without the message.
    kind = RuntimeError if name == "script" else MissingRuleError
    with pytest.raises(kind), pytest.warns(FlipoutWarning, match="site 'w': in aten"):
        step(model, guide, 1, FlipoutMessenger(on_missing_rule="error"))


def test_the_warning_points_at_the_program():
    with pytest.warns(FlipoutWarning) as caught:
        MyLinear.apply(torch.randn(N, 3), random_weight(2, 3))
    assert caught[0].filename == __file__


# ------------------------------------------------------------- networks, noise, evolution


class Layer(nn.Module):
    def __init__(self, call, make=nn.Parameter):
        super().__init__()
        self.weight = make(torch.randn(2, 3))
        self.call = call

    def forward(self, x):
        return self.call(x, self.weight)


def test_a_layer_of_a_network_of_sites():
    def net():
        torch.manual_seed(1)
        layer = PyroModule[Layer](CALLS["MyLinear"])
        layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        return layer

    model = net()
    x = ARGS[0].clone().requires_grad_()
    guide = AutoNormal(model, init_scale=0.5)
    guide(x)
    trace = poutine.trace(guide).get_trace(x)
    leaves = (x, *guide.parameters())
    with pytest.warns(FlipoutWarning, match="'weight' .* MyLinear.apply"):
        out = poutine.replay(FlipoutMessenger()(model), trace=trace)(x)
    expected = poutine.replay(model, trace=trace)(x)
    for result in (out, expected):
        assert len(result) == N
    assert_all_close(
        torch.autograd.grad(out.exp().sum(), leaves, retain_graph=True),
        torch.autograd.grad(expected.exp().sum(), leaves),
    )


def test_a_weight_without_a_gradient_is_exact_for_each_example():
    """The backward function then serves the data alone, and is by the rules."""
    _, _, x = draw()
    center, delta = torch.randn(2, 3), torch.randn(2, 3)
    w = flip(center + delta, center, delta)
    for function in (MyLinear, SetupContext):
        out, expected = function.apply(x, w), by_example(w, x)
        torch.testing.assert_close(out, expected)
        assert_all_close(
            torch.autograd.grad(out.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x)
        )


@pytest.mark.parametrize("name", [name for name in CALLS if name != "hook"])
def test_weight_noise_is_shared(name):
    torch.manual_seed(0)
    net = Layer(CALLS[name])
    weight_noise_(net, "gaussian", sigma=0.5)
    x = torch.randn(N, 3)
    torch.manual_seed(1)
    with pytest.warns(FlipoutWarning, match="'weight' keeps its shared noise") as caught:
        out = net(x)
    assert len([c for c in caught if c.category is FlipoutWarning]) == 1
    (grad,) = torch.autograd.grad(out.sin().sum(), net.weight)
    torch.manual_seed(1)
    w = (net.weight + 0.5 * torch.randn_like(net.weight)).detach().requires_grad_()
    expected = CALLS[name](x, w)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sin().sum(), w)[0])


@pytest.mark.parametrize("name", ["MyLinear", "Reversal", "setup_context"])
def test_functions_of_members_are_exact(name):
    net, x = Layer(CALLS[name]), torch.randn(6, 3)
    es = FlipES(net, sigma=0.3, seed=0)
    with es.perturb(num_members=6):
        out = net(x)
    for n in range(6):
        expected = F.linear(x[n], es.member(n)["weight"])
        torch.testing.assert_close(out[n].detach(), expected.detach())
    explore = Exploration(net, sigma=0.3, num_envs=6, seed=0)
    out = explore(x)
    for n in range(6):
        torch.testing.assert_close(out[n], F.linear(x[n], explore.policy(n)["weight"]))


def pointer(x, w):
    w.data_ptr()
    return x


@pytest.mark.parametrize("call", [CALLS["script"], CALLS["vmap"], pointer])
def test_members_that_would_be_one_are_an_error(call):
    net, x = Layer(call), torch.randn(6, 3)
    kind = RuntimeError if call is CALLS["script"] else MissingRuleError
    es = FlipES(net, sigma=0.3, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(kind) as error, es.perturb(num_members=6):
            net(x)
        with pytest.raises(kind):
            Exploration(net, sigma=0.3, num_envs=6, seed=0)(x)
    words = [str(error.value)] + [str(c.message) for c in caught]
    assert any("site 'weight': in " in w and "hide" in w for w in words)


def test_a_scripted_network_with_a_weight_put_into_it():
    w, x = random_weight(2, 3), torch.randn(N, 3, requires_grad=True)
    leaves = (w.center, w.terms[0].delta, x)
    net = script(nn.Linear(3, 2, bias=False))
    net._c.setattr("weight", w)
    with pytest.warns(FlipoutWarning, match="'weight' keeps its shared draw"):
        out = net(x).sin()
    expected = F.linear(x, leaves[0] + leaves[1]).sin()
    assert_all_close(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )


def test_no_reference_cycles():
    """A weight is gone with its last reference, without the garbage collector."""
    import gc
    import weakref

    gc.disable()
    try:
        loc = torch.zeros(2, 3, requires_grad=True)
        w = flip(loc + 1.0, loc, execution=Execution())
        gone = weakref.ref(w)
        F.linear(torch.randn(N, 3), w).sum().backward()
        del w
        assert gone() is None
    finally:
        gc.enable()
