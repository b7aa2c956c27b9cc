# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The mean-field ELBO without the log-densities that closed-form KL terms replace."""

from __future__ import annotations

from typing import Any

import pyro.poutine as poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites

from pyro_flipout._modes import graphed, recorded
from pyro_flipout.infer._tensor_loss import tensor_loss

__all__ = ["MeanFieldELBO"]


class MeanFieldELBO(TraceMeanField_ELBO):
    r"""``TraceMeanField_ELBO`` that evaluates only the log-densities it needs.

    Pyro's evaluates :math:`\log p` and :math:`\log q` at every site, then replaces those of
    weights by a closed-form KL divergence. For networks of small mini-batches that waste is a
    good part of the step. Loss and gradients are the same.

    With Pyro's validation on, as it is by default, all log-densities are evaluated, since it is
    they that are checked: call ``pyro.enable_validation(False)`` once the model runs.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI
    >>> from pyro_flipout import flipout
    >>> from pyro_flipout.infer import AutoMeanField
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> optim = pyro.optim.Adam({"lr": 0.01})
    >>> svi = SVI(flipout(model), AutoMeanField(model), optim, MeanFieldELBO())
    >>> loss = svi.step(torch.randn(8, 3), torch.randn(8))

    *CUDA graphs.* While a graph is captured, :meth:`differentiable_loss` reads no number off the
    device, which Pyro's losses do: with Pyro's validation off, a whole step of SVI can be captured
    and replayed without Python (see the performance page). On a CPU :func:`captured` does that.

    Parameters are those of :class:`~pyro.infer.elbo.ELBO`.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        if is_validation_enabled() or isinstance(poutine.unwrap(guide), Messenger):
            traces: tuple[Trace, Trace] = super()._get_trace(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
            return traces
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        return _lazy(prune_subsample_sites(model_trace)), _lazy(prune_subsample_sites(guide_trace))

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss as a tensor with a gradient.

        :raises RuntimeError: while a CUDA graph is captured, if Pyro's validation is on.
        """
        if not (graphed() or recorded()):
            return super().differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[no-untyped-call]
        if is_validation_enabled():
            raise RuntimeError(
                "MeanFieldELBO: Pyro's validation reads numbers off the device, which the CUDA "
                "graph that is being captured cannot; call pyro.enable_validation(False) before"
            )
        return tensor_loss(self, model, guide, args, kwargs)


class _LazySite(dict[str, Any]):
    """A site of a trace whose densities are evaluated when they are asked for.

    It does not know its trace, which knows it: a cycle would keep the tensors of many steps.
    """

    def __missing__(self, key: str) -> Any:
        if key == "score_parts":
            parts = self["fn"].score_parts(self["value"], *self["args"], **self["kwargs"])
            self[key] = parts.scale_and_mask(self["scale"], self["mask"])
        elif key in ("log_prob", "log_prob_sum", "unscaled_log_prob"):
            alone = Trace()
            alone.nodes[self["name"]] = self  # type: ignore[assignment]
            alone.compute_log_prob()
        else:
            raise KeyError(key)
        return self[key]


def _lazy(trace: Trace) -> Trace:
    """Makes the sample sites of a trace lazy, in place."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            trace.nodes[name] = _LazySite(site)  # type: ignore[assignment]
    return trace
