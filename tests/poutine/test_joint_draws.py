"""Draws of a guide that have something in common: none of them may be flipped on its own."""

import warnings
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoNormal,
    AutoStructured,
)
from torch.distributions.transforms import AffineTransform

from pyro_flipout import FlipoutWarning, NotSymmetricError, flipout, symmetric_center
from pyro_flipout.infer import AutoMeanField
from tests.helpers import Recording, kinds

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


def prior():
    return dist.Normal(0.0, 1.0).expand([3]).to_event(1)


def difference(x):
    """0 for every example where the two weights are one."""
    return x @ pyro.sample("w", prior()) - x @ pyro.sample("v", prior())


def draw(name, size=3, auxiliary=True):
    loc = pyro.param(f"{name}_loc", torch.zeros(size))
    infer = {"is_auxiliary": True} if auxiliary else {}
    return pyro.sample(name, dist.Normal(loc, 1.0).to_event(1), infer=infer)


def point(name, value):
    pyro.sample(name, dist.Delta(value, event_dim=value.dim()))


def one_draw_for_both(x):
    e = draw("e")
    point("w", e)
    point("v", e)


def a_site_again(x):
    point("v", draw("w", auxiliary=False))


def run(guide, model, x=X):
    """The handler, the model's output, and its warnings."""
    handler = Recording()
    trace = poutine.trace(guide).get_trace(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A function of its own: what an audit found with another guide is kept with the model.
        out = poutine.replay(handler(lambda x: model(x)), trace=trace)(x)
    return handler, out, [w for w in caught if issubclass(w.category, FlipoutWarning)]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("guide", [one_draw_for_both, a_site_again])
def test_two_sites_of_one_draw_stay_shared(guide, grad):
    with torch.set_grad_enabled(grad):
        handler, out, told = run(guide, difference)
    assert (out == 0).all()
    other = "v" if guide is a_site_again else "w"  # what v is told
    assert "site 'v' depends on it" in handler.decisions["w"]
    assert f"site '{other}' depends on it" in handler.decisions["v"]
    assert len(told) == 2


@pytest.mark.parametrize("overlap", [0, 1])
def test_parts_of_one_draw(overlap):
    """Disjoint parts are flipped, though they interleave; parts with one element in common not."""

    def guide(x):
        e = draw("e", 6)
        point("w", e[:3] if overlap else e[::2])
        point("v", e[2:5] if overlap else e[1::2])

    handler, _, told = run(guide, difference)
    if overlap:
        assert set(handler.decisions.values()) == set(DEPENDS)
    else:
        assert set(kinds(handler.decisions).values()) == {"flipped"}
    assert len(told) == 2 * overlap


DEPENDS = [
    f"shared: site '{on}' depends on it, so that the two are not independent draws; "
    f"hide '{name}', or draw '{on}' from a factorised guide"
    for name, on in (("w", "v"), ("v", "w"))
]


@pytest.mark.parametrize(
    "view",
    [lambda e: e[:3].expand(2, 3), lambda e: e[:4].unfold(0, 3, 1)],
    ids=["expand", "unfold"],
)
def test_a_point_that_has_an_element_twice_stays_shared(view):
    def model(x):
        return x @ pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)).mT

    handler, _, told = run(lambda x: point("w", view(draw("e", 8))), model)
    assert "several of its elements are one" in handler.decisions["w"]
    assert len(told) == 1
    for once in (
        lambda e: e[:6].view(3, 2).mT,
        lambda e: e.as_strided((2, 3), (3, 2)),  # elements 0, 2, 4 and 3, 5, 7
    ):
        handler = run(lambda x, once=once: point("w", once(draw("e", 8))), model)[0]
        assert handler.decisions["w"].startswith("flipped")


def test_noise_that_elements_have_in_common_is_not_factorised():
    base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    wide = [AffineTransform(torch.zeros(3), torch.ones(3), event_dim=1)]
    with pytest.raises(NotSymmetricError, match="noise in common"):
        symmetric_center(dist.TransformedDistribution(base, wide))
    batch = dist.TransformedDistribution(dist.Normal(torch.zeros(1), 1.0), [AffineTransform(X, 1)])
    assert torch.equal(symmetric_center(batch), X)


