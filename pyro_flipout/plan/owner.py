# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What a handler knows of the model that it is about to run."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro.poutine.runtime as runtime
import torch
from pyro.infer.inspect import TrackProvenance
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyro_flipout._modes import graphed, recorded, transformed
from pyro_flipout._notices import Notices, cause
from pyro_flipout.errors import FlipoutError
from pyro_flipout.plan.audit import Audit, Finding, Verdict
from pyro_flipout.plan.isolation import isolated
from pyro_flipout.plan.memory import Call, Memory, Plan, memory_of, shuffled
from pyro_flipout.plan.probe import Probe
from pyro_flipout.tensor import Execution

if TYPE_CHECKING:
    from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger

__all__ = [
    "NOT_OWNED",
    "PARTICLE_PLATES",
    "Planned",
    "plan_of",
    "remember",
    "run_audit",
]

PARTICLE_PLATES = frozenset({"num_particles_vectorized", "_num_predictive_samples"})
"""Plates of Pyro's that are no data."""


@dataclass
class Planned:
    """What is known for one call of a model.

    :ivar plan: what an audit found; ``None`` if there was none.
    :ivar why_not: why there was none.
    """

    why_not: str = ""
    plan: Plan | None = None
    count: int | None = None
    trusted: bool = False
    forget: Callable[[], None] = lambda: None

    @property
    def proved(self) -> bool:
        """Whether an audit says who the examples are."""
        return self.plan is not None and self.plan.verdict.others is None

    def failed(self) -> None:
        """The run that counts raised an error, too: a failure of the audit meant nothing."""
        if not self.proved:
            self.forget()

    def judge(self, site: str, center: Tensor) -> str | None:
        """Why a site that could be flipped is not, ``None`` if it is."""
        if self.plan is None:
            return _remembered(center, site)
        finding = self.plan.verdict.of(site)
        if finding is None:
            self.forget()
            return "the audit did not meet it; the next call is audited anew"
        return None if finding.flipped else finding.reason

    def decision(self, site: str) -> str:
        """What is decided of a site that is flipped."""
        finding = Finding(True, False, self.why_not)
        if self.plan is not None:
            finding = self.plan.verdict.of(site) or finding
        return (
            "flipped (verified)"
            if finding.verified
            else f"flipped (not verified: {finding.reason})"
        )

    def prepare(self, execution: Execution) -> None:
        """Gives an execution what is known of its examples."""
        if self.plan is not None:
            self.plan.prepare(execution, self.count, self.trusted)


_CONTRADICTED = WeakIdKeyDictionary()
"""For parameters of guides, the sites that were seen to be flipped for the wrong examples."""


def remember(center: Tensor, site: str, reason: str) -> None:
    """Keeps with the guide's parameters that a site of its model cannot be flipped."""
    leaf = _leaf(center)
    if leaf is not None:
        _CONTRADICTED.setdefault(leaf, {})[site] = reason


def _remembered(center: Tensor, site: str) -> str | None:
    if not len(_CONTRADICTED):
        return None
    found: dict[str, str] = _CONTRADICTED.get(_leaf(center), {})
    return found.get(site)


def _leaf(tensor: Tensor) -> Tensor | None:
    """The parameter that a centre is, or is computed from first of all."""
    if tensor._base is not None:
        tensor = tensor._base
    step = tensor.grad_fn
    while step is not None and not hasattr(step, "variable"):
        step = next((above for above, _ in step.next_functions if above is not None), None)
    return tensor if step is None else step.variable


NOT_OWNED = Planned("the handler is around inference and not around the model")


def plan_of(
    handler: FlipoutMessenger, model: Any, fn: Callable[..., Any], args: Any, kwargs: Any
) -> Planned:
    """What is known for a call of a model: from an earlier audit, or by one that is made now.

    :param fn: calls the model.
    """
    if any(getattr(frame, "_probe", None) is not None for frame in runtime._PYRO_STACK):
        raise _Nested
    if not (handler.can_audit and handler.audit):
        return Planned("audit=False")
    memory = memory_of(model)
    call = Call.of(args, kwargs, _options(handler))
    known = memory.find(call)
    if known is None:
        why_not = _why_not()
        if why_not:
            return Planned(why_not)
        plan = _audited(handler, fn, args, kwargs)
        if plan is None:
            # The run that counts raises it again, unless only a second run does.
            if not memory.failed_before(call):
                return Planned(_RAISED, forget=lambda: memory.forget_failure(call))
            plan = Plan(Verdict(None, {}, others=Finding(True, False, _RAISED)), [])
        memory.add(call, plan)
        _tell(plan.verdict, memory)
        known = plan, plan.verdict.num_examples, False
    plan, count, trusted = known

    def forget() -> None:
        memory.forget(call, plan)
        memory.forget_failure(call)

    return Planned("", plan, count, trusted, forget)


