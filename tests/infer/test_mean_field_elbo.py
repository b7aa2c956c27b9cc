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
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flipout import FlipoutMessenger, flipout
from pyro_flipout.infer import AutoMeanField, MeanFieldELBO, mean_field_elbo, tempered
from pyro_flipout.infer._normal_kl import normal_kl
from pyro_flipout.nn import bayesianize

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
            if self._probe is not None:  # a run of the audit
                return
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


# ------------------------------------------------------------------ CUDA graphs


class NothingRead(TorchDispatchMode):
    """Forbids what reads numbers off a device, which would end the capture of a CUDA graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(mean_field_elbo, "graphed", lambda: True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("make", [AutoMeanField, AutoNormal])
def test_captured_loss_is_the_same(make, options, monkeypatch):
    guide, elbo = make(regression), MeanFieldELBO(**options)
    guide(X, Y)
    loss, grads = loss_and_grads(elbo, guide)
    monkeypatch.setattr(mean_field_elbo, "graphed", lambda: True)
    pyro.set_rng_seed(3)
    guide.zero_grad()
    with NothingRead():
        ours = elbo.differentiable_loss(flipout(regression), guide, X, Y)
        ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    for p, grad in zip(guide.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_pyros_loss_is_read():
    """What the test above forbids is what Pyro's does."""
    guide = AutoMeanField(regression)
    guide(X, Y)
    with NothingRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        TraceMeanField_ELBO().differentiable_loss(flipout(regression), guide, X, Y)


@pytest.mark.usefixtures("unchecked", "capturing")
def test_captured_loss_of_an_auxiliary_site():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        aux = pyro.sample("aux", dist.Normal(0.3, 2.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(aux, 0.5))

    pyro.set_rng_seed(0)
    ours = MeanFieldELBO().differentiable_loss(model, guide)
    pyro.set_rng_seed(0)
    assert ours.item() == pytest.approx(TraceMeanField_ELBO().loss(model, guide), rel=1e-6)


@pytest.mark.usefixtures("unchecked", "capturing")
def test_captured_loss_of_a_guide_that_is_scaled_and_masked():
    mask = torch.tensor([True, False, True])

    def program(loc):
        with pyro.plate("plate", 3), poutine.scale(scale=0.3), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(loc, 1.0))

    model, guide = (lambda loc=loc: program(loc) for loc in (0.0, 2.0))
    ours = MeanFieldELBO().differentiable_loss(model, guide)
    assert ours.item() == pytest.approx(0.3 * 2 * 2.0, rel=1e-6)  # KL(N(2, 1) | N(0, 1)) = 2
    assert ours.item() == pytest.approx(TraceMeanField_ELBO().loss(model, guide), rel=1e-6)


@pytest.mark.usefixtures("unchecked", "capturing")
def test_captured_loss_of_a_site_that_is_masked_out():
    """Its KL divergence is a number."""

    def model():
        pyro.sample("gone", dist.Normal(0.0, 1.0).expand([3]).mask(False))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("gone", dist.Normal(1.0, 2.0).expand([3]).mask(False))
        pyro.sample("z", dist.Normal(0.3, 0.5))

    ours = MeanFieldELBO().differentiable_loss(model, guide)
    assert ours.item() == pytest.approx(TraceMeanField_ELBO().loss(model, guide), rel=1e-6)


@pytest.mark.usefixtures("capturing")
def test_capture_refuses_validation():
    with pytest.raises(RuntimeError, match="call pyro.enable_validation"):
        MeanFieldELBO().differentiable_loss(regression, AutoMeanField(regression), X, Y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("width", [8, 2048])
def test_replayed_steps_train(width):
    """Every replay draws anew and trains as steps that are not captured do."""
    x = torch.randn(64, 8, device="cuda")
    y = x @ torch.randn(8, 3, device="cuda")
    net = torch.nn.Sequential(
        torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
    ).cuda()
    net = bayesianize(net)
    noise = torch.tensor(0.1, device="cuda")  # a number would be copied there in every step

    def model(x, y):
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    losses = {}
    for captured in (False, True):
        pyro.set_rng_seed(0)
        guide, elbo = AutoMeanField(model), MeanFieldELBO()
        guide(x, y)
        optimizer = torch.optim.Adam(guide.parameters(), 1e-2, capturable=True)

        def step(guide=guide, elbo=elbo, optimizer=optimizer):
            optimizer.zero_grad()
            loss = elbo.differentiable_loss(flipout(model), guide, x, y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        if captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static = step()

            def step(graph=graph, static=static):
                graph.replay()
                return static

        losses[captured] = [step().item() for _ in range(300)]
        assert len(set(losses[captured])) == 300
    first, last = (
        torch.tensor([losses[c][s] for c in (False, True)]) for s in (slice(5), slice(-50, None))
    )
    first, last = first.mean(1), last.mean(1)
    assert (last < 0.3 * first).all()
    assert last[0] == pytest.approx(last[1], rel=0.1)
