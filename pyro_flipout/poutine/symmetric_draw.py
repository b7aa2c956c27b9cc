# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The question which symmetric draw a value is.

A value reaches the model's program in one of several ways, and each says where the
centre of its distribution is, if it has one:

==========================================  ==========================================
replayed from a guide with a symmetric fn   centre of the *guide's* fn
replayed ``Delta`` whose value is a view    the same view of the centre of that draw
of another draw of the guide (autoguides)
really drawn here, from ``msg["fn"]``       centre of that fn
observed, conditioned, set by a handler     none
==========================================  ==========================================

What cannot be shown to be a symmetric draw, independent of all other draws, is left
alone. This module only *finds* the draw; what to do with it is the estimator's.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro.poutine.runtime as runtime
import torch
from pyro.distributions import Delta, Independent, Normal
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.equalize_messenger import EqualizeMessenger
from pyro.poutine.escape_messenger import EscapeMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.lift_messenger import LiftMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reentrant_messenger import ReentrantMessenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.seed_messenger import SeedMessenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.substitute_messenger import SubstituteMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from pyro_flipout._modes import looked_at
from pyro_flipout.errors import NotSymmetricError
from pyro_flipout.symmetric import symmetric_center, symmetric_delta

__all__ = [
    "NO_HANDLERS",
    "NoDraw",
    "Stack",
    "SymmetricDraw",
    "current_stack",
    "find_symmetric_draw",
    "is_real",
    "replayed_by_flipout",
    "replayed_site",
    "was_replayed_by_flipout",
]

Message: TypeAlias = Any
"""A ``pyro.poutine.runtime.Message``, of which Pyro types not every key."""


@dataclass(slots=True)
class SymmetricDraw:
    """A value that is its centre and a symmetric, factorised perturbation.

    :ivar center: shape of the value.
    :ivar delta: the perturbation, shape of the value, where the distribution has kept it;
        ``None`` for the value less the centre.
    :ivar fn: the distribution that was drawn from, of the value or of what it is a view of.
    :ivar view: what makes the value of such a draw.
    """

    center: Tensor
    delta: Tensor | None
    fn: Distribution | None = None
    view: Callable[[Tensor], Tensor] = lambda drawn: drawn


@dataclass(frozen=True)
class NoDraw:
    """A value that is no symmetric draw.

    :ivar reason: why, in words.
    :ivar tell: whether the user would want to know.
    :ivar source: what the reason is about; one warning is given for each.
    :ivar joint: whether the value and another draw depend on each other.
    :ivar inherent: whether it is so in every execution, under whatever handlers.
    """

    reason: str
    tell: bool = False
    source: str = ""
    joint: bool = False
    inherent: bool = False


class Stack:
    """Handlers that are on Pyro's stack, by what they mean for a site.

    :ivar frames: all of them, the outermost first.
    :ivar equalizers: those that give the value of one site to others.
    :ivar replays: those that replay a trace.
    :ivar recorder: the innermost one that makes a trace.
    """

    __slots__ = ("_together", "equalizers", "frames", "recorder", "replays")

    def __init__(self, frames: Iterable[Messenger]) -> None:
        self.frames = list(frames)
        self.equalizers: list[EqualizeMessenger] = []
        self.replays: list[ReplayMessenger] = []
        self.recorder: TraceMessenger | None = None
        self._together: dict[Trace, bool] = {}
        for frame in self.frames:
            if isinstance(frame, TraceMessenger):
                self.recorder = frame
            if isinstance(frame, ReplayMessenger):
                self.replays.append(frame)
            if isinstance(frame, EqualizeMessenger):
                self.equalizers.append(frame)

    def drawn_together(self, trace: Trace) -> bool:
        """Whether all draws of a trace that is replayed are one, see :func:`_drawn_together`."""
        if trace not in self._together:
            self._together[trace] = _drawn_together(trace)
        return self._together[trace]


