# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Which distributions flipout is exact for, and the centre of each.

Flipout replaces the draw :math:`W = c + \Delta` of example :math:`n` by
:math:`c + \Delta \circ E_n` with signs :math:`E_n \in \{-1, 1\}^{\text{shape}}`. That is
again a draw from the same distribution :math:`q` if, for every :math:`E`,

.. math::
    q(c + E \circ t) = q(c + t),

that is, if :math:`q` is symmetric about :math:`c` element by element, independently of the
other elements (Wen et al. 2018, section 3.1). :data:`SYMMETRIC` holds the distributions
that are, each with a function for its centre :math:`c`. Everything else is refused: a
shared draw is valid too.

A subclass of a registered class is taken at its parent's word, the nearest parent's in
the method resolution order. If yours overrides how it samples, register it itself, and
let :func:`pyro_flipout.testing.check_symmetric` try it.

References

[1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
    Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
    https://arxiv.org/abs/1803.04386
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as pyro_dist
import torch.distributions as torch_dist
from torch import Tensor
from torch.distributions import AffineTransform, ComposeTransform, Distribution, Transform
from torch.distributions.transforms import IndependentTransform

from pyro_flipout.errors import NotSymmetricError

__all__ = [
    "SYMMETRIC",
    "is_symmetric",
    "register_symmetric",
    "symmetric_center",
    "symmetric_delta",
    "why_not_symmetric",
]

F = TypeVar("F", bound=Callable[[Any], Tensor])

SYMMETRIC: dict[type, Callable[[Any], Tensor]] = {}
"""The function that gives the centre, for every registered distribution class."""

_CORRELATED = "is not factorised: its components are correlated"
_SKEWED = "is not symmetric about any centre"

_REFUSED: dict[type, str] = {
    torch_dist.Dirichlet: _CORRELATED,
    torch_dist.LKJCholesky: _CORRELATED,
    torch_dist.LowRankMultivariateNormal: _CORRELATED,
    torch_dist.MultivariateNormal: _CORRELATED,
    torch_dist.Wishart: _CORRELATED,
    pyro_dist.MultivariateStudentT: _CORRELATED,
    torch_dist.Exponential: _SKEWED,
    torch_dist.Gamma: _SKEWED,
    torch_dist.Poisson: _SKEWED,
}


def register_symmetric(*classes: type) -> Callable[[F], F]:
    r"""Registers the decorated function as giving the centre of ``classes``.

    The function takes a distribution of one of these classes and returns the centre it is
    symmetric about, element by element: a tensor that broadcasts to ``batch_shape +
    event_shape``, with its autograd history. It raises
    :class:`~pyro_flipout.errors.NotSymmetricError` with the reason where the parameters
    make the distribution asymmetric.

    :param classes: distribution classes.
    :raises TypeError: if one of ``classes`` is not a class, or none is given.
    :raises ValueError: if one of ``classes`` is registered already.

    >>> import torch
    >>> from pyro_flipout.testing import check_symmetric
    >>> class Triangular(torch.distributions.Distribution):
    ...     def __init__(self, loc, scale):
    ...         self.loc, self.scale = torch.broadcast_tensors(loc, scale)
    ...         super().__init__(self.loc.shape, validate_args=False)
    ...     def sample(self, sample_shape=()):
    ...         u, v = torch.rand(2, *sample_shape, *self.batch_shape, dtype=self.loc.dtype)
    ...         return self.loc + self.scale * (u - v)
    >>> @register_symmetric(Triangular)
    ... def triangular_center(dist):
    ...     return dist.loc
    >>> check_symmetric(Triangular(torch.tensor([1.0, 2.0]).double(), torch.tensor(0.5).double()))
    """
    if not classes or not all(isinstance(cls, type) for cls in classes):
        raise TypeError(
            f"register_symmetric: expected one or more distribution classes, got {classes}; "
            "write @register_symmetric(MyDistribution) above the function"
        )
    for cls in classes:
        if cls in SYMMETRIC:
            raise ValueError(
                f"register_symmetric: {cls.__name__} is registered already, by "
                f"{SYMMETRIC[cls].__name__}; remove one of the two registrations"
            )

    def decorator(fn: F) -> F:
        SYMMETRIC.update(dict.fromkeys(classes, fn))
        return fn

    return decorator


def symmetric_center(dist: Distribution) -> Tensor:
    """The centre about which ``dist`` is symmetric, element by element.

    :param dist: a distribution of ``torch.distributions`` or ``pyro.distributions``.
    :returns: tensor of shape ``dist.batch_shape + dist.event_shape``, with the autograd
        history of the parameters.
    :raises NotSymmetricError: if there is no such centre, or none is registered.

    >>> import torch, pyro.distributions as dist
    >>> symmetric_center(dist.Uniform(0.0, torch.tensor([2.0, 4.0])).to_event(1))
    tensor([1., 2.])
    """
    center = _center(dist)
    shape = dist.batch_shape + dist.event_shape
    if center.shape == shape:
        return center
    try:
        return center.expand(shape)
    except RuntimeError as why:
        raise ValueError(
            f"symmetric_center: the centre registered for {type(dist).__name__} has shape "
            f"{tuple(center.shape)}, expected one that broadcasts to batch_shape + event_shape "
            f"= {tuple(shape)}"
        ) from why


def symmetric_delta(dist: Distribution, value: Tensor) -> Tensor | None:
    """The perturbation with which ``dist`` drew ``value``, if it kept it.

    ``value - center`` is the same up to rounding, which matters where ``abs(center)`` is much
    larger than the scale, and its gradient reaches the centre by two paths that cancel. A
    distribution that computes ``value = center + delta`` can hand its ``delta`` over
    instead: by a method ``symmetric_delta(value)`` that returns it if ``value`` *is* (not:
    equals) the last draw, else None. Those of
    :class:`~pyro_flipout.infer.AutoMeanField` do.

    :param dist: a distribution of ``torch.distributions`` or ``pyro.distributions``.
    :param value: a value of its support.
    :returns: tensor of the shape of ``value``, or None.

    >>> import torch, pyro.distributions as dist
    >>> symmetric_delta(dist.Normal(0.0, 1.0), torch.tensor(0.5)) is None
    True
    """
    fn: Any = dist
    while True:
        kept = getattr(fn, "symmetric_delta", None)
        if kept is not None:
            delta: Tensor | None = kept(value)
            return delta
        if not isinstance(fn, (torch_dist.Independent, pyro_dist.MaskedDistribution)):
            return None
        fn = fn.base_dist


def is_symmetric(dist: Distribution) -> bool:
    """Whether ``dist`` is known to be symmetric about a centre and factorised by element.

    :param dist: a distribution of ``torch.distributions`` or ``pyro.distributions``.

    >>> import pyro.distributions as dist
    >>> is_symmetric(dist.Laplace(0.0, 1.0)), is_symmetric(dist.LogNormal(0.0, 1.0))
    (True, False)
    """
    return why_not_symmetric(dist) is None


def why_not_symmetric(dist: Distribution) -> str | None:
    """The reason why flipout refuses ``dist``, None if it does not.

    :param dist: a distribution of ``torch.distributions`` or ``pyro.distributions``.

    >>> import pyro.distributions as dist
    >>> why_not_symmetric(dist.Gamma(2.0, 1.0))
    'Gamma is not symmetric about any centre'
    """
    try:
        _center(dist)
    except NotSymmetricError as why:
        return str(why)
    return None


def _center(dist: Any) -> Tensor:
    # Not expanded yet: nested distributions expand once, at the outside.
    for cls in type(dist).__mro__:
        if cls in SYMMETRIC:
            return SYMMETRIC[cls](dist)
        if cls in _REFUSED:
            raise NotSymmetricError(f"{type(dist).__name__} {_REFUSED[cls]}")
    name = type(dist).__name__
    raise NotSymmetricError(
        f"{name} is not known to be symmetric: flipout needs a centre about which every element "
        "is symmetric, independently of the others. If it has one, register it with "
        f"@pyro_flipout.register_symmetric({name}) and try it with "
        "pyro_flipout.testing.check_symmetric"
    )


# -------------------------------------------------------------- distributions


@register_symmetric(
    torch_dist.Cauchy,
    torch_dist.Laplace,
    torch_dist.Normal,
    torch_dist.StudentT,
    pyro_dist.Logistic,
    pyro_dist.SoftLaplace,
)
def _loc(dist: Any) -> Tensor:
    """At ``loc``."""
    return dist.loc  # type: ignore[no-any-return]


@register_symmetric(torch_dist.Uniform)
def _midpoint(dist: torch_dist.Uniform) -> Tensor:
    """At the midpoint of ``low`` and ``high``."""
    return (dist.low + dist.high) / 2


@register_symmetric(pyro_dist.Stable)
def _stable(dist: Any) -> Tensor:
    """At ``loc``, only if ``skew`` is 0."""
    if not (dist.skew == 0).all():
        raise NotSymmetricError(f"{type(dist).__name__} is symmetric only at skew = 0")
    return dist.loc  # type: ignore[no-any-return]


@register_symmetric(torch_dist.Bernoulli)
def _fair(dist: torch_dist.Bernoulli) -> Tensor:
    """At 0.5, only if ``probs`` is 0.5."""
    if not (dist.probs == 0.5).all():
        raise NotSymmetricError(
            f"{type(dist).__name__} is symmetric only at probs = 0.5; at other probs the "
            "alternative is noise that the mini-batch shares"
        )
    return dist.probs.new_full((), 0.5)


@register_symmetric(pyro_dist.Delta)
def _point(dist: Any) -> Tensor:
    """At its point; there is no perturbation."""
    return dist.v  # type: ignore[no-any-return]


@register_symmetric(
    torch_dist.Independent, pyro_dist.ExpandedDistribution, pyro_dist.MaskedDistribution
)
def _of_base(dist: Any) -> Tensor:
    """That of the base distribution."""
    return _center(dist.base_dist)


@register_symmetric(torch_dist.TransformedDistribution)
def _affine_image(dist: torch_dist.TransformedDistribution) -> Tensor:
    """The image of the base's centre, only if every transform is affine by element."""
    base = dist.base_dist
    center = _center(base)
    for transform in dist.transforms:
        try:
            center = _affine(transform, center)
        except NotImplementedError as why:
            raise NotSymmetricError(
                f"{type(dist).__name__} is not known to be symmetric: its transform {why} is not "
                "affine element by element"
            ) from None
    shapes = [d.batch_shape + d.event_shape for d in (base, dist)]
    if shapes[0].numel() != shapes[1].numel():  # torch expands the batch alone
        raise NotSymmetricError(
            f"{type(dist).__name__} is not factorised: it makes {tuple(shapes[1])} of a base "
            f"distribution over {tuple(shapes[0])}, so that elements have their noise in common; "
            "expand the base to that shape"
        )
    return center


def _affine(transform: Transform, x: Tensor, inverse: bool = False) -> Tensor:
    # Calling the transform would put (center, image) into its cache in place of the draw's
    # pair, which log_prob relies on: `_call` and `_inverse` pass the cache by.
    if isinstance(transform, ComposeTransform):
        for part in reversed(transform.parts) if inverse else transform.parts:
            x = _affine(part, x, inverse)
        return x
    if isinstance(transform, IndependentTransform):
        return _affine(transform.base_transform, x, inverse)
    if isinstance(transform, AffineTransform):
        image: Tensor = transform._inverse(x) if inverse else transform._call(x)
        return image
    if isinstance(transform.inv, (AffineTransform, IndependentTransform)):
        return _affine(transform.inv, x, not inverse)
    name = type(transform).__name__
    if name == "_InverseTransform":
        name = f"{type(transform.inv).__name__}.inv"
    raise NotImplementedError(name)