@pytest.mark.parametrize("outside", [True, False])
def test_equalized_sites_stay_shared(outside):
    handler = Recording()
    model = (
        handler(poutine.equalize(difference, ["w", "v"]))
        if outside
        else poutine.equalize(handler(difference), ["w", "v"])
    )
    with pytest.warns(FlipoutWarning, match="'w' keeps its shared draw: poutine.equalize"):
        assert (model(X) == 0).all()


def test_evaluation_remembers_what_training_saw():
    """Without autograd no dependence can be seen."""

    def model(x):
        mean = difference(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=torch.zeros(len(x)))

    def guide(x):
        w = draw("w", auxiliary=False)
        pyro.sample("v", dist.Normal(w, 1e-4).to_event(1))

    handler = Recording()
    svi = SVI(handler(model), guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO())
    with pytest.warns(FlipoutWarning, match="site 'v' depends on it"):
        svi.step(X)
    trained = handler.decisions["w"]
    svi.evaluate_loss(X)
    assert handler.decisions["w"] == trained


def test_a_structured_guide_is_told_of():
    guide = AutoStructured(difference, conditionals="normal")
    with pytest.warns(FlipoutWarning, match="in a way that flipout cannot see through"):
        poutine.replay(flipout(difference), trace=poutine.trace(guide).get_trace(X))(X)


def test_a_point_beside_an_autonormal_is_a_point():
    guide = AutoGuideList(difference)
    guide.append(AutoDelta(poutine.block(difference, hide=["w"])))
    guide.append(AutoNormal(poutine.block(difference, hide=["v"])))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            handler, _, told = run(guide, difference)
        assert not told
        assert "point" in handler.decisions["v"]
        assert handler.decisions["w"].startswith("flipped")


def test_particles_of_a_common_draw_are_flipped():
    """Parts of one draw whose particles lie between each other's."""
    guide = AutoDiagonalNormal(difference)
    guide(X)
    with pyro.plate("num_particles_vectorized", 3, dim=-2):
        trace = poutine.trace(guide).get_trace(X)
    handler = Recording()
    with pyro.plate("num_particles_vectorized", 3, dim=-2):
        poutine.replay(handler(lambda: [pyro.sample(n, prior()) for n in "wv"]), trace=trace)()
    assert set(kinds(handler.decisions).values()) == {"flipped"}


def test_a_new_distribution_of_a_guides_class_draws():
    guide = AutoMeanField(difference)
    fn = poutine.trace(guide).get_trace(X).nodes["w"]["fn"].base_dist
    assert type(fn)(torch.zeros(2), torch.ones(2)).rsample().shape == (2,)


def test_a_trace_whose_nodes_were_replaced():
    def dependent(x):
        point("v", 3 * draw("w", auxiliary=False))

    def apart(x):
        draw("w", auxiliary=False)
        draw("v", auxiliary=False)

    trace, other = (poutine.trace(guide).get_trace(X) for guide in (apart, dependent))
    handler = Recording()
    flipped = poutine.replay(handler(difference), trace=trace)
    flipped(X)
    assert set(kinds(handler.decisions).values()) == {"flipped"}
    for name in "wv":
        trace.nodes[name] = other.nodes[name]
    with pytest.warns(FlipoutWarning, match="'v' depends on it"):
        flipped(X)
    assert "depends" in handler.decisions["w"]


class Keeps(dist.TorchDistribution):
    """A Normal that keeps its parameters where nobody looks."""

    arg_constraints: ClassVar = {}
    support = torch.distributions.constraints.real_vector
    has_rsample = True

    def __init__(self, loc):
        self.kept = {"loc": loc}
        super().__init__(event_shape=loc.shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return self.kept["loc"] + torch.randn(self.event_shape)

    def log_prob(self, value):
        return -0.5 * (value - self.kept["loc"]).square().sum(-1)


@pytest.mark.parametrize("last", [True, False])
def test_a_dependence_that_a_distribution_hides(last):
    def model(x):
        for name in "abc" if last else "ab":
            pyro.sample(name, prior())

    def guide(x):
        b = pyro.sample("b", Keeps(2 * draw("a", auxiliary=False)))
        if last:
            pyro.sample("c", dist.Normal(2 * b, 1.0).to_event(1))

    handler, _, told = run(guide, model)
    assert "depends on it" in handler.decisions["a"]
    assert told
