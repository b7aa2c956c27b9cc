"""The audit runs the model a few more times, and nobody can tell."""

import copy
import gc
import pickle
import random
import threading
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pyro.poutine.runtime as runtime
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_mean
from pyro.nn import PyroModule
from torch import nn

from pyro_flipout import FlipoutWarning, flipout
from pyro_flipout.nn import FlipoutLinear, bayesianize
from pyro_flipout.plan import memory

N = 12
VERIFIED = "flipped (verified)"


def data(rows=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)


class Model(PyroModule):
    """A regression that counts how often its Python runs."""

    def __init__(self, net=None, mixes=False):
        super().__init__()
        if net is None:
            net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.net, self.mixes, self.calls = bayesianize(net), mixes, 0

    def likelihood(self, mean, y):
        with pyro.plate("data", len(mean)):
            return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    def forward(self, x, y=None):
        self.calls += 1
        mean = self.net(x)
        return self.likelihood(mean - mean.mean(0) if self.mixes else mean, y)


class Noisy(Model):
    """Everything that a run changes: generators, buffers and parameters."""

    def __init__(self, mixes=True):
        norm = nn.BatchNorm1d(4)
        super().__init__(
            nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(0.4), nn.Linear(4, 2)), mixes
        )
        self.register_buffer("seen", torch.zeros(()))
        self.part = nn.Linear(2, 2)

    def forward(self, x, y=None):
        self.calls += 1
        self.seen += 1
        shift = pyro.param("shift", lambda: torch.randn(2))
        pyro.module("part", self.part)
        noise = random.random() + np.random.rand()  # noqa: NPY002
        mean = self.part(self.net(x)) + shift + 0.01 * noise
        return self.likelihood(mean - mean.mean(0) if self.mixes else mean, y)


def guide_of(model, *args, cls=AutoNormal, **options):
    guide = cls(model, **options)
    guide(*args)
    if isinstance(model, Model):
        model.calls = 0
    return guide


def quiet(fn, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipoutWarning)
        return fn(*args)


def seed(number=1):
    pyro.set_rng_seed(number)  # of torch, Python and NumPy


def generators():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def trained(wrap, model_class=Noisy, steps=3, elbo=Trace_ELBO, **options):
    """Losses, and everything that there is after some steps."""
    pyro.clear_param_store()
    seed(0)
    model = model_class()
    x, y = data()
    guide = guide_of(model, x, y, init_scale=0.1)
    pyro.clear_param_store()
    wrapped = wrap(model)
    svi = SVI(wrapped, guide, pyro.optim.Adam({"lr": 0.01}), elbo(**options))
    seed(1)
    losses = [quiet(svi.step, x, y) for _ in range(steps)]
    store = {name: pyro.param(name).detach().clone() for name in pyro.get_param_store()}
    grads = {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}
    return losses, generators(), store, dict(model.named_buffers()), grads, model


def enumerating():
    """An estimator that enumerates, here nothing: which it says."""
    return TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)