_RAISED = "the model raised an error in the audit"
_TRACKS = TrackNonReparam, TrackProvenance


def _why_not() -> str:
    if recorded() or graphed() or torch.compiler.is_compiling():
        return "the call is being recorded"
    if torch._C._get_tracing_state() is not None:
        return "the call is being traced by torch.jit"
    if transformed():
        return "the call is inside a transform of torch.func"
    if any(isinstance(frame, _TRACKS) for frame in runtime._PYRO_STACK):
        return "the values of sites carry provenance, which they cannot get a second time"
    if torch.is_inference_mode_enabled():
        return "the call is in inference mode"
    return ""


class _Nested(Exception):
    """A model that is being audited has a handler of its own, which decides."""


class _ModelFailed(Exception):
    """The model raised an error in the audit."""


def _options(handler: FlipoutMessenger) -> Any:
    return (
        type(handler),
        handler._example_dim,
        handler.group_size,
        None if handler.hide is None else frozenset(handler.hide),
        None if handler.expose is None else frozenset(handler.expose),
        handler.hide_fn,
        handler.expose_fn,
        handler.on_missing_rule,
    )


def _audited(
    handler: FlipoutMessenger, fn: Callable[..., Any], args: Any, kwargs: Any
) -> Plan | None:
    try:
        verdict, modes = run_audit(handler, fn, args, kwargs)
    except _Nested:
        found = Finding(True, False, "a part of the model has a handler of its own")
        return Plan(Verdict(None, {}, others=found), [])
    except FlipoutError:
        raise
    except _ModelFailed:
        return None  # the run that counts raises it again, where it belongs
    return Plan(verdict, [(weakref.ref(module), mode) for module, mode in modes.items()])


def run_audit(
    handler: FlipoutMessenger, fn: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Verdict, dict[torch.nn.Module, bool]]:
    """Audits a model as ``handler`` would run it.

    :returns: the verdict, and the modules that were called with their training modes.
    :raises _ModelFailed: if the model raises an error.
    """
    raised: list[Exception] = []

    def run_model(probe: Probe) -> Trace:
        probing = copy.copy(handler)
        probing.decisions, probing._shared = {}, dict(handler._shared)
        probing._notices, probing._joint = Notices(), dict(handler._joint)
        probing._probe = probe
        tracer = TraceMessenger()
        with tracer, probing:
            try:
                if probe.shuffled:
                    fn(*shuffled(args), **shuffled(kwargs))
                else:
                    fn(*args, **kwargs)
            except (FlipoutError, _Nested):
                raise
            except Exception as why:
                raised.append(why)
                raise
        trace: Trace = tracer.trace
        return trace

    grad_mode = torch.is_grad_enabled()
    with isolated() as state:
        audit = Audit(
            run_model,
            state,
            handler.example_dim,
            handler.group_size,
            PARTICLE_PLATES,
            grad_mode,
            handler.on_missing_rule == "error",
        )
        try:
            return audit.verdict(), state.modes
        except Exception as why:
            if why not in raised:
                raise
        finally:
            raised.clear()  # which refer to this frame
        raise _ModelFailed


_REMEDY = (
    "keep the example dimension apart and each example's rows to itself, write a plate over what "
    "is one example (a graph, a series, a set), or name the site in flipout(hide=[...])"
)


def _tell(verdict: Verdict, memory: Memory) -> None:
    """One warning for all sites that are left shared for one reason."""
    for site, finding in verdict.findings.items():
        if not finding.flipped:
            reason = f"{finding.reason}; {_REMEDY}" if finding.mixed else finding.reason
            memory.notices.leave(f"{site}: {cause(reason)}", site, reason, wait=True)
        elif finding.tell:
            memory.notices.tell(
                finding.reason, f"the audit could not verify the model: {finding.reason}"
            )
    memory.notices.say()
