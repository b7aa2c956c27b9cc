# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Sites of a trace, and the handlers that :func:`pyro_flipout.to_arviz` runs programs under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_flipout.errors import FlipoutError
from pyro_flipout.plan.owner import PARTICLE_PLATES

__all__ = [
    "Coherent",
    "SetSubsample",
    "Unobserve",
    "check_guide",
    "check_observed",
    "data_frame",
    "event_dim_of",
    "in_plate",
    "is_deterministic",
    "is_latent",
    "is_observation",
    "observations",
    "sample_sites",
    "swapped",
    "unscaled_log_prob",
]

Site = Any
"""A node of a trace, of which Pyro types not every key."""


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, without those of the plates' indices."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def is_observation(site: Site) -> bool:
    """Whether a site is data: observed, and neither deterministic nor a factor."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not (is_deterministic(site) or site_is_factor(site) or site_is_subsample(site))
    )


def is_deterministic(site: Site) -> bool:
    """Whether a site only records a value."""
    return bool(site["infer"].get("_deterministic"))


def is_latent(site: Site) -> bool:
    """Whether a site is drawn."""
    return site["type"] == "sample" and not (site["is_observed"] or site_is_subsample(site))


def in_plate(site: Site, plate: str | None) -> bool:
    """Whether a site is in the vectorised plate of that name."""
    return plate is not None and any(
        f.name == plate and f.vectorized for f in site.get("cond_indep_stack", ())
    )


def event_dim_of(site: Site) -> int:
    """Number of event dimensions; ``pyro.deterministic`` by default takes all for such.

    In plates, those of a deterministic site are then what is right of the plates.
    """
    event_dim: int = site["fn"].event_dim
    shape = site["value"].shape
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    if is_deterministic(site) and event_dim == len(shape) and frames:
        for right in range(len(shape), -1, -1):
            places = [len(shape) - right + f.dim for f in frames]
            if all(i >= 0 and shape[i] == f.size for i, f in zip(places, frames, strict=True)):
                return right
    return event_dim


def unscaled_log_prob(site: Site) -> tuple[Tensor, Tensor | None]:
    """Log density of a site without its scale, and the mask if there is one: ``batch_shape``."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    mask = site["mask"]
    if mask is None or mask is True:
        return log_prob, None
    return log_prob, torch.as_tensor(mask, device=log_prob.device).expand(log_prob.shape)


class SetSubsample(Messenger):
    """Sets the indices of a subsampled plate."""

    never_sets_values = True

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Site) -> None:
        if site_is_subsample(msg) and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True


class Unobserve(Messenger):
    """Forgets observed values; deterministic sites and factors stay as they are."""

    never_sets_values = True

    def _pyro_sample(self, msg: Site) -> None:
        if is_observation(msg):
            msg["infer"] = {**msg["infer"], "was_observed": True}
            msg.update(is_observed=False, value=None, done=False)


class Coherent(Messenger):
    """Keeps flipout from giving every example its own draw."""

    never_sets_values = True

    def _pyro_sample(self, msg: Site) -> None:
        msg["infer"] = {**msg["infer"], "flipout": False}


def data_frame(trace: Trace, rows: int | None, name: str | None) -> Any | None:
    """The plate that counts the examples, as a ``CondIndepStackFrame``.

    :param rows: number of examples in the arguments.
    :param name: the user's word on it.
    :raises ValueError: if there is no plate ``name``, or no way to choose.
    """
    frames: dict[str, Any] = {}
    for _, site in sample_sites(trace):
        if is_observation(site) or (name is not None and is_latent(site)):
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and frame.name not in PARTICLE_PLATES:
                    frames[frame.name] = frame
    if name is not None:
        if name not in frames:
            raise ValueError(f"to_arviz: got data_plate={name!r}, expected one of {sorted(frames)}")
        return frames[name]
    subsampled = [f for f in frames.values() if f.full_size not in (None, f.size)]
    found = subsampled or [f for f in frames.values() if f.size == rows]
    if len(found) > 1:
        names = sorted(f.name for f in found)
        raise ValueError(
            f"to_arviz: each of the plates {names} may count the examples; name one as data_plate"
        )
    return found[0] if found else None


def observations(trace: Trace) -> dict[str, Site]:
    """The observed sites of a trace, by name."""
    return {name: site for name, site in sample_sites(trace) if is_observation(site)}


def check_observed(model: Mapping[str, Site], guide: Mapping[str, Site]) -> None:
    """The model must observe something.

    :param model: what the model observes.
    :param guide: what the guide observes, which should be nothing.
    """
    if not model and guide:
        raise swapped(f"observes nothing and the second one observes {sorted(guide)}")
    if not model:
        raise ValueError(
            "to_arviz: the model observes nothing when called with these arguments; give "
            "those of svi.step, the observed values among them"
        )


def swapped(found: str) -> ValueError:
    """The error for ``to_arviz(guide, model)``."""
    return ValueError(
        f"to_arviz: the first program {found}: model and guide seem to be swapped; expected "
        "to_arviz(model, guide, ...)"
    )


def check_guide(model: Trace, guide: Trace) -> None:
    """A guide must draw every latent site; what it leaves out was summed out in training."""
    missing = [
        name
        for name, site in sample_sites(model)
        if is_latent(site) and not is_deterministic(site) and name not in guide
    ]
    if missing:
        raise FlipoutError(
            f"to_arviz: the guide has no sites {missing} of the model; draw them in the guide, or, "
            "where they were enumerated, use pyro.infer.infer_discrete"
        )
