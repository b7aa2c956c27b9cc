# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import pytest
import torch
import torch.distributions as torch_dist
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch.distributions import AffineTransform, ComposeTransform, ExpTransform
from torch.distributions.transforms import IndependentTransform, identity_transform

from pyro_flipout.errors import NotSymmetricError
from pyro_flipout.symmetric import (
    SYMMETRIC,
    is_symmetric,
    register_symmetric,
    symmetric_center,
    why_not_symmetric,
)
from pyro_flipout.testing import check_symmetric


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


LOC = tensor(1.0, -2.0, 3.0)
SCALE = tensor(0.1, 1.0, 3.0)
ZERO, ONE, HALF = torch.tensor(0.0), torch.tensor(1.0), torch.full((3,), 0.5).double()
COLUMN = tensor(5.0, 7.0)[:, None]


def affine(base, *transforms, of=dist):
    return of.TransformedDistribution(base, list(transforms))


class Plain(dist.TorchDistribution):
    """A distribution without `expand` of its own, so that Pyro wraps it."""

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape=()):
        return self.loc + torch.randn(*sample_shape, *self.loc.shape, dtype=self.loc.dtype)


@pytest.fixture(autouse=True)
def _same_registry():
    before = dict(SYMMETRIC)
    yield
    SYMMETRIC.clear()
    SYMMETRIC.update(before)


def register(cls, center):
    """Registers a centre in place of the one the class has."""
    SYMMETRIC.pop(cls, None)
    register_symmetric(cls)(center)


