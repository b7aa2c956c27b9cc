# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""What the weights are in the runs of an audit.

Each weight has two draws: :math:`W = C + \Delta`, and :math:`W^* = C + \Delta \circ E^*` with one
sign pattern :math:`E^*`. In a flipped run examples of the first kind see :math:`W`, those of the
second :math:`W^*`: codes are drawn from {0, 2}, and the number of an example in the signs is its
kind.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_flipout.plan.rows import RowsRouter
from pyro_flipout.signs import Numbers, paired_signs
from pyro_flipout.tensor import Draw, Execution, FlipoutTensor, Term, batched

__all__ = ["Drawn", "Probe"]

_SMALLEST = 0.1
"""Perturbations are enlarged to this part of the centre, so that rounding does not hide them.

Where the centre is nearly zero, as that of a bias in the beginning, they are enlarged until the
weight is as large as those of a network are: a model is nearly linear in a small perturbation, and
examples that mix linearly cannot be told from a sum over them.
"""


@dataclass
class Drawn:
    """The draw of one site that all runs use.

    :ivar center: its centre, a leaf that requires a gradient.
    :ivar delta: its perturbation, likewise.
    :ivar codes: codes of the pattern, one after the other.
    """

    center: Tensor
    delta: Tensor
    codes: Tensor


@dataclass
class Probe:
    """One run of an audit.

    :ivar drawn: the draws of all sites, shared by the runs; filled by the first.
    :ivar second: for sites whose weight is W* for every example the pattern, which broadcasts to
        the weight.
    :ivar flipped: sites whose weight is flipped.
    :ivar kinds: 0 or 1 for each example, shape ``(N,)``; ``None`` for examples not yet counted.
    :ivar round: number of the pattern.
    :ivar grad_mode: whether gradients are on where the audit was asked for.
    :ivar shuffled: whether the integers among the arguments are shuffled.
    :ivar enlarge: whether to enlarge small perturbations.
    :ivar shared: sites that a rule left shared, and why.
    :ivar sites: those that the program met and that can be flipped.
    :ivar replayed: those of them that were replayed from a guide.
    :ivar executions: those of the run.
    :ivar draws: the draws of the flipped sites.
    """

    drawn: dict[str, Drawn]
    second: Mapping[str, Tensor] = field(default_factory=dict)
    flipped: frozenset[str] = frozenset()
    kinds: Tensor | None = None
    router: RowsRouter | None = None
    round: int = 0
    grad_mode: bool = True
    enlarge: bool = True
    shuffled: bool = False
    shared: dict[str, str] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    replayed: set[str] = field(default_factory=set)
    executions: list[Execution] = field(default_factory=list)
    draws: dict[str, Draw] = field(default_factory=dict)

    def execution(
        self, example_dim: int | None, on_missing_rule: str, group_size: int
    ) -> Execution:
        """An execution of this run, whose examples are known."""
        made = Execution(example_dim, on_missing_rule, self._share, group_size)
        if self.kinds is not None:
            made.num_examples = len(self.kinds)
            made._numbers = Numbers(self.kinds, 2)
            made._group_size = 1
            made.router = self.router
        self.executions.append(made)
        return made

    def _share(self, site: str, reason: str) -> None:
        self.shared.setdefault(site, reason)

    def weight(
        self,
        site: str,
        value: Tensor,
        center: Tensor,
        delta: Tensor | None,
        lead_dims: int,
        execution: Callable[[], Execution],
    ) -> Tensor:
        """What the program gets for the draw ``value`` of a site."""
        self.sites.append(site)
        drawn = self.drawn.get(site)
        if drawn is None or drawn.center.shape != value.shape:
            drawn = self.drawn[site] = self._draw(site, value, center, delta, lead_dims)
        plain = drawn.center + drawn.delta
        if site in self.second:
            plain = drawn.center + drawn.delta * self.second[site]
        elif site in self.flipped:
            own = execution()
            draw = self.draws[site] = Draw(site, plain, own, lead_dims, drawn.codes)
            terms = (Term(drawn.delta, (draw,)),)
            return FlipoutTensor.build(plain, drawn.center, terms, own, lead_dims)
        return batched(plain, execution(), lead_dims) if lead_dims else plain

    def _draw(
        self, site: str, value: Tensor, center: Tensor, delta: Tensor | None, lead_dims: int
    ) -> Drawn:
        with torch.no_grad():
            center = center.detach().expand(value.shape).clone()
            delta = (value - center if delta is None else delta).detach().clone()
            if self.enlarge:
                size, of_center = (float(t.norm()) for t in (delta, center))
                usual = _usual_norm(value.shape, lead_dims)
                smallest = max(_SMALLEST * of_center, usual - of_center)
                if 0 < size < smallest:
                    delta *= smallest / size
            codes = codes_of(site, value, lead_dims, self.round)
        return Drawn(center.requires_grad_(), delta.requires_grad_(), codes)

    def patterns(self) -> dict[str, Tensor]:
        """The signs E* of the flipped sites, without those that a rule did without."""
        return {site: pattern_of(draw, self.drawn[site].delta) for site, draw in self.draws.items()}


def _usual_norm(shape: torch.Size, lead_dims: int) -> float:
    """Norm of a weight that keeps the size of what it is applied to."""
    lead, event = shape[:lead_dims].numel(), shape[lead_dims:]
    outputs = event[0] if len(event) > 1 else 1
    return math.sqrt(lead * outputs)


def pattern_of(draw: Draw, like: Tensor) -> Tensor:
    """The signs that an example of the second kind sees, broadcastable to the weight."""
    pattern = torch.ones((), dtype=like.dtype, device=like.device)
    for codes in draw.codes:
        pattern = pattern * paired_signs(codes, codes.new_ones(()), like.dtype)
    return pattern


def mirrored_codes(draw: Draw) -> Tensor:
    """Codes of the pattern that is -1 everywhere, by one factor that a rule did not do without."""
    found: list[Tensor] = []
    mirrored = False
    for source, codes in draw.factors:
        here = not (mirrored or source.dropped)
        mirrored |= here
        found.append(codes.new_full((codes.numel(),), 2 if here else 0, dtype=torch.int32))
    return torch.cat(found)


def codes_of(site: str, value: Tensor, lead_dims: int, round: int) -> Tensor:
    """Codes of a pattern that is not all ones, the same in every run of a round."""
    generator = torch.Generator().manual_seed(zlib.crc32(site.encode()) + 7919 * round)
    count = Draw.count_codes(value.shape, lead_dims)
    codes = 2 * torch.randint(2, (count,), generator=generator, dtype=torch.int32)
    draw = Draw(site, value, Execution(), lead_dims, codes)
    if count and bool((pattern_of(draw, torch.ones((), dtype=value.dtype)) > 0).all()):
        codes[:1] ^= 2
    return codes.to(value.device)


def kinds_of(count: int, round: int) -> Tensor:
    """Kinds of the examples in a round: any two of a few examples differ in one of the rounds."""
    bits = max(count - 1, 1).bit_length()
    if count <= 16:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        return (order >> (round % bits)) & 1
    generator = torch.Generator().manual_seed(104729 + round)
    return torch.randint(2, (count,), generator=generator)