NO_HANDLERS = Stack([])


def current_stack(last: Stack = NO_HANDLERS) -> Stack:
    """The stack as it is now, which is the last one if no handler came or went."""
    return last if last.frames == runtime._PYRO_STACK else Stack(runtime._PYRO_STACK)


# Handlers of Pyro that leave the value of an unobserved continuous site alone, or mark
# what they set as observed. Any other handler that sees sample sites may have set it.
_NEVER_SETS_VALUES = (
    BlockMessenger,
    BroadcastMessenger,
    ConditionMessenger,
    DoMessenger,
    EnumMessenger,
    EqualizeMessenger,
    EscapeMessenger,
    GuideMessenger,
    IndepMessenger,
    InferConfigMessenger,
    LiftMessenger,
    MarkovMessenger,
    MaskMessenger,
    ReentrantMessenger,
    ReparamMessenger,
    ReplayMessenger,
    ScaleMessenger,
    SeedMessenger,
    SubsampleMessenger,
    SubstituteMessenger,
    TraceMessenger,
    UnconditionMessenger,
)


def find_symmetric_draw(msg: Message, vouched: bool, stack: Stack) -> SymmetricDraw | NoDraw:
    """Finds the symmetric draw that the value of a sample site is.

    :param msg: a sample message with its final value, seen with the handlers that
        processed it still on the stack.
    :param vouched: the user named this site, so that unknown handlers are trusted.
    :param stack: what is on that stack.
    """
    if msg["is_observed"]:
        return NoDraw("it is observed")
    if msg.get("_intervener_id") is not None:
        return NoDraw("it is intervened on, and nothing in the model uses it")
    if stack.equalizers and any(frame._is_matching(msg) for frame in stack.equalizers):
        return NoDraw(
            "poutine.equalize gives its one value to other sites too; name it in "
            "flipout(hide=[...])",
            tell=True,
            source=msg["name"],
        )
    if "_enumerate_dim" in msg["infer"]:
        return NoDraw("it is drawn several times at once, as TraceTMC_ELBO does")
    replayed = replayed_site(msg, stack)
    if replayed is not None:
        return _replayed(msg, *replayed, stack)
    if isinstance(msg["value"], ProvenanceTensor):
        return NoDraw("what depends on it is tracked, as pyro.infer.inspect does")
    setter = _value_setter(msg["name"], vouched)
    if setter is not None:
        return setter
    if msg["mask"] is False:
        return NoDraw("its density is masked out, as in Predictive")
    if not vouched and _is_trial(msg):
        return NoDraw("it is traced inside poutine.block, as MCMC does to learn the sites")
    return _drawn(msg)


def _is_trial(msg: Message) -> bool:
    """Whether a trace is made that nobody outside sees anything of, as in MCMC's set-up."""
    hidden = False
    for frame in runtime._PYRO_STACK:
        if hidden and isinstance(frame, TraceMessenger):
            return True
        hidden = hidden or (isinstance(frame, BlockMessenger) and bool(frame.hide_fn(msg)))
    return False


def replayed_site(msg: Message, stack: Stack) -> tuple[Message, Trace] | None:
    """The guide's site that the value was replayed from, and the guide's trace."""
    value = msg["value"]
    tracked = isinstance(value, ProvenanceTensor)
    if type(value) is not Tensor:
        value = detach_provenance(value) if tracked else getattr(value, "plain", value)
    for frame in stack.replays:
        if frame.trace is not None:
            node = frame.trace.nodes.get(msg["name"])
            if node is None:
                continue
            given: Any = node["value"]
            given = detach_provenance(given) if tracked else given
            if given is value:
                return node, frame.trace
    return None


