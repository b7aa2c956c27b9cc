# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""One gradient of an objective after the other, and which site each entry belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

__all__ = ["Piece", "Sampler", "pieces_of"]


@dataclass(frozen=True)
class Piece:
    """The entries of one parameter that one site depends on.

    :ivar label: the parameter's name, with the site's in brackets if it has several.
    :ivar site: name of the site; the parameter's own if none or several depend on it.
    :ivar position: which of the sampler's parameters it is.
    :ivar index: its entries in the flat parameter, shape ``(size,)``; None for all.
    :ivar size: number of entries.
    """

    label: str
    site: str
    position: int
    index: Tensor | None
    size: int


class Sampler:
    """Gradients of ``elbo`` as ``SVI`` would take them; ``.grad`` is left as it was.

    :param elbo: has ``loss`` and ``loss_and_grads``, of ``(model, guide, *args, **kwargs)``.
    :param patterns: names of the parameters to keep, with ``*`` for anything; None for all.
    :raises ValueError: if one of them matches none.

    :ivar names: of the parameters.
    :ivar parameters: unconstrained, as the optimiser sees them.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        elbo: Any,
        patterns: Iterable[str] | None,
        args: Any,
        kwargs: Any,
    ) -> None:
        self.guide, self.elbo = guide, elbo
        with poutine.trace(param_only=True) as capture:
            elbo.loss(model, guide, *args, **kwargs)
        sites: Any = capture.trace.nodes.items()
        found = {str(n): site["value"].unconstrained() for n, site in sites}
        found = {name: value for name, value in found.items() if value.requires_grad}
        self.names = _matching(list(found), patterns)
        self.parameters = [found[name] for name in self.names]
        self._all = list(found.values())

    def draw(self, model: Any, args: Any, kwargs: Any, divide_by: float) -> list[Tensor]:
        """One draw of the gradient divided by ``divide_by``, zero where there is none."""
        kept = [p.grad for p in self._all]
        try:
            for parameter in self._all:
                parameter.grad = None
            self.elbo.loss_and_grads(model, self.guide, *args, **kwargs)
            return [
                torch.zeros_like(p) if p.grad is None else p.grad / divide_by
                for p in self.parameters
            ]
        finally:
            for parameter, grad in zip(self._all, kept, strict=True):
                parameter.grad = grad


def _matching(names: list[str], patterns: Iterable[str] | None) -> list[str]:
    """The names that a pattern means, all if there are no patterns."""
    if isinstance(patterns, str):  # whose letters would be patterns, and "*" among them
        patterns = [patterns]
    wanted = ["*"] if patterns is None else list(patterns)
    unused = [p for p in wanted if not any(fnmatchcase(name, p) for name in names)]
    if unused or not wanted:
        raise ValueError(
            f"gradient_variance: got parameters={wanted}, of which {unused} mean nothing, expected "
            f"names or patterns of some of {sorted(names)}"
        )
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in wanted)]


def pieces_of(sampler: Sampler, args: Any, kwargs: Any) -> list[Piece]:
    """Cuts the parameters by the sites of the guide that depend on their entries.

    An entry belongs to the one site whose value it moves. So a guide's flat vector of
    locations falls into its sites, and a parameter of an amortised guide, which moves several
    sites at once, stays in one piece under its own name.
    """
    trace = poutine.trace(sampler.guide).get_trace(*args, **kwargs)
    reached: list[dict[str, Tensor]] = [{} for _ in sampler.parameters]
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or node["infer"].get("is_auxiliary"):
            continue
        if isinstance(node["value"], Tensor) and node["value"].requires_grad:
            grads = torch.autograd.grad(
                node["value"].sum(), sampler.parameters, retain_graph=True, allow_unused=True
            )
            for where, grad in zip(reached, grads, strict=True):
                if grad is not None and bool(grad.any()):
                    where[str(name)] = grad.flatten() != 0
    pieces: list[Piece] = []
    for position, where in enumerate(reached):
        pieces += _cut(sampler.names[position], position, sampler.parameters[position], where)
    return pieces


def _cut(name: str, position: int, parameter: Tensor, where: dict[str, Tensor]) -> list[Piece]:
    """The pieces of one parameter, of which each site reaches some entries."""
    if len(where) < 2 or bool((sum(w.int() for w in where.values()) != 1).any()):  # type: ignore[union-attr]
        site = next(iter(where)) if len(where) == 1 else name
        return [Piece(name, site, position, None, parameter.numel())]
    indices = {site: reached.nonzero().squeeze(1) for site, reached in where.items()}
    return [
        Piece(f"{name}[{site}]", site, position, index, len(index))
        for site, index in indices.items()
    ]
