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
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from pyro.ops.provenance import ProvenanceTensor
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.overrides import resolve_name

from pyro_flipout._functions import (
    differentiating,
    refuse_operator,
    share_in_functions,
    watch_gradient,
)
from pyro_flipout._modes import (
    as_subclass,
    generator_state,
    in_backward,
    looked_at,
    transformed,
    untransformed,
)
from pyro_flipout.errors import ExampleDimError, FlipoutError, MissingRuleError, warn
from pyro_flipout.signs import Numbers, Signs, dense_signs, draw_codes, random_bits

__all__ = [
    "RULES",
    "Draw",
    "Execution",
    "FlipoutTensor",
    "NoRule",
    "NotExamples",
    "Router",
    "Rows",
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


class NoExampleDim(NotExamples):
    """Raised inside a rule: no dimension of the data can count examples.

    A single example sees the shared draw anyway, and needs no warning.
    """


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
    if getattr(op, "__name__", "") not in ("__get__", "__set__") or op in _REFUSED:
        return False
    return getattr(op, "__self__", None) not in _VIEWS


_VIEWS = (Tensor.real, Tensor.imag)
"""Attributes that are no questions, but views with a gradient: `w.real = x` changes the weight."""


# -------------------------------------------------------------------- execution


_CODES_AT_ONCE = 128
"""Enough for all weights of a small network, and no large request to the allocator."""


class _Codes:
    """Random codes for several weights, which are drawn when the first of these meets examples.

    So one example draws none, nor does a model of which no weight is flipped in the end: it leaves
    torch's generator where the bare model does. Until the codes are drawn their *places*, numbers
    0 to ``size`` of dtype int64, are there instead of them: rules that move the entries of a weight
    move the places as they would move the codes.

    ``torch.utils.checkpoint`` runs a part of the program again, from the generator's state when it
    ran first. Where codes were drawn in that part, a recomputation has to consume as many random
    numbers as their draw did, else a dropout behind it would be another one. It is there when the
    generator has the state again in which they were drawn.

    :param size: their number.
    :param device: where they are.
    :param drawn: the codes, if they are there already.
    """

    __slots__ = ("_before", "_places", "device", "drawn", "size", "taken")

    def __init__(self, size: int, device: torch.device, drawn: Tensor | None = None) -> None:
        self.size, self.device, self.taken = size, device, 0
        self.drawn = drawn
        self._before: Tensor | None = None  # state of the generator
        self._places: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """Their numbers, shape ``(size,)``."""
        if self._places is None:
            with untransformed():
                self._places = looked_at(lambda: torch.arange(self.size, device=self.device))
        return self._places

    def draw(self) -> Tensor:
        """Draws all codes, shape ``(size,)``."""
        with untransformed():  # torch.func.vmap would draw them for each call, or refuse to
            before = generator_state(self.device)
            self.drawn = draw_codes((self.size,), self.device)
        self._before = before if type(self.drawn) is Tensor else None
        return self.drawn

    def draw_again(self) -> None:
        """Consumes the random numbers of the draw, if this is a recomputation of it."""
        if self._before is None or not in_backward():
            return
        with untransformed():
            now = generator_state(self.device)
            if now is not None and torch.equal(now, self._before):
                random_bits((self.size,), self.device)

    def at(self, places: Tensor) -> Tensor:
        """The codes that were drawn for some places: a view, if the places are one of all."""
        codes = self.drawn
        assert codes is not None, "drawn by who asks for them"
        if places.device != codes.device:  # the weight has been moved
            codes = codes.to(places.device)
        elif self._is_part(places):
            return codes.as_strided(places.shape, places.stride(), places.storage_offset())
        return codes[places]

    def _is_part(self, places: Tensor) -> bool:
        """Whether they are a view of all places."""
        if torch._C._functorch.is_functorch_wrapped_tensor(places):
            return False
        return bool(places.untyped_storage()._cdata == self.places.untyped_storage()._cdata)


class Execution:
    """One execution of a model: its examples, and what befell its flipped weights.

    :param example_dim: dimension of the data that counts the examples; dimension 0 if omitted,
        and then data without it leave a weight shared, which is an error if it was given.
    :param on_missing_rule: ``"warn"`` or ``"error"``.
    :param on_shared: called with ``(site, reason)`` when a site of this execution
        falls back to its shared draw. The default warns.
    :param group_size: how many neighbouring examples have their signs in common.
    """

    router: Router | None = None
    """Decides, for each call, how the rows of its data belong to the examples."""
    constants: bool = False
    """Whether the data of the call are constants, the same for every example."""
    _numbers: Numbers | None = None

    def __init__(
        self,
        example_dim: int | None = None,
        on_missing_rule: str = "warn",
        on_shared: Callable[[str, str], None] | None = None,
        group_size: int = 1,
    ) -> None:
        self.example_dim = example_dim or 0
        self.example_dim_given = example_dim is not None
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
        self._seen_as: dict[Any, Execution] = {}

    def _reserve_codes(self, count: int, device: torch.device) -> tuple[_Codes, int]:
        """Random codes of which ``count`` are for nobody else, and where these start.

        Small weights share a call of the generator.

        :raises FlipoutError: under ``torch.func.vmap`` with ``randomness="different"``.
        """
        if transformed():  # what is made inside torch.func must stay there
            drawn = draw_codes((count,), device)
            if torch._C._functorch.is_batchedtensor(drawn):
                raise FlipoutError(
                    'flipout: a weight was made inside torch.func.vmap with randomness="different",'
                    " expected signs that its calls have in common; make it outside of vmap, pass "
                    'randomness="same", or draw particles with vectorize_particles=True'
                )
            return _Codes(count, device, drawn), 0
        codes = self._codes.get(device)
        if codes is None or codes.taken + count > codes.size:
            codes = self._codes[device] = _Codes(max(count, _CODES_AT_ONCE), device)
        start = codes.taken
        codes.taken += count
        return codes, start

    def _draw_codes(self, codes: _Codes) -> None:
        """Draws ``codes``; the signs of a part of them will be cut from those of all."""
        self._drawn[codes.draw().data_ptr()] = codes

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
        if self._numbers is not None:
            return self._numbers.of_rows(dense_signs(codes, self._numbers.count, dtype))
        return dense_signs(codes, count, dtype, self.group_size)

    def numbers(self, rows: Tensor) -> Tensor:
        """The numbers, in the signs, of the groups to which rows of the data belong."""
        if self._numbers is not None:
            return self._numbers.of(rows)
        return rows if self.group_size == 1 else rows // self.group_size

    @property
    def root(self) -> Execution:
        """The execution whose examples these are."""
        return self

    def seen_as(self, rows: Rows) -> Execution:
        """This execution for a call whose data have other rows than one for each example.

        :param rows: how the rows belong to the examples.
        """
        key = rows.key
        if key not in self._seen_as or transformed():
            self._seen_as[key] = _RowsExecution(self, rows)
        return self._seen_as[key]

    def factored_signs(self, codes: Tensor, dtype: torch.dtype) -> Signs:
        """Signs of flat ``codes`` for multiplying data, kept for the whole execution."""
        assert self.num_examples is not None
        if transformed():  # what is made inside torch.func must stay there
            return Signs(codes, self.num_examples, dtype, self.group_size, self._numbers)
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
                assert drawn.drawn is not None
                all_taken = drawn.drawn[: drawn.taken]
                return self.factored_signs(all_taken, dtype).of(slice(start, start + count))
        return Signs(codes, self.num_examples, dtype, self.group_size, self._numbers)

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


@dataclass(frozen=True)
class Rows:
    """How the rows of a call's data belong to the examples.

    :ivar layout: ``"examples"``: row n is example n, in dimension ``dim``; ``"blocks"``: row r is
        of example ``r // (R / N)``, as after ``flatten(0, 1)`` of ``(N, T, ...)``;
        ``"interleaved"``: of example ``r % N``, as after ``flatten(0, 1)`` of ``(T, N, ...)`` or
        ``torch.cat`` of mini-batches; ``"owners"``: of example ``owners[r]``; ``"constant"``: the
        data are the same for every example.
    :ivar dim: dimension of the data that counts the rows.
    :ivar count: the number R of rows.
    :ivar owners: shape ``(R,)``.
    """

    layout: str
    dim: int = 0
    count: int = 0
    owners: Tensor | None = None
    device: torch.device | None = None

    @property
    def key(self) -> Any:
        """Equal for equal rows."""
        # The owners are those of a block, and live as long as it does.
        return self.layout, self.dim, self.count, self.device, id(self.owners)

    def owner_of(self, num_examples: int) -> Tensor:
        """The example that each row belongs to, shape ``(R,)``."""
        if self.owners is not None:
            return self.owners
        rows = torch.arange(self.count, device=self.device)
        if self.layout == "interleaved":
            return rows % num_examples
        return rows // (self.count // num_examples)


class _RowsExecution(Execution):
    """An execution as one call sees it, whose data have rows of their own."""

    def __init__(self, root: Execution, rows: Rows) -> None:
        self.__dict__.update(root.__dict__)
        self._root, self._rows = root, rows
        self.router = None
        self.example_dim = rows.dim
        self._signs = {}
        if rows.layout == "constant":
            self.constants = True
            return
        count = root.num_examples
        assert count is not None, "a layout is chosen once the examples are counted"
        self.num_examples = rows.count
        if rows.layout == "blocks" and root._numbers is None:
            self._group_size = root.group_size * (rows.count // count)
        elif rows.layout != "examples" and count > 1:
            owner = rows.owner_of(count)
            groups = -(-count // root.group_size) if root._numbers is None else root._numbers.count
            self._numbers = Numbers(root.numbers(owner), groups)
            self._group_size = 1

    @property
    def root(self) -> Execution:
        """The execution whose examples these are."""
        return self._root

    @property
    def is_single(self) -> bool:
        """Whether there is one group of examples, which sees the shared draw."""
        return self._root.is_single

    def share(self, draws: Iterable[Draw], reason: str) -> None:
        """Makes ``draws`` fall back to their shared values."""
        self._root.share(draws, reason)

    def hold(self, draws: Sequence[Draw], tell: Callable[[], None]) -> None:
        """Makes ``draws`` fall back here and now, which one example would not notice."""
        self._root.hold(draws, tell)

    def seen_as(self, rows: Rows) -> Execution:
        """The execution for a call inside this one."""
        return self


class Router(Protocol):
    """What knows how the rows of each call's data belong to the examples."""

    def route(
        self, func: Callable[..., Any], args: Any, kwargs: Any, weights: Sequence[FlipoutTensor]
    ) -> Rows | None:
        """The rows of a call, ``None`` for one row an example in the usual dimension."""


def warn_shared(site: str, reason: str) -> None:
    """Emits the one :class:`FlipoutWarning` of a site left shared."""
    warn(f"site '{site}' keeps its shared draw: {reason}")


class Draw:
    """One symmetric draw of one site in one execution.

    Signs vary along the first two dimensions of the value, after ``lead_dims``
    leading batch (particle) dimensions, each of which has signs of its own.
    """

    __slots__ = (
        *("_codes", "_factors", "_lead_dims", "_shape", "_sources", "_start"),
        *("__weakref__", "execution", "shared", "site", "used"),
    )

    def __init__(
        self,
        site: str,
        value: Tensor,
        execution: Execution,
        lead_dims: int = 0,
        codes: Tensor | None = None,
    ) -> None:
        self.site = site
        self.execution = execution
        self.shared = False
        self.used = False
        self._shape, self._lead_dims = value.shape, lead_dims
        self._factors: tuple[Factor, ...] | None = None
        self._sources: tuple[SignFactor, ...] | None = None
        if codes is not None:
            self._codes, self._start = _Codes(codes.numel(), codes.device, codes), 0
            return
        count = self.count_codes(self._shape, lead_dims)
        self._codes, self._start = execution._reserve_codes(count, value.device)

    @staticmethod
    def count_codes(shape: torch.Size, lead_dims: int) -> int:
        """How many codes a value of a shape has."""
        lead, event = shape[:lead_dims].numel(), shape[lead_dims:]
        return lead * (sum(event[:2]) if event else 1)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The sign factors, with the places of their codes until these are drawn."""
        if self._factors is not None:
            return self._factors
        lead, event = tuple(self._shape[: self._lead_dims]), tuple(self._shape[self._lead_dims :])
        codes, start = self._codes.drawn, self._start
        codes = self._codes.places if codes is None else codes
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
        self.draw_codes()
        return tuple(codes for source, codes in self.factors if not source.dropped)

    def draw_codes(self) -> None:
        """Draws the codes, unless they are there."""
        if self._codes.drawn is None:
            self.execution._draw_codes(self._codes)
        else:
            self._codes.draw_again()
        if self._factors is not None and _are_places(self._factors[0][1]):
            self._factors = None

    def codes_at(self, places: Tensor) -> Tensor:
        """The codes, once they are drawn, where a map of the weight has put their places."""
        return self._codes.at(places)

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
        return self.dropped or self.draw.shared

    @property
    def draw(self) -> Draw:
        """The draw whose signs they are."""
        draw = self._draw()
        assert draw is not None  # every term holds its draws
        return draw


Factor = tuple[SignFactor, Tensor]
"""A sign factor: where it is from, and its codes, broadcastable to the term's delta.

Codes are of dtype int32. Until they are drawn there are their places, of dtype int64.
"""


def _are_places(codes: Tensor) -> bool:
    return codes.dtype == torch.int64


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
        """The sign factors, dropped ones too, with the places of codes that are not drawn yet.

        To move entries of the weight, and to ask along which dimensions signs vary.
        """
        return self.draws[0].factors if self._factors is None else self._factors

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """Codes of the sign factors that are applied, for use on the examples."""
        for draw in self.draws:
            draw.used = True
            if not draw.shared:
                draw.draw_codes()
        return tuple(codes for source, codes in self._drawn_factors() if not source.shared)

    def _drawn_factors(self) -> tuple[Factor, ...]:
        factors = self.factors
        if not any(_are_places(codes) for _, codes in factors):
            return factors
        factors = tuple(
            (
                source,
                source.draw.codes_at(codes) if _are_places(codes) and not source.shared else codes,
            )
            for source, codes in factors
        )
        if self._factors is not None and not transformed():
            self._factors = factors
        return factors

    @property
    def shared(self) -> bool:
        """Whether no sign is left, so that the term belongs to the centre."""
        if len(self.draws) == 1:  # a generator costs more than the question
            return self.draws[0].shared
        return all(draw.shared for draw in self.draws)


# ----------------------------------------------------------------------- tensor


def _view(attribute: Any) -> Any:
    """An attribute of tensors whose assignment, other than torch's, is a call that can be seen."""

    def assign(self: FlipoutTensor, value: Any) -> None:
        _dispatch(attribute.__set__, (self, value), {})

    return property(lambda self: attribute.__get__(self), assign)


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

    real = _view(Tensor.real)
    imag = _view(Tensor.imag)

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
        if ProvenanceTensor in types:
            return NotImplemented  # it calls again without the provenance, and adds that after
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

    def as_subclass(self, cls: type[Any]) -> Any:
        """The shared draw as a tensor of another class.

        Provenance is what Pyro tracks; it keeps the flipped weight itself beside that draw.
        """
        if cls is not ProvenanceTensor and self.has_signs:
            self.refuse([self], "torch.Tensor.as_subclass", "another class has other rules")
        return self._plain.as_subclass(cls)

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
    execution = flipped[0]._execution
    if execution.router is not None or OWNED.blocks:
        rows = _rows_of(execution, func, args, kwargs, flipped)
        if rows is not None:
            return _with_rows(rows, func, args, kwargs)
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
    except NoExampleDim as why:
        _share_unless_single(flipped, f"in {describe(func)}, {why}")
    except NotExamples as why:
        _share(flipped, f"in {describe(func)}, {why}")
    return func(*unwrap(args), **unwrap(kwargs))


class _Owned(threading.local):
    blocks: tuple[Router, ...] = ()


OWNED = _Owned()
"""Blocks of :func:`~pyro_flipout.examples` that the program is in, the innermost last."""


def _rows_of(
    execution: Execution,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flipped: Sequence[FlipoutTensor],
) -> Rows | None:
    """How the rows of a call's data belong to the examples, ``None`` as usual."""
    if execution.root is not execution:  # part of a call whose rows are known
        return None
    for block in reversed(OWNED.blocks):
        rows = block.route(func, args, kwargs, flipped)
        if rows is not None:
            return rows
    router = execution.router
    return None if router is None else router.route(func, args, kwargs, flipped)


def _with_rows(
    rows: Rows, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls a torch function whose data have other rows than one for each example."""

    def seen(weight: FlipoutTensor) -> FlipoutTensor:
        return _under(weight, weight._execution.seen_as(rows))

    out = _dispatch(func, map_weights(args, seen), map_weights(kwargs, seen))
    return map_weights(out, lambda weight: _under(weight, weight._execution.root))


def _under(weight: FlipoutTensor, execution: Execution) -> FlipoutTensor:
    """A weight as it is in another execution with the same draws."""
    if weight._execution is execution:
        return weight
    return FlipoutTensor.build(
        weight._plain, weight._center, weight._terms, execution, weight._lead_dims
    )


def map_weights(obj: Any, fn: Callable[[FlipoutTensor], Any]) -> Any:
    """Replaces the flipped weights in nested arguments."""
    if isinstance(obj, FlipoutTensor):
        return fn(obj)
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):  # a named tuple
        return type(obj)(*(map_weights(item, fn) for item in obj))
    if type(obj) in (list, tuple):
        return type(obj)(map_weights(item, fn) for item in obj)
    if type(obj) is dict:
        return {key: map_weights(item, fn) for key, item in obj.items()}
    return obj


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
    if _are_single(flipped):
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


def _share_unless_single(flipped: Sequence[FlipoutTensor], reason: str) -> None:
    if _are_single(flipped):
        return
    if all(w.execution.may_be_single for w in flipped):
        for weight in flipped:
            _hold(weight.execution, list(weight.draws), reason, None)
        return
    _share(flipped, reason)


def _are_single(flipped: Sequence[FlipoutTensor]) -> bool:
    """Whether one example sees the shared draw, whatever the operation."""
    return all(w.execution.is_single for w in flipped)


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


def example_dim_error(
    weight: FlipoutTensor, name: str, shape: Sequence[int]
) -> ExampleDimError | NoExampleDim:
    """What to raise for data whose ``example_dim`` is not free to count examples.

    :returns: an error if ``example_dim`` was given, else the reason to leave the weight shared.
    """
    execution, dim = weight.execution, weight.execution.example_dim
    if execution.example_dim_given:
        return ExampleDimError(
            f"flipout: site '{weight.site}' in {name} met data of shape {tuple(shape)}, whose "
            f"dimension {dim} is used up by the weight and cannot count the examples; "
            f"you said example_dim={dim}: set it to the dimension that does, or move the examples "
            f"there; {_CONSTANT}"
        )
    return NoExampleDim(
        f"dimension {dim} of data of shape {tuple(shape)} is used up by the weight and cannot "
        f"count the examples; move them there, as in x @ w.T in place of (w @ x.T).T, or set "
        f"example_dim to the dimension that counts them; {_CONSTANT}"
    )


_CONSTANT = "a constant is told from data by torch.nn.Parameter(..., requires_grad=False)"


def why_not_flippable(value: Tensor) -> str | None:
    """The reason why a value cannot be a flipped weight, whatever its distribution.

    :param value: the shared draw.
    """
    kind = type(value)
    if value.is_meta:
        return f"its value is on the meta device and has no numbers{_SHAPES}"
    if kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return None
    why = f"its value is a {kind.__name__}, a subclass that runs torch's operations in its own way"
    return why + _SHAPES if kind.__name__ == "FakeTensor" else why


_SHAPES = "; shapes are those of a flipped weight, and memory is that of a shared draw"
