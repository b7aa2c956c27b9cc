"""Models, and the oracle that compares a whole flipped network with its explicit weights."""

from __future__ import annotations

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_

from pyro_flipout import FlipoutMessenger

FAILURE_RATE = 1e-6  # of any one statistical check
Z = math.sqrt(2) * torch.erfinv(torch.tensor(1 - FAILURE_RATE, dtype=torch.float64)).item()


class Recording(FlipoutMessenger):
    """Keeps the flipped weights of the last execution."""

    def _flip(self, msg, draw):
        super()._flip(msg, draw)
        if self._probe is not None:  # a run of the audit
            return
        if self.seen_execution is not msg["value"].execution:
            self.seen, self.seen_execution = {}, msg["value"].execution
        self.seen[msg["name"]] = msg["value"]

    seen: dict
    seen_execution = None


def bayesian(net, scale=1.0):
    """Turns every parameter of a plain network into a sample site, in place."""
    to_pyro_module_(net)
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, scale).expand(value.shape).to_event(value.dim())
            setattr(module, name, PyroSample(prior))
    return net


class Regression(PyroModule):
    """A Bayesian network under a Gaussian likelihood."""

    def __init__(self, net, scale=0.1):
        super().__init__()
        self.net = bayesian(net)
        self.scale = scale

    def forward(self, x, y=None):
        mean = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.scale).to_event(mean.dim() - 1), obs=y)


def mlp(sizes=(4, 8, 3), act=torch.nn.Tanh):
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [act()] if i else []
        layers.append(torch.nn.Linear(a, b))
    return torch.nn.Sequential(*layers)


def randomize(guide, scale=0.5):
    """Moves the parameters of a guide away from their initial values."""
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(scale * torch.randn_like(p))
    return guide


def check_network(net, guide_class, *args, prefix="", tol=1e-9, handler=None, example_dim=0):
    """The flipped network equals the plain one run example by example on its weights.

    Both run under one draw of the guide: outputs and gradients of all guide parameters.
    """
    plain = copy.deepcopy(net)
    model = bayesian(net)
    guide = guide_class(model)
    guide(*args)
    randomize(guide, 0.1)
    trace = poutine.trace(guide).get_trace(*args)
    handler = handler or Recording(on_missing_rule="error", example_dim=example_dim)
    out = poutine.replay(handler(model), trace=trace)(*args)
    names = set(dict(plain.named_parameters()))
    assert set(handler.seen) == names, names ^ set(handler.seen)
    explicit = {name: w.materialize() for name, w in handler.seen.items()}
    num_examples = handler.seen_execution.num_examples
    rows = []
    for n in range(num_examples):
        weights = {name: w[n] for name, w in explicit.items()}
        example = [a.narrow(example_dim, n, 1) for a in args]
        rows.append(torch.func.functional_call(plain, weights, tuple(example)))
    expected = torch.cat(rows, example_dim)
    torch.testing.assert_close(out, expected, atol=tol, rtol=tol)
    cotangent = torch.randn_like(out)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    actual, wanted = (
        torch.autograd.grad((o * cotangent).sum(), parameters, retain_graph=True, allow_unused=True)
        for o in (out, expected)
    )
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=tol)
    return handler


def kinds(decisions):
    """Decisions of a handler, by site, without what they say behind the first word."""
    return {site: decision.partition(" ")[0].rstrip(":") for site, decision in decisions.items()}
