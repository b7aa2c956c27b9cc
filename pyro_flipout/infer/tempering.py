# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Tempering: a factor before the KL term of an ELBO, fixed or annealed."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeVar, overload

import pyro.poutine.runtime as runtime
import torch
from pyro.infer import ELBO
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.reentrant_messenger import ReentrantMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from pyro_flipout._modes import graphed, looked_at, recorded
from pyro_flipout.errors import FlipoutError, warn
from pyro_flipout.infer._elbo_mixin import ElboMixin, mixed
from pyro_flipout.poutine.flipout_messenger import unknown_names
from pyro_flipout.poutine.module import wrap_module
from pyro_flipout.poutine.symmetric_draw import Message, current_stack, replayed_site

__all__ = ["TemperMessenger", "tempered"]

Fn = TypeVar("Fn")

_MARK = "_tempered"  # key of a message: the product of the factors that its scale has
_AUXILIARY = "_unconstrained"  # what autoguides add to a site's name


class TemperMessenger(ReentrantMessenger):
    """The handler behind :func:`tempered`, with the same parameters.

    :ivar factor: the factor; set it between steps to anneal.
    """

    never_sets_values = True

    def __init__(
        self,
        factor: float = 1.0,
        hide: Iterable[str] | None = None,
        expose: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        self.hide = _names("hide", hide)
        self.expose = _names("expose", expose)
        both = (self.hide or frozenset()) & (self.expose or frozenset())
        if both:
            raise ValueError(
                f"tempered: sites {sorted(both)} are named in both hide and expose; remove one"
            )
        self._frozen = False
        self._tensors: dict[torch.dtype, torch.Tensor] = {}
        self._seen: set[str] = set()
        self._told: set[str] = set()
        self.factor = factor

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        if args[0] is None:
            for option, message in unknown_names(self.hide, self.expose, self._seen):
                if option not in self._told:
                    self._told.add(option)
                    warn(f"tempered: {message}")

    @property
    def factor(self) -> float:
        """What the KL term is multiplied by."""
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        if not (_is_number(factor) and math.isfinite(factor) and factor >= 0):
            raise ValueError(f"tempered: got factor={factor!r}, expected a finite number >= 0")
        if self._frozen:
            raise FlipoutError(
                "tempered: torch.jit or a CUDA graph has compiled the factor in as a constant; to "
                "anneal it, use an ELBO that is not compiled, or pyro_flipout.infer.captured"
            )
        self._factor = float(factor)
        for tensor in self._tensors.values():
            tensor.fill_(self._factor)

    def __call__(self, fn: Any) -> Any:
        """Wraps a model, a guide, or an ELBO: each is given back as what it is."""
        if isinstance(fn, _Tempered):
            raise ValueError(
                f"tempered: got an ELBO that is tempered already, with the factor "
                f"{fn._temper.factor}; temper it once, with the product of the factors"
            )
        if isinstance(fn, ELBO):
            return mixed(fn, _Tempered, self)
        if isinstance(fn, torch.nn.Module):
            return wrap_module(fn, self)
        if isinstance(fn, type) or not callable(fn):
            raise TypeError(
                f"tempered: got {fn!r} of type {type(fn).__name__}, expected a model, a guide or "
                "an ELBO; give the factor as factor=..."
            )
        return super().__call__(fn)

    def _pyro_sample(self, msg: Message) -> None:
        if self._tempers(msg):
            self._frozen |= torch._C._get_tracing_state() is not None or graphed()
            factor = self._as_tensor(msg["fn"]) if recorded() else self._factor
            msg["scale"] = msg["scale"] * factor
            msg[_MARK] = msg.get(_MARK, 1.0) * self._factor

    def _as_tensor(self, fn: Any) -> torch.Tensor:
        """The factor for what is recorded, where a number would be a constant: it follows."""
        dtype = _dtype_of(fn)
        if dtype not in self._tensors:
            self._tensors[dtype] = looked_at(lambda: torch.tensor(self._factor, dtype=dtype))
        return self._tensors[dtype]

    def _pyro_post_sample(self, msg: Message) -> None:
        replayed = replayed_site(msg, current_stack())
        if replayed is None:
            return
        ours, guides = (m.get(_MARK, 1.0) for m in (msg, replayed[0]))
        if not math.isclose(ours, guides):
            raise FlipoutError(
                f"tempered: site '{msg['name']}' has the factor {ours} in the model and {guides} "
                "in the guide, expected the same: wrap both, or the ELBO alone"
            )

    def _tempers(self, msg: Message) -> bool:
        if msg["is_observed"] or msg["infer"].get("was_observed") or site_is_subsample(msg):
            return False
        if _conditioned_outside(msg["name"]):
            return False
        self._seen.add(msg["name"])
        name, hide, expose = msg["name"], self.hide or (), self.expose or ()
        if name in hide or name in expose:
            return name in expose
        if msg["infer"].get("is_auxiliary") and not (self.hide is self.expose is None):
            site = name.removesuffix(_AUXILIARY)
            if site == name:
                raise FlipoutError(
                    f"tempered: the guide's site '{name}' may stand for several sites of the "
                    "model, of which hide and expose name only some; use AutoMeanField or "
                    f"AutoNormal, or name '{name}' itself"
                )
            name = site
        if self.expose is not None:
            return name in expose
        return name not in hide and not _is_discrete(msg["fn"])


@overload
def tempered(
    fn: None = ...,
    factor: float = ...,
    *,
    hide: Iterable[str] | None = ...,
    expose: Iterable[str] | None = ...,
) -> TemperMessenger: ...


@overload
def tempered(
    fn: Fn,
    factor: float = ...,
    *,
    hide: Iterable[str] | None = ...,
    expose: Iterable[str] | None = ...,
) -> Fn: ...


def tempered(
    fn: Any = None,
    factor: float = 1.0,
    *,
    hide: Iterable[str] | None = None,
    expose: Iterable[str] | None = None,
) -> Any:
    r"""Multiplies the KL term of an ELBO by a factor.

    .. math:: \mathbb{E}_q[\log p(y \mid W)] - \lambda \, \mathrm{KL}(q(W) \,\|\, p(W))

    Wen et al. (2018, section 4.3) train with :math:`\lambda = 0.1`. The handler scales
    :math:`\log p` and :math:`\log q` of the latent sites, as ``poutine.scale`` does, and leaves
    the likelihood alone. Both must have the factor, so wrap the ELBO:

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, TraceMeanField_ELBO
    >>> from pyro_flipout import flipout
    >>> from pyro_flipout.infer import AutoMeanField, tempered
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> guide, optim = AutoMeanField(model), pyro.optim.Adam({"lr": 0.01})
    >>> svi = SVI(flipout(model), guide, optim, tempered(TraceMeanField_ELBO(), 0.1))
    >>> x, y = torch.randn(8, 3), torch.randn(8)
    >>> loss = svi.step(x, y)

    or wrap model and guide each: ``SVI(flipout(tempered(model, 0.1)), tempered(guide, 0.1), ...)``,
    or use the handler as a context manager. Set its ``factor`` to anneal:

    >>> svi = SVI(flipout(model), guide, optim, TraceMeanField_ELBO())
    >>> temper = tempered(factor=0.0)
    >>> for step in range(20):
    ...     temper.factor = min(1.0, step / 10)
    ...     with temper:
    ...         loss = svi.step(x, y)

    Without ``hide`` and ``expose`` every continuous latent site is tempered, local variables
    in data plates too. Discrete sites are not, since a site that is summed out of the model
    is part of the likelihood.

    :param fn: an ELBO, or a model or a guide: a function or an ``nn.Module``. Each is given back
        as what it is.
    :param float factor: the factor, finite and at least 0.
    :param hide: names of sites of the model to leave alone.
    :param expose: names of the only sites of the model to temper.
    :returns: the wrapped ``fn``, or the :class:`TemperMessenger` if it is omitted.
    :raises FlipoutError: when run, if model and guide have different factors, or if ``hide``
        or ``expose`` choose among sites that the guide draws jointly.

    .. note:: A guide that is wrapped with the bare model cannot be noticed, and is wrong under
        ``Trace_ELBO``. An ELBO that is wrapped cannot get this wrong.
    """
    handler = TemperMessenger(factor, hide, expose)
    if fn is None:
        return handler
    wrapped = handler(fn)
    if isinstance(fn, (ELBO, torch.nn.Module)):
        return wrapped
    return functools.update_wrapper(wrapped, fn, updated=())


class _Tempered(ElboMixin):
    """Runs model and guide under its handler."""

    own = "_temper"
    _temper: TemperMessenger

    def _get_trace(self, *args: Any) -> Any:
        with self._temper:
            return super()._get_trace(*args)  # type: ignore[misc]


def _dtype_of(fn: Any) -> torch.dtype:
    """Of a distribution's parameters."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    floating = (v.dtype for v in vars(fn).values() if _is_floating(v))
    return next(floating, torch.get_default_dtype())


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _conditioned_outside(name: str) -> bool:
    """Whether a handler that has not seen the message yet will make it an observation."""
    for frame in runtime._PYRO_STACK:
        if isinstance(frame, ConditionMessenger) and name in frame.data:
            data = frame.data
            value = data.nodes[name]["value"] if isinstance(data, Trace) else data[name]
            if value is not None:
                return True
    return False


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _is_number(obj: object) -> bool:
    return isinstance(obj, numbers.Real) and not isinstance(obj, bool)


def _names(option: str, names: Iterable[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    found = None if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if found is None or not all(isinstance(name, str) for name in found):
        raise TypeError(f"tempered: got {option}={names!r}, expected a list of site names")
    return frozenset(found)
