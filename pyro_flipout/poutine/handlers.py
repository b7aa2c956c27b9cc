# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The handlers as functions: wrappers, decorators and context managers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

import torch

from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger, SiteFn
from pyro_flipout.poutine.independent_messenger import IndependentMessenger
from pyro_flipout.poutine.local_reparameterization_messenger import (
    LocalReparameterizationMessenger,
)

__all__ = ["flipout", "independent", "local_reparameterization"]

_OPTIONS = list(inspect.signature(FlipoutMessenger.__init__).parameters)[1:]
Fn = TypeVar("Fn", bound=Callable[..., Any])


@overload
def flipout(
    fn: None = ...,
    *,
    example_dim: int | None = ...,
    hide: Iterable[str] | None = ...,
    expose: Iterable[str] | None = ...,
    hide_fn: SiteFn | None = ...,
    expose_fn: SiteFn | None = ...,
    on_missing_rule: str = ...,
    group_size: int = ...,
    audit: bool = ...,
) -> FlipoutMessenger: ...


@overload
def flipout(
    fn: Fn,
    *,
    example_dim: int | None = ...,
    hide: Iterable[str] | None = ...,
    expose: Iterable[str] | None = ...,
    hide_fn: SiteFn | None = ...,
    expose_fn: SiteFn | None = ...,
    on_missing_rule: str = ...,
    group_size: int = ...,
    audit: bool = ...,
) -> Fn: ...


def flipout(fn: Any = None, **options: Any) -> Any:
    r"""Gives every example of a mini-batch its own pseudo-independent draw of the weights.

    Wraps a model, decorates one, or serves as a context manager around inference; see
    :class:`~pyro_flipout.FlipoutMessenger` for what it does and for its options.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> svi = SVI(flipout(model), AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    >>> loss = svi.step(torch.randn(8, 3), torch.randn(8))

    :param fn: a function with ``pyro.sample`` statements or an ``nn.Module``; a module is
        given back as a module with the same parameters, ``state_dict`` and site names.
    :param options: keyword arguments of :class:`~pyro_flipout.FlipoutMessenger`.
    :returns: the wrapped model, or the handler if ``fn`` is omitted.
    :raises TypeError: if ``fn`` is not a model, or an option is unknown.
    """
    return _handle("flipout", FlipoutMessenger, fn, options)


def local_reparameterization(fn: Any = None, **options: Any) -> Any:
    """Draws what Gaussian weights do to each example in place of the weights.

    The form is that of :func:`~pyro_flipout.flipout`; for fully connected layers only, see
    :class:`~pyro_flipout.poutine.LocalReparameterizationMessenger`.

    :param fn: a function with ``pyro.sample`` statements or an ``nn.Module``.
    :param options: keyword arguments of :class:`~pyro_flipout.FlipoutMessenger`.
    :returns: the wrapped model, or the handler if ``fn`` is omitted.
    :raises TypeError: if ``fn`` is not a model, or an option is unknown.
    """
    return _handle("local_reparameterization", LocalReparameterizationMessenger, fn, options)


def independent(fn: Any = None, **options: Any) -> Any:
    """Gives every example of a mini-batch an independent draw of the weights, at N times the cost.

    The form is that of :func:`~pyro_flipout.flipout`; for small nets, see
    :class:`~pyro_flipout.poutine.IndependentMessenger`.

    :param fn: a function with ``pyro.sample`` statements or an ``nn.Module``.
    :param options: keyword arguments of :class:`~pyro_flipout.FlipoutMessenger`.
    :returns: the wrapped model, or the handler if ``fn`` is omitted.
    :raises TypeError: if ``fn`` is not a model, or an option is unknown.
    """
    return _handle("independent", IndependentMessenger, fn, options)


def _handle(name: str, cls: type[FlipoutMessenger], fn: Any, options: dict[str, Any]) -> Any:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"{name}: got unknown options {unknown}, expected some of {_OPTIONS}")
    messenger = cls(**options)
    if fn is None:
        return messenger
    wrapped = messenger(fn)
    if isinstance(fn, torch.nn.Module):
        return wrapped
    return functools.update_wrapper(wrapped, fn, updated=())
