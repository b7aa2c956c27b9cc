# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The effect handler that swaps flipped weights in for plain draws."""

from __future__ import annotations

import functools
import numbers
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro.poutine.runtime as runtime
import torch
from pyro.distributions import Normal
from pyro.infer.abstract_infer import TracePosterior
from pyro.infer.autoguide import AutoGuide
from pyro.infer.elbo import ELBO
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.ops.provenance import (
    ProvenanceTensor,
    detach_provenance,
    extract_provenance,
    track_provenance,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import ignore_jit_warnings
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_flipout._notices import Notices, by_reason
from pyro_flipout.errors import FlipoutError
from pyro_flipout.plan.owner import (
    NOT_OWNED,
    PARTICLE_PLATES,
    Planned,
    plan_of,
    remember,
)
from pyro_flipout.plan.probe import Probe
from pyro_flipout.poutine.symmetric_draw import (
    ATOMS,
    NO_HANDLERS,
    Message,
    NoDraw,
    SymmetricDraw,
    current_stack,
    depends,
    find_symmetric_draw,
    forget_guides,
    replayed_by_flipout,
    replayed_site,
    was_replayed_by_flipout,
    without_events,
)
from pyro_flipout.tensor import (
    Draw,
    Execution,
    FlipoutTensor,
    batched,
    flip,
    why_not_flippable,
)

__all__ = ["FlipoutMessenger"]

SiteFn = Callable[[Message], "bool | None"]


class FlipoutMessenger(Messenger):
    r"""Gives every example of a mini-batch its own pseudo-independent draw of the weights.

    At each latent site whose value is a symmetric, factorised draw
    :math:`W = \bar W + \Delta W`, the program receives a
    :class:`~pyro_flipout.FlipoutTensor` that stands for

    .. math:: W_n = \bar W + \Delta W \circ E_n, \qquad E_n = r_n s_n^\top

    (Wen et al. 2018, eq. 3). Traces, log-densities and the guide see the plain draw.

    Example::

        svi = SVI(flipout(model), guide, optim, Trace_ELBO())

    Sites inside a plate other than the vectorised particles' are local variables and
    left alone, and so is whatever is observed, conditioned, intervened on, initialised
    or replayed by ``Predictive`` or MCMC. ``infer={"flipout": True}`` on a site, or its
    name in ``expose``, overrides the former; ``infer={"flipout": False}`` or ``hide``
    leaves a site alone.

    :param int example_dim: dimension of the *data* that counts the examples; 1 for
        time-major models. By default dimension 0. Data that do not have it free, as ``x.T`` in
        ``w @ x.T``, leave the weight shared with a warning then, and raise
        :class:`~pyro_flipout.ExampleDimError` if ``example_dim`` is given.
    :param hide: names of sites to leave alone.
    :param expose: names of the only sites to consider.
    :param hide_fn: function of a site that returns True to leave it alone.
    :param expose_fn: function of a site that returns True to consider it.
    :param int group_size: how many neighbouring examples of the mini-batch share their signs. With
        1 no two do, as in the paper. With k there are N / k pseudo-independent draws, which large
        batches can spare, and dense and convolutional layers on a CPU take little more than one
        product for the draw of a group. Shuffle the data.
    :param bool audit: whether the model is run a few more times before its first real run, to prove
        that every example sees one weight of its own. Set it to False for a model whose Python must
        not run twice; its sites are then ``"flipped (not verified: ...)"``.
    :param str on_missing_rule: ``"warn"`` to leave a site shared that meets a torch
        function without a flipout rule, ``"error"`` to raise
        :class:`~pyro_flipout.MissingRuleError`.

    .. note:: As a context manager around inference (``with flipout(): svi.step(x)``) the
        handler sees what ``replay`` makes of a site, and that carries the *guide's*
        ``infer`` dict: mark sites there, or use ``hide`` and ``expose``.
    """

    never_sets_values = True
    can_audit = True
    _probe: Probe | None = None
    _unowned: Planned = NOT_OWNED

    def __init__(
        self,
        example_dim: int | None = None,
        hide: Iterable[str] | None = None,
        expose: Iterable[str] | None = None,
        hide_fn: SiteFn | None = None,
        expose_fn: SiteFn | None = None,
        on_missing_rule: str = "warn",
        group_size: int = 1,
        audit: bool = True,
    ) -> None:
        super().__init__()
        if on_missing_rule not in ("warn", "error"):
            raise ValueError(
                f'flipout: got on_missing_rule={on_missing_rule!r}, expected "warn" or "error"'
            )
        self._example_dim: int | None = None
        if example_dim is not None:
            self.example_dim = example_dim
        self.group_size = group_size
        self.on_missing_rule = on_missing_rule
        self.hide = _names("hide", hide)
        self.expose = _names("expose", expose)
        self.hide_fn = hide_fn
        self.expose_fn = expose_fn
        if not isinstance(audit, bool):
            raise TypeError(f"flipout: got audit={audit!r}, expected True or False")
        self.audit = audit
        self._check_choice()
        #: What was decided of each latent site: ``"flipped (verified)"``,
        #: ``"flipped (not verified: <reason>)"`` or ``"shared: <reason>"``.
        self.decisions: dict[str, str] = {}
        self._shared: dict[str, str] = {}
        self._notices = Notices()
        self._inherent: set[str] = set()  # sites that no execution will flip
        self._idle = 0  # executions in which nothing was flipped
        self._guide: Trace | None = None  # of the first call, if that looked like a guide's
        self._joint: dict[str, NoDraw] = {}
        self._most_examples = 0
        self._forget()

    @property
    def example_dim(self) -> int:
        """Dimension of the data that counts the examples."""
        return self._example_dim or 0

    @example_dim.setter
    def example_dim(self, example_dim: int) -> None:
        if not _is_integer(example_dim) or example_dim < 0:
            raise ValueError(
                f"flipout: got example_dim={example_dim!r}, expected an integer >= 0, counted from "
                "the left of the data: 0 for (N, ...), 1 for time-major (T, N, ...)"
            )
        self._example_dim = int(example_dim)

    @property
    def group_size(self) -> int:
        """How many neighbouring examples of the mini-batch share their signs."""
        return self._group_size

    @group_size.setter
    def group_size(self, group_size: int) -> None:
        self._check_group_size(group_size)
        self._group_size = int(group_size)

    def _check_group_size(self, group_size: int) -> None:
        if not _is_integer(group_size) or group_size < 1:
            raise ValueError(
                f"flipout: got group_size={group_size!r}, expected an integer >= 1, the number of "
                "neighbouring examples that share their signs"
            )

    def _check_choice(self) -> None:
        if self.hide_fn is not None and self.expose_fn is not None:
            raise ValueError("flipout: got both hide_fn and expose_fn, expected one of them")
        both = (self.hide or frozenset()) & (self.expose or frozenset())
        if both:
            raise ValueError(
                f"flipout: sites {sorted(both)} are named in both hide and expose; remove one"
            )

    def __repr__(self) -> str:
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("hide", "expose", "hide_fn", "expose_fn")
            if getattr(self, name)
        }
        if self._example_dim is not None:
            options = {"example_dim": self._example_dim, **options}
        if self.group_size > 1:
            options["group_size"] = self.group_size
        options["on_missing_rule"] = self.on_missing_rule
        return f"FlipoutMessenger({', '.join(f'{k}={v!r}' for k, v in options.items())})"

    # ------------------------------------------------------------------ life cycle

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a model: a function, or a module, which stays one."""
        if isinstance(fn, torch.nn.Module):
            from pyro_flipout.poutine.module import wrap_module

            return wrap_module(fn, self)  # its calls come to `run_model`
        if isinstance(fn, (TracePosterior, ELBO, MCMCKernel)):
            kind = type(fn).__name__
            raise TypeError(
                f"flipout: got a {kind}, expected a model; wrap the model that it is given, as in "
                "SVI(flipout(model), guide, ...), or run it inside of `with flipout():`"
            )
        if isinstance(fn, type) or not callable(fn):
            raise TypeError(
                f"flipout: got {fn!r} of type {type(fn).__name__}, expected a model: a function "
                "with pyro.sample statements or an nn.Module instance; give options by keyword"
            )
        return functools.partial(_run_function, self, fn)  # as Pyro's poutine.unwrap expects

    def run_model(self, model: Any, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a model under this handler, once it is known which of its sites can be flipped.

        :param model: what the knowledge is kept with.
        :param fn: calls it.
        """
        planned = plan_of(self, model, fn, args, kwargs)
        with self:
            self._planned = planned
            # Which may keep its sites to itself: it is the model that flips.
            self._seen = isinstance(model, AutoGuide)
            try:
                return fn(*args, **kwargs)
            except Exception:
                planned.failed()
                raise

    def __enter__(self) -> FlipoutMessenger:
        self._check_guide()
        self._forget()
        forget_guides()
        super().__enter__()
        self._entered = True
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        try:
            if args[0] is None:
                self._end()
            else:
                self._notices.drop()
        finally:
            self._forget()

    def _end(self) -> None:
        """Says what is to be said of the executions that end here."""
        self._notices.say()
        if self.hide or self.expose:
            self._check_names()
        self._check_use()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in _OF_ONE_EXECUTION:
            state.pop(name, None)
        return state | {"_guide": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._execution: Execution | None = None
        self._sites: set[str] = set()
        self._flipped: dict[str, Tensor] = {}  # those that are flipped, and their centres
        self._stack = NO_HANDLERS
        self._planned = self._unowned
        self._trace: Callable[[], Any] = lambda: None
        self._entered = False
        self._seen = self._observed = False  # a site, an observed one
        self._noticed: Callable[[], Any] = lambda: None  # the trace when a notice came

    # ----------------------------------------------------------------------- sites

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        if _flipped(msg["value"]) is not None:  # a deterministic site of flipped weights
            flipped = msg["value"]
            msg["value"] = _plain(flipped)
            msg["continuation"] = Continuation(lambda m: m.update(value=flipped), msg)
        if not msg["is_observed"] or msg["infer"].get("_deterministic"):
            # Densities are those of the shared draw, in a prior's parameters too.
            prior = msg["infer"].get("prior")
            draws = _strip(msg["fn"]) + ([] if prior is None else _strip(prior))
            if draws and not msg["is_observed"]:
                msg["continuation"] = Continuation(lambda m: self._check_prior(m, draws), msg)

    def _pyro_post_sample(self, msg: Message) -> None:
        # Swapped in after every post-hook, so that each trace keeps the plain value.
        if not site_is_subsample(msg):
            alone = msg["continuation"] is None
            msg["continuation"] = self._finish if alone else Continuation(self._finish, msg)

    def _finish(self, msg: Message) -> None:
        if torch._C._get_tracing_state() is None:
            self._settle(msg)
        else:  # what is asked of tensors here changes nothing that is traced
            with ignore_jit_warnings():
                self._settle(msg)

    def _settle(self, msg: Message) -> None:
        stack = current_stack(self._stack)
        if stack is not self._stack:
            self._stack = stack
            replayed_by_flipout(stack)
        self._seen = True
        if self._notices and self._recorded() is not self._noticed():
            self._notices.say()
        if _flipped(msg["value"]) is not None:
            _plain_in_traces(msg)
        elif msg["is_observed"]:
            self._observed |= not msg["infer"].get("_deterministic")
            self._check_plates(msg)
        else:
            found = self._decide(msg) if self._probe is None else self._decide_in_probe(msg)
            if isinstance(found, SymmetricDraw):
                self._flip(msg, found)
            else:
                self._leave(msg, found)
        if not isinstance(msg["value"], FlipoutTensor):
            self._batch_particles(msg)

    def _decide(self, msg: Message) -> SymmetricDraw | NoDraw:
        name, infer = msg["name"], msg["infer"]
        if name in self._shared:
            return NoDraw(self._shared[name])
        wish = infer.get("flipout")
        if wish not in (None, True, False):
            raise ValueError(
                f"flipout: site '{name}' has infer={{\"flipout\": {wish!r}}}, "
                "expected True or False"
            )
        if wish is False or self._hides(msg):
            return NoDraw("it is hidden")
        if infer.get("is_auxiliary") or infer.get("was_observed"):
            return NoDraw("it is auxiliary", inherent=True)
        named = bool(wish) or (self.expose is not None and name in self.expose)
        if not named:
            plates = [f.name for f in msg["cond_indep_stack"] if f.name not in PARTICLE_PLATES]
            if plates:
                return NoDraw(f"it is local to the plate '{plates[0]}'", inherent=True)
            if _is_discrete(msg["fn"]):
                return NoDraw("it is discrete", inherent=True)
        reason = why_not_flippable(msg["value"])
        if reason is not None:
            return NoDraw(reason, tell=True, source=reason)
        found = self._remembered(name, find_symmetric_draw(msg, named, self._stack))
        if wish and isinstance(found, NoDraw) and found.tell:
            raise FlipoutError(
                f"flipout: site '{name}' has infer={{\"flipout\": True}}, but {found.reason}; "
                "remove the mark or change the distribution"
            )
        if isinstance(found, SymmetricDraw) and self._probe is None:
            reason = self._planned.judge(name, found.center)
            return found if reason is None else NoDraw(reason)
        return found

    def _decide_in_probe(self, msg: Message) -> SymmetricDraw | NoDraw:
        assert self._probe is not None
        if replayed_site(msg, self._stack) is not None:
            self._probe.replayed.add(msg["name"])
        with torch.set_grad_enabled(self._probe.grad_mode):
            return self._decide(msg)

    def _remembered(self, name: str, found: SymmetricDraw | NoDraw) -> SymmetricDraw | NoDraw:
        """What was found of a site while autograd recorded what depends on what."""
        if isinstance(found, NoDraw):
            if found.joint:
                self._joint[name] = found
        elif name in self._joint:
            if not torch.is_grad_enabled():
                return self._joint[name]
            del self._joint[name]
        return found

    def _hides(self, msg: Message) -> bool:
        if self.hide_fn is not None:
            return bool(self.hide_fn(msg))
        if self.expose_fn is not None:
            return not self.expose_fn(msg)
        name = msg["name"]
        return (self.hide is not None and name in self.hide) or (
            self.expose is not None and name not in self.expose
        )

    def _leave(self, msg: Message, why: NoDraw) -> None:
        name = msg["name"]
        self.decisions[name] = f"shared: {why.reason}"
        (self._inherent.add if why.inherent else self._inherent.discard)(name)
        if why.tell:
            self._notice(why.source, name, why.reason, alone=why.joint)

    def _flip(self, msg: Message, draw: SymmetricDraw) -> None:
        if torch._C._get_tracing_state() is not None:
            raise FlipoutError(
                f"flipout: site '{msg['name']}' is being traced by torch.jit, which would freeze "
                "the number of examples; use Trace_ELBO instead of JitTrace_ELBO "
                "(pyro_flipout.infer.captured replays it without Python), or hide the site"
            )
        name, value = msg["name"], msg["value"]
        if self._probe is not None:
            msg["value"] = self._probe.weight(
                name,
                value,
                draw.center,
                draw.delta,
                _particle_dims(msg),
                lambda: self._execution_of(name),
            )
            return
        execution = self._execution_of(name)
        self.decisions[name] = self._planned.decision(name)
        self._flipped[name] = draw.center
        self._inherent.discard(name)
        msg["value"] = flip(
            value,
            draw.center,
            draw.delta,
            site=name,
            execution=execution,
            lead_dims=_particle_dims(msg),
        )

    def _batch_particles(self, msg: Message) -> None:
        """Lets layers know the particle dimensions of a weight that is not flipped."""
        if msg["infer"].get("_deterministic"):
            return
        lead = _particle_dims(msg)
        if lead and all(f.name in PARTICLE_PLATES for f in msg["cond_indep_stack"]):
            msg["value"] = batched(msg["value"], self._execution_of(msg["name"]), lead)

    def _execution_of(self, name: str) -> Execution:
        """The current execution: a new one for a new trace, or when a site comes again."""
        trace = None if self._stack.recorder is None else self._stack.recorder.trace
        if self._execution is None or name in self._sites or trace is not self._trace():
            self._execution = self._new_execution()
            self._sites, self._flipped = set(), {}
            self._trace = (lambda: None) if trace is None else weakref.ref(trace)
        self._sites.add(name)
        return self._execution

    def _new_execution(self) -> Execution:
        options = self._example_dim, self.on_missing_rule
        if self._probe is not None:
            return self._probe.execution(*options, self.group_size)
        execution = Execution(*options, self._share, self.group_size)
        self._planned.prepare(execution)
        return execution

    # -------------------------------------------------------------------- warnings

    def _share(self, site: str, reason: str) -> None:
        self._shared[site] = reason
        self.decisions[site] = f"shared: {reason}"
        self._notice(site, site, reason, " from now on")

    def _notice(
        self, key: str, site: str, reason: str, verb: str = "", alone: bool = False
    ) -> None:
        """Says at the end of the execution that a site is left shared, once for each key."""
        trace = self._recorded()
        self._noticed = (lambda: None) if trace is None else weakref.ref(trace)
        self._notices.leave(key, site, reason, verb, alone=alone, wait=self._entered)

    def _tell(self, key: str, message: str) -> None:
        self._notices.tell(key, message)

    def _recorded(self) -> Trace | None:
        """The trace that is being made."""
        return None if self._stack.recorder is None else self._stack.recorder.trace

    def _check_use(self) -> None:
        """A program of which nothing is flipped, and why, as far as one can see."""
        if not self._seen:
            if self._planned is self._unowned:  # around inference: captured programs run no model
                return
            self._tell(
                "no sites",
                "the program that is wrapped has no sample site, so that flipout does nothing; "
                "make its weights sample sites, with PyroSample or pyro_flipout.nn.bayesianize",
            )
        elif self._observed:
            # Not after the first execution: the model may have more sites in others.
            if self.decisions and self.decisions.keys() <= self._inherent:
                self._idle += 1
            if self._idle == 2:
                self._tell(
                    "nothing",
                    f"no site of the model can be flipped, so that flipout does nothing: "
                    f"{by_reason(self.decisions)}. It is for weights outside of plates, with a "
                    "guide that draws them, such as AutoNormal",
                )
        elif self._guide is None and "guide" not in self._notices.told:
            counted = self._execution is not None and self._execution.num_examples is not None
            self._guide = None if counted else self._recorded()

    def _check_guide(self) -> None:
        """Whether the first call was a guide's, of a model that is not wrapped."""
        trace, self._guide = self._guide, None
        if trace is None or "guide" in self._notices.told:
            return
        if not any(_SCORED & site.keys() for site in trace.nodes.values()):
            return
        if was_replayed_by_flipout(trace):
            self._notices.told.add("guide")
            return
        self._tell(
            "guide",
            "a guide is wrapped and the model beside it is not, so that flipout does nothing; "
            "wrap the model, as in SVI(flipout(model), guide, ...)",
        )

    def _check_prior(self, msg: Message, draws: list[Draw]) -> None:
        """A site drawn here from flipped parameters needs them to be one joint draw."""
        if self._probe is None:
            replayed = replayed_site(msg, self._stack) is not None
        else:  # which has put another value in its place
            replayed = msg["name"] in self._probe.replayed
        if self._execution is not None and not replayed:
            for draw in draws:
                self._execution.share([draw], depends(msg["name"], draw.site))

    def _check_names(self) -> None:
        """Names given to hide or expose must be those of sites."""
        if self._probe is not None:
            return
        for option, message in unknown_names(self.hide, self.expose, set(self.decisions)):
            self._tell(option, message)

    def _check_plates(self, msg: Message) -> None:
        """The examples that the rules counted must be a data plate of what is observed."""
        if self._execution is None or self._probe is not None:
            return
        sizes = data_plates(msg)
        if self._execution.num_examples is None and set(sizes.values()) != {1}:
            self._execution.tell_held()
        if self._execution.num_examples in (None, 0, 1):
            return
        self._check_groups(self._execution.num_examples)
        if not self._planned.proved:
            reason = contradiction(self._execution, msg, self.example_dim)
            if reason:
                self._share_from_now_on(reason)

    def _share_from_now_on(self, reason: str) -> None:
        """Leaves shared what was flipped for other examples than those of the plates."""
        for site in sorted(self._flipped):
            if site not in self._shared:
                remember(self._flipped[site], site, reason)
                self._share(site, reason)

    def _check_groups(self, num_examples: int) -> None:
        """One group alone sees the shared draw; a last, smaller mini-batch may be one."""
        self._most_examples = max(self._most_examples, num_examples)
        if self._most_examples <= self.group_size:
            self._tell(
                "group_size",
                f"all {num_examples} examples are one group and see the shared draw, since "
                f"group_size={self.group_size}; set it to a fraction of the mini-batch",
            )


_OF_ONE_EXECUTION = (
    *("_execution", "_flipped", "_noticed", "_planned", "_probe", "_sites", "_stack", "_trace"),
)


def _run_function(
    handler: FlipoutMessenger, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    return handler.run_model(fn, fn, args, kwargs)


def contradiction(execution: Execution, site: Message, example_dim: int) -> str | None:
    """Why what was counted cannot be the examples, ``None`` if it can.

    :param site: an observed site of the execution.
    """
    count, sizes = execution.num_examples, data_plates(site)
    # A plate that subsamples may pick from what was computed for all of the data.
    full = {f.full_size for f in site["cond_indep_stack"] if f.vectorized}
    if count in (None, 0, 1) or not sizes or count in {*sizes.values(), *full}:
        return None
    remedy = (
        "wrap the model, as in SVI(flipout(model), guide, ...), so that its examples are found and "
        "verified, or set example_dim to the dimension of the data that counts the examples"
    )
    if any(f.name in sizes and f.size != f.full_size for f in site["cond_indep_stack"]):
        remedy = (
            "give the model the rows that the plate picks, as in "
            f"`with pyro.plate(...) as i: x[i]`, or {remedy}"
        )
    return (
        f"{count} examples were counted in dimension {example_dim} of the data, but the observed "
        f"site '{site['name']}' is in plates of sizes {sizes}; {remedy}"
    )


def data_plates(msg: Message) -> dict[str, int]:
    """Sizes of the vectorised plates of a site that are not those of particles."""
    return {
        f.name: int(f.size)
        for f in msg["cond_indep_stack"]
        if f.vectorized and f.name not in PARTICLE_PLATES
    }


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class Continuation:
    """Runs ``step``, then whatever continuation the message has already.

    Post-hooks run from the outermost handler inwards, so the innermost handler is first.
    """

    def __init__(self, step: Callable[[Message], None], msg: Message) -> None:
        self.step = step
        self.before = msg["continuation"]

    def __call__(self, msg: Message) -> None:
        self.step(msg)
        if self.before is not None:
            self.before(msg)


def unknown_names(
    hide: frozenset[str] | None, expose: frozenset[str] | None, known: set[str]
) -> Iterator[tuple[str, str]]:
    """Which of the two options names sites that are none of those known, and what to say."""
    for option, names in (("hide", hide), ("expose", expose)):
        unknown = sorted((names or frozenset()) - known)
        if unknown and known:
            yield (
                option,
                f"{option} names {unknown}, but the latent sites are {sorted(known)}; correct the "
                "names",
            )


def _names(option: str, names: Iterable[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"flipout: got {option}={names!r}, expected a list of site names")
    return frozenset(names)


def _particle_dims(msg: Message) -> int:
    """Number of leading particle dimensions of a weight's value, else 0."""
    plates = msg["cond_indep_stack"]
    if not plates or not any(f.name in PARTICLE_PLATES for f in plates):
        return 0
    event_dim: int = getattr(msg["fn"], "event_dim", 0)
    return max(int(msg["value"].dim()) - event_dim, 0)


def _is_discrete(fn: Any) -> bool:
    fn = without_events(fn)
    if type(fn) is Normal:  # in most cases
        return False
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _strip(fn: Any) -> list[Draw]:
    """Replaces flipped weights in a distribution by their shared draws, in place."""
    draws: list[Draw] = []
    fn = without_events(fn)  # most have tensors alone, which this tells
    for item in getattr(fn, "__dict__", {}).values():
        if type(item) not in _PLAIN:
            break
    else:
        return draws
    seen, todo = set(), [fn]
    while todo:
        obj = todo.pop()
        if isinstance(obj, (list, tuple)):
            todo += obj
        elif isinstance(obj, (Distribution, Transform)) and id(obj) not in seen:
            seen.add(id(obj))  # transforms refer to their inverses
            for name, item in vars(obj).items():
                if type(item) in _PLAIN:
                    continue
                weight = _flipped(item)
                if weight is not None:
                    draws += weight.draws
                    vars(obj)[name] = _plain(item)
                else:
                    todo.append(item)
    return draws


_PLAIN = ATOMS | {torch.Tensor}
"""Of the attributes of a distribution, those that cannot hold a flipped weight."""


def _plain_in_traces(msg: Message) -> None:
    """Keeps traces plain where another handler computed a site from flipped weights."""
    _strip(msg["fn"])
    for frame in runtime._PYRO_STACK:
        if isinstance(frame, TraceMessenger):
            node = frame.trace.nodes.get(msg["name"])
            if node is not None and _flipped(node["value"]) is not None:
                node["value"] = _plain(node["value"])


def _flipped(value: Any) -> FlipoutTensor | None:
    """The flipped weight that a value is, perhaps one with provenance."""
    if type(value) is torch.Tensor:
        return None
    value = detach_provenance(value) if isinstance(value, ProvenanceTensor) else value
    return value if isinstance(value, FlipoutTensor) else None


def _plain(value: Any) -> Any:
    """The shared draw of such a value, with the same provenance."""
    inner, provenance = extract_provenance(value)
    return track_provenance(inner.plain, provenance)  # type: ignore[attr-defined]


_SCORED = frozenset({"log_prob", "log_prob_sum", "score_parts"})
"""What an objective leaves in the sites of a guide's trace."""
