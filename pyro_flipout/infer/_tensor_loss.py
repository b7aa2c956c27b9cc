# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The losses of Pyro's ELBOs as tensors, of which no number is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_flipout.errors import FlipoutError

__all__ = ["compared_loss", "is_stock", "tensor_loss"]

_METHODS = "_differentiable_loss_particle", "differentiable_loss", "loss_and_grads"


def is_stock(elbo: Any, *others: type) -> bool:
    """Whether the loss is that of ``Trace_ELBO`` or ``TraceMeanField_ELBO``.

    :param others: classes whose methods compute the same.
    """
    known = Trace_ELBO, TraceMeanField_ELBO, *others
    return all(
        any(getattr(type(elbo), name, None) is vars(cls).get(name, name) for cls in known)
        for name in _METHODS
    )


def tensor_loss(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
    """The loss of a stock ELBO, with its gradient.

    Pyro's own losses read numbers off the device, which nothing that records operations can
    follow. Loss and gradient are the same.
    """
    return _of_traces(elbo, elbo._get_traces(model, guide, args, kwargs))


def compared_loss(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
    """:func:`tensor_loss`, compared with the ELBO's own loss of the same traces.

    :raises FlipoutError: if they differ.
    """
    traces = list(elbo._get_traces(model, guide, args, kwargs))
    loss = _of_traces(elbo, traces)
    with torch.no_grad():
        own = sum(float(elbo._differentiable_loss_particle(*pair)[0]) for pair in traces)
    ours, theirs = float(torch.as_tensor(loss).detach()), own / elbo.num_particles
    if abs(ours - theirs) > torch.finfo(torch.get_default_dtype()).eps ** 0.5 * abs(theirs):
        raise FlipoutError(
            f"captured: the recorded loss is {ours:.6g}, but that of {type(elbo).__name__} is "
            f"{theirs:.6g}; train this program without captured(), and report this"
        )
    return loss


def _of_traces(elbo: Any, traces: Iterable[tuple[Trace, Trace]]) -> Any:
    particle = _mean_field if isinstance(elbo, TraceMeanField_ELBO) else _sampled
    return sum(particle(*pair) for pair in traces) / elbo.num_particles


def _mean_field(model_trace: Trace, guide_trace: Trace) -> Any:
    """``TraceMeanField_ELBO``'s loss of one particle."""
    loss: Any = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            loss = loss - site["log_prob_sum"]
            continue
        of_guide = guide_trace.nodes[name]
        try:
            kl = kl_divergence(of_guide["fn"], site["fn"])  # type: ignore[arg-type]
        except NotImplementedError:
            loss = loss - site["log_prob_sum"] + of_guide["score_parts"].entropy_term.sum()
        else:
            kl = scale_and_mask(kl, of_guide["scale"], of_guide["mask"])
            # A number, 0, for a distribution that is masked out.
            loss = loss + (kl.sum() if isinstance(kl, Tensor) else kl)
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and name not in model_trace.nodes:
            loss = loss + site["score_parts"].entropy_term.sum()  # auxiliary
    return loss


def _sampled(model_trace: Trace, guide_trace: Trace) -> Any:
    """``Trace_ELBO``'s loss of one particle; its gradient is that of the surrogate loss."""
    elbo: Any = 0.0
    surrogate: Any = 0.0
    for site in model_trace.nodes.values():
        if site["type"] == "sample":
            elbo = elbo + site["log_prob_sum"]
            surrogate = surrogate + site["log_prob_sum"]
    log_r = None
    for site in guide_trace.nodes.values():
        if site["type"] != "sample":
            continue
        _, score_function, entropy = site["score_parts"]
        elbo = elbo - site["log_prob_sum"]
        if not is_identically_zero(entropy):
            surrogate = surrogate - entropy.sum()
        if not is_identically_zero(score_function):
            if log_r is None:
                log_r = _compute_log_r(model_trace, guide_trace)
            summed = log_r.sum_to(site["cond_indep_stack"])
            surrogate = surrogate + (summed * score_function).sum()
    if not (isinstance(elbo, Tensor) and isinstance(surrogate, Tensor)):
        return -elbo
    return torch.sub(surrogate.detach() - elbo.detach(), surrogate)
