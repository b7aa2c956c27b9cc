# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""A weight of which every example of the mini-batch sees its own draw.

A :class:`FlipoutTensor` *is* the plain shared draw :math:`W = \bar W + \Delta W` (same
data, same autograd history), and carries what is needed to compute with

.. math::
    W_n = \bar W + \sum_k \Delta W_k \circ E_{nk},
    \qquad E_{nk} \in \{-1, 1\}^{\text{shape}}

instead (Wen et al. 2018, eq. 3). A draw has one term; sums, concatenations and
products of flipped weights have several. ``torch`` functions find their rule in
:data:`RULES` through ``__torch_function__``.

References

[1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
    Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
    https://arxiv.org/abs/1803.04386
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import resolve_name

from pyro_flipout._functions import (
    differentiating,
    refuse_operator,
    share_in_functions,
    watch_gradient,
)
from pyro_flipout._modes import as_subclass, transformed
from pyro_flipout.errors import ExampleDimError, FlipoutError, MissingRuleError, warn
from pyro_flipout.signs import Signs, dense_signs, even_codes, random_bits

__all__ = [
    "RULES",
    "Draw",
    "Execution",
    "FlipoutTensor",
    "NoRule",
    "NotExamples",
    "Rule",
    "SignFactor",
    "Term",
    "flip",
    "implements",
    "queries",
]

F = TypeVar("F", bound=Callable[..., Any])


class NoRule(Exception):
    """Raised inside a rule: this use of a flipped weight cannot be flipped.

    :param reason: for the warning or error.
    :param weights: those that have to be shared for the rule to apply to the others; all
        flipped weights of the call if omitted.
    :param remedy: what to do instead; to register a rule or to hide the site if omitted.
    """

    def __init__(self, reason: str, *weights: FlipoutTensor, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.weights = weights
        self.remedy = remedy


class NotExamples(Exception):
    """Raised inside a rule: the data do not carry the execution's examples."""


# --------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Rule:
    """What a registered torch function does with a flipped weight.

    :ivar apply: the rule, called as ``apply(op, *args, **kwargs)`` with the torch
        function ``op`` and its arguments.
    :ivar flips: what is flipped, one line for the support table.
    :ivar limits: what is left shared or refused, one line for the support table.
    :ivar per_particle: whether weights with leading particle dimensions are taken apart.
    """

    apply: Callable[..., Any]
    flips: str
    limits: str = ""
    per_particle: bool = False


RULES: dict[Callable[..., Any], Rule] = {}
"""The rule of every torch function that knows flipped weights."""

_QUERIES: set[Callable[..., Any]] = set()
_REFUSED: dict[Callable[..., Any], tuple[str, str]] = {}


def implements(
    *ops: Callable[..., Any], flips: str, limits: str = "", per_particle: bool = False
) -> Callable[[F], F]:
    """Registers the decorated function as the flipout rule of ``ops``.

    The rule is called as ``rule(op, *args, **kwargs)``. It returns what ``op`` would
    return if it were run example by example on the explicit weights, or raises
    :class:`NoRule` or :class:`NotExamples` with the reason.

    :param ops: torch functions, as ``__torch_function__`` receives them.
    :param flips: what is flipped, for the support table in the docs.
    :param limits: what is not, for the support table.
    :param per_particle: run the rule once for each particle of weights with leading
        particle dimensions, and stack the results. For layers, whose torch function
        does not know batched weights.
    :raises ValueError: if one of ``ops`` is registered already.
    """

    def decorator(fn: F) -> F:
        for op in dict.fromkeys(ops):  # torch has aliases
            if op in RULES or op in _QUERIES:
                raise ValueError(
                    f"implements: {op} has a flipout rule already; "
                    "remove one of the two registrations"
                )
            RULES[op] = Rule(fn, flips, limits, per_particle)
        return fn

    return decorator


def queries(*ops: Callable[..., Any]) -> None:
    """Registers ``ops`` as questions about a weight, answered by its shared draw."""
    for op in dict.fromkeys(ops):
        if op in RULES or op in _QUERIES:
            raise ValueError(f"queries: {op} is registered already")
        _QUERIES.add(op)


def refuses(*ops: Callable[..., Any], reason: str, remedy: str) -> None:
    """Registers ``ops`` as functions that leave a weight shared, with words of their own.

    :param reason: why they cannot be computed for each example.
    :param remedy: what to do instead.
    """
    for op in ops:
        if op in RULES or op in _QUERIES:
            raise ValueError(f"refuses: {op} is registered already")
        _REFUSED[op] = reason, remedy


def _is_query(op: Callable[..., Any]) -> bool:
    # Attribute reads such as `w.shape` arrive as `torch.Tensor.shape.__get__`.
    if op in _QUERIES:
        return True
    return getattr(op, "__name__", "") in ("__get__", "__set__") and op not in _REFUSED


# -------------------------------------------------------------------- execution


_CODES_AT_ONCE = 128
"""Enough for all weights of a small network, and no large request to the allocator."""


class _Codes:
    """Random codes for several weights, drawn now and finished when first asked for.

    One example needs none, and what a step calls once costs it tens of microseconds.
    """

    __slots__ = ("_bits", "_even", "size", "taken")

    def __init__(self, size: int, device: torch.device) -> None:
        self._bits = random_bits((size,), device)
        self._even: Tensor | None = None
        self.size = size
        self.taken = 0

    @property
    def batched(self) -> bool:
        """Whether ``torch.func.vmap`` drew them for each of its calls."""
        return torch._C._functorch.is_batchedtensor(self._bits)

    def get(self) -> Tensor:
        """All codes, shape ``(size,)``."""
        if self._even is not None:
            return self._even
        even = even_codes(self._bits)
        if not transformed():  # what is made inside torch.func must stay there
            self._even = even
        return even


class Execution:
    """One execution of a model: its examples, and what befell its flipped weights.

    :param example_dim: dimension of the data that counts the examples.
    :param on_missing_rule: ``"warn"`` or ``"error"``.
    :param on_shared: called with ``(site, reason)`` when a site of this execution
        falls back to its shared draw. The default warns.
    :param group_size: how many neighbouring examples have their signs in common.
    """

    def __init__(
        self,
        example_dim: int = 0,
        on_missing_rule: str = "warn",
        on_shared: Callable[[str, str], None] | None = None,
        group_size: int = 1,
    ) -> None:
        self.example_dim = example_dim
        self.on_missing_rule = on_missing_rule
        self._group_size = int(group_size)
        self.num_examples: int | None = None
        self.particles_seen = False
        self.perhaps_one = False  # a weight met one row: data of one example, or a constant
        self.picked: set[str] = set()  # sites of which entries were picked by a tensor of indices
        self._held: list[Callable[[], None]] = []  # what to tell unless there is one example
        self._on_shared = on_shared or warn_shared
        self._signs: dict[tuple[Any, ...], tuple[Tensor, Signs]] = {}
        self._codes: dict[torch.device, _Codes] = {}  # from which the next weight takes its own
        self._drawn: dict[int, _Codes] = {}  # all that have been used, by address

    def _draw_codes(self, count: int, device: torch.device) -> tuple[_Codes, int]:
        """Random codes of which ``count`` are for nobody else, and where these start.

        Small weights share a call of the generator.

        :raises FlipoutError: under ``torch.func.vmap`` with ``randomness="different"``.
        """
        if transformed():  # what is made inside torch.func must stay there
            own = _Codes(count, device)
            if own.batched:
                raise FlipoutError(
                    'flipout: a weight was made inside torch.func.vmap with randomness="different",'
                    " expected signs that its calls have in common; make it outside of vmap, pass "
                    'randomness="same", or draw particles with vectorize_particles=True'
                )
            return own, 0
        codes = self._codes.get(device)
        if codes is None or codes.taken + count > codes.size:
            codes = self._codes[device] = _Codes(max(count, _CODES_AT_ONCE), device)
        start = codes.taken
        codes.taken += count
        return codes, start

    def _look_at(self, codes: _Codes) -> Tensor:
        """All of ``codes``; the signs of a part of them will be cut from those of all."""
        found = codes.get()
        if not transformed():
            self._drawn[found.data_ptr()] = codes
        return found

    def count(self, num_examples: int, counted_on: str) -> None:
        """Learns the number of examples, or checks it against the one known.

        :raises NotExamples: if it differs.
        """
        if self.num_examples is None:
            self.num_examples = num_examples
            if not self.is_single:
                self.tell_held()
        elif self.num_examples != num_examples:
            raise NotExamples(
                f"{counted_on} has {num_examples} rows in its dimension "
                f"{self.example_dim}, but this execution has "
                f"{self.num_examples} examples; keep the example dimension apart, as "
                "in (N, T, features) instead of (N * T, features), or set example_dim"
            )

    @property
    def group_size(self) -> int:
        """How many neighbouring examples have their signs in common."""
        return self._group_size

    @property
    def is_single(self) -> bool:
        """Whether there is one group, which sees the shared draw: its signs are all 1."""
        count = self.num_examples
        return count is not None and 0 < count <= self._group_size

    def signs(self, codes: Tensor, dtype: torch.dtype, num_examples: int | None = None) -> Tensor:
        """Dense signs ``(N, *codes.shape)``."""
        count = self.num_examples if num_examples is None else num_examples
        assert count is not None
        return dense_signs(codes, count, dtype, self.group_size)

    def numbers(self, rows: Tensor) -> Tensor:
        """The numbers, in the signs, of the groups to which rows of the data belong."""
        return rows if self.group_size == 1 else rows // self.group_size

    def factored_signs(self, codes: Tensor, dtype: torch.dtype) -> Signs:
        """Signs of flat ``codes`` for multiplying data, kept for the whole execution."""
        assert self.num_examples is not None
        if transformed():  # what is made inside torch.func must stay there
            return Signs(codes, self.num_examples, dtype, self.group_size)
        key = codes.data_ptr(), codes.numel(), codes.stride(), dtype
        if key not in self._signs:
            # Holding `codes` keeps its address its own.
            self._signs[key] = codes, self._new_signs(codes, dtype)
        return self._signs[key][1]

    def _new_signs(self, codes: Tensor, dtype: torch.dtype) -> Signs:
        """Signs of ``codes``, cut from those of all codes that were drawn with them."""
        assert self.num_examples is not None
        drawn = self._drawn.get(codes.untyped_storage().data_ptr())
        if drawn is not None and codes.is_contiguous():
            start, count = codes.storage_offset(), codes.numel()
            if drawn.taken > count:
                all_taken = drawn.get()[: drawn.taken]
                return self.factored_signs(all_taken, dtype).of(slice(start, start + count))
        return Signs(codes, self.num_examples, dtype, self.group_size)

    def has_particles(self, data: Tensor, particles: int) -> bool:
        """Whether ``data`` are ``(K, N, ...)``, with one slice for each of K particles.

        Before any examples were counted data have none. Where K = N leaves it open, they
        have particles once a layer of this execution has added that dimension.
        """
        count, dim = self.num_examples, self.example_dim
        if count is None or data.dim() < dim + 2:
            return False
        if data.shape[0] != particles or data.shape[dim + 1] != count:
            return False
        return data.shape[dim] != count or self.particles_seen

    def share(self, draws: Iterable[Draw], reason: str) -> None:
        """Makes ``draws`` fall back to their shared values."""
        for draw in draws:
            if not draw.shared:
                draw.shared = True
                self._on_shared(draw.site, reason)

    @property
    def may_be_single(self) -> bool:
        """Whether nothing counted the examples yet, and a weight met what may be data of one.

        Only if somebody will ask in the end, as the handler does: else nothing might be told.
        """
        unknown = self.num_examples is None and self._on_shared is not warn_shared
        return self.perhaps_one and unknown

    def hold(self, draws: Sequence[Draw], tell: Callable[[], None]) -> None:
        """Makes ``draws`` fall back here and now, which one example would not notice.

        :param tell: called when there turn out to be more.
        """
        for draw in draws:
            draw.shared = True
        self._held.append(tell)

    def tell_held(self) -> None:
        """Tells what was held back: there are several examples."""
        held, self._held = self._held, []
        for tell in held:
            tell()


def warn_shared(site: str, reason: str) -> None:
    """Emits the one :class:`FlipoutWarning` of a site left shared."""
    warn(f"site '{site}' keeps its shared draw: {reason}")


class Draw:
    """One symmetric draw of one site in one execution.

    Signs vary along the first two dimensions of the value, after ``lead_dims``
    leading batch (particle) dimensions, each of which has signs of its own. Codes are
    drawn here and not when first used: a first use inside ``torch.utils.checkpoint``
    would consume random numbers that its recomputation does not consume again.
    """

    __slots__ = (
        *("_codes", "_factors", "_lead_dims", "_shape", "_sources", "_start"),
        *("__weakref__", "execution", "shared", "site", "used"),
    )

    def __init__(self, site: str, value: Tensor, execution: Execution, lead_dims: int = 0) -> None:
        self.site = site
        self.execution = execution
        self.shared = False
        self.used = False
        self._shape, self._lead_dims = value.shape, lead_dims
        self._factors: tuple[Factor, ...] | None = None
        self._sources: tuple[SignFactor, ...] | None = None
        lead, event = self._shape[:lead_dims].numel(), self._shape[lead_dims:]
        count = lead * (sum(event[:2]) if event else 1)
        self._codes, self._start = execution._draw_codes(count, value.device)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The sign factors, which one example has no use for: made when first asked for."""
        if self._factors is not None:
            return self._factors
        lead, event = tuple(self._shape[: self._lead_dims]), tuple(self._shape[self._lead_dims :])
        codes, start = self.execution._look_at(self._codes), self._start
        if self._sources is None:
            self._sources = tuple(SignFactor(self) for _ in range(min(2, len(event)) or 1))
        factors = []
        for dim, source in enumerate(self._sources):
            shape = (*lead, *(size if d == dim else 1 for d, size in enumerate(event)))
            stop = start + math.prod(shape)
            factors.append((source, codes[start:stop].view(shape)))
            start = stop
        if not transformed():  # what is made inside torch.func must stay there
            self._factors = tuple(factors)
        return tuple(factors)

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """Codes of the sign factors, each broadcastable to the value's shape."""
        return tuple(codes for source, codes in self.factors if not source.dropped)

    def drop(self, sources: set[SignFactor]) -> None:
        """Does without some sign factors, before any example has seen them.

        The perturbation stays symmetric with fewer signs, as long as one is left.

        :raises NoRule: if none would be left, or an example has seen them already.
        """
        own = {source for source, _ in self.factors if not source.dropped}
        dropped = own & sources
        if not dropped:
            return
        if self.used:
            raise NoRule(
                f"site '{self.site}' met the examples before, with signs along the dimension "
                "that is summed over here; multiply the weights first"
            )
        if dropped == own:
            raise NoRule(f"all signs of site '{self.site}' are summed over")
        for source in dropped:
            source.dropped = True


class SignFactor:
    """The signs of a draw along one dimension of its value, wherever that goes."""

    __slots__ = ("_draw", "dropped")

    def __init__(self, draw: Draw) -> None:
        self._draw = weakref.ref(draw)  # which holds its factors: no cycle, nothing to collect
        self.dropped = False

    @property
    def shared(self) -> bool:
        """Whether these signs are not applied."""
        draw = self._draw()
        assert draw is not None  # every term holds its draws
        return self.dropped or draw.shared


Factor = tuple[SignFactor, Tensor]
"""A sign factor: where it is from, and codes broadcastable to the term's delta."""


class Term:
    """A perturbation ``delta ∘ E_n`` with ``E_n`` the product of its sign factors.

    :param delta: perturbation, of the weight's shape; or the value and the centre that it is the
        difference of, which one example has no use for.
    :param draws: the draws it comes from.
    :param factors: its sign factors; those of the one draw if omitted.
    """

    __slots__ = ("_delta", "_factors", "draws")

    def __init__(
        self,
        delta: Tensor | tuple[Tensor, Tensor],
        draws: tuple[Draw, ...],
        factors: tuple[Factor, ...] | None = None,
    ) -> None:
        self._delta = delta
        self.draws = draws
        self._factors = factors

    @property
    def delta(self) -> Tensor:
        """The perturbation, of the weight's shape."""
        if isinstance(self._delta, Tensor):
            return self._delta
        value, center = self._delta
        delta = value - center
        # What is made without a history, or inside torch.func, is for this call alone.
        if torch.is_grad_enabled() and not transformed():
            self._delta = delta
        return delta

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The sign factors, dropped ones too."""
        return self.draws[0].factors if self._factors is None else self._factors

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """Codes of the sign factors that are applied, for use on the examples."""
        for draw in self.draws:
            draw.used = True
        return tuple(codes for source, codes in self.factors if not source.shared)

    @property
    def shared(self) -> bool:
        """Whether no sign is left, so that the term belongs to the centre."""
        if len(self.draws) == 1:  # a generator costs more than the question
            return self.draws[0].shared
        return all(draw.shared for draw in self.draws)


# ----------------------------------------------------------------------- tensor


class FlipoutTensor(Tensor):
    """A weight with one pseudo-independent draw for each example of the mini-batch.

    Made by the :func:`~pyro_flipout.flipout` handler, or by :func:`flip`. Everything a
    rule does not cover sees the plain shared draw.
    """

    _plain: Tensor
    _center: Tensor
    _terms: tuple[Term, ...]
    _execution: Execution

    _lead_dims: int = 0

    @staticmethod
    def build(
        plain: Tensor,
        center: Tensor,
        terms: Sequence[Term],
        execution: Execution,
        lead_dims: int = 0,
    ) -> FlipoutTensor:
        """Wraps the plain value ``center + sum of deltas``."""
        self = as_subclass(plain, FlipoutTensor)
        self._lead_dims = lead_dims
        self._plain = plain
        self._center = center
        self._terms = tuple(terms)
        self._execution = execution
        watch_gradient(self)
        return self

    @property
    def plain(self) -> Tensor:
        """The shared draw as a plain tensor."""
        return self._plain

    # Read by every rule, and faster here than by way of __torch_function__.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Shape of the weight."""
        return self._plain.shape

    def dim(self) -> int:
        """Number of dimensions of the weight."""
        return self._plain.dim()

    @property
    def lead_dims(self) -> int:
        """Number of leading particle dimensions, ``(K, 1, ..., 1)``."""
        return self._lead_dims

    @property
    def execution(self) -> Execution:
        """The execution of the model in which this weight was drawn."""
        return self._execution

    @property
    def center(self) -> Tensor:
        """Centre of the distribution, of the shape of the weight."""
        return self._split()[0]

    @property
    def delta(self) -> Tensor:
        """Perturbation of the shared draw, ``plain - center``."""
        terms = self._split()[1]
        if not terms:
            return torch.zeros_like(self._plain)
        total = terms[0].delta
        for term in terms[1:]:
            total = total + term.delta
        return total.expand(self._plain.shape)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The perturbations that are flipped, each with its own sign factors."""
        return self._split()[1]

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The draws this weight is made of, shared or not."""
        return tuple(dict.fromkeys(d for term in self._terms for d in term.draws))

    @property
    def site(self) -> str:
        """Name of the sample site, several joined by ``" and "``."""
        return " and ".join(dict.fromkeys(d.site for d in self.draws))

    def materialize(self, num_examples: int | None = None) -> Tensor:
        """The explicit weights that the examples see.

        :param num_examples: the number N of examples; by default that of the
            execution, which is known once a rule has met data.
        :returns: tensor of shape ``(N, *self.shape)``.
        :raises ValueError: if the number of examples is unknown or contradicted.
        """
        known = self._execution.num_examples
        if num_examples is None:
            if known is None:
                raise ValueError(
                    f"materialize: the number of examples of site '{self.site}' is not known "
                    "yet, since the weight has not met data; pass num_examples"
                )
            num_examples = known
        elif known is not None and known != num_examples:
            raise ValueError(
                f"materialize: got num_examples={num_examples}, but the execution in which "
                f"site '{self.site}' was drawn has {known} examples"
            )
        center, terms = self._split()
        out = center.expand(num_examples, *self._plain.shape)
        for term in terms:
            perturbation = term.delta
            for codes in term.codes:
                signs = self._execution.signs(codes, self.plain.dtype, num_examples)
                perturbation = perturbation * signs
            out = out + perturbation
        return out

    def _split(self) -> tuple[Tensor, tuple[Term, ...]]:
        # Terms whose site fell back to its shared draw belong to the centre.
        for term in self._terms:
            if term.shared:
                break
        else:
            return self._center, self._terms
        terms = tuple(term for term in self._terms if not term.shared)
        if not terms:  # the plain value may have been changed in place
            return self._plain, terms
        center = self._center
        for term in self._terms:
            if term.shared:
                center = center + term.delta
        return center, terms

    @classmethod
    @_disable_dynamo  # torch.compiler.disable, but without importing dynamo until it is called
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch._guards.TracingContext.try_get() is not None:
            # torch.compile looks at a weight before it traces a call. It would trace the shared
            # draw: told to leave the frame alone, it runs it as it is, and the rules apply.
            raise torch._dynamo.exc.SkipFrame("a flipped weight is not traced")
        return _dispatch(func, args, kwargs or {})

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operator on shared draws that was called past ``__torch_function__``.

        TorchScript, ``torch.func`` over a weight and extensions call operators directly. Autograd
        has recorded the call by now, and sends its gradient to the shared draw.
        """
        arguments = (args, kwargs or {})
        weights = [weight for weight in _weights(arguments) if weight.has_signs]
        if weights:
            refuse_operator(weights, str(func))
        args, kwargs = unwrap(arguments)
        return func(*args, **kwargs)

    @property
    def has_signs(self) -> bool:
        """Whether the examples see draws that differ."""
        return not all(term.shared for term in self._terms)

    @classmethod
    def refuse(
        cls, weights: Sequence[Any], call: str, reason: str, remedy: str | None = None
    ) -> None:
        """Leaves weights of this class shared that met a call without a rule, or raises."""
        _missing_rule(call, weights, reason, remedy)


def _dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a torch function on flipped weights by its rule, or on their shared draws."""
    if differentiating():
        share_in_functions(func, _weights((args, kwargs)))
    rule = RULES.get(func)
    if rule is None and _is_query(func):
        return func(*unwrap(args), **unwrap(kwargs))
    weights = _weights((*args, kwargs) if kwargs else args)
    flipped = []
    for weight in weights:
        if weight._lead_dims and rule is not None and rule.per_particle:
            return _over_particles(func, args, kwargs, weights)
        if weight._split()[1]:
            flipped.append(weight)
    if not flipped:
        return func(*unwrap(args), **unwrap(kwargs))
    try:
        if rule is None:
            reason, remedy = _REFUSED.get(func, ("there is no flipout rule", None))
            raise NoRule(reason, remedy=remedy)
        if kwargs.get("out") is not None:
            raise NoRule("the result is written into out=; use what the call returns instead")
        return rule.apply(func, *args, **kwargs)
    except NoRule as why:
        _missing_rule(describe(func), why.weights or flipped, str(why), why.remedy)
        if why.weights:
            return _dispatch(func, args, kwargs)
    except NotExamples as why:
        _share(flipped, f"in {describe(func)}, {why}")
    return func(*unwrap(args), **unwrap(kwargs))


def flip(
    value: Tensor,
    center: Tensor,
    delta: Tensor | None = None,
    *,
    site: str = "weight",
    execution: Execution | None = None,
    lead_dims: int = 0,
) -> FlipoutTensor:
    """Gives every example its own pseudo-independent draw of a weight.

    :param value: the shared draw ``center + delta``; any shape ``(*)``.
    :param center: centre of a symmetric, factorised distribution, shape ``(*)``.
    :param delta: the perturbation, shape ``(*)``; ``value - center`` if omitted. Give
        it where it is known exactly, as ``scale * eps``.
    :param site: name for messages.
    :param execution: weights that meet the same examples share one.
    :param lead_dims: number of leading batch (particle) dimensions.
    :returns: the weight; give it to any torch function that has a rule.

    >>> _ = torch.manual_seed(0)
    >>> loc, scale = torch.zeros(2, 3), 0.1
    >>> w = flip(loc + scale * torch.randn(2, 3), loc)
    >>> torch.nn.functional.linear(torch.randn(5, 3), w).shape
    torch.Size([5, 2])
    >>> w.materialize().shape
    torch.Size([5, 2, 3])
    """
    execution = Execution() if execution is None else execution
    draw = Draw(site, value, execution, lead_dims)
    term = Term((value, center) if delta is None else delta, (draw,))
    return FlipoutTensor.build(value, center, (term,), execution, lead_dims)


def batched(value: Tensor, execution: Execution, lead_dims: int) -> FlipoutTensor:
    """A weight with particle dimensions that is not flipped.

    :param value: shape ``(K, 1, ..., 1, *)`` with ``lead_dims`` leading dimensions.
    """
    return FlipoutTensor.build(value, value, (), execution, lead_dims)


def _over_particles(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: Sequence[FlipoutTensor],
) -> Any:
    """Runs a layer once for each particle: data ``(N, ...)`` or ``(K, N, ...)``."""
    particles = max(w.size(0) for w in weights if w.lead_dims)
    execution = weights[0].execution
    data = next((t for t in _tensors((args, kwargs)) if t.dim() > execution.example_dim), None)
    if execution.num_examples is None and data is not None:
        execution.num_examples = data.size(execution.example_dim)

    def pick(obj: Any, k: int) -> Any:
        if isinstance(obj, FlipoutTensor):
            return _particle(obj, k)
        if isinstance(obj, Tensor):
            return obj[k] if execution.has_particles(obj, particles) else obj
        if type(obj) in (list, tuple):
            return type(obj)(pick(item, k) for item in obj)
        return obj

    results = [
        func(*(pick(a, k) for a in args), **{name: pick(a, k) for name, a in kwargs.items()})
        for k in range(particles)
    ]
    execution.particles_seen = True
    return torch.stack(results)


def _tensors(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor) and not isinstance(obj, FlipoutTensor):
        yield obj
    elif isinstance(obj, (list, tuple, dict)):
        for item in obj.values() if isinstance(obj, dict) else obj:
            yield from _tensors(item)


def _particle(weight: FlipoutTensor, k: int) -> FlipoutTensor | Tensor:
    lead = weight.lead_dims
    if not lead:
        return weight

    def slice_(value: Tensor) -> Tensor:
        index = k if value.size(0) > 1 else 0
        return value[(index, *(0,) * (lead - 1))]

    if not weight.terms:
        return slice_(weight.plain)
    terms = [
        Term(slice_(t.delta), t.draws, tuple((source, slice_(c)) for source, c in t.factors))
        for t in weight.terms
    ]
    center = slice_(weight.center)
    return FlipoutTensor.build(slice_(weight.plain), center, terms, weight.execution)


def unwrap(obj: Any) -> Any:
    """Replaces flipped weights by their shared draws in nested arguments."""
    if isinstance(obj, FlipoutTensor):
        return obj.plain
    if type(obj) in (list, tuple):
        return type(obj)(unwrap(item) for item in obj)
    if type(obj) is dict:
        return {key: unwrap(item) for key, item in obj.items()}
    return obj


def describe(op: Callable[..., Any]) -> str:
    """Public name of a torch function, for messages."""
    name = resolve_name(op)
    if name is None:
        name = getattr(op, "__qualname__", None) or getattr(op, "__name__", None) or str(op)
        module = getattr(op, "__module__", None)
        return f"{module}.{name}" if module else str(name)
    return str(name)


def _weights(args: Iterable[Any]) -> list[FlipoutTensor]:
    """The flipped weights among arguments and in their lists, tuples and dicts."""
    found: list[FlipoutTensor] = []
    for obj in args:
        if isinstance(obj, FlipoutTensor):
            found.append(obj)
        elif isinstance(obj, (list, tuple)):
            found += _weights(obj)
        elif isinstance(obj, dict):
            found += _weights(obj.values())
    return found


def _share(flipped: Sequence[FlipoutTensor], reason: str) -> None:
    for weight in flipped:
        weight.execution.share(weight.draws, reason)


def _missing_rule(
    name: str, flipped: Sequence[FlipoutTensor], reason: str, remedy: str | None = None
) -> None:
    if all(w.execution.is_single for w in flipped):
        for weight in flipped:  # one example sees the shared draw: nothing to warn of
            for draw in weight.draws:
                draw.shared = True
        return
    site = " and ".join(dict.fromkeys(w.site for w in flipped))
    if remedy is None:
        remedy = _usual_remedy(flipped)
    message = f"in {name}, {reason}; {remedy}"
    error = MissingRuleError(f"flipout: site '{site}': {message}")
    strict = any(w.execution.on_missing_rule == "error" for w in flipped)
    if all(w.execution.may_be_single for w in flipped):
        for weight in flipped:
            _hold(weight.execution, list(weight.draws), message, error if strict else None)
        return
    if strict:
        raise error
    _share(flipped, message)


def _usual_remedy(flipped: Sequence[FlipoutTensor]) -> str:
    remedy = "register a rule with pyro_flipout.implements, or hide it with flipout(hide=[...])"
    if any(draw.site in w.execution.picked for w in flipped for draw in w.draws):
        return (
            "to pick an entry for each example write "
            f"F.embedding(index, w.unsqueeze(-1)).squeeze(-1) in place of w[index]; else {remedy}"
        )
    return remedy


def _hold(
    execution: Execution, draws: Sequence[Draw], reason: str, error: Exception | None
) -> None:
    def tell() -> None:
        if error is not None:
            raise error
        for draw in draws:
            draw.shared = False  # so that it is told
        execution.share(draws, reason)

    execution.hold(draws, tell)


def example_dim_error(weight: FlipoutTensor, name: str, shape: Sequence[int]) -> ExampleDimError:
    """The error for data whose ``example_dim`` is not free to count examples."""
    dim = weight.execution.example_dim
    return ExampleDimError(
        f"flipout: site '{weight.site}' in {name} met data of shape {tuple(shape)}, whose "
        f"dimension {dim} is used up by the weight and cannot count the examples; "
        f"you said example_dim={dim}: set it to the dimension that does, or move the examples "
        "there; a constant is told from data by torch.nn.Parameter(..., requires_grad=False)"
    )
