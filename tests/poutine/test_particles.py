"""Vectorised particles and parallel Predictive with stock layers."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import nn

from pyro_flipout import FlipoutWarning, flipout
from tests.helpers import Recording, bayesian, kinds, mlp

K, N = 3, 5


class Conv(nn.Module):
    """Convolution, norms and a dense head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose1d(4, 2, 2)
        self.layer_norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        h = torch.tanh(self.norm(self.conv(x)))
        return self.head(self.layer_norm(self.up(h))).sum(-2)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.act = nn.PReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.act(self.embed(x)).mean(-2))


class Shifted(nn.Module):
    """Layers of weights that are functions of weights."""

    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
        self.b = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        w = torch.where(torch.arange(2) > 0, self.w + 1, self.w * self.u)
        w = torch.cat([w.masked_fill(torch.eye(3, 2) > 0, 0.5), self.u - self.w], -1)
        return torch.nn.functional.linear(x, torch.nn.functional.pad(w, (1, 0)), self.b)


NETS = {
    "mlp": (lambda: mlp((4, 6, 3)), lambda n: torch.randn(n, 4)),
    "conv": (Conv, lambda n: torch.randn(n, 2, 6)),
    "tokens": (Tokens, lambda n: torch.randint(0, 7, (n, 8))),
}


def model_of(net):
    net = bayesian(net)

    def model(x, y=None):
        mean = net(x)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    return model


def vectorised(fn):
    def run(*args):
        with pyro.plate("num_particles_vectorized", K, dim=-2):
            return fn(*args)

    return run


@pytest.mark.parametrize("batch", [N, K])  # K examples: sizes alone do not tell
@pytest.mark.parametrize(
    ("name", "flipped"), [*itertools.product(NETS, (True, False)), ("shifted", True)]
)
def test_particles_equal_sequential_ones(name, batch, flipped, float64):
    """The same draws give the same densities, particle by particle and example by example."""
    make, data = {**NETS, "shifted": (Shifted, lambda n: torch.randn(n, 5))}[name]
    net = make()
    plain = dict(net.named_parameters())
    model = model_of(net)
    x, y = data(batch), torch.randn(batch, 3)
    guide = AutoNormal(model)
    guide(x, y)
    trace = poutine.trace(vectorised(guide)).get_trace(x, y)
    options = {} if flipped else {"hide_fn": lambda site: True}
    handler = Recording(on_missing_rule="error", **options)
    out = poutine.trace(poutine.replay(vectorised(handler(model)), trace=trace)).get_trace(x, y)
    out.compute_log_prob()
    assert out.nodes["y"]["log_prob"].shape == (K, batch)
    reference = make()
    for k in range(K):
        for n in range(batch):
            weights = {}
            for site in plain:
                value = trace.nodes[site]["value"]  # (K, 1, *)
                value = handler.seen[site].materialize()[n] if flipped else value
                weights[site] = value[k, 0]
            mean = torch.func.functional_call(reference, weights, (x[n : n + 1],))
            expected = dist.Normal(mean, 1.0).to_event(1).log_prob(y[n : n + 1])
            torch.testing.assert_close(out.nodes["y"]["log_prob"][k, n], expected[0])


@pytest.mark.parametrize("batch", [N, K])
@pytest.mark.parametrize("plates", [1, 2])
def test_scalars_and_scales_of_particles(batch, plates, float64):
    """A scalar and a second scale meet data that have particles already."""

    def model(x):
        normal = dist.Normal(0.0, 1.0)
        w, v = (pyro.sample(n, normal.expand([2]).to_event(1)) for n in "wv")
        b = pyro.sample("b", normal)
        return (torch.tanh(x * w) * v).sum(-1) * b + b

    x = torch.randn(batch, 2) if plates == 1 else torch.randn(4, batch, 2)  # (T, N, in)
    guide = AutoNormal(model)
    guide(x)

    def run(fn, *args):
        with pyro.plate("num_particles_vectorized", K, dim=-plates - 1):
            return fn(*args)

    trace = poutine.trace(run).get_trace(guide, x)
    handler = Recording(on_missing_rule="error", example_dim=plates - 1)
    out = poutine.replay(run, trace=trace)(handler(model), x)
    assert set(kinds(handler.decisions).values()) == {"flipped"}
    seen = {n: weight.materialize(batch) for n, weight in handler.seen.items()}
    for k in range(K):
        for n in range(batch):
            w, v, b = (seen[name][n, k].reshape(-1) for name in "wvb")
            expected = (torch.tanh(x[..., n, :] * w) * v).sum(-1) * b + b
            torch.testing.assert_close(out[k, ..., n], expected.reshape(out[k, ..., n].shape))


def test_one_particle_meets_data_with_as_many_dimensions(float64):
    def model(x):
        return x * pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    x = torch.randn(N, 4, 2)
    handler = Recording(on_missing_rule="error")
    with pyro.plate("num_particles_vectorized", 1, dim=-2):
        out = handler(model)(x)  # (N, 4, 2)
    w = handler.seen["w"].materialize()  # (N, 1, 1, 2)
    torch.testing.assert_close(out, x * w[:, 0])


