"""The oracle of the layers: one execution, and the plain network on its explicit weights."""

from __future__ import annotations

import pyro.poutine as poutine
import torch

from pyro_flipout import FlipoutTensor
from pyro_flipout.nn.layer import EXECUTION
from tests.helpers import randomize


class Execution:
    """One call of a PyroModule under a draw of its guide, and what its sites gave the program."""

    def __init__(self, model, guide, *args, trace=None):
        self.guide_trace = trace or poutine.trace(guide).get_trace(*args)
        handle = model.register_forward_hook(self._record)
        try:
            traced = poutine.trace(poutine.replay(model, trace=self.guide_trace))
            self.trace = traced.get_trace(*args)
        finally:
            handle.remove()
        self.out = self.trace.nodes["_RETURN"]["value"]

    def _record(self, model, args, output):
        self.draws = {k: v for k, v in model._pyro_context.cache.items() if k != EXECUTION}

    @property
    def num_examples(self):
        return next(w.execution.num_examples for w in self.draws.values())

    def explicit(self):
        assert all(isinstance(w, FlipoutTensor) for w in self.draws.values()), self.draws
        return {name: w.materialize(self.num_examples) for name, w in self.draws.items()}


def ready(model, guide_class, *args):
    """A guide of a model, away from its first values."""
    guide = guide_class(model)
    guide(*args)
    return randomize(guide, 0.1)


def assert_explicit(run, plain, args, guide, dims=(0,), out_dim=0, tol=1e-9):
    """Output and gradients are those of ``plain``, example by example, on the run's weights."""
    weights = run.explicit()
    assert set(weights) == set(dict(plain.named_parameters()))
    rows = []
    for n in range(run.num_examples):
        own = {name: w[n] for name, w in weights.items()}
        example = [a.narrow(d, n, 1) for a, d in zip(args, dims, strict=True)]
        rows.append(first(torch.func.functional_call(plain, own, tuple(example))))
    expected, out = torch.cat(rows, out_dim), first(run.out)
    torch.testing.assert_close(out, expected, atol=tol, rtol=tol)
    cotangent = torch.randn_like(out)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    actual, wanted = (
        torch.autograd.grad((o * cotangent).sum(), parameters, retain_graph=True, allow_unused=True)
        for o in (out, expected)
    )
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def first(out):
    return out[0] if isinstance(out, tuple) else out
