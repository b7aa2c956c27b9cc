# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The audit as a check that people call in their own tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
from pyro.poutine.trace_struct import Trace

from pyro_flipout.plan.audit import Finding, Verdict
from pyro_flipout.plan.owner import run_audit
from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger
from pyro_flipout.poutine.module import unwrap_module

__all__ = ["ModelReport", "check_model"]


@dataclass(frozen=True)
class ModelReport:
    """What :func:`check_model` found.

    :ivar num_examples: the number N of examples, ``None`` if nothing says it.
    :ivar sites: what was found of every site that could be flipped.
    :ivar observed: for every density that depends on the weights, how many of its elements saw the
        second draw, of how many that depend on it.
    :ivar largest: for these, the largest difference between an element and what it should be,
        relative to the difference of the two draws.
    :ivar runs: how often the model was run.
    """

    num_examples: int | None
    sites: dict[str, Finding]
    observed: dict[str, tuple[int, int]]
    largest: dict[str, float]
    runs: int

    @property
    def ok(self) -> bool:
        """Whether every site that could be flipped is, and is verified."""
        return all(found.flipped and found.verified for found in self.sites.values())

    def __str__(self) -> str:
        count = "unknown" if self.num_examples is None else self.num_examples
        lines = [f"{count} examples, {self.runs} runs of the model"]
        lines += [f"  site {name!r}: {_decision(found)}" for name, found in self.sites.items()]
        for name, (second, apart) in self.observed.items():
            lines.append(
                f"  density {name!r}: {second} of {apart} elements saw the second draw, largest "
                f"difference {self.largest.get(name, 0.0):.2g}"
            )
        return "\n".join(lines)


def _decision(found: Finding) -> str:
    if not found.flipped:
        return f"shared: {found.reason}"
    return "flipped (verified)" if found.verified else f"flipped (not verified: {found.reason})"


def check_model(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    strict: bool = True,
    **kwargs: Any,
) -> ModelReport:
    """Checks that flipout gives every example of a model one weight of its own.

    This is the audit that :func:`~pyro_flipout.flipout` makes before a model's first run: the model
    is run on two draws of its weights, then flipped with examples of both kinds, and every element
    of every log-density, and the gradients, must be those of the examples' own draws.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> check_model(model, AutoNormal(model), torch.randn(8, 3), torch.randn(8)).ok
    True

    :param model: a model, or one that is wrapped in ``flipout(...)``, whose options then hold.
    :param guide: its guide.
    :param args: arguments of both, a mini-batch of at least two examples.
    :param strict: whether to raise an error if a site is not verified; else it is in the report.
    :param kwargs: keyword arguments of both.
    :returns: site by site what was found.
    :raises AssertionError: if a site that could be flipped mixes examples, meets a call that cannot
        be flipped, or could not be verified. The message is the report.
    """
    handler, bare = _unwrapped(model)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    first_dim = -1 - _plate_nesting(bare, guide_trace, args, kwargs)
    with poutine.enum(first_available_dim=first_dim), poutine.replay(trace=guide_trace):
        verdict, _ = run_audit(handler, lambda: bare(*args, **kwargs))
    report = _report(verdict)
    if strict and not report.ok:
        raise AssertionError(f"check_model: {report}")
    return report


def _report(verdict: Verdict) -> ModelReport:
    return ModelReport(
        verdict.num_examples, verdict.findings, verdict.elements, verdict.largest, verdict.runs
    )


def _unwrapped(model: Any) -> tuple[FlipoutMessenger, Callable[..., Any]]:
    if isinstance(model, functools.partial) and len(model.args) == 2:
        handler, fn = model.args
        if isinstance(handler, FlipoutMessenger):
            return handler, fn
    handlers, bare = unwrap_module(model)
    if len(handlers) == 1 and isinstance(handlers[0], FlipoutMessenger):
        return handlers[0], bare
    return FlipoutMessenger(), model


def _plate_nesting(model: Any, guide_trace: Trace, args: Any, kwargs: Any) -> int:
    trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
    dims = [
        -frame.dim
        for node in trace.nodes.values()
        if node["type"] == "sample"
        for frame in node["cond_indep_stack"]
        if frame.vectorized
    ]
    return max(dims, default=0)
