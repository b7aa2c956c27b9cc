# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Multi-head attention: one set of projections for each example, for all its tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyro_flipout.nn.layer import FlipoutLayer
from pyro_flipout.nn.site_prior import Prior

__all__ = ["FlipoutMultiheadAttention"]


class FlipoutMultiheadAttention(  # type: ignore[misc]
    FlipoutLayer, nn.MultiheadAttention, PyroModule
):
    """Attention with all its projections Bayesian, as ``torch.nn.MultiheadAttention``.

    Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`. A prior that is a function gets
    ``"out_proj.weight"`` and ``"out_proj.bias"`` for the names of the output's parameters.
    """

    def _make_sites(self, prior: Prior, bias_prior: Prior | None) -> None:
        super()._make_sites(prior, bias_prior)
        plain = self.out_proj
        self.out_proj = _OutProjection(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            device=plain.weight.device,
            dtype=plain.weight.dtype,
            prior=_of_output(prior),
            bias_prior=None if bias_prior is None else _of_output(bias_prior),
            example_dim=self.example_dim,
        )
        self.out_proj._shown = self._shown

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {super().extra_repr()}"


class _OutProjection(  # type: ignore[misc]
    FlipoutLayer, NonDynamicallyQuantizableLinear, PyroModule
):
    pass


def _of_output(prior: Prior) -> Prior:
    return prior if isinstance(prior, Distribution) else partial(_named, prior)


def _named(prior: Any, name: str, parameter: Tensor) -> Any:
    return prior(f"out_proj.{name}", parameter)