def _value_setter(name: str, vouched: bool) -> NoDraw | None:
    """Whether a handler on the stack may have set the value instead of drawing it."""
    for frame in runtime._PYRO_STACK:
        if isinstance(frame, InitMessenger):
            return NoDraw("it is set by an initialisation")
        if isinstance(frame, LiftMessenger) and name in frame._samples_cache:
            return NoDraw("it is a parameter lifted to a sample site")
        if vouched or isinstance(frame, _NEVER_SETS_VALUES) or _is_transparent(frame):
            continue
        kind = type(frame).__name__
        return NoDraw(
            f"the handler {kind} may have set its value; if it does not, name the site in "
            "flipout(expose=[...])",
            tell=True,
            source=kind,
        )
    return None


def _is_transparent(frame: Messenger) -> bool:
    cls = type(frame)
    return getattr(cls, "never_sets_values", False) or (
        cls._process_message is Messenger._process_message and not hasattr(cls, "_pyro_sample")
    )


def _drawn(msg: Message) -> SymmetricDraw | NoDraw:
    fn, value = msg["fn"], msg["value"]
    try:
        center = symmetric_center(fn)
    except NotSymmetricError as why:
        # Under a GuideMessenger `fn` is the posterior, whose support torch may not know.
        prior = msg["infer"].get("prior", fn)
        real = is_real(prior)
        return NoDraw(str(why), tell=real, source=msg["name"], inherent=not real)
    if _is_delta(fn):
        return NoDraw("it is a Delta, which has no perturbation", inherent=True)
    return SymmetricDraw(center, symmetric_delta(fn, value), fn)


def _replayed(msg: Message, node: Message, trace: Trace, stack: Stack) -> SymmetricDraw | NoDraw:
    fn, value = node.get("fn"), node["value"]
    if fn is None:
        return NoDraw("the trace that is replayed does not say what it was drawn from")
    if isinstance(msg["value"], ProvenanceTensor):
        return _score_function(node) or _tracked(msg["name"], msg["value"])
    delta = symmetric_delta(fn, value)
    if delta is not None and value.requires_grad and stack.drawn_together(trace):
        return SymmetricDraw(without_events(fn).center_beside, delta, fn)
    source, center, graph = node, None, _guide_graph(trace)
    if _is_delta(fn):
        found = graph.aliased(value)
        if found is None:
            return _no_source(msg, value, graph)
        source = found
    try:
        center = symmetric_center(source["fn"])
    except NotSymmetricError as why:
        reason = f"the guide draws '{source['name']}' jointly or skewed: {why}"
        real = is_real(msg["fn"])
        return NoDraw(reason, real, source["name"], inherent=not real)
    if source is not node:
        center = _same_view(value, source["value"], center)
    blocker = _score_function(source) or _entangled(node, source, graph)
    if blocker is not None:
        return blocker
    if source is node:
        return SymmetricDraw(center, delta, fn)
    return SymmetricDraw(
        center, delta, source["fn"], lambda drawn: _same_view(value, source["value"], drawn)
    )


def _no_source(msg: Message, value: Tensor, graph: _GuideGraph) -> NoDraw:
    names = sorted(graph.upstream([value]) - {msg["name"]})
    if not names and value.grad_fn is not None:  # computed, but of what?
        names = graph.untracked
    if not names:
        return NoDraw(
            "the guide has a point there (a Delta), which has no perturbation", inherent=True
        )
    support = _constraint(msg["fn"])
    if support not in (None, constraints.real):
        return NoDraw(
            f"its support is constrained ({support}), and no flip of signs keeps it there; the "
            "draw that all examples share is right, and there is nothing to do",
            inherent=True,
        )
    return NoDraw(
        f"the guide computes it from {names} in a way that flipout cannot see through; use a "
        "factorised guide such as AutoNormal",
        tell=is_real(msg["fn"]),
        source=names[0],
    )