@pytest.mark.parametrize("elbo", [Trace_ELBO, enumerating])
def test_a_model_whose_sites_are_shared_trains_as_the_bare_model_to_the_last_bit(elbo):
    bare, flipped = trained(lambda m: m, elbo=elbo), trained(flipout, elbo=elbo)
    assert flipped[5].calls > bare[5].calls + 3  # it was audited
    assert bare[0] == flipped[0]
    assert same(bare[1], flipped[1])
    for mine, theirs in zip(bare[2:5], flipped[2:5], strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def centred(x, y=None):
    """A model that particles can be vectorised for, and whose examples mix."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    mean = x @ w
    mean = mean - mean.mean(-2, keepdim=True)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_of_a_model_whose_sites_are_shared(vectorize):
    x, y = data()
    losses = []
    for wrap in (lambda m: m, flipout):
        pyro.clear_param_store()
        guide = guide_of(centred, x, y)
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
        svi = SVI(wrap(centred), guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        seed(1)
        losses.append([quiet(svi.step, x, y) for _ in range(3)])
    assert losses[0] == losses[1]


def test_generators_buffers_and_parameters_after_one_call():
    """Where the audit raises no error and flips: the state is that of one plain call."""
    states = {}
    for wrap in (lambda m: m, lambda m: flipout(m, audit=False), flipout):
        pyro.clear_param_store()
        seed(0)
        model = Noisy(mixes=False).eval()
        x, y = data()
        guide = guide_of(model, x, y)
        pyro.clear_param_store()
        seed(1)
        trace = poutine.trace(guide).get_trace(x, y)
        poutine.trace(poutine.replay(wrap(model), trace)).get_trace(x, y)
        states[len(states)] = (
            *generators()[1:],
            tuple(buffer.clone() for buffer in model.buffers()),
            tuple((name, pyro.param(name).clone()) for name in pyro.get_param_store()),
            model.calls,
        )
    assert same(states[0], states[1])
    assert same(states[0][:-1], states[2][:-1])
    assert states[2][-1] > 3


def test_gradients_of_parameters_are_left_alone():
    model = Model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    x, y = data()
    guide = guide_of(model, x, y)
    guide_trace = poutine.trace(guide).get_trace(x, y)
    for p in guide.parameters():
        p.grad = torch.ones_like(p)
    poutine.replay(flipout(model), guide_trace)(x, y)
    assert model.calls > 2
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in guide.parameters())


# ------------------------------------------------------------------------ handlers outside


class Counting(poutine.messenger.Messenger):
    """A user's own handler."""

    def __init__(self):
        super().__init__()
        self.num_calls, self.names, self.by_name, self.seen = 0, [], {}, set()
        self.total = torch.zeros(())
        self.deep = {"a": [{"b": []}]}

    def _pyro_post_sample(self, msg):
        self.num_calls += 1
        self.total += 1
        self.names.append(msg["name"])
        self.seen.add(msg["name"])
        self.by_name[msg["name"]] = self.by_name.get(msg["name"], 0) + 1
        self.deep["a"][0]["b"].append(msg["name"])


def test_handlers_of_the_user_count_what_they_count_for_a_plain_call():
    found = []
    for wrap in (lambda m: m, flipout):
        seed(0)
        model = Model()
        x, y = data()
        guide = guide_of(model, x, y)
        counting = Counting()
        guide_trace = poutine.trace(guide).get_trace(x, y)
        with counting, poutine.trace() as outer, poutine.trace(param_only=True) as params:
            poutine.replay(wrap(model), guide_trace)(x, y)
        found.append(
            (
                counting.num_calls,
                counting.total.item(),
                counting.names,
                counting.by_name,
                counting.seen,
                counting.deep,
                list(outer.trace.nodes),
                list(params.trace.nodes),
            )
        )
        assert model.calls > 2 or wrap is not flipout
    assert found[0] == found[1]


def test_the_users_traces_hold_one_run_and_the_plain_draws():
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    guide_trace = poutine.trace(guide).get_trace(x, y)
    trace = poutine.trace(poutine.replay(flipout(model), guide_trace)).get_trace(x, y)
    bare = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, y)
    assert list(trace.nodes) == list(bare.nodes)
    for name in ("net.0.weight", "net.2.bias"):
        assert torch.equal(trace.nodes[name]["value"], bare.nodes[name]["value"])


