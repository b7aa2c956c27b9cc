# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What a mean-field guide samples from: distributions that keep their perturbation."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pyro.distributions as pyro_dist
import torch
from torch import Tensor
from torch.distributions import Distribution, register_kl

from pyro_flipout.poutine.symmetric_draw import is_real

__all__ = [
    "Family",
    "Image",
    "Noise",
    "Slot",
    "check_family",
    "keep_delta",
    "keeping",
    "standard",
]

Family = Callable[[Tensor, Tensor], Any]
"""A distribution class with location and scale, or anything else that makes an instance of one."""


_SCALAR = torch.Size()


def standard(family: Family, like: Tensor) -> Any:
    """The member of ``family`` with location 0 and scale 1, in the dtype and device of ``like``."""
    return family(like.new_zeros(()), like.new_ones(()))


class Noise:
    """Standard noise for all sites of one call of a guide, drawn at once.

    :param family: the location-scale family.
    :param size: number of elements that the sites have together, for one particle.
    :param like: gives dtype and device.
    """

    def __init__(self, family: Family, size: int, like: Tensor) -> None:
        self.standard = standard(family, like)
        self.size = size
        self._flat: dict[int, Tensor] = {}

    def slot(
        self, start: int | None, shape: torch.Size, drawn: tuple[Tensor, ...] | None = None
    ) -> Slot:
        """The noise of one site: elements ``start`` onwards, or a draw of its own if None.

        :param drawn: perturbation, value and centre, if the site's first draw was made already.
        """
        return Slot(self, start, shape, drawn)

    def fresh(self, shape: torch.Size) -> Tensor:
        """Noise that nobody else gets."""
        fn = self.standard
        if type(fn) is pyro_dist.Normal:  # its rsample makes four passes over the memory
            return torch.randn(shape, dtype=fn.loc.dtype, device=fn.loc.device)
        noise: Tensor = fn.rsample(shape)
        return noise

    def flat(self, particles: int) -> Tensor:
        """The common noise, of shape ``(particles, size)``."""
        if particles not in self._flat:
            self._flat[particles] = self.fresh(torch.Size((particles, self.size)))
        return self._flat[particles]


