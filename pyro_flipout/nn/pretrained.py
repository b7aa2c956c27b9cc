# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that start from the weights of a trained network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_median
from torch import Tensor, nn
from torch.distributions import biject_to

__all__ = ["init_to_pretrained", "scale_fraction"]


@dataclass(frozen=True)
class init_to_pretrained:
    """Initialisation of a guide: every weight starts at its value in a trained network.

    Give it to the guide as ``init_loc_fn``, with a small ``init_scale``.

    >>> from pyro_flipout.nn import bayesianize
    >>> net = nn.Linear(4, 1)
    >>> model = bayesianize(net)
    >>> guide = AutoNormal(model, init_loc_fn=init_to_pretrained(net), init_scale=0.01)
    >>> guide(torch.randn(1, 4))["weight"].shape
    torch.Size([1, 4])

    :param net: the network, or its ``state_dict``.
    :param prefix: path of the network in the model, such as ``"net"`` if the sites are called
        ``net.0.weight``.
    :param fallback: initialisation of all other sites.
    """

    net: nn.Module | Mapping[str, Tensor]
    prefix: str = ""
    fallback: Callable[[Any], Tensor] = init_to_median

    def __post_init__(self) -> None:
        net = self.net
        if isinstance(net, nn.Module):
            net = dict(net.named_parameters(remove_duplicate=False))
        # A copy: bayesianize_ and the optimizer change the network in place.
        values = {name: value.detach().clone() for name, value in net.items()}
        object.__setattr__(self, "net", values)

    def __call__(self, site: Any) -> Tensor:
        """The initial value of a site."""
        assert not isinstance(self.net, nn.Module)
        name = site["name"]
        dotted = f"{self.prefix}." if self.prefix else ""
        own = name.removeprefix(dotted)
        if not name.startswith(dotted) or own not in self.net:
            self._check(name)
            return self.fallback(site)
        value, like = self.net[own], site["fn"].sample()
        if value.shape != like.shape[like.dim() - value.dim() :]:
            raise ValueError(
                f"init_to_pretrained: site '{name}' has shape {tuple(like.shape)}, but '{own}' of "
                f"the network {tuple(value.shape)}; is it the same network, under prefix "
                f"{self.prefix!r}?"
            )
        return value.to(like).expand(like.shape).clone()

    def _check(self, name: str) -> None:
        close = [own for own in self.net if name.endswith(f".{own}")]  # type: ignore[union-attr]
        if close and not self.prefix:
            own = max(close, key=len)
            raise ValueError(
                f"init_to_pretrained: the network has '{own}', but the site is called '{name}'; "
                f"say prefix={name.removesuffix(own).rstrip('.')!r}"
            )


@dataclass(frozen=True)
class scale_fraction:
    """Initial scale of a guide as a fraction of the size of every weight.

    Give it to :class:`~pyro_flipout.infer.AutoMeanField` as ``init_scale``. Pyro's AutoNormal
    and AutoDiagonalNormal take only a number there: use :meth:`set_` on them.

    :param fraction: of the absolute value of the weight.
    :param minimum: smallest scale, for weights that are zero or nearly so.
    :raises ValueError: if one of them is not positive.
    """

    fraction: float = 0.1
    minimum: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.fraction > 0 and self.minimum > 0):
            raise ValueError(f"scale_fraction: got {self}, expected numbers > 0")

    def __call__(self, site: Any) -> Tensor:
        """The initial scale of a site's unconstrained value."""
        return self._of(biject_to(site["fn"].support).inv(site["value"].detach()))

    def _of(self, loc: Tensor) -> Tensor:
        return (self.fraction * loc.detach().abs()).clamp(min=self.minimum)

    @torch.no_grad()
    def set_(self, guide: Any) -> Any:
        """Sets the scales of a guide that has been called once, from its locations.

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("w", dist.Normal(3.0, 1e-3))
        >>> guide = AutoNormal(model, init_loc_fn=init_to_median)
        >>> _ = guide()
        >>> round(scale_fraction(0.1).set_(guide).scales.w.item(), 2)
        0.3

        :param guide: an AutoNormal or AutoDiagonalNormal.
        :returns: the guide.
        :raises TypeError: if it is neither.
        :raises ValueError: if it has not been called yet.
        """
        if not isinstance(guide, (AutoNormal, AutoDiagonalNormal)):
            raise TypeError(
                f"scale_fraction.set_: got {type(guide).__name__}, expected AutoNormal or "
                "AutoDiagonalNormal; AutoMeanField takes init_scale=scale_fraction(...)"
            )
        if guide.prototype_trace is None:
            raise ValueError("scale_fraction.set_: call the guide once on data first")
        if isinstance(guide, AutoDiagonalNormal):
            setattr(guide, "scale", self._of(guide.loc))  # noqa: B010
            return guide
        for name, _ in guide.prototype_trace.iter_stochastic_nodes():
            *path, attr = name.split(".")
            locs, scales = guide.locs, guide.scales
            for part in path:
                locs, scales = getattr(locs, part), getattr(scales, part)
            setattr(scales, attr, self._of(getattr(locs, attr)))
        return guide
