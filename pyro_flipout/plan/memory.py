# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What was learnt of a model, kept with the model and not with a handler.

An audit holds for one *structure*: shapes and types of the arguments, modes of the modules that
are called, kinds of the handlers around the call, options of the handler. After three audits that
agree, other sizes of the same kind are trusted: each call then has the layout of rows that calls of
the same function had.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro.poutine.runtime as runtime
import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyro_flipout._notices import Notices
from pyro_flipout.plan.audit import Finding, Verdict
from pyro_flipout.plan.rows import RowsRouter
from pyro_flipout.tensor import Execution

__all__ = ["Call", "Memory", "Plan", "memory_of", "shuffled"]

ENOUGH = 3
"""Audits that agree, after which other sizes are trusted."""


@dataclass(frozen=True)
class Call:
    """A call of a model.

    :ivar exact: equal for calls that one audit holds for.
    :ivar kind: equal for calls that differ in sizes and numbers only.
    :ivar sizes: size of each dimension of each tensor among the arguments.
    :ivar integers: the tensors of integers among the arguments.
    """

    exact: Hashable
    kind: Hashable
    sizes: tuple[tuple[int, ...], ...]
    integers: tuple[Tensor, ...] = field(default=(), compare=False)

    @staticmethod
    def of(args: Any, kwargs: Any, options: Hashable) -> Call:
        """Looks at the arguments and at the handlers around the call."""
        exact: list[Hashable] = []
        kinds: list[Hashable] = []
        sizes: list[tuple[int, ...]] = []
        integers: list[Tensor] = []
        for leaf in _leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                if not leaf.is_nested:
                    sizes.append(tuple(leaf.shape))
                    exact.append(leaf.shape)
                if _is_integers(leaf):
                    integers.append(leaf)
                kinds.append((leaf.dim(), leaf.dtype, leaf.device, leaf.layout))
            else:
                simple = isinstance(leaf, (int, str, type(None)))
                exact.append(leaf if simple else _name(leaf))
                kinds.append(_name(leaf))
        stack = tuple(_kind(f) for f in runtime._PYRO_STACK if not _watches(f))
        modes = torch.is_grad_enabled(), torch.get_default_dtype()
        kind = (tuple(kinds), stack, options, modes)
        return Call((tuple(exact), kind), kind, tuple(sizes), tuple(integers))


def _watches(frame: Messenger) -> bool:
    """Whether a handler changes nothing that an audit depends on."""
    return isinstance(frame, TraceMessenger) or getattr(frame, "only_watches", False)


def _kind(frame: Messenger) -> Hashable:
    """What an audit depends on of a handler around the model."""
    if isinstance(frame, ReplayMessenger) and frame.trace is not None:
        nodes = frame.trace.nodes.items()
        return ReplayMessenger, tuple(
            (name, type(node.get("fn"))) for name, node in nodes if node["type"] == "sample"
        )
    if isinstance(frame, IndepMessenger):
        return type(frame), frame.name, frame.size
    data = getattr(frame, "data", None)  # of what is conditioned on, or set
    return type(frame), tuple(data) if isinstance(data, dict) else None


def _name(leaf: object) -> str:
    return type(leaf).__qualname__