# Distribution and its centre. A line here is all that a new distribution needs.
ACCEPTED = {
    "Normal": (dist.Normal(LOC, SCALE), LOC),
    "torch Normal": (torch_dist.Normal(LOC, SCALE), LOC),
    "NanMaskedNormal": (dist.NanMaskedNormal(LOC, SCALE), LOC),
    "NonreparameterizedNormal": (NonreparameterizedNormal(LOC, SCALE), LOC),
    "Laplace": (dist.Laplace(LOC, SCALE), LOC),
    "torch Laplace": (torch_dist.Laplace(LOC, SCALE), LOC),
    "StudentT": (dist.StudentT(tensor(1.0, 3.0, 9.0), LOC, SCALE), LOC),
    "torch StudentT": (torch_dist.StudentT(3.0, LOC, SCALE), LOC),
    "Cauchy": (dist.Cauchy(LOC, SCALE), LOC),
    "torch Cauchy": (torch_dist.Cauchy(LOC, SCALE), LOC),
    "Logistic": (dist.Logistic(LOC, SCALE), LOC),
    "SoftLaplace": (dist.SoftLaplace(LOC, SCALE), LOC),
    "Uniform": (dist.Uniform(tensor(-1.0, 0.0, 2.5), tensor(1.0, 3.0, 3.0)), tensor(0, 1.5, 2.75)),
    "torch Uniform": (torch_dist.Uniform(LOC, LOC + 1), LOC + 0.5),
    "Stable": (dist.Stable(tensor(0.7, 1.0, 1.7), ZERO, SCALE, LOC), LOC),
    "Stable in S": (dist.Stable(tensor(0.7, 1.0, 1.7), ZERO, SCALE, LOC, coords="S"), LOC),
    "StableWithLogProb": (dist.StableWithLogProb(tensor(1.7), ZERO, ONE, LOC), LOC),
    "fair Bernoulli": (dist.Bernoulli(HALF), HALF),
    "fair torch Bernoulli": (torch_dist.Bernoulli(logits=0 * HALF), HALF),
    "fair scalar Bernoulli": (dist.Bernoulli(HALF[0]), HALF[0]),
    "Delta": (dist.Delta(LOC), LOC),
    "Delta with event": (dist.Delta(LOC, event_dim=1), LOC),
    "zero-dim": (dist.Normal(LOC[0], 1.0), LOC[0]),
    "far from zero": (dist.Normal(1e6 + LOC, 1e-2), 1e6 + LOC),
    "to_event": (dist.Normal(LOC, SCALE).to_event(1), LOC),
    "torch Independent": (torch_dist.Independent(torch_dist.Normal(LOC, SCALE), 1), LOC),
    "nested Independent": (
        torch_dist.Independent(torch_dist.Independent(dist.Cauchy(LOC + COLUMN, 1.0), 1), 1),
        LOC + COLUMN,
    ),
    "expand": (dist.Normal(LOC[0], 1.0).expand([3, 4]).to_event(2), LOC[0].expand(3, 4)),
    "ExpandedDistribution": (
        dist.ExpandedDistribution(dist.Normal(LOC, 1.0), [2, 3]),
        LOC.expand(2, 3),
    ),
    "ExpandedDistribution inside": (
        dist.ExpandedDistribution(dist.Laplace(COLUMN, 1.0).to_event(1), [4, 2]),
        COLUMN.expand(4, 2, 1),
    ),
    "ExpandedDistribution between": (
        dist.ExpandedDistribution(dist.Normal(COLUMN, 1.0), [2, 3]),
        COLUMN.expand(2, 3),
    ),
    "mask": (dist.Normal(LOC, SCALE).mask(torch.tensor([True, False, True])), LOC),
    "mask that expands": (dist.Normal(LOC, SCALE).mask(torch.ones(2, 3)), LOC.expand(2, 3)),
    "mask(False)": (dist.Normal(LOC, SCALE).mask(False), LOC),
    "mask to_event": (dist.Normal(LOC, SCALE).mask(False).to_event(1), LOC),
    "affine": (affine(dist.Normal(LOC, SCALE), AffineTransform(2.0, -3.0)), 2 - 3 * LOC),
    "torch affine": (
        affine(torch_dist.Laplace(LOC, SCALE), AffineTransform(2.0, -3.0), of=torch_dist),
        2 - 3 * LOC,
    ),
    "affine that expands": (
        affine(dist.Normal(LOC[0], 1.0), AffineTransform(COLUMN, LOC)),
        COLUMN + LOC * LOC[0],
    ),
    "affine with event": (
        affine(dist.Normal(LOC, SCALE), AffineTransform(LOC, SCALE, event_dim=1)),
        LOC + SCALE * LOC,
    ),
    "two affine": (
        affine(dist.Uniform(LOC, LOC + 2), AffineTransform(1.0, 2.0), AffineTransform(3.0, SCALE)),
        3 + SCALE * (1 + 2 * (LOC + 1)),
    ),
    "no transform": (affine(dist.Normal(LOC, SCALE)), LOC),
    "identity": (affine(dist.Normal(LOC, SCALE), identity_transform), LOC),
    "ComposeTransform": (
        affine(
            dist.Normal(LOC, SCALE),
            ComposeTransform([AffineTransform(1.0, 2.0), AffineTransform(5.0, 4.0)]),
        ),
        5 + 4 * (1 + 2 * LOC),
    ),
    "ComposeTransform.inv": (
        affine(
            dist.Normal(LOC, SCALE),
            ComposeTransform([AffineTransform(1.0, 2.0), AffineTransform(5.0, 4.0)]).inv,
        ),
        ((LOC - 5) / 4 - 1) / 2,
    ),
    "IndependentTransform": (
        affine(dist.Normal(LOC, SCALE), IndependentTransform(AffineTransform(1.0, 2.0), 1)),
        1 + 2 * LOC,
    ),
    "AffineTransform.inv": (
        affine(dist.Normal(LOC, SCALE), AffineTransform(1.0, 2.0).inv),
        (LOC - 1) / 2,
    ),
    "IndependentTransform.inv": (
        affine(dist.Normal(LOC, SCALE), IndependentTransform(AffineTransform(1.0, 2.0), 1).inv),
        (LOC - 1) / 2,
    ),
    "IndependentTransform of ComposeTransform, inverse": (
        affine(
            dist.Normal(LOC, SCALE),
            IndependentTransform(
                ComposeTransform([AffineTransform(1.0, 2.0), AffineTransform(5.0, 4.0)]), 1
            ).inv,
        ),
        ((LOC - 5) / 4 - 1) / 2,
    ),
    "inverse of an inverse": (
        affine(dist.Normal(LOC, SCALE), IndependentTransform(AffineTransform(1.0, 2.0).inv, 1).inv),
        1 + 2 * LOC,
    ),
    "affine of affine": (
        affine(
            affine(dist.Normal(LOC, SCALE), AffineTransform(1.0, 2.0)), AffineTransform(3.0, 4.0)
        ),
        3 + 4 * (1 + 2 * LOC),
    ),
    "affine of mask": (
        affine(dist.Normal(LOC, SCALE).mask(False), AffineTransform(1.0, 2.0)),
        1 + 2 * LOC,
    ),
    "DropConnect": (affine(dist.Bernoulli(HALF), AffineTransform(0.0, 2 * LOC)), LOC),
}