class Mixture(PyroModule):
    """An enumerated state of each datum, in time-varying markov states."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, y):
        self.calls += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            u = pyro.sample("u", dist.Bernoulli(0.3 + 0.4 * z), infer={"enumerate": "parallel"})
            mean = F.linear(x, w) + z.unsqueeze(-1) + u.unsqueeze(-1)
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def weights_only(model):
    return poutine.block(model, hide=["z", "u"])


def test_enumeration_is_allocated_once():
    x, y = data()
    losses, dims = [], []
    for wrap in (lambda m: m, lambda m: flipout(m, hide=["w"]), flipout):
        pyro.clear_param_store()
        seed(0)
        model = Mixture()
        guide = guide_of(weights_only(model), x, y, init_scale=1e-6)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        seed(1)
        losses.append(elbo.loss(wrap(model), guide, x, y))
        dims.append(runtime._ENUM_ALLOCATOR.next_available_dim)
        wrapped = wrap(model)
        sites = {}

        def look(*args, wrapped=wrapped, sites=sites):
            with poutine.trace() as tr:
                wrapped(*args)
            sites.update({n: s["value"].shape for n, s in tr.trace.nodes.items() if n in "zu"})

        elbo.loss(look, guide, x, y)
        dims.append(sites)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert dims[0:2] == dims[2:4] == dims[4:6]


def test_trace_enum_after_trace_elbo():
    """The structures differ: the handlers around the call are others."""
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    wrapped = flipout(model)
    for elbo in (Trace_ELBO(), enumerating(), Trace_ELBO()):
        svi = SVI(wrapped, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
        svi.step(x, y)
        before = model.calls
        svi.step(x, y)
        assert model.calls == before + 1
    trace = poutine.trace(poutine.replay(wrapped, poutine.trace(guide).get_trace(x, y))).get_trace(
        x, y
    )
    assert trace.nodes["y"]["value"].shape == y.shape


# ------------------------------------------------------------------------------- warnings


class Warns(Model):
    def forward(self, x, y=None):
        warnings.warn("of the model", UserWarning, stacklevel=1)
        return super().forward(x, y)


def test_warnings_of_the_model_are_given_once():
    for wrap in (lambda m: m, flipout):
        model = Warns()
        x, y = data()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guide = guide_of(model, x, y)
        guide_trace = poutine.trace(guide).get_trace(x, y)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            poutine.replay(wrap(model), guide_trace)(x, y)
        assert [str(w.message) for w in caught] == ["of the model"]


def test_one_warning_for_sites_that_are_shared_whatever_is_made_anew():
    model = Model(mixes=True)
    x, y = data()
    guide = guide_of(model, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            svi = SVI(flipout(model), guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
            svi.step(x, y)
            svi.step(x[:5], y[:5])
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ("net.0.weight", "net.2.bias", "'y'"))


# ----------------------------------------------------------------------------- exceptions


class Fails(Model):
    """Fails in its call number ``at``, or in every call."""

    def __init__(self, at=None):
        super().__init__()
        self.at = at

    def forward(self, x, y=None):
        out = super().forward(x, y)
        if self.at is None or self.calls == self.at:
            with pyro.plate("another", 3, dim=-2), poutine.mask(mask=True):
                raise KeyError("of the model")
        return out


def test_an_error_of_the_model_is_what_the_user_sees():
    x, y = data()
    model = Fails()
    guide = AutoNormal(Model())
    guide(x, y)
    guide_trace = poutine.trace(guide).get_trace(x, y)
    before = list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)
    for _ in range(2):
        with pytest.raises(KeyError, match="of the model") as raised:
            poutine.replay(flipout(model), guide_trace)(x, y)
        assert raised.value.__cause__ is None
        assert raised.value.__context__ is None
        assert (list(runtime._PYRO_STACK), list(runtime._DIM_ALLOCATOR._stack)) == before
    model.at = -1  # it is well from now on
    handler = flipout()
    poutine.replay(handler(model), guide_trace)(x, y)
    assert set(handler.decisions.values()) == {VERIFIED}


@pytest.mark.parametrize("at", range(1, 8))
def test_an_error_in_any_run_of_the_audit_is_survived(at):
    x, y = data()
    model = Fails(at=at)
    guide = AutoNormal(Model())
    guide(x, y)
    guide_trace = poutine.trace(guide).get_trace(x, y)
    handler = flipout()
    with poutine.trace() as outer:
        quiet(poutine.replay(handler(model), guide_trace), x, y)
    assert "y" in outer.trace.nodes
    assert not runtime._PYRO_STACK
    assert not runtime._DIM_ALLOCATOR._stack


class Picky(Model):
    """A Cholesky factor of what its weights say: it fails for most other weights."""

    def forward(self, x, y=None):
        self.calls += 1
        w = pyro.sample("w", dist.Normal(torch.eye(2), 1.0).to_event(2))
        torch.linalg.cholesky(getattr(w, "plain", w) - 0.5 * torch.eye(2))
        return self.likelihood(F.linear(x[:, :2], w), y)


def test_a_model_that_fails_with_other_weights_runs():
    x, y = data()
    model = Picky()
    pyro.param("loc", torch.eye(2))

    def guide(x, y=None):
        loc = pyro.param("loc")
        pyro.sample("w", dist.Normal(loc, 1e-3).to_event(2))

    handler = flipout()
    svi = SVI(handler(model), guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipoutWarning)
        for _ in range(3):
            svi.step(x, y)
    assert set(handler.decisions) == {"w"}


# ------------------------------------------------------------------------ what is remembered


def step(fn, guide, x, y, elbo=None, lr=1e-3):
    return SVI(fn, guide, pyro.optim.SGD({"lr": lr}), elbo or Trace_ELBO()).step(x, y)


def test_a_handler_made_anew_at_each_step_asks_nothing_twice():
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    step(flipout(model), guide, x, y)
    first = model.calls
    assert first > 3
    for _ in range(4):
        handler = flipout()
        step(handler(model), guide, x, y)
        assert set(handler.decisions.values()) == {VERIFIED}
    assert model.calls == first + 4


def test_functions_and_methods_remember_too():
    x, y = data()
    calls = []

    class Holder:
        def model(self, x, y=None):
            calls.append("method")
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(F.linear(x, w), 1.0).to_event(1), obs=y)

    holder = Holder()
    function = Holder().model.__func__

    def free(x, y=None):
        return function(None, x, y)

    for get in (lambda: holder.model, lambda: free):
        pyro.clear_param_store()
        guide = guide_of(get(), x, y)
        step(flipout(get()), guide, x, y)
        before = len(calls)
        for _ in range(3):
            step(flipout(get()), guide, x, y)
        assert len(calls) == before + 3


def test_a_last_smaller_batch():
    model = Model()
    guide = guide_of(model, *data())
    for rows in (N, 5, N, 5, 1, N, 5, 1):
        handler = flipout()
        step(handler(model), guide, *data(rows))
        assert set(handler.decisions.values()) == {VERIFIED}
    before = model.calls
    for rows in (N, 5, 1):
        step(flipout(model), guide, *data(rows))
    assert model.calls == before + 3


def test_an_empty_batch():
    """Pyro's plates cannot be empty, independent dimensions can."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        pyro.sample("y", dist.Normal(F.linear(x, w), 1.0).to_event(2), obs=y)

    guide = guide_of(model, *data())
    wrapped = flipout(model)
    for rows in (0, N, 0, N):
        guide_trace = poutine.trace(guide).get_trace()
        traces = [
            poutine.trace(poutine.replay(m, guide_trace)).get_trace(*data(rows))
            for m in (model, wrapped)
        ]
        densities = [float(trace.log_prob_sum().detach()) for trace in traces]
        assert (densities[0] == densities[1]) == (rows == 0)


