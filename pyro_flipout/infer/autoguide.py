# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""A mean-field guide that samples its sites directly."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as pyro_dist
import pyro.poutine as poutine
import pyro.poutine.runtime as runtime
import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import block_messengers
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_flipout._modes import transformed
from pyro_flipout.infer import _normal_kl  # noqa: F401  (registers it)
from pyro_flipout.infer._common_draw import draw_together
from pyro_flipout.infer._draws import (
    Family,
    Image,
    Noise,
    Slot,
    check_family,
    keep_delta,
    standard,
)
from pyro_flipout.poutine.flipout_messenger import FlipoutMessenger
from pyro_flipout.poutine.symmetric_draw import Message, is_real

__all__ = ["AutoMeanField"]


@dataclass(frozen=True)
class _Part:
    """One site's part of the flat parameters.

    :ivar shape: unconstrained shape, over the full size of every plate.
    :ivar event_dim: number of unconstrained event dimensions.
    :ivar start: first element of its part of the common noise, None for a site inside a
        subsampled plate, which would waste most of it.
    """

    name: str
    shape: torch.Size
    event_dim: int
    start: int | None


class AutoMeanField(AutoGuide):
    r"""Factorised symmetric guide whose sites are drawn directly, for use with flipout.

    Over all unconstrained latent values, one vector of locations :math:`\mu` and one of scales
    :math:`\sigma`:

    .. math:: W = \mu + \Delta W, \qquad \Delta W = \sigma \circ \varepsilon

    with standard noise :math:`\varepsilon` of the family, drawn at once for all sites. Where
    ``AutoNormal`` draws an auxiliary site and puts a ``Delta`` at the weight, this guide has
    the family's distribution at the weight itself. So ``TraceMeanField_ELBO`` finds
    :math:`\mathrm{KL}(q \,\|\, p)` in closed form where torch or Pyro has one, and flipout gets
    :math:`\mu` and :math:`\Delta W` as they are, not as a difference. The same loss in less time
    is :class:`~pyro_flipout.infer.MeanFieldELBO`.

    A site with constrained support is treated as in ``AutoNormal``: its unconstrained value is
    an auxiliary site ``<site>_unconstrained``, its KL a Monte Carlo estimate.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, TraceMeanField_ELBO
    >>> from pyro_flipout import flipout
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> guide = AutoMeanField(model)
    >>> svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    >>> loss = svi.step(torch.randn(8, 3), torch.randn(8))
    >>> guide.loc.shape, guide.median()["w"].shape
    (torch.Size([3]), torch.Size([1, 3]))

    :param model: a Pyro model.
    :param family: a symmetric location-scale family with reparametrised draws, called as
        ``family(loc, scale)``: ``dist.Normal``, ``dist.Laplace``,
        ``functools.partial(dist.StudentT, 4.0)``.
    :param init_loc_fn: per-site initialisation, see :mod:`pyro.infer.autoguide.initialization`.
    :param init_scale: initial scale of the unconstrained values: a positive number, or a
        function of the site (a dict with ``"name"``, ``"fn"`` and its initial ``"value"``)
        that returns one, or a tensor that broadcasts to the unconstrained value.
    :param learn_scale: False keeps the scales where they start, as a buffer in place of a
        parameter.
    :param create_plates: function of the model's arguments that returns the plates to
        subsample with, see :class:`~pyro.infer.autoguide.AutoGuide`.
    :raises ValueError: if ``family`` or ``init_scale`` cannot be used.

    :ivar loc: locations of all sites, shape ``(size,)``.
    :ivar scale: scales of all sites, shape ``(size,)``.

    .. note:: All latent sites share one dtype and one device. Use an ``AutoGuideList`` of
        several of these guides where they do not.
    """

    scale_constraint = constraints.softplus_positive

    loc: Any
    scale: Any
    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        family: Family = pyro_dist.Normal,
        init_loc_fn: Callable[[Message], Tensor] = init_to_feasible,
        init_scale: float | Callable[[Message], float | Tensor] = 0.1,
        learn_scale: bool = True,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        try:
            check_family(family)
        except ValueError as why:
            raise ValueError(
                f"AutoMeanField: {why}; give a family such as dist.Normal, dist.Laplace or "
                "functools.partial(dist.StudentT, 4.0)"
            ) from None
        if not callable(init_scale) and not (_is_number(init_scale) and init_scale > 0):
            raise ValueError(
                f"AutoMeanField: got init_scale={init_scale!r}, expected a number > 0 or a "
                "function of the site"
            )
        model = InitMessenger(init_loc_fn)(model)
        super().__init__(model, create_plates=create_plates)  # type: ignore[no-untyped-call]
        self.family = family
        self.init_loc_fn = init_loc_fn
        self.init_scale = init_scale
        self.learn_scale = learn_scale
        self._parts: list[_Part] = []

    # ---------------------------------------------------------------------- set-up

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)  # type: ignore[no-untyped-call]
        locs, scales, self._parts = [], [], []
        self._noise_size = 0
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with helpful_support_errors(site):
                loc = biject_to(site["fn"].support).inv(site["value"].detach()).detach()
            event_dim = site["fn"].event_dim + loc.dim() - site["value"].dim()
            scale = self._init_scale_of(site, loc)
            start: int | None = self._noise_size
            for frame in site["cond_indep_stack"]:
                full_size = frame.full_size or frame.size
                if full_size != frame.size:
                    dim = frame.dim - event_dim
                    loc, scale = (periodic_repeat(t, full_size, dim) for t in (loc, scale))
                    start = None
            self._parts.append(_Part(name, loc.shape, event_dim, start))
            self._noise_size += loc.numel() if start is not None else 0
            locs.append(loc)
            scales.append(scale)
        self._check(locs)
        # Not a plain parameter, which SVI cannot train under module_local_params.
        self.loc = PyroParam(torch.cat([t.reshape(-1) for t in locs]), constraints.real)
        scale = torch.cat([t.reshape(-1) for t in scales])
        if self.learn_scale:
            self.scale = PyroParam(scale, self.scale_constraint)
        else:
            self.register_buffer("scale", scale)

    def _init_scale_of(self, site: Message, loc: Tensor) -> Tensor:
        init = self.init_scale(site) if callable(self.init_scale) else self.init_scale
        scale = torch.as_tensor(init, dtype=loc.dtype, device=loc.device).detach()
        if not (scale > 0).all():
            raise ValueError(
                f"AutoMeanField: init_scale gave {scale} for site '{site['name']}', expected > 0"
            )
        try:
            return scale.expand(loc.shape)
        except RuntimeError:
            raise ValueError(
                f"AutoMeanField: init_scale gave shape {tuple(scale.shape)} for site "
                f"'{site['name']}', expected one that broadcasts to {tuple(loc.shape)}"
            ) from None

    def _check(self, locs: list[Tensor]) -> None:
        if not locs:
            raise RuntimeError(
                "AutoMeanField found no latent variables; use an empty guide instead"
            )
        kinds = {f"{t.dtype} on {t.device}": p.name for t, p in zip(locs, self._parts, strict=True)}
        if len(kinds) > 1:
            sites = ", ".join(f"'{name}' is {kind}" for kind, name in kinds.items())
            raise ValueError(
                f"AutoMeanField: site {sites}; expected one dtype and device; use an AutoGuideList "
                "with one AutoMeanField for each"
            )

    def _ensure_setup(self, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None:
            try:
                self._setup_prototype(*args, **kwargs)
            except Exception:
                self.prototype_trace = None
                raise

    # --------------------------------------------------------------------- sampling

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent site of the model.

        :returns: values by site name.
        """
        self._ensure_setup(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
        # It is the model that flips: signs drawn here would be for nothing.
        with block_messengers(lambda m: isinstance(m, FlipoutMessenger)):
            return {
                part.name: self._sample(part, loc, scale, slot, plates)
                for part, loc, scale, slot in self._slots()
            }

    def _slots(self) -> Iterator[tuple[_Part, Tensor, Tensor, Slot]]:
        """Every site's locations, scales and noise."""
        flat_loc, flat_scale = self._flat()
        noise = Noise(self.family, self._noise_size, flat_loc)
        if self._noise_size < len(flat_loc) or transformed() or _in_plates():
            for part, loc, scale in self._unpack():
                yield part, loc, scale, noise.slot(part.start, part.shape)
            return
        shapes = [part.shape for part in self._parts]
        drawn = draw_together(flat_loc, flat_scale, noise.flat(1).view(-1), shapes)
        for part, (loc, scale, *draw) in zip(self._parts, drawn, strict=True):
            yield part, loc, scale, noise.slot(None, part.shape, tuple(draw))

    def _flat(self) -> tuple[Tensor, Tensor]:
        sizes = [part.shape.numel() for part in self._parts]
        flat_loc, flat_scale = self.loc, self.scale
        if len(flat_loc) != sum(sizes):
            raise RuntimeError(
                f"AutoMeanField: the model has {sum(sizes)} latent values, but '{self._pyro_name}"
                f".loc' has {len(flat_loc)}, left in Pyro's parameter store by another guide; call "
                "pyro.clear_param_store() before you make a new one"
            )
        return flat_loc, flat_scale

    def _unpack(self) -> Iterator[tuple[_Part, Tensor, Tensor]]:
        """Every site's locations and scales, in its own shape."""
        sizes = [part.shape.numel() for part in self._parts]
        parts = (flat.split(sizes) for flat in self._flat())
        for part, loc, scale in zip(self._parts, *parts, strict=True):
            yield part, loc.view(part.shape), scale.view(part.shape)

    def _sample(
        self, part: _Part, loc: Tensor, scale: Tensor, slot: Slot, plates: dict[str, Any]
    ) -> Tensor:
        site = self.prototype_trace.nodes[part.name]
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                plate = plates[frame.name]
                indices = stack.enter_context(plate)
                if plate.subsample_size < plate.size:
                    dim = frame.dim - part.event_dim
                    loc, scale = (t.index_select(dim, indices.to(t.device)) for t in (loc, scale))
            fn = keep_delta(self.family(loc, scale), slot)
            fn = fn.to_event(part.event_dim)
            if not is_real(site["fn"]):
                return _sample_image(site, fn)
            # A mark on the model's site would be lost: replay gives it the guide's infer dict.
            marks: Any = {k: v for k, v in site["infer"].items() if k == "flipout"}
            value: Tensor = pyro.sample(part.name, fn, infer=marks)
            return value

    # ---------------------------------------------------------------------- summary

    @torch.no_grad()
    def loc_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        """Locations and scales of one site's unconstrained value, over the full size of plates.

        :param name: name of a latent site of the model.
        :returns: two copies, in the site's unconstrained shape.
        :raises KeyError: if there is no such site.
        :raises RuntimeError: before the guide has run.
        """
        if self.prototype_trace is None:
            raise RuntimeError(
                "AutoMeanField.loc_and_scale: the guide has not run yet, and learns the sites of "
                "the model then; call it once with the model's arguments"
            )
        for part, loc, scale in self._unpack():
            if part.name == name:
                return loc.clone(), scale.clone()
        raise KeyError(
            f"AutoMeanField: got site '{name}', expected one of {[p.name for p in self._parts]}"
        )

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every latent site.

        :param args: the model's, needed only before the guide's first call.
        :returns: medians by site name, over the full size of plates.
        """
        self._ensure_setup(*args, **kwargs)
        return {part.name: self._transform(part)(loc).clone() for part, loc, _ in self._unpack()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Tensor | Iterable[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of every latent site.

        :param quantiles: ``Q`` levels between 0 and 1.
        :param args: the model's, needed only before the guide's first call.
        :returns: by site name, tensors of shape ``(Q, *shape)``, over the full size of plates.
        :raises NotImplementedError: if the family has no quantile function.

        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoMeanField(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), init_scale=0.5)
        >>> guide.quantiles([0.025, 0.5, 0.975])["w"]
        tensor([-0.9800,  0.0000,  0.9800])
        """
        self._ensure_setup(*args, **kwargs)
        levels = torch.as_tensor(quantiles if isinstance(quantiles, Tensor) else list(quantiles))
        noise = _standard_quantiles(standard(self.family, self.loc), levels.to(self.loc))
        result = {}
        for part, loc, scale in self._unpack():
            transform = self._transform(part)
            z = noise.view(-1, *(1,) * loc.dim()) * _direction(transform)
            result[part.name] = transform(loc + scale * z)
        return result

    def _transform(self, part: _Part) -> Transform:
        transform: Transform = biject_to(self.prototype_trace.nodes[part.name]["fn"].support)
        return transform


def _sample_image(site: Message, fn: Any) -> Tensor:
    """Samples a constrained site as the image of an auxiliary one."""
    transform = biject_to(site["fn"].support)
    name, event_dim = site["name"], site["fn"].event_dim
    draw = pyro.sample(f"{name}_unconstrained", fn, infer={"is_auxiliary": True})
    value = transform(draw)
    log_density: Any = 0.0
    if poutine.get_mask() is not False:
        log_density = transform.inv.log_abs_det_jacobian(value, draw)
        log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
    image: Any = Image(value, log_density, event_dim)  # type: ignore[no-untyped-call]
    sample: Tensor = pyro.sample(name, image)
    return sample


def _standard_quantiles(fn: Any, levels: Tensor) -> Tensor:
    """Quantiles of a standard member of a family, shape ``(Q,)``."""
    if isinstance(fn, torch.distributions.StudentT):
        from scipy.stats import t  # torch has none

        return torch.as_tensor(t.ppf(levels.cpu(), fn.df.cpu())).to(levels)
    try:
        quantiles: Tensor = fn.icdf(levels)
    except NotImplementedError:
        raise NotImplementedError(
            f"AutoMeanField: {type(fn).__name__} has no icdf, so that there are no quantiles; take "
            "those of samples: Predictive(model, guide=guide, num_samples=1000)"
        ) from None
    return quantiles


def _direction(transform: Transform) -> int | Tensor:
    """-1 for a transform that decreases, such as that to ``less_than(0)``."""
    try:
        return transform.sign
    except NotImplementedError:
        return 1


def _in_plates() -> bool:
    """Whether the guide is called inside a plate, such as that of vectorised particles."""
    return any(isinstance(frame, IndepMessenger) for frame in runtime._PYRO_STACK)


def _is_number(obj: object) -> bool:
    return isinstance(obj, numbers.Real) and not isinstance(obj, bool)