NORMAL = dist.Normal(LOC, SCALE)
EYE = torch.eye(3, dtype=torch.float64)

# Distribution and words of the reason.
REFUSED = {
    "MultivariateNormal": (dist.MultivariateNormal(LOC, EYE), "components are correlated"),
    "torch MultivariateNormal": (
        torch_dist.MultivariateNormal(LOC, EYE),
        "MultivariateNormal is not factorised",
    ),
    "OMTMultivariateNormal": (dist.OMTMultivariateNormal(LOC, EYE), "correlated"),
    "LowRankMultivariateNormal": (
        dist.LowRankMultivariateNormal(LOC, EYE, SCALE),
        "components are correlated",
    ),
    "MultivariateStudentT": (dist.MultivariateStudentT(3.0, LOC, EYE), "components are correlated"),
    "Dirichlet": (dist.Dirichlet(SCALE), "components are correlated"),
    "Gamma": (dist.Gamma(SCALE, SCALE), "Gamma is not symmetric about any centre"),
    "Chi2": (dist.Chi2(SCALE), "Chi2 is not symmetric about any centre"),
    "Exponential": (dist.Exponential(SCALE), "not symmetric about any centre"),
    "Poisson": (dist.Poisson(SCALE), "not symmetric about any centre"),
    "Beta": (dist.Beta(SCALE, SCALE), r"register it with @pyro_flipout.register_symmetric\(Beta\)"),
    "Categorical": (dist.Categorical(SCALE), "Categorical is not known to be symmetric"),
    "Plain": (Plain(LOC), "pyro_flipout.testing.check_symmetric"),
    "Bernoulli": (dist.Bernoulli(tensor(0.5, 0.4)), "only at probs = 0.5.*noise that .*shares"),
    "Bernoulli logits": (dist.Bernoulli(logits=tensor(0.0, 1e-9)), "only at probs = 0.5"),
    "Bernoulli nearly fair": (dist.Bernoulli(HALF + 1e-12), "only at probs = 0.5"),
    "skewed Stable": (dist.Stable(1.5, tensor(0.0, 0.1)), "symmetric only at skew = 0"),
    "pushed through exp": (affine(NORMAL, ExpTransform()), "ExpTransform is not affine"),
    "pushed through log": (
        affine(dist.Uniform(LOC + 9, LOC + 10), ExpTransform().inv),
        r"ExpTransform\.inv is not affine",
    ),
    "exp inside a composition": (
        affine(NORMAL, ComposeTransform([AffineTransform(0.0, 1.0), ExpTransform()])),
        "ExpTransform is not affine",
    ),
    "exp inside independent": (
        affine(NORMAL, IndependentTransform(ExpTransform(), 1)),
        "ExpTransform is not affine",
    ),
    "mixed elements": (
        affine(NORMAL, dist.transforms.LowerCholeskyAffine(LOC, EYE)),
        "LowerCholeskyAffine is not affine element by element",
    ),
    "affine image of a Gamma": (affine(dist.Gamma(SCALE, 1.0), AffineTransform(0.0, 1.0)), "Gamma"),
    "Independent": (dist.LogNormal(LOC, SCALE).to_event(1), "ExpTransform"),
    "mask": (dist.MultivariateNormal(LOC, EYE).mask(False), "correlated"),
    "ExpandedDistribution": (
        dist.ExpandedDistribution(dist.Gamma(SCALE, 1.0), [2, 3]),
        "Gamma is not symmetric",
    ),
    "AffineBeta": (dist.AffineBeta(SCALE, SCALE, 0.0, 2.0), "Beta is not known"),
    "FoldedDistribution": (dist.FoldedDistribution(NORMAL), "AbsTransform is not affine"),
    "Gumbel": (dist.Gumbel(LOC, SCALE), "Gumbel is not known .* is not affine"),
    "HalfCauchy": (dist.HalfCauchy(SCALE), "AbsTransform is not affine"),
    "HalfNormal": (dist.HalfNormal(SCALE), "AbsTransform is not affine"),
    "InverseGamma": (dist.InverseGamma(SCALE, SCALE), "Gamma is not symmetric"),
    "Kumaraswamy": (dist.Kumaraswamy(SCALE, SCALE), "is not affine"),
    "LKJ": (dist.LKJ(3, ONE), "correlated"),
    "LogNormal": (dist.LogNormal(LOC, SCALE), "ExpTransform is not affine"),
    "torch LogNormal": (torch_dist.LogNormal(LOC, SCALE), "ExpTransform is not affine"),
    "LogisticNormal": (dist.LogisticNormal(LOC, SCALE), "StickBreakingTransform is not affine"),
    "Pareto": (dist.Pareto(SCALE, SCALE), "Exponential is not symmetric"),
    "RelaxedBernoulli": (dist.RelaxedBernoulli(ONE, HALF), "LogitRelaxedBernoulli is not known"),
    "RelaxedBernoulliStraightThrough": (
        dist.RelaxedBernoulliStraightThrough(ONE, HALF),
        "LogitRelaxedBernoulli is not known",
    ),
    "RelaxedOneHotCategorical": (dist.RelaxedOneHotCategorical(ONE, HALF), "is not known"),
    "RelaxedOneHotCategoricalStraightThrough": (
        dist.RelaxedOneHotCategoricalStraightThrough(ONE, HALF),
        "is not known",
    ),
    "Weibull": (dist.Weibull(SCALE, SCALE), "Exponential is not symmetric"),
}


