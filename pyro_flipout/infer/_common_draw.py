# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The draw of all sites of a mean-field guide as one node of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_flipout._modes import fused

__all__ = ["draw_together"]


class _Together(torch.autograd.Function):
    """Locations, scales, perturbations, values and centres of all sites, in turn for each site.

    One node for autograd. Its backward writes the gradients of all sites into two vectors, where
    those of views would be added up for each site and then joined. A centre is the location again,
    for those who use it beside the distribution.
    """

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, noise: Tensor, shapes: list[torch.Size]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(noise)
        ctx.shapes = shapes
        out = []
        for center, spread, eps in zip(
            *(_apart(t, shapes) for t in (loc, scale, noise)), strict=True
        ):
            delta = spread * eps
            out += [center, spread, delta, center + delta, center.view_as(center)]
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (noise,) = ctx.saved_tensors
        join = _join_differentiable if torch.is_grad_enabled() or fused() else _join
        each = [grads[i : i + _OUTPUTS] for i in range(0, len(grads), _OUTPUTS)]
        need = (
            ctx.needs_input_grad[0] and any(g is not None for of in each for g in _of_loc(of)),
            ctx.needs_input_grad[1] and any(g is not None for of in each for g in of[1:4]),
        )
        return *join(noise, ctx.shapes, each, need), None, None


_OUTPUTS = 5


def _of_loc(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Of the gradients of a site's outputs, those that its location has a part in."""
    return grads[0], grads[3], grads[4]


def _join(
    noise: Tensor, shapes: list[torch.Size], grads: list[Any], need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the vectors of locations and of scales."""
    flat_loc, flat_scale = (torch.empty_like(noise) if n else None for n in need)
    parts = [noise if t is None else t for t in (flat_loc, flat_scale)]
    for of_site, eps, loc, scale in zip(
        grads, *(_apart(t, shapes) for t in (noise, *parts)), strict=True
    ):
        _, of_scale, of_delta, of_value, _ = of_site
        if flat_loc is not None:
            _sum([g for g in _of_loc(of_site) if g is not None], loc)
        if flat_scale is None:
            continue
        if of_delta is None or of_value is None:
            moved = of_delta if of_value is None else of_value
        else:
            moved = of_delta + of_value
        if moved is None:
            scale.zero_() if of_scale is None else scale.copy_(of_scale)
        elif of_scale is None:
            torch.mul(moved, eps, out=scale)
        else:
            torch.addcmul(of_scale, moved, eps, out=scale)
    return flat_loc, flat_scale


def _sum(parts: list[Tensor], out: Tensor) -> None:
    if len(parts) < 2:
        out.copy_(parts[0]) if parts else out.zero_()
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out += part


def _join_differentiable(
    noise: Tensor, shapes: list[torch.Size], grads: list[Any], need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`_join`, out of place."""
    locs, scales = [], []
    for of_site, eps in zip(grads, _apart(noise, shapes), strict=True):
        of_loc, of_scale, of_delta, of_value, of_center = (
            torch.zeros_like(eps) if g is None else g for g in of_site
        )
        locs.append((of_loc + of_value + of_center).reshape(-1))
        scales.append((of_scale + (of_delta + of_value) * eps).reshape(-1))
    return torch.cat(locs) if need[0] else None, torch.cat(scales) if need[1] else None


def _apart(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def draw_together(
    loc: Tensor, scale: Tensor, noise: Tensor, shapes: list[torch.Size]
) -> list[tuple[Tensor, ...]]:
    """Draws all sites at once.

    :param loc: locations of all sites, shape ``(size,)``.
    :param scale: scales, shape ``(size,)``.
    :param noise: standard noise, shape ``(size,)``.
    :param shapes: of the sites, in order.
    :returns: location, scale, perturbation, value and centre of each site.
    """
    flat = _together(loc, scale, noise, shapes)
    return [flat[i : i + _OUTPUTS] for i in range(0, len(flat), _OUTPUTS)]


_together: Callable[..., tuple[Tensor, ...]] = _Together.apply
