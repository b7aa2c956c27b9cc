# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""From an SVI fit to ArviZ, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pyro_flipout._arviz_groups import build
from pyro_flipout._arviz_runs import Batch, Program
from pyro_flipout._arviz_sampler import Sampler
from pyro_flipout._arviz_store import Policy

__all__ = ["to_arviz"]


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_prior_samples: int | None = None,
    predictions: Any = None,
    per_example: bool = False,
    batch_size: int | None = None,
    batch_dim: int = 0,
    data_plate: str | None = None,
    sites: Iterable[str] | None = None,
    max_size: int = 10_000_000,
    large: str | int | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    pred_coords: Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draws from an SVI fit, in the groups that ArviZ reads.

    Called with the arguments of ``svi.step``. What the model observes is found from its trace;
    to predict, it is run with those values forgotten.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_flipout import to_arviz
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> guide, x, y = AutoNormal(model), torch.randn(8, 3), torch.randn(8)
    >>> guide(x, y)  # doctest: +SKIP
    >>> idata = to_arviz(model, guide, x, y, num_samples=20, predictions=x[:2])
    >>> dict(idata["posterior_predictive"].sizes)
    {'chain': 1, 'draw': 20, 'data': 8}

    ===================================  ======================================================
    ``posterior``, ``prior``             latent and deterministic sites
    ``posterior_predictive``,            what is observed, drawn anew
    ``prior_predictive``
    ``log_likelihood``                   of each observation: the scale of a subsampled plate
                                         and any other is removed; NaN where masked
    ``sample_stats``                     ``log_p`` and ``log_q``: joint log densities of each draw
                                         in model (all data, no scales) and guide
    ``observed_data``,                   what is observed; tensor arguments that are not
    ``constant_data``
    ``predictions``,                     for new inputs; their tensor arguments
    ``predictions_constant_data``
    ``posterior_summary``                mean and sd of sites that are summarised
    ===================================  ======================================================

    A draw is a draw of the *function*: all inputs, in all batches, see the same weights. With
    ``per_example=True`` every example sees its own :func:`flipout` draw. Each example's
    predictions then have the same distribution, but not those of several examples jointly.

    :param model: as given to SVI, with or without :func:`flipout`. Put modules in ``eval`` mode
        first if they have dropout or batch normalisation.
    :param guide: as given to SVI.
    :param args: arguments of ``svi.step``; or one loader (or iterator) of batches. A batch is a
        dict of keyword arguments or a tuple of positional ones; if the model's signature does not
        take these, it is the model's one argument. A model that takes its own mini-batches, in a
        plate with ``subsample_size``, is walked through all its data.
    :param int num_samples: number of draws.
    :param num_prior_samples: the same for the prior, by default as many; 0 omits its groups.
    :param predictions: new inputs: a tensor, a tuple or dict as above, or a loader.
    :param bool per_example: flipout's draws in place of coherent ones; no ``sample_stats``, which
        need a joint density.
    :param batch_size: cuts the tensor arguments, new inputs too, into batches of so many examples.
    :param int batch_dim: the dimension of the tensor arguments that counts the examples.
    :param data_plate: name of the plate that counts them, if it cannot be told by its size.
    :param sites: names, or patterns such as ``"net.*.bias"``, of what to keep in ``posterior``
        and ``prior``, whatever its size; by default all sites but the large ones. (With none,
        ArviZ 0.x has no ``posterior`` to count chains in: call ``az.loo(idata, reff=1)``.)
    :param int max_size: the most values, in all draws, of a site that is not large.
    :param large: what to do with large ones: ``"drop"`` (the default, which warns), ``"keep"``,
        ``"summary"``, or a number of elements to thin to.
    :param dims: site → names of its dimensions outside plates, or of all.
    :param coords: dimension → coordinate values.
    :param pred_coords: the same for ``predictions``; ``coords`` does not apply there.
    :param seed: by default drawn from torch's generator, which is otherwise left alone.
    :param progress: show a bar (needs tqdm); by default only on a terminal.
    :param kwargs: keyword arguments of ``svi.step``. (If the model has one of the names above,
        bind it with ``functools.partial`` to model and guide.)
    :returns: an ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).
    :raises ValueError: if arguments contradict each other or the model's plates, are empty, name
        dimensions of unknown variables, or if model and guide are swapped.
    :raises FlipoutError: if the guide leaves out a latent site of the model.
    """
    names = None if sites is None else [sites] if isinstance(sites, str) else list(sites)
    num_prior = num_samples if num_prior_samples is None else num_prior_samples
    sampler = Sampler(
        Program(model, guide, per_example),
        Batch(args, kwargs),
        _count("num_samples", num_samples, 1),
        _count("num_prior_samples", num_prior, 0),
        Policy(names, max_size, large),
        dict(dims or {}),
        None if batch_size is None else _count("batch_size", batch_size, 1),
        batch_dim,
        data_plate,
        progress,
    )
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        sampler.run(np.random.default_rng(seed), predictions)
    known = {**sampler.coords(), **(coords or {})}
    return build(sampler.groups(), known, pred_coords, sampler.attrs())


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"to_arviz: got {name}={value!r}, expected an integer >= {least}")
    return value