class Slot:
    """Where one site finds its noise, and where it keeps its last draw.

    An object of its own because ``expand`` copies distributions, and because nobody who looks
    for the parameters of a distribution should find the draw among them.
    """

    def __init__(
        self,
        noise: Noise,
        start: int | None,
        shape: torch.Size,
        drawn: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.noise = noise
        self.start = start
        self.shape = shape
        self.drawn = drawn
        self.together = None if drawn is None else noise
        self.last: tuple[Tensor, ...] | None = None  # perturbation, value and centre

    def draw(self, loc: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """A value of the given shape; its perturbation is kept."""
        drawn, self.drawn = self.drawn, None
        if drawn is None or drawn[0].shape != shape:
            delta = scale * self.take(shape)
            drawn = delta, loc + delta, loc
        self.last = drawn
        return drawn[1]

    def take(self, shape: torch.Size) -> Tensor:
        """Noise of the given shape: the first time from the common draw, where it fits."""
        start, self.start = self.start, None
        lead = len(shape) - len(self.shape)
        if start is None or lead < 0 or shape[lead:] != self.shape:
            return self.noise.fresh(shape)
        flat = self.noise.flat(shape[:lead].numel())
        return flat[:, start : start + self.shape.numel()].view(shape)


def _plain(family: Any, state: dict[str, Any]) -> Any:
    fn = family.__new__(family)
    vars(fn).update(state)
    return fn


class _KeepsDelta:
    """Mixin: draws ``loc + delta`` and keeps ``delta``."""

    _slot: Slot | None = None  # of an instance that is made by its class, as reparametrisations do
    _family: type
    loc: Tensor
    scale: Tensor

    def rsample(self, sample_shape: Any = _SCALAR) -> Tensor:
        if self._slot is None:
            value: Tensor = super().rsample(sample_shape)  # type: ignore[misc]
            return value
        shape = self._extended_shape(sample_shape)  # type: ignore[attr-defined]
        if not sample_shape:
            return self._slot.draw(self.loc, self.scale, shape)
        delta = self.scale * self._slot.noise.fresh(shape)
        value = self.loc + delta
        self._slot.last = delta, value, self.loc
        return value

    @property
    def drawn_together(self) -> Noise | None:
        """What all sites of the guide have in common if one call drew them, else None."""
        return None if self._slot is None else self._slot.together

    def symmetric_delta(self, value: Tensor) -> Tensor | None:
        """See :func:`pyro_flipout.symmetric.symmetric_delta`."""
        last = None if self._slot is None else self._slot.last
        return last[0] if last is not None and last[1] is value else None

    @property
    def center_beside(self) -> Tensor:
        """The centre of the last draw: ``loc``, by an output of its own where there is one.

        Autograd would add the gradients of one output up before the guide's node joins them.
        """
        last = None if self._slot is None else self._slot.last
        return self.loc if last is None else last[2]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)  # type: ignore[misc]
        if isinstance(new, _KeepsDelta):
            new._slot = self._slot
        return new

    def __reduce__(self) -> Any:
        # A copy of a trace has no use for the noise of the moment.
        state = {name: item for name, item in vars(self).items() if name != "_slot"}
        return _plain, (self._family, state)


@functools.cache
def keeping(cls: type) -> type:
    """The version of a family that :func:`keep_delta` makes its members."""
    # A subclass, so that registered KL divergences and centres are found for it.
    return types.new_class(
        cls.__name__,
        (_KeepsDelta, cls),
        exec_body=lambda ns: ns.update(_family=cls, __module__=__name__, __doc__=cls.__doc__),
    )


def keep_delta(fn: Any, slot: Slot) -> Any:
    """Makes ``fn``, with ``loc`` and ``scale``, draw from ``slot`` and keep its perturbation.

    :param fn: a fresh instance, changed in place.
    :param slot: its noise.
    """
    cls: Any = type(fn)
    fn.__class__ = keeping(cls)
    fn._slot = slot
    return fn


class Image(pyro_dist.Delta):
    """A point that is the image of an auxiliary draw, with the log-density of the transform.

    In Pyro 1.9, ``kl_divergence`` of a ``Delta`` leaves its ``log_density`` out, so that
    ``TraceMeanField_ELBO`` lacks the Jacobian of every constrained site of ``AutoNormal``.
    """


@register_kl(Image, pyro_dist.Distribution)  # type: ignore[untyped-decorator]
def _kl_image(p: Any, q: Any) -> Tensor:
    kl: Tensor = p.log_density - q.log_prob(p.v)
    return kl


def check_family(family: Family) -> None:
    """Raises unless ``family`` is symmetric about its location, scales, and is reparametrised."""
    loc, scale = torch.tensor([-1.5, 3.0]).double(), torch.tensor([0.5, 2.0]).double()
    fn, base = family(loc, scale), standard(family, loc)
    if not isinstance(fn, Distribution) or fn.event_shape or fn.batch_shape != loc.shape:
        raise ValueError(f"got {fn!r}, expected a distribution over one element for each location")
    if not fn.has_rsample:
        raise ValueError(f"{type(fn).__name__} has no reparametrised draws (rsample)")
    if not is_real(fn):
        raise ValueError(f"{type(fn).__name__} is not a distribution over all real numbers")
    noise = torch.tensor([[0.3], [-1.1], [2.4]]).double()  # (3, 1)
    moved = fn.log_prob(loc + scale * noise) + scale.log()  # (3, 2)
    for sign in (1, -1):
        if not torch.allclose(base.log_prob(sign * noise).expand(3, 2), moved):
            raise ValueError(
                f"{type(fn).__name__} is not symmetric about its first argument with its second "
                "argument as scale"
            )
    # The guide draws `loc + scale * noise` itself.
    if not all(
        isinstance(found, Tensor) and torch.equal(found.expand_as(given), given)
        for found, given in ((getattr(fn, "loc", None), loc), (getattr(fn, "scale", None), scale))
    ):
        raise ValueError(
            f"{type(fn).__name__} is made with another loc or scale than the family was given; "
            "pass them on as they are, and put a factor of the scale into init_scale"
        )
