# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The KL divergence of the guide's normals from a fixed normal prior, in few passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as pyro_dist
import torch
import torch.distributions as torch_dist
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_flipout._modes import transformed
from pyro_flipout.infer._draws import keeping

__all__ = ["normal_kl"]


class _NormalKL(torch.autograd.Function):
    """Saves locations and scales alone, where autograd keeps seven tensors of their size."""

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(loc, scale, prior_loc, prior_scale)
        kl = torch.sub(loc, prior_loc)
        kl.mul_(kl).addcmul_(scale, scale).mul_(prior_scale.square().mul_(2).reciprocal_())
        return kl.sub_(scale.log()).add_(prior_scale.log().sub_(0.5))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        loc, scale, prior_loc, prior_scale = ctx.saved_tensors
        grad = _compact(grad)
        weight = grad / prior_scale.square()
        if torch.is_grad_enabled():
            return weight * (loc - prior_loc), weight * scale - grad / scale, None, None
        grad_loc = torch.sub(loc, prior_loc).mul_(weight)
        return grad_loc, torch.mul(scale, weight).addcdiv_(grad, scale, value=-1), None, None


_apply: Callable[..., Tensor] = _NormalKL.apply


def _compact(x: Tensor) -> Tensor:
    """``x`` without the repetitions of ``expand``: a tensor that broadcasts to it."""
    return x[tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())]


def normal_kl(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    r""":math:`\mathrm{KL}(N(\mu, \sigma^2) \,\|\, N(m, s^2))`, element by element.

    .. math:: \frac{\sigma^2 + (\mu - m)^2}{2 s^2} - \log \frac{\sigma}{s} - \frac12

    :param loc: :math:`\mu`, shape ``(*)``.
    :param scale: :math:`\sigma`, shape ``(*)``.
    :param prior_loc: :math:`m`, which broadcasts to ``(*)`` and gets no gradient.
    :param prior_scale: :math:`s`, likewise.
    :returns: tensor of shape ``(*)``.

    >>> one = torch.ones(2)
    >>> normal_kl(one, one, torch.zeros(2), one)
    tensor([0.5000, 0.5000])
    """
    if transformed():
        ratio, step = scale / prior_scale, (loc - prior_loc) / prior_scale
        return 0.5 * (ratio.square() + step.square() - 1) - ratio.log()
    return _apply(loc, scale, _compact(prior_loc), _compact(prior_scale))


@register_kl(keeping(pyro_dist.Normal), torch_dist.Normal)  # type: ignore[untyped-decorator]
def _kl(q: Any, p: Any) -> Tensor:
    if p.loc.requires_grad or p.scale.requires_grad or q.batch_shape != p.batch_shape:
        kl: Tensor = kl_divergence(torch_dist.Normal(q.loc, q.scale), p)
        return kl
    return normal_kl(q.loc, q.scale, p.loc, p.scale)