def _same_view(view: Tensor, base: Tensor, center: Tensor) -> Tensor:
    """The view of ``center`` that ``view`` is of ``base``."""
    shape, offset = base.shape, view.storage_offset() - base.storage_offset()
    center = center if center.shape == shape else center.expand(shape)
    if offset == 0 and view.shape == shape and view.stride() == base.stride():
        return center
    if base.is_contiguous() and view.is_contiguous():
        flat = center.reshape(-1)
        if view.numel() != base.numel():
            flat = flat[offset : offset + view.numel()]
        return flat.view(view.shape)
    if center.stride() != base.stride():
        center = torch.empty_strided(
            base.shape, base.stride(), dtype=center.dtype, device=center.device
        ).copy_(center)
    return center.as_strided(view.shape, view.stride(), center.storage_offset() + offset)


def _tracked(name: str, value: ProvenanceTensor) -> NoDraw:
    """Refuses draws that depend on others without a reparametrised gradient."""
    return NoDraw(
        f"it depends on the guide's draws {sorted(map(str, get_provenance(value)))}, which are not "
        f"reparametrised, so that TraceGraph_ELBO tracks it; draw '{name}' independently of them, "
        "or hide it",
        tell=True,
        source=name,
    )


def _score_function(source: Message) -> NoDraw | None:
    """Refuses draws whose gradient is not that of a reparametrised sample."""
    value, fn = source["value"], source["fn"]
    if not torch.is_grad_enabled() or value.requires_grad:
        return None
    if not any(t.requires_grad for t in _tensors(fn)):
        return None
    return NoDraw(
        f"the guide's draw '{source['name']}' is not reparametrised (or detached, as by "
        "ReweightedWakeSleep), and a score-function gradient needs one joint weight for the whole "
        "mini-batch",
        tell=True,
        source=source["name"],
    )


def _entangled(node: Message, source: Message, graph: _GuideGraph) -> NoDraw | None:
    """Refuses draws that another site of the guide depends on, or has elements of."""
    name = node["name"]
    auxiliary = source["infer"].get("is_auxiliary")
    other: str | None
    for other in graph.dependents.get(source["name"], ()):
        # Autoguides cut an auxiliary draw into disjoint parts.
        if other != name and not (auxiliary and _is_delta(graph.sites[other].get("fn"))):
            return NoDraw(depends(other, name), tell=True, source=name, joint=True)
    value = node["value"]
    if source is not node and not auxiliary:
        return NoDraw(depends(name, source["name"]), tell=True, source=name, joint=True)
    other = graph.clash(name, value)
    if other is not None:
        return NoDraw(depends(other, name), tell=True, source=name, joint=True)
    if _repeats(value):
        reason = (
            f"several of its elements are one element of the guide's draw '{source['name']}'; draw "
            "every element by itself, or hide the site"
        )
        return NoDraw(reason, tell=True, source=name, joint=True)
    return None


def _in_common(views: list[tuple[str, Tensor]]) -> dict[str, str]:
    """Of views of one storage, by name, those that have elements in common: with which."""
    ordered = sorted((_extent(view) for _, view in views))
    if all(a[1] < b[0] for a, b in itertools.pairwise(ordered)):
        return {}
    found: dict[str, str] = {}
    owners = torch.full((max(last for _, last in ordered) + 1,), -1, dtype=torch.int32)
    for number, (name, view) in enumerate(views):
        strides = view.stride()
        shape = [1 if s == 0 else n for n, s in zip(view.shape, strides, strict=True)]
        places = owners.as_strided(shape, strides, view.storage_offset())
        owner = int(places.max())
        if owner >= 0:
            found.setdefault(name, views[owner][0])
            found.setdefault(views[owner][0], name)
        places.fill_(number)
    return found