def _is_integers(leaf: Any) -> bool:
    """Whether an argument may say which example a row belongs to."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_nested:
        return False
    return not (leaf.is_floating_point() or leaf.is_complex()) and leaf.numel() > 1


def shuffled(obj: Any) -> Any:
    """Arguments with the entries of every tensor of integers in another order."""
    if _is_integers(obj):
        order = torch.randperm(obj.numel(), generator=torch.Generator().manual_seed(obj.numel()))
        return obj.reshape(-1)[order.to(obj.device)].view(obj.shape)
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*map(shuffled, obj))
    if type(obj) in (list, tuple):
        return type(obj)(map(shuffled, obj))
    if type(obj) is dict:
        return {key: shuffled(item) for key, item in obj.items()}
    return obj


def _leaves(obj: Any) -> Iterator[Any]:
    if isinstance(obj, dict):
        for key, item in obj.items():
            yield key if isinstance(key, str) else type(key)
            yield from _leaves(item)
    elif isinstance(obj, (list, tuple)):
        yield len(obj)
        for item in obj:
            yield from _leaves(item)
    else:
        yield obj


@dataclass
class Plan:
    """What holds for one structure.

    :ivar verdict: of the audit.
    :ivar modes: modules that were called, by weak reference, and their training modes.
    :ivar integers: tensors of integers that the layouts may depend on, by their numbers.
    :ivar sources: arguments that have N for a size, by their numbers, and their dimensions.
    """

    verdict: Verdict
    modes: list[tuple[weakref.ref[nn.Module], bool]]
    sources: list[tuple[int, int]] = field(default_factory=list)
    sizes: tuple[tuple[int, ...], ...] = ()
    integers: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def findings(self) -> dict[str, Finding]:
        """By site."""
        return self.verdict.findings

    def fits(self, call: Call) -> bool:
        """Whether the modules are in the modes of the audit, and integers are what they were."""
        if any(not torch.equal(call.integers[i], kept) for i, kept in self.integers):
            return False
        for reference, training in self.modes:
            module = reference()
            if module is not None and module.training != training:
                return False
        return True

    def agrees(self, other: Plan) -> bool:
        """Whether two audits came to the same findings."""
        mine, theirs = self.verdict, other.verdict
        return {s: f.flipped for s, f in mine.findings.items()} == {
            s: f.flipped for s, f in theirs.findings.items()
        } and all(theirs.choices.get(k, c) == c for k, c in mine.choices.items())

    def prepare(self, execution: Execution, count: int | None, trusted: bool) -> None:
        """Gives an execution what is known of its examples."""
        if count is None:
            return
        execution.num_examples = count
        verdict, dim = self.verdict, execution.example_dim
        usual = all(c == ("examples", dim) for c in verdict.choices.values())
        if not usual or trusted:
            execution.router = RowsRouter(count, dim, verdict.choices, trusted)


class Memory:
    """The plans of one model.

    :ivar notices: what the user was warned of.
    """

    def __init__(self) -> None:
        self.notices = Notices()
        self._plans: dict[Hashable, list[Plan]] = {}
        self._by_kind: dict[Hashable, list[Plan]] = {}
        self._failed: set[Hashable] = set()

    def find(self, call: Call) -> tuple[Plan, int | None, bool] | None:
        """The plan for a call, its number of examples, and whether it was made for other sizes."""
        for plan in self._plans.get(call.exact, ()):
            if plan.fits(call):
                return plan, plan.verdict.num_examples, False
        plans = [p for p in self._by_kind.get(call.kind, ()) if not p.integers and p.fits(call)]
        if len(plans) < ENOUGH or not all(p.agrees(plans[0]) for p in plans[1:]):
            return None
        sources = set.intersection(*(set(p.sources) for p in plans))
        found = {call.sizes[i][dim] for i, dim in sources}
        counts = (p.verdict.num_examples for p in plans if p.sizes == call.sizes)
        found = found or {count for count in counts if count is not None}
        if len(found) != 1:
            return None
        choices = {k: c for p in plans for k, c in p.verdict.choices.items()}
        merged = Verdict(None, plans[0].findings, choices)
        return Plan(merged, plans[0].modes), found.pop(), True

    def failed_before(self, call: Call) -> bool:
        """Whether an audit of such a call has failed before; from now on one has."""
        before = call.exact in self._failed
        self._failed.add(call.exact)
        return before

    def forget_failure(self, call: Call) -> None:
        """The model itself raised an error, so that the audit had to fail."""
        self._failed.discard(call.exact)

    def forget(self, call: Call, plan: Plan) -> None:
        """Lets the next call of this structure be audited anew."""
        for plans in (self._plans.get(call.exact, []), self._by_kind.get(call.kind, [])):
            plans[:] = [p for p in plans if p is not plan and p.verdict is not plan.verdict]

    def add(self, call: Call, plan: Plan) -> None:
        """Keeps a plan."""
        count, plan.sizes = plan.verdict.num_examples, call.sizes
        if plan.verdict.of_integers:  # those that are the same in any order were not tried
            plan.integers = [
                (i, tensor.clone())
                for i, tensor in enumerate(call.integers)
                if torch.equal(tensor, shuffled(tensor)) or not plan.verdict.shuffled
            ]
        plan.sources = [
            (i, dim)
            for i, shape in enumerate(call.sizes)
            for dim, n in enumerate(shape)
            if n == count
        ]
        self._plans.setdefault(call.exact, []).append(plan)
        if count is not None and count > 1:
            self._by_kind.setdefault(call.kind, []).append(plan)


_MEMORIES: weakref.WeakKeyDictionary[Any, dict[Any, Memory]] = weakref.WeakKeyDictionary()


def memory_of(model: Callable[..., Any]) -> Memory:
    """What was learnt of a model; bound methods belong to their object."""
    owner, name = getattr(model, "__self__", model), getattr(model, "__func__", None)
    try:
        memories = _MEMORIES.setdefault(owner, {})
    except TypeError:  # it has no hash, or cannot be referred to weakly
        return Memory()
    return memories.setdefault(name, Memory())
