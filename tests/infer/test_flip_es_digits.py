# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""FlipES is as sample-efficient as independent perturbations of all members (IdealES)."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, vmap

from pyro_flipout.infer import FlipES, _es_population
from tests.helpers import Z

MEMBERS, IMAGES, SIGMA = 200, 16, 0.05


def images():
    digits = load_digits()
    return torch.tensor(digits.data[:IMAGES] / 16, dtype=torch.float), torch.tensor(
        digits.target[:IMAGES]
    )


def ideal(net, x, y):
    """Eq. 5 with a draw of its own for each member."""
    eps = {name: torch.randn(MEMBERS, *p.shape) for name, p in net.named_parameters()}
    own = {name: p.detach() + SIGMA * eps[name] for name, p in net.named_parameters()}
    out = vmap(lambda w: functional_call(net, w, (x,)))(own)  # (members, images, 10)
    fitness = torch.stack([-F.cross_entropy(o, y) for o in out])
    values = (fitness - fitness.mean()) / (MEMBERS - 1) / -SIGMA
    return torch.cat([torch.tensordot(values, e, 1).flatten() for e in eps.values()])


def flipped(es, x, y):
    es.module.zero_grad()
    with es.perturb(MEMBERS):
        out = es.module(x.repeat(MEMBERS, 1))
    loss = F.cross_entropy(out, y.repeat(MEMBERS), reduction="none")
    es.backward(-loss.view(MEMBERS, IMAGES).mean(1))
    return torch.cat([p.grad.flatten() for p in es.module.parameters()])


def variance(gradient, repeats, seed):
    """Summed variance of the estimate, all members on the same images, and its standard error."""
    x, y = images()
    torch.manual_seed(seed)
    grads = torch.stack([gradient(x, y) for _ in range(repeats)])
    squares = (grads - grads.mean(0)).pow(2).sum(1) * repeats / (repeats - 1)
    return squares.mean(), squares.std() / repeats**0.5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def check_variance(excess=0.0, repeats=100, **options):
    """The estimate's variance is that of IdealES plus ``excess`` squares of the gradient."""
    net = network()
    es = FlipES(net, SIGMA, seed=0, **options)
    best, error = variance(lambda x, y: ideal(net, x, y), repeats, 1)
    own, own_error = variance(lambda x, y: flipped(es, x, y), repeats, 2)
    x, y = images()
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), tuple(net.parameters()))
    wanted = best + excess * sum(g.pow(2).sum() for g in grads)
    assert (own - wanted).abs() < Z * (error**2 + own_error**2).sqrt(), (own, wanted)
    assert Z * error < 0.2 * best  # the check is sharp


@pytest.mark.slow
def test_forty_members_a_base():
    check_variance(2 / 5, num_bases=5)


@pytest.mark.slow
def test_one_base_adds_what_theory_says():
    check_variance(2)


@pytest.mark.slow
def test_one_base_of_equal_sizes_is_as_good_as_independent_members():
    check_variance(distribution="rademacher")


@pytest.mark.slow
def test_planted_bug(monkeypatch):
    # Few bits: many members see the same weights.
    right = _es_population.MemberDraw.__init__

    def few_bits(self, *args):
        right(self, *args)
        self._factors = tuple((source, codes & 7) for source, codes in self.factors)

    monkeypatch.setattr(_es_population.MemberDraw, "__init__", few_bits)
    with pytest.raises(AssertionError):
        check_variance(distribution="rademacher")