def _repeats(x: Tensor) -> bool:
    """Whether a view reaches an element more than once, as ``expand`` and ``unfold`` make it."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return looked_at(lambda: len(_places(x).unique()) < x.numel())
        reach += (size - 1) * stride
    return False


def _places(x: Tensor) -> Tensor:
    """Where in its storage each element is."""
    places = torch.arange(_extent(x)[1] + 1)
    return places.as_strided(x.shape, x.stride(), x.storage_offset())


def _extent(x: Tensor) -> tuple[int, int]:
    """Its first and its last element in the storage."""
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset()), int(x.storage_offset() + reach)


def depends(name: str, on: str) -> str:
    """The reason that entangled draws are left shared."""
    return (
        f"site '{name}' depends on it, so that the two are not independent draws; "
        f"hide '{on}', or draw '{name}' from a factorised guide"
    )


class _GuideGraph:
    """Which draws of a guide the others are computed from, by autograd history.

    :ivar sites: the guide's sample sites, by name.
    :ivar draws: the draw that an output of an autograd node is.
    :ivar storages: the draw whose value has its storage at an address.
    :ivar views: names and values of the model's sites there.
    :ivar untracked: auxiliary draws without history, so that nobody knows what they are used for.
    :ivar dependents: for every draw, the sites whose distribution depends on it.
    """

    def __init__(self, trace: Trace) -> None:
        self.draws: dict[Any, str] = {}
        self._above: dict[Any, set[str]] = {}  # for outputs in `draws`, the draws upstream
        self._bare: set[Any] = set()  # nodes whose inputs no draw is upstream of
        self.storages: dict[int, Message] = {}
        self.views: dict[int, list[tuple[str, Tensor]]] = {}
        self._in_common: dict[int, dict[str, str]] = {}
        self.untracked: list[str] = []
        self.sites = {n: node for n, node in trace.nodes.items() if node["type"] == "sample"}
        outputs: dict[str, Any] = {}
        for name, node in self.sites.items():
            value = node.get("value")
            if not isinstance(value, Tensor):
                continue
            if (history := value.grad_fn) is not None:
                outputs[name] = step = history, value.output_nr
                self.draws[step] = name
            if not node.get("is_observed"):
                self._add(name, node, history)
        self.dependents: dict[str, list[str]] = {}
        if _drawn_together(trace):
            return
        for name, node in self.sites.items():
            output, fn = outputs.get(name), without_events(node.get("fn"))
            hidden = output is not None and type(fn) not in _SHOW_ALL
            above = self.upstream(_tensors(fn), outputs[name][0].next_functions if hidden else ())
            if output is not None:
                # Sites come after those they depend on. A view comes after the draw it is of.
                self._above.setdefault(output, above)
            for source in above:
                if source != name:
                    self.dependents.setdefault(source, []).append(name)

    def _add(self, name: str, node: Message, history: Any) -> None:
        value, auxiliary = node["value"], node.get("infer", {}).get("is_auxiliary")
        address, is_point = value.untyped_storage().data_ptr(), _is_delta(node.get("fn"))
        if value.numel() and (is_point or not auxiliary):
            self.views.setdefault(address, []).append((name, value))
        if not is_point:
            self.storages.setdefault(address, node)
            if auxiliary and history is None:
                self.untracked.append(name)

    def aliased(self, value: Tensor) -> Message | None:
        """The draw of the guide that ``value`` is a view of, by storage."""
        if value.numel() == 0:
            return None
        return self.storages.get(value.untyped_storage().data_ptr())

    def clash(self, name: str, value: Tensor) -> str | None:
        """Another site of the model that has elements of the value of site ``name``."""
        address = value.untyped_storage().data_ptr()
        views = self.views.get(address, [])
        if len(views) < 2:
            return None
        if address not in self._in_common:
            self._in_common[address] = looked_at(lambda: _in_common(views))
        return self._in_common[address].get(name)

    def upstream(self, tensors: Iterable[Tensor], steps: Iterable[Any] = ()) -> set[str]:
        """Names of the draws that ``tensors`` are computed from.

        :param steps: outputs of autograd nodes that count too.
        """
        todo: list[Any] = [(f, t.output_nr) for t in tensors if (f := t.grad_fn) is not None]
        todo += [s for s in steps if s[0] is not None]
        found: set[str] = set()
        nodes = set()
        while todo:
            step = todo.pop()
            if step in self.draws:
                found.add(self.draws[step])
                if step in self._above:
                    found |= self._above[step]
                    continue
            node = step[0]
            if node not in self._bare and node not in nodes:
                nodes.add(node)
                todo += [s for s in node.next_functions if s[0] is not None]
        if not found:
            self._bare |= nodes
        return found


_SHOW_ALL = (Delta, Normal)
"""Distributions that draw from nothing but the tensors among their attributes."""


def _drawn_together(trace: Trace) -> bool:
    """Whether all of a guide's distributions say that they were drawn at once, from its parameters.

    Then none of the draws can be a parameter of another, and they have no element in common.
    """
    first = None
    for node in trace.nodes.values():
        if node["type"] == "sample":
            draw = getattr(without_events(node.get("fn")), "drawn_together", None)
            if draw is None or first not in (None, draw):
                return False
            first = draw
    return first is not None


_GRAPHS: weakref.WeakKeyDictionary[Trace, _GuideGraph] = weakref.WeakKeyDictionary()


def forget_guides() -> None:
    """Looks at the traces of guides anew: their nodes may have been replaced."""
    if len(_GRAPHS):
        _GRAPHS.clear()


_REPLAYED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""A value of each trace that a model was replayed of which flipout runs, by its ``id``."""