@pytest.mark.parametrize("use", [torch.mul, torch.add, lambda x, s: torch.where(x > 0, x, s)])
def test_data_have_particles_after_arithmetic(use, float64):
    """As many particles as examples: sizes alone do not tell."""

    def model(x):
        s, u, w = (
            pyro.sample(n, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
            for n, shape in (("s", [2]), ("u", [3, 4]), ("w", [4, 2]))
        )
        return torch.nn.functional.linear(torch.tanh(use(x, s)), u @ w)

    x, guide = torch.randn(K, 2), AutoNormal(model)
    guide(x)
    trace = poutine.trace(vectorised(guide)).get_trace(x)
    handler = Recording(on_missing_rule="error")
    out = poutine.replay(vectorised(handler(model)), trace=trace)(x)
    assert out.shape == (K, K, 3)
    seen = {name: weight.materialize(K) for name, weight in handler.seen.items()}
    for k in range(K):
        for n in range(K):
            s, u, w = (seen[name][n, k, 0] for name in "suw")
            torch.testing.assert_close(out[k, n], (u @ w) @ torch.tanh(use(x[n], s)))


def test_products_of_matrices_with_particles_are_shared():
    def model(x):
        w, v = (
            pyro.sample(n, dist.Normal(0.0, 1.0).expand(shape).to_event(2))
            for n, shape in (("w", [2, 4]), ("v", [4, 3]))
        )
        return torch.tanh(x @ w) @ v

    x, handler = torch.randn(N, 2), Recording()
    with (
        pyro.plate("num_particles_vectorized", K, dim=-2),
        pytest.warns(FlipoutWarning, match="'[wv]' keeps its shared draw"),
    ):
        out = handler(model)(x)
    assert out.shape == (K, 1, N, 3)
    assert all(d.startswith("shared") for d in handler.decisions.values())


def test_particles_have_signs_of_their_own():
    model = model_of(mlp((4, 6, 3)))
    x = torch.randn(64, 4)
    guide = AutoNormal(model)
    guide(x)
    trace = poutine.trace(vectorised(guide)).get_trace(x)
    handler = Recording()
    poutine.replay(vectorised(handler(model)), trace=trace)(x)
    w = handler.seen["0.weight"]
    signs = torch.sign((w.materialize() - w.center) / w.delta)
    assert signs.shape == (64, K, 1, 6, 4)
    assert not torch.equal(signs[:, 0], signs[:, 1])


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceMeanField_ELBO])
def test_training(guide_class, elbo_class):
    model = model_of(mlp((4, 6, 3)))
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    elbo = elbo_class(num_particles=K, vectorize_particles=True)
    svi = SVI(flipout(model), guide_class(model), pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = [svi.step(x, y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert torch.isfinite(torch.tensor(svi.step(x[:7], y[:7])))


def test_shared_sites_are_batched_too():
    model = model_of(mlp((4, 6, 3)))
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    elbo = Trace_ELBO(num_particles=K, vectorize_particles=True)
    guide = AutoLowRankMultivariateNormal(model)
    svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    with pytest.warns(FlipoutWarning, match="correlated"):
        assert torch.isfinite(torch.tensor(svi.step(x, y)))


def test_vectorised_elbo_has_the_mean_of_sequential_ones():
    model = model_of(mlp((4, 6, 3)))
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    guide = AutoNormal(model, init_scale=0.2)
    guide(x, y)
    samples = {}
    for vectorize in (False, True):
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorize)
        fn = flipout(model)
        samples[vectorize] = torch.tensor([elbo.loss(fn, guide, x, y) for _ in range(200)])
    a, b = samples[False], samples[True]
    error = (a.var() / 200 + b.var() / 200).sqrt()
    assert (a.mean() - b.mean()).abs() < 4.9 * error  # two-sided 1e-6


@pytest.mark.parametrize("name", NETS)
def test_parallel_predictive(name):
    """Runs with stock layers inside the handler, and equals the sequential one."""
    make, data = NETS[name]
    net, x = make(), data(N)
    samples = {n: torch.randn(K, *p.shape) for n, p in net.named_parameters()}
    means = [
        torch.func.functional_call(net, {n: w[k] for n, w in samples.items()}, (x,))
        for k in range(K)
    ]
    model = model_of(net)
    for parallel in (False, True):
        pyro.set_rng_seed(0)
        predictive = Predictive(flipout(model), posterior_samples=samples, parallel=parallel)
        y = predictive(x)["y"]
        assert type(y) is torch.Tensor
        assert y.shape == (K, N, 3)
        # The likelihood has scale 1: 45 standard normal errors.
        assert (y - torch.stack(means)).pow(2).mean() < 4


def test_predictive_draws_are_coherent():
    """Predictive never flips: one weight for all inputs of a draw."""
    net = bayesian(nn.Linear(2, 1))

    def model(x):
        pyro.deterministic("f", net(x))

    x = torch.ones(6, 2)
    samples = {"weight": torch.randn(K, 1, 2), "bias": torch.randn(K, 1)}
    for parallel in (False, True):
        f = Predictive(flipout(model), posterior_samples=samples, parallel=parallel)(x)["f"]
        expected = samples["weight"].sum(-1, keepdim=True) + samples["bias"][:, None]
        torch.testing.assert_close(f.reshape(K, 6, 1), expected.expand(K, 6, 1))
