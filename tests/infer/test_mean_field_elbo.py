"""The ELBO without needless densities: the same loss and gradients as Pyro's."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flipout import FlipoutMessenger, flipout
from pyro_flipout.infer import AutoMeanField, MeanFieldELBO, tempered
from pyro_flipout.infer._normal_kl import normal_kl

X, Y = torch.linspace(-1, 1, 12).reshape(6, 2), torch.tensor([0.1, 2.0, -1.0, 0.4, 0.0, 1.0])


def regression(x, y):
    """Sites with closed forms and without, constrained, in a plate, masked and scaled."""
    scale = pyro.sample("prior_scale", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, scale).expand([1, 2]).to_event(2))
    heavy = pyro.sample("heavy", dist.StudentT(3.0, 0.0, 1.0).expand([2]).to_event(1))
    with poutine.scale(scale=0.5):
        pyro.sample("plain", dist.Normal(torch.zeros(3), 0.7).to_event(1))
    mean = torch.nn.functional.linear(x, w).squeeze(-1) + x @ heavy
    with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > -0.5):
        shift = pyro.sample("shift", dist.Normal(0.2, 0.3))
        pyro.sample("y", dist.Normal(mean + shift, 1.0), obs=y)


def loss_and_grads(elbo, guide, wrap=flipout):
    pyro.set_rng_seed(3)
    guide.zero_grad()
    loss = elbo.loss_and_grads(wrap(regression), guide, X, Y)
    return loss, [p.grad.clone() for p in guide.parameters()]


@pytest.fixture
def unchecked():
    """Validation off, which is what the ELBO is for."""
    with pyro.validation_enabled(False):
        yield


OPTIONS = [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("factor", [None, 0.1])
@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("make", [AutoMeanField, AutoNormal])
def test_loss_and_gradients_are_those_of_pyro(make, options, factor):
    guide = make(regression)
    guide(X, Y)
    elbos = [cls(**options) for cls in (TraceMeanField_ELBO, MeanFieldELBO)]
    elbos = elbos if factor is None else [tempered(elbo, factor) for elbo in elbos]
    (loss, grads), (ours, our_grads) = (loss_and_grads(elbo, guide) for elbo in elbos)
    assert ours == pytest.approx(loss, rel=1e-5)
    for grad, our in zip(grads, our_grads, strict=True):
        torch.testing.assert_close(our, grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_vectorized_particles():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        mean = torch.nn.functional.linear(x, w).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide, losses = AutoMeanField(model), []
    guide(X, Y)
    for cls in (TraceMeanField_ELBO, MeanFieldELBO):
        pyro.set_rng_seed(0)
        losses.append(cls(**OPTIONS[2], max_plate_nesting=1).loss(flipout(model), guide, X, Y))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


class Counting(dist.Normal):
    calls = 0

    def expand(self, batch_shape, _instance=None):
        return Counting(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value):
        Counting.calls += 1
        return super().log_prob(value)


@pytest.mark.parametrize(("validate", "calls"), [(False, 0), (True, 1)])
def test_densities_are_evaluated_only_where_they_are_needed(validate, calls):
    def model():
        pyro.sample("w", Counting(torch.zeros(3), 1.0).to_event(1))

    guide = AutoMeanField(model)
    guide()
    Counting.calls = 0
    with pyro.validation_enabled(validate):
        MeanFieldELBO().loss(model, guide)
    assert Counting.calls == calls


@pytest.mark.usefixtures("unchecked")
def test_training():
    guide = AutoMeanField(regression)
    svi = SVI(flipout(regression), guide, pyro.optim.Adam({"lr": 0.05}), MeanFieldELBO())
    pyro.set_rng_seed(0)
    losses = [svi.step(X, Y) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.parametrize("prior", [(0.3, 0.7), ([[0.3], [1.0]], [[0.7], [0.2]])])
def test_kl_of_normals(prior):
    torch.manual_seed(0)
    loc, scale = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) + 0.1
    prior = [torch.tensor(p, dtype=torch.float64).expand(2, 3) for p in prior]
    leaves = [loc.requires_grad_(), scale.requires_grad_()]
    plain = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(plain(loc, scale), plain(*prior))
    torch.testing.assert_close(normal_kl(*leaves, *prior), expected)
    assert torch.autograd.gradcheck(lambda a, b: normal_kl(a, b, *prior), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b: normal_kl(a, b, *prior), leaves)
    total = torch.func.grad(lambda a, b: normal_kl(a, b, *prior).sum(), argnums=(0, 1))(*leaves)
    torch.testing.assert_close(
        total, torch.autograd.grad(expected.sum(), leaves, retain_graph=True)
    )
    weights = torch.rand_like(loc)
    for total in (torch.sum, lambda kl: (kl * weights).sum()):
        grads, ours = (
            torch.autograd.grad(total(kl), leaves, retain_graph=True)
            for kl in (expected, normal_kl(*leaves, *prior))
        )
        torch.testing.assert_close(ours, grads)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [AutoMeanField, AutoNormal])
def test_a_step_leaves_nothing_to_the_garbage_collector(make):
    """Cycles would keep the draws of a step until it runs, and it runs when it likes."""
    alive = []

    class Watched(MeanFieldELBO):
        def _get_trace(self, *args):
            traces = super()._get_trace(*args)
            alive.extend(map(weakref.ref, traces))
            return traces

    class Handler(FlipoutMessenger):
        def _flip(self, msg, draw):
            super()._flip(msg, draw)
            alive.extend(map(weakref.ref, (msg["value"].execution, *msg["value"].draws)))

    guide = make(regression)
    svi = SVI(Handler()(regression), guide, pyro.optim.Adam({"lr": 0.01}), Watched())
    svi.step(X, Y)
    gc.collect()
    gc.disable()
    try:
        alive.clear()
        svi.step(X, Y)
        assert len(alive) == 2 + 2 * 3  # of w, heavy and plain
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()
