# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Local reparameterisation, for fully connected layers with Gaussian weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Normal

from pyro_flipout.errors import FlipoutError
from pyro_flipout.poutine._own_draws import (
    TRANSPOSES,
    OwnDrawsMessenger,
    OwnDrawsTensor,
    transposes,
)
from pyro_flipout.poutine.symmetric_draw import SymmetricDraw
from pyro_flipout.rules._product import check_layout
from pyro_flipout.tensor import FlipoutTensor, NoRule, describe

__all__ = ["LocalReparameterizationMessenger", "LocallyReparameterized"]


class LocallyReparameterized(OwnDrawsTensor):
    """A Gaussian weight that is never drawn: what it does to the data is."""

    estimator = "local_reparameterization"
    rules = dict.fromkeys(TRANSPOSES, transposes)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of every entry, of the shape of the weight."""
        found = self._origin.found
        fn: Any = _base(found.fn)
        return self.image(found.view(fn.scale.expand(_shape(found.fn))))

    @classmethod
    def refuse(
        cls, weights: Sequence[Any], call: str, reason: str, remedy: str | None = None
    ) -> None:
        """Leaves the weights of a call shared, or raises."""
        for weight in weights:
            _check_first_use(weight, call)
        super().refuse(weights, call, reason, remedy)


class LocalReparameterizationMessenger(OwnDrawsMessenger):
    r"""Draws what Gaussian weights do to each example in place of the weights.

    For data :math:`x_n` and independent weights :math:`W_{oi} \sim N(\mu_{oi}, \sigma_{oi}^2)`

    .. math:: y_{no} = \sum_i \mu_{oi} x_{ni}
        + \Bigl(\sum_i \sigma_{oi}^2 x_{ni}^2\Bigr)^{1/2} \zeta_{no},
        \qquad \zeta_{no} \sim N(0, 1)

    has the distribution that independent draws of the weights for each example give it
    (Kingma et al. 2015, eq. 6 [1]), for two products in place of one. Traces, log-densities and
    the guide see the plain draw, as under flipout. Parameters as for
    :class:`~pyro_flipout.FlipoutMessenger`.

    It is for weights that meet each example once: ``F.linear``, or ``matmul`` with data
    ``(N, in)``, and biases added to ``(N, out)``. With a convolution, a sequence or a tied weight
    one example meets the same weight several times, and draws made at each would not be those of
    *one* weight. Such sites, and those that are not Normal, keep their shared draw with a warning;
    a second use of a site after the first was reparameterised raises an error.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     return torch.nn.functional.linear(x, w).squeeze(-1)
    >>> LocalReparameterizationMessenger()(model)(torch.ones(4, 3)).unique().shape
    torch.Size([4])

    :raises FlipoutError: when run, if a site is used twice in one execution.

    References

    [1] `Variational Dropout and the Local Reparameterization Trick`,
        Diederik P. Kingma, Tim Salimans, Max Welling,
        https://arxiv.org/abs/1506.02557
    """

    tensor = LocallyReparameterized

    def why_not(self, found: SymmetricDraw) -> str | None:
        """The reason to leave a symmetric draw shared, if there is one."""
        base = _base(found.fn)
        if isinstance(base, Normal):
            return None
        return f"it needs a Normal distribution, and this is a {type(base).__name__}"


def _base(fn: Any) -> Any:
    """The elementwise distribution inside ``Independent``, ``expand`` and masks."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


def _shape(fn: Distribution | None) -> torch.Size:
    assert fn is not None
    return fn.batch_shape + fn.event_shape


def _check_first_use(weight: Any, call: str) -> None:
    if weight._origin.used:
        raise FlipoutError(
            f"local_reparameterization: site '{weight.site}' is used a second time in one "
            f"execution, in {call}. What it did to the examples was drawn without it, so "
            "that two uses would not see one weight; hide it with "
            f"local_reparameterization(hide=['{weight.site}']), or use flipout"
        )


def _use(weight: Any, op: Callable[..., Any], data: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and variance of a weight, which now counts as used."""
    _check_first_use(weight, describe(op))
    weight.execution.count(data.size(0), f"data of shape {tuple(data.shape)}")
    weight.mark_used()
    return weight.center, weight.scale**2


def _own(weight: Any) -> bool:
    return isinstance(weight, LocallyReparameterized) and bool(weight.terms)


def _linear(op: Callable[..., Any], input: Any, weight: Any, bias: Any = None) -> Tensor:
    _check_data(input)
    if any(
        isinstance(w, FlipoutTensor) and not isinstance(w, LocallyReparameterized)
        for w in (weight, bias)
    ):
        raise NoRule("its other weight has another estimator")
    center, variance = _use(weight, op, input) if _own(weight) else (_plain(weight), None)
    shift, spread = _use(bias, op, input) if _own(bias) else (_plain(bias), None)
    mean = F.linear(input, center, shift)
    if variance is not None:
        total = F.linear(input**2, variance, spread)
    else:
        assert spread is not None
        total = spread.expand(mean.shape)
    return _draw(mean, total)


def _matmul(op: Callable[..., Any], input: Any, weight: Any) -> Tensor:
    _check_data(input)
    if not _own(weight) or weight.dim() != 2:
        raise NoRule("the weight must be a matrix, to the right of the data")
    return _linear(op, input, weight.mapped(Tensor.t))


def _add(op: Callable[..., Any], a: Any, b: Any) -> Tensor:
    data, bias = (b, a) if _own(a) else (a, b)
    _check_data(data)
    if bias.dim() > 1:
        raise NoRule("only a bias of one dimension can be added to the data")
    center, variance = _use(bias, op, data)
    return _draw(data + center, variance.expand(data.shape))


def _plain(weight: Any) -> Any:
    return weight.plain if isinstance(weight, LocallyReparameterized) else weight


def _check_data(data: Any) -> None:
    if not isinstance(data, Tensor) or isinstance(data, FlipoutTensor):
        raise NoRule("it is for a weight that meets data, not numbers or other weights")
    if data.layout is not torch.sparse_coo:  # which has squares and products
        check_layout(data)
    if data.dim() != 2:
        raise NoRule(
            f"data of shape {tuple(data.shape)}, not (N, in), meet the weight several times in "
            "each example (time steps, tokens, pixels), which would not see one weight; use flipout"
        )


def _draw(mean: Tensor, variance: Tensor) -> Tensor:
    # The clamp keeps the gradient finite where all inputs of an example are 0.
    tiny = torch.finfo(variance.dtype).tiny
    return mean + variance.clamp_min(tiny).sqrt() * torch.randn_like(mean)


def _conv(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    raise NoRule("a convolution meets its weight once at every pixel; use flipout")


LocallyReparameterized.rules.update(
    dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv)
)
LocallyReparameterized.rules[F.linear] = _linear
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
LocallyReparameterized.rules.update(dict.fromkeys(_PRODUCTS, _matmul))
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
LocallyReparameterized.rules.update(dict.fromkeys(_SUMS, _add))
