"""What to_arviz gives as a whole: files of a real fit, event dimensions, memory."""

import gc

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flipout import to_arviz
from tests.arviz_names import check_equal, datasets, read_zarr, write_zarr

N, D, K = 7, 3, 2


def model(x, y=None):
    """Two responses for each example, correlated: event dimension 1."""
    w = pyro.sample("net.w", dist.Normal(0.0, 1.0).expand([D, K]).to_event(2))
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    with pyro.plate("data", len(x)):
        pyro.deterministic("mean", x @ w, event_dim=1)
        pyro.sample("y", dist.MultivariateNormal(x @ w, cov), obs=y)


@pytest.fixture
def fit():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator)
    y = torch.randn(N, K, generator=generator)
    guide = AutoNormal(model, init_scale=0.3)
    guide(x, y)
    return guide, x, y


def call(guide, x, y, **kwargs):
    options = {"num_samples": 5, "seed": 1, "progress": False, "predictions": x[:2]}
    names = {"dims": {"net.w": ["feature", "response"], "y": ["response"], "mean": ["response"]}}
    return to_arviz(model, guide, x, y, **{**options, **names, **kwargs})


@pytest.mark.parametrize("batch_size", [None, 3])
def test_event_dimensions_are_named_and_summed_in_the_log_likelihood(fit, batch_size):
    guide, x, y = fit
    idata = call(guide, x, y, batch_size=batch_size)
    for group in ("posterior_predictive", "prior_predictive", "predictions"):
        assert idata[group]["y"].dims == ("chain", "draw", "data", "response"), group
    assert idata["observed_data"]["y"].dims == ("data", "response")
    assert idata["posterior"]["net.w"].dims == ("chain", "draw", "feature", "response")
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(idata["observed_data"]["y"], y)
    w = idata["posterior"]["net.w"].values[0]
    error = y.numpy() - x.numpy() @ w  # (draw, data, response)
    cov = np.array([[1.0, 0.3], [0.3, 0.5]])
    square = np.einsum("sni,ij,snj->sn", error, np.linalg.inv(cov), error)
    expected = -0.5 * (square + np.log(np.linalg.det(cov)) + K * np.log(2 * np.pi))
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values[0], expected, rtol=1e-4)


def test_examples_may_be_counted_by_another_dimension():
    """Two regressions side by side: dimension 1 counts the examples, in batches too."""
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, N, D, generator=generator), torch.randn(2, N, generator=generator)

    def side_by_side(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D, 2]).to_event(2))
        with pyro.plate("fit", 2, dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(torch.einsum("fnd,df->fn", x, w), 1.0), obs=y)

    guide = AutoNormal(side_by_side, init_scale=0.3)
    guide(x, y)
    options = {"num_samples": 5, "seed": 1, "progress": False, "data_plate": "data"}
    whole, cut = (
        to_arviz(side_by_side, guide, x, y, batch_dim=1, batch_size=b, **options) for b in (None, 3)
    )
    w = whole["posterior"]["w"].values[0]
    error = y.numpy() - np.einsum("fnd,sdf->sfn", x, w)
    expected = -0.5 * error**2 - 0.5 * np.log(2 * np.pi)
    for idata in (whole, cut):
        assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "fit", "data")
        np.testing.assert_allclose(idata["log_likelihood"]["y"].values[0], expected, rtol=1e-4)
        np.testing.assert_array_equal(idata["observed_data"]["y"], y)
        np.testing.assert_array_equal(idata["constant_data"]["x"], x)
        assert idata["posterior_predictive"]["y"].shape == (1, 5, 2, N)


def test_deterministic_sites_in_a_plate_keep_it_where_its_size_is():
    """Of a value that counts the examples last, or first and says nothing of the rest."""
    x, y = torch.randn(N), torch.randn(N)

    def curves(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.deterministic("rows", torch.stack([w * x, x]))
            pyro.deterministic("columns", torch.stack([w * x, x], -1))
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = AutoNormal(curves)
    guide(x, y)
    posterior = to_arviz(curves, guide, x, y, num_samples=3, progress=False)["posterior"]
    assert posterior["rows"].dims[2:] == ("rows_dim_0", "data")
    assert posterior["columns"].dims[2:] == ("data", "columns_dim_1")


def test_a_fit_survives_netcdf(fit, tmp_path):
    idata = call(*fit, coords={"response": ["low", "high"]}, max_size=50, large="summary")
    assert "posterior_summary" in datasets(idata)
    assert "mean" in idata["posterior"].attrs["left_out"]
    path = str(tmp_path / "fit.nc")
    idata.to_netcdf(path)
    check_equal(idata, az.from_netcdf(path))


@pytest.mark.filterwarnings("ignore:.*(consolidated|Zarr|zarr|string|dtype).*")
def test_a_fit_survives_zarr(fit, tmp_path):
    idata = call(*fit, coords={"response": ["low", "high"]}, max_size=50, large="summary")
    path = str(tmp_path / "fit.zarr")
    write_zarr(idata, path)
    check_equal(idata, read_zarr(path))


@pytest.mark.slow
def test_draws_of_the_weights_are_not_held():
    """The tensors of a weight's size that live at once do not grow with the number of draws."""
    shape = 61, 53  # of no other tensor
    alive = []

    def wide(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w).mean(-1), 1.0), obs=y)
        tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
        alive.append(sum(o.shape == shape for o in tensors))

    def guide(x, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(shape), 1.0).to_event(2))

    x, y = torch.randn(4, shape[0]), torch.randn(4)
    gc.collect()
    to_arviz(
        wide, guide, x, y, num_samples=30, num_prior_samples=30, large="drop", max_size=10,
        batch_size=2, seed=0, progress=False,
    )  # fmt: skip
    assert max(alive[-20:]) <= max(alive[:20])