def replayed_by_flipout(stack: Stack) -> None:
    """Notes of which traces a model is replayed that flipout runs."""
    for frame in stack.replays:
        if frame.trace is not None:
            value = next(_values(frame.trace), None)
            if value is not None:
                _REPLAYED[id(value)] = value


def was_replayed_by_flipout(trace: Trace) -> bool:
    """Whether a model that flipout runs was replayed of a trace, or of a copy of it."""
    return any(_REPLAYED.get(id(value)) is value for value in _values(trace))


def _values(trace: Trace) -> Iterator[Tensor]:
    for node in trace.nodes.values():
        value: Any = node.get("value")
        if node["type"] == "sample" and isinstance(value, Tensor):
            yield value


def _guide_graph(trace: Trace) -> _GuideGraph:
    """The graph of a guide's trace, made once for all sites."""
    graph = _GRAPHS.get(trace)
    if graph is None:
        graph = _GRAPHS[trace] = _GuideGraph(trace)
    return graph


def _tensors(fn: Any) -> list[Tensor]:
    """The tensors that a distribution is made of."""
    found: list[Tensor] = []
    seen, todo = set(), [without_events(fn)]
    while todo:
        obj = todo.pop()
        if isinstance(obj, Tensor):
            found.append(obj)
        elif isinstance(obj, (list, tuple)):
            todo += obj
        elif isinstance(obj, (Distribution, Transform)) and id(obj) not in seen:
            seen.add(id(obj))  # transforms refer to their inverses
            for item in vars(obj).values():
                if type(item) not in ATOMS:
                    (found if isinstance(item, Tensor) else todo).append(item)
    return found


def without_events(fn: Any) -> Any:
    """What ``to_event`` was called on, which holds all the parameters."""
    while type(fn) is Independent:
        fn = fn.base_dist
    return fn


ATOMS = frozenset({torch.Size, type(None), bool, int, float, str})
"""Types of attributes that hold no tensor."""


def _is_delta(fn: Any) -> bool:
    while not isinstance(fn, Delta):
        fn = getattr(fn, "base_dist", None)
        if fn is None:
            return False
    return True


def is_real(fn: Any) -> bool:
    """Whether the support of ``fn`` is unconstrained."""
    return _constraint(fn) is constraints.real


def _constraint(fn: Any) -> Any:
    """The support of ``fn``, of one event; ``None`` if it is not known."""
    try:
        support = without_events(fn).support
    except (AttributeError, NotImplementedError):
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support
