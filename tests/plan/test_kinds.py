"""Every example sees one weight of its own, or all see one: exactly, for all kinds of models."""

import contextlib
import warnings

import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import Independent
from pyro.infer.autoguide import AutoNormal
from pyro.poutine.util import site_is_subsample

from pyro_flipout import FlipoutWarning
from tests.helpers import Recording, kinds, randomize
from tests.plan.kinds import FORMS, KINDS


class Program:
    """A model of a kind, and a draw of its guide."""

    def __init__(self, kind, sizes, form):
        self.kind = kind
        self.model, self.args = kind.make(*sizes, FORMS[form])
        hidden = ["z"] if kind.enumerated else []
        self.guide = AutoNormal(poutine.block(self.model, hide=hidden), init_scale=0.4)
        self.guide(*self.args)
        randomize(self.guide, 0.2)
        self.draw = poutine.trace(self.guide).get_trace(*self.args)

    def run(self, model, values=None):
        """A trace of the model under the draw, or under other values of some sites."""
        draw = self.draw.copy()
        for name, value in (values or {}).items():
            draw.nodes[name] = dict(draw.nodes[name], value=value)
        with contextlib.ExitStack() as stack:
            if self.kind.enumerated:
                stack.enter_context(poutine.enum(first_available_dim=-2))
            traced = poutine.trace(poutine.replay(model, trace=draw))
            return traced.get_trace(*self.args)

    def gradient(self, densities):
        torch.manual_seed(1)
        total = sum((d * torch.rand(d.shape)).sum() for d in densities.values())
        parameters = list(self.guide.parameters())
        grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in grads]


def densities(trace, latent):
    """Log-densities of all sites but weights, rows of examples first where there are any."""
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and name not in latent and not site_is_subsample(node):
            found[name] = by_example(node)
    return found


def by_example(node):
    fn, events = node["fn"], 0
    while isinstance(fn, Independent):
        events += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    density = fn.log_prob(node["value"])
    plates = [f.dim - events for f in node["cond_indep_stack"] if f.vectorized]
    dim = plates[0] if plates else -events
    return density if density.dim() == 0 else density.movedim(dim, 0)


def check(program, audit=True):
    """The whole oracle: decisions, densities, gradients."""
    handler = Recording(on_missing_rule="warn", audit=audit)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FlipoutWarning)
        torch.manual_seed(5)
        flipped = program.run(handler(program.model))
    latent = [n for n in program.draw.nodes if n not in ("_INPUT", "_RETURN")]
    sites = {s: d for s, d in handler.decisions.items() if s != "z"}
    flips = {s for s in program.kind.either if audit and sites[s].startswith("flipped")}
    shared = program.kind.shared - flips
    expected = {s: "shared" if s in shared else "flipped" for s in sites}
    found = densities(flipped, latent)
    assert kinds(sites) == expected, (sites, [str(w.message) for w in told])
    if audit:
        assert all(d == "flipped (verified)" for d in sites.values() if d[0] == "f"), sites
    torch.manual_seed(5)
    bare = densities(program.run(program.model), latent)
    if "flipped" not in expected.values():
        assert all(torch.equal(found[n], bare[n]) for n in bare)
        pairs = zip(program.gradient(found), program.gradient(bare), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        return handler, told
    count = handler.seen_execution.num_examples
    weights = {s: w.materialize(count) for s, w in handler.seen.items() if s not in shared}
    assert any((w[0] != w[n]).any() for w in weights.values() for n in range(count))
    rows = []
    for n in range(count):
        torch.manual_seed(5)
        own = program.run(program.model, {s: w[n] for s, w in weights.items()})
        rows.append(densities(own, latent))
    want = {}
    for name, density in found.items():
        if density.dim() == 0:  # a sum of terms of one example each
            raise AssertionError(f"{name} has no rows")
        each = len(density) // count
        want[name] = torch.cat([r[name][each * n : each * (n + 1)] for n, r in enumerate(rows)])
        torch.testing.assert_close(density, want[name], atol=1e-9, rtol=1e-9)
    for a, b in zip(program.gradient(found), program.gradient(want), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    return handler, told


def cases():
    for name, kind in KINDS.items():
        for form in FORMS:
            if form == "to_event" and kind.needs_plate:
                continue
            # Under a plate with N equal to another size, as events with N of its own.
            usual = kind.sizes[form == "plate"]
            for sizes in kind.sizes:
                marks = () if sizes == usual else pytest.mark.slow
                label = f"{name}-{form}-{sizes[0]}-{sizes[1]}"
                yield pytest.param(name, form, sizes, id=label, marks=marks)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "form", "sizes"), list(cases()))
def test_exactly_one_weight_an_example_or_one_for_all(name, form, sizes):
    check(Program(KINDS[name], sizes, form))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if not kind.was_right])
def test_the_oracle_fails_without_the_audit(name):
    kind = KINDS[name]
    with pytest.raises((AssertionError, RuntimeError)):
        check(Program(kind, kind.sizes[0], "plate"), audit=False)
