# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""From NumPy arrays to ArviZ's groups, without torch.

ArviZ 0.2x keeps groups in an ``InferenceData`` (Python 3.10 and newer), ArviZ 1.x in an
``xarray.DataTree`` (Python 3.12 and newer). The groups themselves are the same xarray
datasets; :func:`build` makes them and puts them into whichever is installed.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "SAMPLE_DIMS",
    "Variable",
    "build",
    "container",
    "dataset_of",
    "groups_of",
    "has_inference_data",
    "psis",
    "site_dims",
]

SAMPLE_DIMS = ("chain", "draw")


class Variable(NamedTuple):
    """An array with named dimensions.

    :ivar values: ``(draw, *shape)`` if sampled, else ``(*shape)``.
    :ivar dims: names of the dimensions of ``shape``.
    :ivar sampled: whether dimension 0 counts draws; one chain is added then.
    """

    values: np.ndarray
    dims: tuple[str, ...]
    sampled: bool = True


def site_dims(
    name: str,
    shape: Sequence[int],
    plates: Mapping[int, str],
    named: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Names the dimensions of a site: plates first, then the user's, then ArviZ's default.

    :param shape: shape of the value in one draw.
    :param plates: position in ``shape`` → name of the plate there.
    :param named: the user's names, of all dimensions or of those in no plate.
    :raises ValueError: if the number of names is neither.
    """
    free = [i for i in range(len(shape)) if i not in plates]
    names = {**{i: f"{name}_dim_{i}" for i in free}, **plates}
    if named is not None:
        if len(named) == len(shape):
            free = list(range(len(shape)))
        if len(named) != len(free):
            raise ValueError(
                f"to_arviz: dims has {list(named)} for '{name}', which has shape {tuple(shape)} "
                f"and plates {list(plates.values())}; expected {len(free)} names of the "
                f"dimensions outside plates, or {len(shape)} of all"
            )
        names.update(zip(free, named, strict=True))
    return tuple(names[i] for i in range(len(shape)))


def build(
    groups: Mapping[str, Mapping[str, Variable]],
    coords: Mapping[str, Any] | None = None,
    pred_coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Makes what the installed ArviZ keeps groups in.

    :param groups: group → name → array. Groups without variables are left out.
    :param coords: dimension → coordinate values; the others count from 0.
    :param pred_coords: the same for groups that are named ``predictions*``.
    :param attrs: group → attributes.
    :returns: an ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (1.x).
    :raises ValueError: if coordinates do not fit the length of their dimension.
    """
    datasets = {
        group: dataset_of(
            variables,
            (pred_coords if group.startswith("predictions") else coords) or {},
            (attrs or {}).get(group, {}),
        )
        for group, variables in groups.items()
        if variables
    }
    return container(datasets)


def has_inference_data() -> bool:
    """Whether the installed ArviZ is older than 1.0."""
    import arviz as az

    return int(az.__version__.split(".")[0]) < 1


def container(datasets: Mapping[str, Any]) -> Any:
    """Puts datasets, by name of group, into what the installed ArviZ reads."""
    import arviz as az
    import xarray as xr

    if has_inference_data():
        return az.InferenceData(**datasets)
    return xr.DataTree.from_dict({f"/{name}": found for name, found in datasets.items()})


def dataset_of(
    variables: Mapping[str, Variable],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """One group, as an ``xarray.Dataset`` whose every dimension has coordinates."""
    import arviz as az
    import xarray as xr

    arrays: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, (values, dims, sampled) in variables.items():
        if sampled:
            values, dims = values[None], (*SAMPLE_DIMS, *dims)
        if len(set(dims)) < len(dims):
            raise ValueError(f"to_arviz: '{name}' has dimensions {dims}, expected distinct names")
        arrays[name] = (dims, values)
        for dim, size in zip(dims, values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"to_arviz: dimension '{dim}' has length {size} in '{name}' and {sizes[dim]} "
                    "in another variable of its group; give one of them another name in dims"
                )
    created = datetime.datetime.now(datetime.timezone.utc).isoformat()
    notes = {"created_at": created, "arviz_version": az.__version__, **(attrs or {})}
    indexes = {dim: _coordinate(dim, size, coords) for dim, size in sizes.items()}
    return xr.Dataset(arrays, indexes, {**notes, "inference_library": "pyro_flipout"})


def _coordinate(dim: str, size: int, coords: Mapping[str, Any]) -> np.ndarray:
    values = np.asarray(coords.get(dim, np.arange(size)))
    if values.shape != (size,):
        raise ValueError(
            f"to_arviz: coords has {values.shape} values for dimension '{dim}', which has "
            f"length {size}"
        )
    return values


def groups_of(idata: Any) -> Iterator[tuple[str, Any]]:
    """Name and ``xarray.Dataset`` of each group, of either version of ArviZ."""
    if hasattr(idata, "children"):
        for name, node in idata.children.items():
            yield name, node.to_dataset()
    else:
        for name in idata.groups():
            yield name, idata[name]


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed importance sampling by ArviZ.

    :param log_weights: ``(draw,)``; :func:`pyro_flipout.vi_quality.vi_quality` says which of them
        have a tail to fit.
    :returns: normalised smoothed log weights ``(draw,)``, and the shape :math:`\hat k`.
    """
    import arviz as az

    log_weights = np.array(log_weights, dtype=float)
    if has_inference_data():
        smoothed, khat = az.psislw(log_weights)
    else:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(-log_weights)  # takes log ratios by minus sign
    smoothed = np.asarray(smoothed)
    return smoothed - np.logaddexp.reduce(smoothed), float(khat)