# ----------------------------------------------------------------- the registry


@pytest.mark.parametrize(("fn", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_center(fn, expected):
    center = symmetric_center(fn)
    assert center.shape == torch.Size(fn.batch_shape) + fn.event_shape
    assert center.dtype == torch.float64
    torch.testing.assert_close(center, expected, rtol=1e-15, atol=0)
    assert is_symmetric(fn)
    assert why_not_symmetric(fn) is None


@pytest.mark.parametrize(("fn", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(fn, words):
    with pytest.raises(NotSymmetricError, match=words):
        symmetric_center(fn)
    with pytest.raises(NotSymmetricError, match=words):
        raise NotSymmetricError(why_not_symmetric(fn))
    assert not is_symmetric(fn)


def test_every_subclass_has_a_case():
    # A subclass goes by its parent's registration: each one that Pyro ships is looked at.
    known = {type(fn) for fn, _ in [*ACCEPTED.values(), *REFUSED.values()]}
    for name, cls in vars(dist).items():
        if isinstance(cls, type) and not SYMMETRIC.keys().isdisjoint(cls.__mro__):
            assert cls in known, f"{name} inherits a registration; add it to ACCEPTED or REFUSED"


def test_every_registered_class_is_accepted_somewhere():
    covered = {cls for fn, _ in ACCEPTED.values() for cls in type(fn).__mro__}
    assert SYMMETRIC.keys() <= covered


def test_center_keeps_float32():
    center = symmetric_center(dist.Bernoulli(torch.full((2,), 0.5)))
    assert center.dtype == torch.float32


def test_nearest_class_decides():
    class Child(dist.Normal):
        pass

    torch.testing.assert_close(symmetric_center(Child(LOC, SCALE)), LOC)
    register(Child, lambda fn: fn.loc + 1)
    torch.testing.assert_close(symmetric_center(Child(LOC, SCALE)), LOC + 1)
    torch.testing.assert_close(symmetric_center(NORMAL), LOC)


def test_user_registration():
    fn = Plain(LOC).expand([2]).mask(False).to_event(1)
    assert type(fn.base_dist.base_dist) is dist.ExpandedDistribution
    assert not is_symmetric(fn)
    register(Plain, lambda fn: fn.loc)
    torch.testing.assert_close(symmetric_center(fn), LOC.expand(2, 3))
    check_symmetric(fn)


def test_register_several_returns_the_function():
    class Other(Plain):
        pass

    def center(fn):
        return fn.loc

    assert register_symmetric(Plain, Other)(center) is center
    assert SYMMETRIC[Plain] is center
    assert SYMMETRIC[Other] is center


def test_duplicate_registration():
    before = dict(SYMMETRIC)
    with pytest.raises(ValueError, match="Normal is registered already, by _loc; remove one"):
        register_symmetric(Plain, torch_dist.Normal)(lambda fn: fn.loc)
    assert before == SYMMETRIC


@pytest.mark.parametrize("classes", [(), ("Normal",), (NORMAL,), (len,)])
def test_register_wants_classes(classes):
    with pytest.raises(TypeError, match="expected one or more distribution classes, got"):
        register_symmetric(*classes)


def test_center_may_broadcast():
    register(Plain, lambda fn: fn.loc.new_zeros(1))
    assert symmetric_center(Plain(LOC)).shape == (3,)


def test_center_of_wrong_shape():
    register(Plain, lambda fn: fn.loc.new_zeros(2))
    with pytest.raises(ValueError, match=r"Plain has shape \(2,\), expected .* = \(3,\)"):
        symmetric_center(Plain(LOC))


@pytest.mark.parametrize(
    ("make", "slope"),
    [
        (lambda loc: dist.Normal(loc, SCALE).to_event(1), 1.0),
        (lambda loc: dist.Uniform(LOC - 9, loc), 0.5),
        (lambda loc: dist.Delta(loc).mask(False), 1.0),
        (lambda loc: dist.Stable(tensor(1.5), ZERO, ONE, loc), 1.0),
        (lambda loc: dist.ExpandedDistribution(dist.Cauchy(loc, 1.0), [2, 3]), 2.0),
        (lambda loc: affine(dist.Bernoulli(HALF), AffineTransform(0.0, 4 * loc)), 2.0),
        (lambda loc: affine(NORMAL, AffineTransform(-loc, 2.0).inv), 0.5),
    ],
)
def test_gradient_of_center(make, slope):
    loc = LOC.clone().requires_grad_()
    (grad,) = torch.autograd.grad(symmetric_center(make(loc)).sum(), loc)
    torch.testing.assert_close(grad, torch.full_like(loc, slope))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda part: part,
        lambda part: part.inv,
        lambda part: ComposeTransform([part]),
        lambda part: ComposeTransform([part]).inv,
        lambda part: IndependentTransform(part, 1, cache_size=1),
        lambda part: IndependentTransform(part, 1, cache_size=1).inv,
    ],
)
def test_center_leaves_the_cache_alone(wrap):
    part = AffineTransform(LOC, SCALE, cache_size=1)
    fn = affine(NORMAL, wrap(part))
    value = fn.rsample()
    transforms = [part, fn.transforms[0], fn.transforms[0].inv]
    caches = [getattr(transform, "_cached_x_y", None) for transform in transforms]
    assert any(item is value for item in caches[0])
    symmetric_center(fn)
    for transform, cache in zip(transforms, caches, strict=True):
        assert getattr(transform, "_cached_x_y", None) is cache


# ------------------------------------------------------------------- the oracle


class NoDensity(dist.TorchDistribution):
    """Draws ``draw(noise)`` of shape (n, size) without a density, about a centre of 0."""

    def __init__(self, draw, size):
        self.draw = draw
        super().__init__(torch.Size(), torch.Size([size]), validate_args=False)

    def rsample(self, sample_shape=()):
        return self.draw(torch.randn(*sample_shape, 3, dtype=torch.float64))

    def log_prob(self, value):
        raise NotImplementedError


def correlated(z):
    return torch.stack([z[:, 0] + z[:, 1], z[:, 1]], -1)


def skew_hidden_in_the_other(z):
    # Both elements are symmetric and uncorrelated; the size of one tells the skew of the other.
    skewed = z[:, 0].exp() - 1.6487
    return torch.stack([skewed * (1 - 2 * (z[:, 1].abs() > 0.67)), z[:, 1]], -1)


@pytest.mark.parametrize("fn", [fn for fn, _ in ACCEPTED.values()], ids=ACCEPTED)
def test_check_symmetric_passes(fn):
    check_symmetric(fn)


# Distribution, the class that is registered wrongly, its wrong centre, and words of the error.
WRONG = {
    "median of LogNormal": (
        dist.LogNormal(LOC, SCALE),
        torch_dist.LogNormal,
        lambda fn: fn.base_dist.loc.exp(),
        r"element \(\d,\) of LogNormal.*, reflected from .* changes log_prob from .* to .*"
        "correct the registered centre, or remove the registration",
    ),
    "correlated": (
        dist.MultivariateNormal(LOC, EYE + 0.5),
        torch_dist.MultivariateNormal,
        lambda fn: fn.loc,
        "changes log_prob from .* to",
    ),
    "correlated StudentT": (
        dist.MultivariateStudentT(3.0, LOC, EYE + 0.1 * EYE.roll(1, 0).tril()),
        dist.MultivariateStudentT,
        lambda fn: fn.loc,
        "changes log_prob from .* to",
    ),
    "shifted Normal": (
        dist.Normal(LOC, SCALE),
        torch_dist.Normal,
        lambda fn: fn.loc + tensor(0, 1e-6, 0),
        r"element \(1,\) of Normal.* about its centre -1.999999, changes log_prob",
    ),
    "shifted Normal.to_event": (
        dist.Normal(LOC + COLUMN, SCALE).to_event(2),
        torch_dist.Normal,
        lambda fn: fn.loc + tensor(0, 0, 1e-6),
        r"element \([01], 2\) of Independent.* changes log_prob",
    ),
    "lower end of a Uniform": (
        dist.Uniform(LOC, LOC + 1),
        torch_dist.Uniform,
        lambda fn: fn.low,
        "changes log_prob from 0 to -inf",
    ),
    "mean of a Gamma": (
        dist.Gamma(tensor(3.0), tensor(1.0)),
        torch_dist.Gamma,
        lambda fn: fn.mean,
        "element .* of Gamma.* changes log_prob",
    ),
    "skewed Stable": (
        dist.Stable(tensor(1.5), tensor(0.1)),
        dist.Stable,
        lambda fn: fn.loc,
        "element .* of Stable.* changes log_prob",
    ),
    "unfair Bernoulli": (
        dist.Bernoulli(tensor(0.5, 0.4)),
        torch_dist.Bernoulli,
        lambda fn: fn.probs.new_full((), 0.5),
        r"mean of sin\(.* t\) at element \(1,\) is .* expected 0 ±",
    ),
    "shifted Delta": (
        dist.Delta(LOC),
        dist.Delta,
        lambda fn: fn.v + tensor(0, 1e-9, 0),
        r"mean of sin\(.* t\) at element \(1,\)",
    ),
    "masked": (
        dist.Normal(LOC, SCALE).mask(False),
        torch_dist.Normal,
        lambda fn: fn.loc + tensor(0, 0, 1.0),
        r"mean of sin\(.* t\) at element \(2,\)",
    ),
    "heavy tails about 0.5, no density": (
        NoDensity(lambda z: z[:, :1] / z[:, 1:2] + 0.5, 1),
        NoDensity,
        lambda fn: tensor(0.0),
        r"mean of sin\(.* t\) at element \(0,\)",
    ),
    "correlated, no density": (
        NoDensity(correlated, 2),
        NoDensity,
        lambda fn: tensor(0.0),
        r"mean of sin\(.* t_i\) sin\(.* t_j\) at element \(.,\) and \(.,\)",
    ),
    "dependent, no density": (
        NoDensity(skew_hidden_in_the_other, 2),
        NoDensity,
        lambda fn: tensor(0.0),
        r"mean of sin\(.* t_i\) cos\(.* t_j\) at element \(0,\) and \(1,\)",
    ),
    "wrong shape": (
        NoDensity(correlated, 1),
        NoDensity,
        lambda fn: tensor(0.0),
        r"sample of NoDensity.* has shape \(2,\), but .* = \(1,\)",
    ),
    "nan draws": (
        NoDensity(lambda z: z.log(), 3),
        NoDensity,
        lambda fn: tensor(0.0),
        "of 5000 draws of NoDensity, .* are finite",
    ),
    "nan density": (
        dist.Cauchy(LOC, -SCALE, validate_args=False),
        torch_dist.Cauchy,
        lambda fn: fn.loc,
        "log_prob of a draw of Cauchy is nan",
    ),
}


@pytest.mark.parametrize(("fn", "cls", "center", "words"), WRONG.values(), ids=WRONG)
def test_check_symmetric_fails(fn, cls, center, words):
    register(cls, center)
    with pytest.raises(AssertionError, match=words):
        check_symmetric(fn)


def test_check_symmetric_refused():
    with pytest.raises(NotSymmetricError, match="Gamma"):
        check_symmetric(dist.Gamma(SCALE, SCALE))


@pytest.mark.parametrize("fn", [dist.Normal(0.0, 1.0), dist.Normal(LOC[:0], 1.0)])
def test_check_symmetric_wants_float64(fn):
    with pytest.raises(ValueError, match=r"in float64, got shape .* build it from float64"):
        check_symmetric(fn)


def test_check_symmetric_false_alarms():
    # The bound holds for any number of draws: 1e-6 each, where z = 2 would fail half of these.
    for num_samples in [1, 3, 30] * 50:
        check_symmetric(dist.StudentT(1.0, COLUMN + LOC, 1.0), num_samples)
