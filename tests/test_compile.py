"""torch.compile: a compiled network that meets flipped weights runs as it is, by the rules."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.func import functional_call

from pyro_flipout import flip, flipout
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.rules._fused_product import apply_flipped
from pyro_flipout.rules.linear import LINEAR
from pyro_flipout.signs import Signs, draw_codes
from pyro_flipout.tensor import Execution

X = torch.linspace(-1, 1, 30).reshape(6, 5)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def draws(net, prefix=""):
    torch.manual_seed(1)
    execution, weights = Execution(on_missing_rule="error"), {}
    for name, p in net.named_parameters():
        delta = 0.3 * torch.randn_like(p)
        loc = p.detach()
        weights[prefix + name] = flip(loc + delta, loc, delta, site=name, execution=execution)
    return weights


def test_a_compiled_network_with_flipped_weights():
    net = network()
    compiled = torch.compile(net, backend="aot_eager")
    plain = compiled(X)
    expected = functional_call(net, draws(net), (X,))
    for _ in range(3):  # frames that were left alone once, too
        assert torch.equal(functional_call(compiled, draws(net, "_orig_mod."), (X,)), expected)
    assert not torch.allclose(expected, plain)
    assert torch.equal(compiled(X), plain)


def test_a_compiled_function_with_a_flipped_argument():
    weight = draws(network())["0.weight"]
    compiled = torch.compile(lambda x, w: F.relu(F.linear(x, w)) + 1, backend="aot_eager")
    assert torch.equal(compiled(X, weight), F.relu(F.linear(X, weight)) + 1)


def test_training_a_compiled_network():
    net = network().requires_grad_(False)
    parameters = dict(net.named_parameters())
    compiled = torch.compile(net, backend="aot_eager")

    def model(x, forward):
        prefix = "" if forward is net else "_orig_mod."
        weights = {
            prefix + name: pyro.sample(name, dist.Normal(p, 0.3).to_event(p.dim()))
            for name, p in parameters.items()
        }
        out = functional_call(forward, weights, (x,))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(1), obs=torch.zeros(6, 3))

    losses = []
    for forward in (net, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program = flipout(model, on_missing_rule="error")
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = SVI(program, AutoMeanField(model), optim, TraceMeanField_ELBO())
        losses.append([svi.step(X, forward) for _ in range(3)])
    assert losses[0] == losses[1]


def product(x, center, delta, bias, into_data, into_out):
    signs = (Signs(codes, 6, x.dtype) for codes in (into_data, into_out))
    placed = [(s, 0, 1) for s in signs]
    return apply_flipped(x, center, delta, bias, None, LINEAR, *placed, None, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")  # inductor's
def test_the_product_compiles_as_one_graph():
    """With inductor, which needs a C++ compiler."""
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((6, 5), (7, 5), (7, 5), (7,))]
    codes = draw_codes((5,)), draw_codes((7,))
    found = []
    for fn in (product, torch.compile(product, fullgraph=True)):
        out = fn(*leaves, *codes)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    torch.testing.assert_close(*found)