class Series(PyroModule):
    """A recurrent network over series whose lengths vary from batch to batch."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.rnn = bayesianize(nn.LSTM(3, 4, batch_first=True))
        self.out = bayesianize(nn.Linear(4, 2))

    def forward(self, x, y=None):
        self.calls += 1
        mean = self.out(self.rnn(x)[0][:, -1])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def test_varying_lengths_are_trusted_after_three_audits():
    model = Series()
    _, y = data()
    guide = guide_of(model, torch.randn(N, 4, 3), y)
    model.calls, audits = 0, 0
    for length in (4, 7, 5, 6, 8, 9, 11, 3, 2):
        before, handler = model.calls, flipout()
        step(handler(model), guide, torch.randn(N, length, 3), y)
        audits += model.calls > before + 1
        assert set(handler.decisions.values()) == {VERIFIED}
    assert audits == 3


def test_what_is_trusted_at_other_sizes_is_exact():
    """The densities are those of explicit weights at a size that no audit has seen."""
    model = Folded()
    guide = AutoNormal(model, init_scale=0.3)
    shapes = ((6, 4), (5, 3), (7, 4), (9, 5), (4, 3))
    arguments = [(torch.randn(n, t, 3), torch.randn(n)) for n, t in shapes]
    guide(*arguments[0])
    for x, y in arguments:
        model.calls = 0
        guide_trace = poutine.trace(guide).get_trace(x, y)
        run = poutine.replay(flipout(model), guide_trace)
        density = poutine.trace(run).get_trace(x, y)
        density.compute_log_prob()
        own = torch.stack([F.linear(x[n], w).sum() for n, w in enumerate(model.weight)])
        expected = dist.Normal(own, 1.0).log_prob(y)
        torch.testing.assert_close(density.nodes["y"]["log_prob"], expected, rtol=1e-4, atol=1e-4)
    assert model.calls == 1


class Folded(PyroModule):
    """A network that is applied to all steps of all series at once."""

    def forward(self, x, y=None):
        self.calls = getattr(self, "calls", 0) + 1
        n, t, _ = x.shape
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        h = F.linear(x.flatten(0, 1), w).view(n, t).sum(1)
        self.weight = w.materialize(n) if hasattr(w, "materialize") else None
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(h, 1.0), obs=y)


def test_numbers_among_the_arguments():
    """Temperatures and other floats do not ask again; integers may be sizes, and do."""

    class Annealed(Model):
        def forward(self, x, y=None, temperature=1.0, epoch=0):
            with poutine.scale(scale=temperature):
                return super().forward(x, y)

    model = Annealed()
    x, y = data()
    guide = guide_of(model, x, y)
    svi = SVI(flipout(model), guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    svi.step(x, y, 0.5)
    before = model.calls
    for i in range(5):
        svi.step(x, y, 0.5 + 0.1 * i)
    assert model.calls == before + 5
    for epoch in range(5):
        svi.step(x, y, epoch=epoch)
    audited = model.calls
    for epoch in range(5, 10):
        svi.step(x, y, epoch=epoch)
    assert model.calls == audited + 5


def test_the_mode_of_a_net_that_the_model_closes_over():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    calls = []

    def model(x, y=None):
        calls.append(0)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        mean = net(F.linear(x, w))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    x, y = data()
    guide = guide_of(model, x, y)
    kinds = []
    for training in (True, False, True, False):
        net.train(training)
        handler = flipout()
        before = len(calls)
        quiet(step, handler(model), guide, x, y)
        kinds.append((handler.decisions["w"] == VERIFIED, len(calls) - before > 1))
    assert kinds == [(False, True), (True, True), (False, False), (True, False)]


def test_a_second_guide():
    """Another family of draws is another structure; the same family is not."""
    model = Model()
    x, y = data()
    guides = [guide_of(model, x, y, cls=c) for c in (AutoNormal, AutoDiagonalNormal, AutoNormal)]
    runs = []
    for guide in guides:
        handler, before = flipout(), model.calls
        step(handler(model), guide, x, y)
        runs.append(model.calls - before)
        assert set(handler.decisions.values()) == {VERIFIED}
    assert runs[2] == 1
    assert runs[0] > 3


def test_memory_does_not_keep_models_alive():
    x, y = data()
    gc.collect()
    memories = len(memory._MEMORIES)
    model = Model()
    guide = guide_of(model, x, y)
    step(flipout(model), guide, x, y)
    net, model_ref, guide_ref = (weakref.ref(m) for m in (model.net, model, guide))
    del model, guide
    pyro.clear_param_store()
    gc.collect()
    assert net() is model_ref() is guide_ref() is None
    assert len(memory._MEMORIES) == memories


def test_a_function_that_closes_over_its_net_is_not_kept_alive():
    def learn():
        net = bayesianize(nn.Linear(3, 2))

        def model(x, y=None):
            mean = net(x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

        x, y = data()
        step(flipout(model), guide_of(model, x, y), x, y)
        return weakref.ref(net), weakref.ref(model)

    references = learn()
    pyro.clear_param_store()
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_tensors_of_the_audit_are_freed():
    """No run of the audit is kept: neither its trace nor its weights."""
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    guide_trace = poutine.trace(guide).get_trace(x, y)

    def tensors():
        gc.collect()
        return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    wrapped = poutine.replay(flipout(model), guide_trace)
    poutine.replay(flipout(Model(), audit=False), guide_trace)(x, y)
    before = tensors()
    wrapped(x, y)
    assert model.calls > 3
    assert tensors() <= before


def test_without_an_audit_the_python_runs_once():
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    handler = flipout(audit=False)
    step(handler(model), guide, x, y)
    assert model.calls == 1
    assert set(handler.decisions.values()) == {"flipped (not verified: audit=False)"}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_wrapped_models_learn_for_themselves(clone):
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    wrapped = flipout(model)
    step(wrapped, guide, x, y)
    other = clone(wrapped)
    before = model.calls
    other.calls = 0
    step(other, guide, x, y)
    assert other.calls > 3
    assert model.calls == before


def test_the_memory_of_a_model_is_no_part_of_it():
    model = Model()
    x, y = data()
    guide = guide_of(model, x, y)
    before = set(vars(model)), set(model.state_dict())
    step(flipout(model), guide, x, y)
    assert (set(vars(model)), set(model.state_dict())) == before


def test_two_threads():
    """Pyro's stack is one for all threads, so they take turns; the audits are each model's own."""
    lock, problems = threading.Lock(), []

    def work(number):
        try:
            model = Model(mixes=bool(number))
            with lock:
                guide = guide_of(model, *data(seed=number))
            for _ in range(4):
                with lock, warnings.catch_warnings():
                    warnings.simplefilter("ignore", FlipoutWarning)
                    handler = flipout()
                    step(handler(model), guide, *data(seed=number))
                    kinds = {d.split(":")[0] for d in handler.decisions.values()}
                    assert kinds == ({"shared"} if number else {VERIFIED})
        except BaseException as why:
            problems.append(why)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# ---------------------------------------------------------------------------- nested handlers


def test_nested_flipout_handlers():
    x, y = data()
    model = Model()
    guide = guide_of(model, x, y)
    inner, outer = flipout(), flipout()
    step(outer(inner(model)), guide, x, y)
    before = model.calls
    step(outer(inner(model)), guide, x, y)
    assert model.calls == before + 1
    assert all(d.startswith("flipped") for d in {**inner.decisions, **outer.decisions}.values())


def test_a_wrapped_part_of_a_wrapped_model():
    x, y = data()

    def part(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        return F.linear(x, w)

    wrapped_part = flipout(part)

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = wrapped_part(x) + b
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    guide = guide_of(model, x, y)
    handler = flipout()
    for _ in range(2):
        quiet(step, handler(model), guide, x, y)
    assert set(handler.decisions) >= {"b"}
    assert not runtime._PYRO_STACK


# ------------------------------------------------------------- where there is no second run


def folded(x, y=None):
    """Three frames of each example, folded into rows: 3 N of them meet the first weight."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
    mean = F.linear(x.reshape(-1, 1), w).view(len(x), 3, 2).sum(1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def test_around_inference_a_contradiction_shares_from_the_second_execution_on():
    x, y = data()
    guide = guide_of(folded, x, y)
    svi = SVI(folded, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    with pytest.warns(FlipoutWarning, match="36 examples were counted"), flipout():
        svi.step(x, y)
    for _ in range(3):
        handler = flipout()
        with handler:
            svi.step(x, y)
        assert handler.decisions["w"].startswith("shared: 36 examples")


def test_layers_share_after_a_contradiction():
    layer = FlipoutLinear(1, 2)

    def model(x, y=None):
        mean = layer(x.reshape(-1, 1)).view(len(x), 3, 2).sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    x, y = data()
    guide = guide_of(model, x, y)
    elbo = Trace_ELBO()
    elbo.loss_and_grads(model, guide, x, y)  # layers are not there when data are observed
    with pytest.warns(FlipoutWarning, match="36 examples"):
        elbo.loss_and_grads(model, guide, x, y)
    for _ in range(3):  # no warning: and the densities are those of the shared draw
        guide_trace = poutine.trace(guide).get_trace(x, y)
        trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, y)
        w, b = (guide_trace.nodes[f"{name}"]["value"] for name in ("weight", "bias"))
        mean = F.linear(x.reshape(-1, 1), w, b).view(len(x), 3, 2).sum(1)
        torch.testing.assert_close(trace.nodes["y"]["fn"].base_dist.loc, mean)


# ------------------------------------------------------------------- perturbations too small to see


@pytest.mark.parametrize("init_scale", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("center", ["zero", "random"])
@pytest.mark.parametrize("mixes", [False, True])
def test_the_size_of_the_perturbation_makes_no_difference_to_the_verdict(init_scale, center, mixes):
    """A model is linear in what is small, and a linear mixture looks like a sum over examples."""
    options = {"init_loc_fn": init_to_mean} if center == "zero" else {}
    model = Model(mixes=mixes)
    x, y = data()
    guide = guide_of(model, x, y, init_scale=init_scale, **options)
    handler = flipout()
    quiet(step, handler(model), guide, x, y)
    if mixes:
        assert all("examples mix" in decision for decision in handler.decisions.values())
    else:
        assert set(handler.decisions.values()) == {VERIFIED}
