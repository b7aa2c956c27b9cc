"""`flipout(module)` is a module still."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_flipout import FlipoutTensor, flipout
from tests.helpers import Regression, kinds, mlp

X, Y = torch.randn(8, 4), torch.randn(8, 3)


class Net(PyroModule):
    """Half Bayesian, half deterministic, with state of its own.

    Its batch norm comes before the weights: behind them it would mix the examples.
    """

    def __init__(self):
        super().__init__()
        self.first = PyroModule[nn.Linear](4, 5)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 4]).to_event(2))
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x, y=None):
        self.calls += 1
        self.cache = self.first.weight
        mean = self.last(torch.tanh(self.first(self.norm(x))))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def test_is_a_module_with_everything_of_the_model(model):
    wrapped = flipout(model)
    assert isinstance(wrapped, Net)
    assert isinstance(wrapped, nn.Module)
    assert list(wrapped.state_dict()) == list(model.state_dict())
    for (a, p), (b, q) in zip(wrapped.named_parameters(), model.named_parameters(), strict=True):
        assert a == b
        assert p is q
    assert [n for n, _ in wrapped.named_modules()] == [n for n, _ in model.named_modules()]


def test_site_and_parameter_names(model):
    traces = [poutine.trace(fn).get_trace(X, Y) for fn in (model, flipout(model))]
    assert list(traces[0].nodes) == list(traces[1].nodes)
    assert "first.weight" in traces[1].nodes
    assert "last$$$bias" in traces[1].nodes


def test_what_forward_stores_is_found_on_the_model(model):
    wrapped = flipout(model, audit=False)
    before = model.norm.running_mean.clone()
    wrapped(X, Y)
    assert model.calls == wrapped.calls == 1
    assert isinstance(model.cache, FlipoutTensor)
    assert model.cache is wrapped.cache
    assert not torch.equal(model.norm.running_mean, before)
    wrapped.eval()
    assert not model.training
    assert not model.norm.training


def test_the_model_itself_is_not_flipped(model):
    wrapped = flipout(model)
    wrapped(X, Y)
    poutine.trace(model).get_trace(X, Y)
    assert not isinstance(model.cache, FlipoutTensor)


def test_elbo_module_trains_the_models_parameters(model):
    guide = AutoNormal(model)
    elbo = Trace_ELBO()(flipout(model), guide)
    elbo(X, Y)
    names = {n for n, _ in elbo.named_parameters()}
    assert {"model.last.weight", "model.last.bias"} <= names
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
    before = {n: p.detach().clone() for n, p in elbo.named_parameters()}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = elbo(X, Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unchanged = [n for n, p in elbo.named_parameters() if torch.equal(p, before[n])]
    assert not unchanged
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("module_local", [False, True])
def test_module_local_parameters(module_local):
    with pyro.settings.context(module_local_params=module_local):
        model = Net()
        elbo = Trace_ELBO()(flipout(model), AutoNormal(flipout(model)))
        elbo(X, Y).backward()
        assert model.last.weight.grad is not None


def test_autoguide_of_the_wrapped_model(model):
    wrapped = flipout(model)
    svi = SVI(wrapped, AutoNormal(wrapped), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X, Y)
    assert kinds(wrapped._handled_by[0].decisions) == {"first.weight": "flipped"}


def clone_by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def clone_by_torch(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, clone_by_torch])
def test_copies(clone):
    model = Regression(mlp((4, 5, 3)))
    model.extra = nn.Parameter(torch.ones(2))
    wrapped = flipout(model, example_dim=0, hide=["net.0.bias"])
    guide = AutoNormal(model)
    svi = SVI(wrapped, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X, Y)
    pyro.clear_param_store()
    other = clone(wrapped)
    assert isinstance(other, Regression)
    assert other.extra is not model.extra
    assert torch.equal(other.extra, model.extra)
    poutine.trace(poutine.replay(other, trace=poutine.trace(guide).get_trace(X, Y))).get_trace(X, Y)
    decisions = other._handled_by[0].decisions
    assert decisions["net.0.weight"].startswith("flipped")
    assert decisions["net.0.bias"] == "shared: it is hidden"


def test_shallow_copy_shares_the_model(model):
    other = copy.copy(flipout(model, audit=False))
    other(X, Y)
    assert model.calls == 1


def test_to(model):
    wrapped = flipout(model)
    assert wrapped.to(torch.float64) is wrapped
    assert model.last.weight.dtype == torch.float64
    wrapped.zero_grad()
    wrapped.requires_grad_(False)
    assert not model.last.weight.requires_grad


def test_wrapping_twice_keeps_both_handlers(model):
    twice = flipout(flipout(model, hide=["first.weight"], audit=False), audit=False)
    twice(X, Y)
    assert model.calls == 1
    inner, outer = twice._handled_by[::-1]
    assert inner.hide == {"first.weight"}
    assert outer.hide is None


def test_predictive_of_the_wrapped_model(model):
    samples = {"first.weight": torch.randn(4, 5, 4)}
    model.eval()
    draws = []
    for fn in (model, flipout(model)):
        pyro.set_rng_seed(0)
        draws.append(Predictive(fn, posterior_samples=samples)(X)["y"])
    assert torch.equal(*draws)


def test_a_model_that_calls_itself():
    class Recursive(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))

        def forward(self, x, depth=2):
            h = nn.functional.linear(x, self.w)
            return self(h, depth - 1) if depth else h

    out = flipout(Recursive())(torch.randn(5, 3))
    assert out.shape == (5, 3)
    assert type(out) is torch.Tensor


def test_parallel_replicas(model):
    replica = flipout(model)._replicate_for_data_parallel()
    assert isinstance(replica, Net)
    assert replica._handled_by


def test_function_keeps_its_name():
    def my_model(x):
        """Doc."""

    wrapped = flipout(my_model)
    assert wrapped.__name__ == "my_model"
    assert wrapped.__doc__ == "Doc."
    assert poutine.unwrap(wrapped) is my_model
