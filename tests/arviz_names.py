"""What the installed ArviZ calls things: 0.2x (Python 3.10 and 3.11) or 1.x (3.12 and newer)."""

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from pyro_flipout._arviz_groups import groups_of, has_inference_data

ARVIZ_1 = not has_inference_data()


def datasets(idata):
    """Group -> dataset."""
    return dict(groups_of(idata))


def check_equal(a, b):
    """Two results hold the same groups, values, coordinates and notes."""
    a, b = datasets(a), datasets(b)
    assert set(a) == set(b)
    for name in a:
        assert a[name].equals(b[name]), name
        for key in ("draws_of_the_weights", "left_out"):
            assert a[name].attrs.get(key) == b[name].attrs.get(key), name


def write_zarr(idata, path):
    (idata if ARVIZ_1 else idata.to_datatree()).to_zarr(path)


def read_zarr(path):
    """What ``write_zarr`` wrote, in memory."""
    with xr.open_datatree(path, engine="zarr") as tree:
        tree = tree.load()
        return tree if ARVIZ_1 else az.InferenceData.from_datatree(tree)


def elpd(found):
    """The expected log pointwise predictive density of ``az.loo``."""
    return found.elpd if ARVIZ_1 else found.elpd_loo


def elpd_terms(found):
    """Its terms, with ``az.loo(..., pointwise=True)``: ``(N,)``."""
    return (found.elpd_i if ARVIZ_1 else found.loo_i).values


def elpd_lost(table):
    """How much less each model of ``az.compare`` has than the best, and the standard error."""
    sign = -1 if ARVIZ_1 else 1
    return sign * table["elpd_diff"], table["dse"]


def _axes(drawn):
    """All axes; ArviZ 1.x gives a collection of plots, and draws on the current figure."""
    return np.array(plt.gcf().axes if ARVIZ_1 else np.ravel(drawn))


def plot_ppc(idata, group="posterior"):
    if ARVIZ_1:
        return _axes(az.plot_ppc_dist(idata, group=f"{group}_predictive", num_samples=20))
    return _axes(az.plot_ppc(idata, group=group, num_pp_samples=20))


def plot_prior_ppc(idata):
    return plot_ppc(idata, "prior")


def plot_loo_pit(idata):
    return _axes(az.plot_loo_pit(idata, **({"var_names": ["y"]} if ARVIZ_1 else {"y": "y"})))


def plot_trace(idata):
    one_axes_each = {} if ARVIZ_1 else {"compact": False}
    return _axes(az.plot_trace(idata, var_names=["w"], **one_axes_each))


def plot_rank(idata):
    one_chain = {"method": "envelope"} if ARVIZ_1 else {}  # 1.x's default compares chains
    return _axes(az.plot_rank(idata, var_names=["w"], **one_chain))


PLOTS = plot_ppc, plot_prior_ppc, plot_loo_pit, plot_trace, plot_rank
