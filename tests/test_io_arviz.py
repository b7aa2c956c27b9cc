"""From SVI fits to ArviZ: exact values, batches, and what ArviZ makes of them."""

import math
import subprocess
import sys
import types

import arviz as az
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_flipout import FlipoutError, FlipoutWarning, flipout, to_arviz
from pyro_flipout._arviz_groups import Variable, build
from pyro_flipout.vi_quality import importance_resample, vi_quality
from tests.arviz_names import PLOTS, datasets, elpd, elpd_lost, elpd_terms
from tests.helpers import bayesian, mlp

N, D = 7, 3


def regression(x, y=None, scale=1.0):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)), poutine.scale(scale=scale):
        mean = pyro.deterministic("mean", x @ w)
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def data(n=N):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, D, generator=generator)
    return x, x.sum(-1) + 0.5 * torch.randn(n, generator=generator)


@pytest.fixture
def fit():
    x, y = data()
    guide = AutoNormal(regression, init_scale=0.3)
    guide(x, y)
    return guide, x, y


def call(guide, *args, model=regression, num_samples=6, seed=1, progress=False, **kwargs):
    return to_arviz(
        model, guide, *args, num_samples=num_samples, seed=seed, progress=progress, **kwargs
    )


def values(idata, group, name):
    return idata[group][name].values[0]


def check_same(a, b, groups=("posterior", "log_likelihood", "sample_stats", "prior")):
    for group in groups:
        assert set(a[group].data_vars) == set(b[group].data_vars)
        for name in a[group].data_vars:
            np.testing.assert_allclose(a[group][name], b[group][name], rtol=1e-5, atol=1e-5)
    for name in ("observed_data", "constant_data"):
        assert a[name].equals(b[name]), name


# ------------------------------------------------------------------------------ groups


def test_groups_dims_and_coords(fit):
    guide, x, y = fit
    idata = call(
        guide,
        x,
        y=y,
        num_prior_samples=4,
        predictions=x[:2],
        dims={"w": ["feature"], "x": ["feature"]},
        coords={"feature": ["a", "b", "c"], "data": range(10, 17)},
        pred_coords={"feature": ["a", "b", "c"], "data": ["new", "newer"]},
    )
    shapes = {
        "posterior": {"w": ("feature",), "noise": (), "mean": ("data",)},
        "posterior_predictive": {"y": ("data",)},
        "log_likelihood": {"y": ("data",)},
        "sample_stats": {"log_p": (), "log_q": ()},
        "prior": {"w": ("feature",), "noise": (), "mean": ("data",)},
        "prior_predictive": {"y": ("data",)},
        "predictions": {"y": ("data",), "mean": ("data",)},
    }
    for group, names in shapes.items():
        found = {k: v.dims[2:] for k, v in idata[group].data_vars.items()}
        assert found == names, group
        assert idata[group].sizes["draw"] == (4 if group.startswith("prior") else 6)
    assert idata["observed_data"]["y"].dims == ("data",)
    assert idata["constant_data"]["x"].dims == ("data", "feature")
    assert list(idata["constant_data"]) == ["x"]  # y is observed, not constant
    assert list(idata["posterior"]["feature"].values) == ["a", "b", "c"]
    assert list(idata["log_likelihood"]["data"].values) == list(range(10, 17))
    assert list(idata["predictions"]["data"].values) == ["new", "newer"]
    np.testing.assert_array_equal(idata["observed_data"]["y"], y)
    np.testing.assert_array_equal(idata["predictions_constant_data"]["x"], x[:2])
    assert set(datasets(idata)) == {*shapes, "observed_data", "constant_data",
                                    "predictions_constant_data"}  # fmt: skip


def test_log_likelihood_and_densities_by_hand(fit):
    """Without the scale that training has; log q with the Jacobian of the LogNormal."""
    guide, x, y = fit
    idata = call(guide, x, y, 13.0)
    w, noise = values(idata, "posterior", "w"), values(idata, "posterior", "noise")
    mean = w @ x.numpy().T
    np.testing.assert_allclose(values(idata, "posterior", "mean"), mean, rtol=1e-5, atol=1e-6)
    z = (y.numpy() - mean) / noise[:, None]
    expected = -0.5 * z**2 - np.log(noise)[:, None] - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y"), expected, rtol=1e-4, atol=1e-5)
    prior = -0.5 * (w**2).sum(1) - 1.5 * math.log(2 * math.pi)
    log_noise = np.log(noise)
    normal = -0.5 * (log_noise / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    log_p = expected.sum(1) + prior + normal - log_noise
    np.testing.assert_allclose(values(idata, "sample_stats", "log_p"), log_p, rtol=1e-4)
    locs, scales = (
        {k: v.detach().numpy() for k, v in (("w", m.w), ("noise", m.noise))}
        for m in (guide.locs, guide.scales)
    )
    z = (w - locs["w"]) / scales["w"], (log_noise - locs["noise"]) / scales["noise"]
    log_q = -0.5 * (z[0] ** 2).sum(1) - np.log(scales["w"]).sum() - 2 * math.log(2 * math.pi)
    log_q += -0.5 * z[1] ** 2 - np.log(scales["noise"]) - log_noise
    np.testing.assert_allclose(values(idata, "sample_stats", "log_q"), log_q, rtol=1e-4)


def test_observations_are_forgotten_to_predict(fit):
    guide, x, y = fit
    idata = call(guide, x, y, num_samples=200, num_prior_samples=200)
    draws, mean = values(idata, "posterior_predictive", "y"), values(idata, "posterior", "mean")
    z = (draws - mean) / values(idata, "posterior", "noise")[:, None]
    assert abs(z.mean()) < 5 / math.sqrt(z.size)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / z.size)
    w = values(idata, "prior", "w")
    assert abs(w.mean()) < 5 / math.sqrt(w.size)
    assert abs((w**2).mean() - 1) < 5 * math.sqrt(2 / w.size)


def test_conditioned_models_and_factors():
    x, y = data()

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        pyro.factor("penalty", -w.abs().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0))

    conditioned = poutine.condition(model, data={"y": y})
    guide = AutoNormal(conditioned)
    guide(x)
    idata = call(guide, x, model=conditioned)
    assert list(idata["observed_data"]) == ["y"]
    assert not np.allclose(values(idata, "posterior_predictive", "y"), y)
    w = values(idata, "posterior", "w")
    prior = -0.5 * (w**2).sum(1) - 1.5 * math.log(2 * math.pi)
    expected = values(idata, "log_likelihood", "y").sum(1) + prior - np.abs(w).sum(1)
    np.testing.assert_allclose(values(idata, "sample_stats", "log_p"), expected, rtol=1e-5)


def test_masked_observations_are_nan():
    x, y = data()
    mask = torch.arange(N) > 1

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    guide = AutoNormal(model)
    guide(x, y)
    idata = call(guide, x, y, model=model)
    log_prob = values(idata, "log_likelihood", "y")
    np.testing.assert_array_equal(np.isnan(log_prob), np.tile(~mask.numpy(), (6, 1)))
    w = values(idata, "posterior", "w")
    prior = -0.5 * (w**2).sum(1) - 1.5 * math.log(2 * math.pi)
    log_p = np.nansum(log_prob, 1) + prior
    np.testing.assert_allclose(values(idata, "sample_stats", "log_p"), log_p, rtol=1e-5)


# ----------------------------------------------------------------------------- batches


def test_batches_see_the_same_draws(fit):
    guide, x, y = fit
    whole = call(guide, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for idata in (
        call(guide, x, y, batch_size=3),
        call(guide, loader),
        call(guide, ({"x": a, "y": b} for a, b in loader)),
    ):
        check_same(whole, idata)
        # ... but not the same noise.
        noise = values(idata, "posterior_predictive", "y") - values(idata, "posterior", "mean")
        assert not np.allclose(noise[:, :3], noise[:, 3:6])


@pytest.mark.parametrize("size", [3, 5])
def test_a_model_that_takes_its_own_batches_is_walked_through_all_data(fit, size):
    guide, x, y = fit

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", N, subsample_size=size) as index:
            mean = pyro.deterministic("mean", x[index] @ w)
            pyro.sample("y", dist.Normal(mean, noise), obs=y[index])

    check_same(call(guide, x, y), call(guide, x, y, model=model))


def test_a_minibatch_with_a_subsampled_plate_is_taken_as_it_is(fit):
    guide, x, y = fit

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 100 * N, subsample_size=len(x)):
            mean = pyro.deterministic("mean", x @ w)
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    whole = call(guide, x, y)
    check_same(whole, call(guide, x, y, model=model))
    check_same(whole, call(guide, x, y, model=model, batch_size=3))


def local_model(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)


class LocalGuide(nn.Module):
    def forward(self, x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.clone(), 1e-4))
        pyro.sample("mu", dist.Normal(2.0, 0.1))


def test_local_variables_are_joined_and_densities_summed():
    """The guide draws them first, so that the batch decides how many numbers come before mu."""
    x, y = data()[0][:, 0], data()[1]
    new = torch.tensor([50.0, -50.0])
    idata = call(LocalGuide(), x, y, model=local_model, batch_size=3, predictions=new)
    z, mu = values(idata, "posterior", "z"), values(idata, "posterior", "mu")
    assert z.shape == (6, N)
    np.testing.assert_allclose(z, np.tile(x, (6, 1)), atol=1e-3)

    def normal(value, loc, scale):
        return dist.Normal(loc, scale).log_prob(torch.as_tensor(value)).numpy()

    y_part = normal(y.numpy(), torch.as_tensor(z) + x, 1.0)
    np.testing.assert_allclose(values(idata, "log_likelihood", "y"), y_part, rtol=1e-4)
    local = normal(z, torch.as_tensor(mu)[:, None], 1.0)
    log_p = y_part.sum(1) + local.sum(1) + normal(mu, 0.0, 1.0)
    np.testing.assert_allclose(values(idata, "sample_stats", "log_p"), log_p, rtol=1e-4)
    # New inputs: z from the model, about mu = 2, not from the guide, at x.
    found = values(idata, "predictions", "y")
    assert found.shape == (6, 2)
    assert (np.abs(found.mean(0) - (2 + new.numpy())) < 5).all()


def test_predictions_in_batches_and_forms(fit):
    guide, x, y = fit
    new = torch.cat([x, x])[:10]
    whole = call(guide, x, y, predictions=new)
    for inputs in ((new, None), {"x": new}, DataLoader(TensorDataset(new), batch_size=4)):
        idata = call(guide, x, y, predictions=inputs)
        np.testing.assert_allclose(
            idata["predictions"]["mean"], whole["predictions"]["mean"], atol=1e-5
        )
        assert idata["predictions_constant_data"]["x"].shape == (10, D)
    cut = call(guide, x, y, predictions=new, batch_size=3)
    np.testing.assert_allclose(cut["predictions"]["mean"], whole["predictions"]["mean"], atol=1e-5)
    expected = values(whole, "posterior", "w") @ new.numpy().T
    np.testing.assert_allclose(values(whole, "predictions", "mean"), expected, atol=1e-5)


# ------------------------------------------------------------------------------- draws


def network():
    net = bayesian(mlp((D, 4, 2)))

    def model(x, y=None):
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        pyro.deterministic("probs", logits.softmax(-1))

    x = torch.ones(1, D).expand(8, D)
    y = torch.zeros(8, dtype=torch.long)
    guide = AutoNormal(model, init_scale=0.5)
    guide(x, y)
    return model, guide, x, y


def test_draws_are_coherent_unless_asked():
    model, guide, x, y = network()
    bare, wrapped = (call(guide, x, y, model=m) for m in (model, flipout(model)))
    check_same(bare, wrapped)
    probs = values(bare, "posterior", "probs")  # (draws, N, classes), equal inputs
    assert np.ptp(probs, axis=1).max() < 1e-6
    for program in (model, flipout(model)):
        idata = call(guide, x, y, model=program, per_example=True)
        np.testing.assert_array_equal(idata["posterior"]["0.weight"], bare["posterior"]["0.weight"])
        assert np.ptp(values(idata, "posterior", "probs"), axis=1).min() > 1e-3
        assert "sample_stats" not in datasets(idata)
        assert idata["posterior"].attrs["draws_of_the_weights"] == "per example"


def test_deterministic_sites_outside_plates_are_joined():
    model, guide, x, y = network()
    whole, cut = (call(guide, x, y, model=model, batch_size=b) for b in (None, 3))
    assert cut["posterior"]["probs"].dims == ("chain", "draw", "data", "probs_dim_1")
    check_same(whole, cut)


def test_seeds_and_the_users_generator(fit):
    guide, x, y = fit
    a, b, c = (call(guide, x, y, seed=s) for s in (1, 1, 2))
    check_same(a, b, ("posterior", "posterior_predictive", "prior_predictive"))
    assert not np.allclose(a["posterior"]["w"], c["posterior"]["w"])
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    call(guide, x, y, seed=1)
    torch.testing.assert_close(torch.rand(2), expected)
    torch.manual_seed(3)
    a = call(guide, x, y, seed=None)
    b = call(guide, x, y, seed=None)
    assert not np.allclose(a["posterior"]["w"], b["posterior"]["w"])


# ------------------------------------------------------------------------- large sites


def test_large_sites_are_left_out_with_a_word_on_their_size():
    model, guide, x, y = network()
    kwargs = {"model": model, "max_size": 60, "num_prior_samples": 0}
    with pytest.warns(FlipoutWarning, match=r"'0.weight' \(6 draws of \(4, 3\): 0.000288 MB\)"):
        idata = call(guide, x, y, **kwargs)
    assert "0.weight" not in idata["posterior"]
    assert "2.bias" in idata["posterior"]
    assert "(4, 3)" in idata["posterior"].attrs["left_out"]
    dropped = call(guide, x, y, large="drop", **kwargs)
    assert set(dropped["posterior"]) == set(idata["posterior"])
    kept = call(guide, x, y, large="keep", **kwargs)
    w = values(kept, "posterior", "0.weight")
    assert w.shape == (6, 4, 3)
    summary = call(guide, x, y, large="summary", **kwargs)["posterior_summary"]["0.weight"]
    assert summary.dims == ("statistic", "0.weight_dim_0", "0.weight_dim_1")
    np.testing.assert_allclose(summary.sel(statistic="mean"), w.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(summary.sel(statistic="sd"), w.std(0, ddof=1), rtol=1e-4)
    thin = call(guide, x, y, large=4, **kwargs)["posterior"]["0.weight"]
    index = thin["0.weight_element"].values
    assert list(index) == [0, 3, 7, 11]
    np.testing.assert_array_equal(thin.values[0], w.reshape(6, -1)[:, index])


def test_named_sites_are_kept_whatever_their_size():
    model, guide, x, y = network()
    idata = call(guide, x, y, model=model, max_size=30, sites=["*.weight"])
    assert set(idata["posterior"]) == set(idata["prior"]) == {"0.weight", "2.weight"}
    one = call(guide, x, y, model=model, max_size=30, sites="2.bias")
    assert set(one["posterior"]) == {"2.bias"}


def test_memory_is_that_of_what_is_kept():
    """A million weights and 50 draws: 200 MB if they were all held."""
    import tracemalloc

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1000, 1000]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w).mean(-1), 1.0), obs=y)

    def guide(x, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(1000, 1000), 1.0).to_event(2))

    x, y = torch.randn(4, 1000), torch.randn(4)
    tracemalloc.start()
    idata = call(guide, x, y, model=model, num_samples=12, num_prior_samples=0, large="drop")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "posterior" not in datasets(idata)
    assert peak < 10e6


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do(fit):
    guide, x, y = fit
    with pytest.raises(ValueError, match="observes nothing"):
        call(guide, x)
    with pytest.raises(FlipoutError, match=r"no sites \['w', 'noise'\]"):
        call(lambda *_: None, x, y)
    with pytest.raises(ValueError, match="num_samples=0"):
        call(guide, x, y, num_samples=0)
    with pytest.raises(ValueError, match="batch_size and a loader"):
        call(guide, DataLoader(TensorDataset(x, y), batch_size=3), batch_size=3)
    with pytest.raises(ValueError, match="loader is empty"):
        call(guide, iter([]))
    with pytest.raises(ValueError, match=r"data_plate='rows', expected one of \['data'\]"):
        call(guide, x, y, data_plate="rows")
    with pytest.raises(ValueError, match="large='thin'"):
        call(guide, x, y, large="thin")


class OfDict(nn.Module):
    """The regression above, of one dict."""

    def forward(self, batch):
        return regression(batch["x"], batch.get("y"))


def of_dict(batch, scale=1.0):
    return regression(batch["x"], batch.get("y"), scale)


def of_pair(pair):
    return regression(*pair)


@pytest.mark.parametrize("model", [of_dict, flipout(of_dict), OfDict(), flipout(OfDict())])
def test_a_model_may_take_one_dict(fit, model):
    guide, x, y = fit
    whole = call(guide, x, y, predictions=x[:4])
    guide = lambda batch: fit[0](batch["x"])  # noqa: E731
    loader = [{"x": x[i : i + 3], "y": y[i : i + 3]} for i in (0, 3, 6)]
    for idata in (
        call(guide, {"x": x, "y": y}, model=model, predictions={"x": x[:4]}),
        call(guide, {"x": x, "y": y}, model=model, predictions=({"x": x[:4]},), batch_size=3),
        call(guide, iter(loader), model=model, predictions=iter([{"x": x[:4]}])),
    ):
        check_same(whole, idata)
        for name in ("predictions", "predictions_constant_data"):
            variable = "x" if name.endswith("data") else "mean"
            np.testing.assert_allclose(idata[name][variable], whole[name][variable], atol=1e-5)


def test_a_model_may_take_one_pair(fit):
    guide, x, y = fit
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    idata = call(lambda pair: guide(*pair), loader, model=of_pair)
    assert list(idata["constant_data"]) == ["pair_0"]
    np.testing.assert_array_equal(idata["constant_data"]["pair_0"], x)
    np.testing.assert_allclose(
        idata["log_likelihood"]["y"], call(guide, x, y)["log_likelihood"]["y"], rtol=1e-5, atol=1e-5
    )


def test_a_guide_that_runs_the_model(fit):
    """AutoNormalMessenger: its trace has what the model observes, too."""
    _, x, y = fit
    guide = AutoNormalMessenger(regression, init_scale=0.3)
    guide(x, y)
    plain = AutoNormal(regression, init_scale=0.3)
    plain(x, y)
    with torch.no_grad():
        for name in ("w", "noise"):
            getattr(plain.locs, name).copy_(getattr(guide.locs, name))
    idata = call(guide, x, y, predictions=x[:2])
    w, noise = (values(idata, "posterior", name) for name in ("w", "noise"))
    scales = {name: getattr(guide.scales, name).detach().numpy() for name in ("w", "noise")}
    z = (w - guide.locs.w.detach().numpy()) / scales["w"]
    expected = (-0.5 * z**2 - np.log(scales["w"])).sum(1) - 2 * math.log(2 * math.pi)
    z = (np.log(noise) - guide.locs.noise.item()) / scales["noise"]
    expected += -0.5 * z**2 - np.log(scales["noise"]) - np.log(noise)
    np.testing.assert_allclose(values(idata, "sample_stats", "log_q"), expected, rtol=1e-4)
    assert idata["predictions"]["y"].shape == (1, 6, 2)
    check_same(idata, call(guide, x, y, batch_size=3), groups=("posterior", "log_likelihood"))


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoNormalMessenger, lambda model: lambda *_: None, flipout]
)
def test_swapped_model_and_guide(fit, make):
    x, y = fit[1:]
    guide = make(regression) if make is not flipout else flipout(AutoNormal(regression))
    for model in (regression, flipout(regression)):
        with pytest.raises(
            ValueError, match=r"seem to be swapped; expected to_arviz\(model, guide"
        ):
            call(model, x, y, model=guide)


@pytest.mark.parametrize("predictions", [None, torch.ones(2, D)])
def test_names_of_dimensions_must_be_of_variables(fit, predictions):
    guide, x, y = fit
    with pytest.raises(ValueError, match=r"of \['weight'\], expected .*\['mean', 'noise', 'w', "):
        call(guide, x, y, dims={"weight": ["feature"]}, predictions=predictions)
    # Also of those that are left out, and of arguments.
    dims = {"w": ["feature"], "x": ["feature"], "y": []}
    call(guide, x, y, dims=dims, predictions=predictions, sites=["noise"])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_empty_data(fit, batch_size):
    guide, x, y = fit
    options = {"batch_size": batch_size}
    with pytest.raises(ValueError, match=r"the arguments hold no data: .*\[\(0, 3\), \(0,\)\]"):
        call(guide, x[:0], y[:0], **options)
    with pytest.raises(ValueError, match=r"predictions hold no data: tensors of shape \[\(0, 3\)"):
        call(guide, x, y, predictions=x[:0], **options)
    with pytest.raises(ValueError, match="the arguments hold no data"):
        call(guide, iter([(x[:0], y[:0])]))
    with pytest.raises(ValueError, match="loader of predictions is empty"):
        call(guide, x, y, predictions=iter([]), **options)


def no_plate(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def beside_the_plate(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    pyro.sample("total", dist.Normal(w.sum(), 1.0), obs=x.sum())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [(no_plate, "no plate that counts the examples"), (beside_the_plate, "site 'total' changes")],
)
def test_batches_must_go_together(model, message):
    x, y = data()
    guide = AutoNormal(model)
    guide(x, y)
    with pytest.raises(ValueError, match=message):
        call(guide, x, y, model=model, batch_size=3)
    with pytest.raises(ValueError, match=message):
        call(guide, DataLoader(TensorDataset(x, y), batch_size=3), model=model)
    assert call(guide, x, y, model=model)["observed_data"]["y"].shape == (N,)
    assert call(guide, x, y, model=model, batch_size=N)["observed_data"]["y"].shape == (N,)


def test_two_plates_of_the_same_size_need_a_word():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 3, dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.randn(3, 3)
    guide = AutoNormal(model)
    guide(y)
    with pytest.raises(ValueError, match=r"plates \['a', 'b'\] may count the examples"):
        call(guide, y, model=model)
    idata = call(guide, y, model=model, data_plate="a")
    assert idata["log_likelihood"]["y"].dims[2:] == ("a", "b")


def test_progress_bar_needs_no_tqdm(fit, capsys, monkeypatch):
    guide, x, y = fit
    call(guide, x, y, progress=True)
    assert "posterior" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    call(guide, x, y, progress=True)
    assert "posterior" not in capsys.readouterr().err


def test_importing_the_package_does_not_import_arviz():
    code = "import pyro_flipout, sys; print({'arviz', 'xarray', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------- conjugate linear regression


def conjugate(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def exact(x, y):
    """Posterior mean and covariance of the weights."""
    cov = torch.linalg.inv(torch.eye(D) + x.T @ x / 0.25)
    return cov @ x.T @ y / 0.25, cov


def test_loo_equals_analytic_leave_one_out(float64):
    x, y = (a.double() for a in data(30))
    loc, cov = exact(x, y)
    posterior = dist.MultivariateNormal(loc, cov)
    idata = call(
        lambda x, y: pyro.sample("w", posterior),
        x, y, model=conjugate, num_samples=600, num_prior_samples=0,
    )  # fmt: skip
    expected = []
    for n in range(30):
        rest = torch.arange(30) != n
        mean, covariance = exact(x[rest], y[rest])
        sd = (x[n] @ covariance @ x[n] + 0.25).sqrt()
        expected.append(dist.Normal(x[n] @ mean, sd).log_prob(y[n]).item())
    found = az.loo(idata, pointwise=True)
    # Monte Carlo error of a pointwise term: the sd of its importance-weighted mean.
    log_prob = values(idata, "log_likelihood", "y")
    ratios = np.exp(-log_prob + log_prob.max(0))
    weights = ratios / ratios.sum(0)
    density = np.exp(log_prob)
    mean = (weights * density).sum(0)
    error = np.sqrt((weights**2 * (density - mean) ** 2).sum(0)) / mean
    assert (np.abs(elpd_terms(found) - expected) < 5 * error + 0.01).all()
    assert abs(elpd(found) - sum(expected)) < 5 * np.sqrt((error**2).sum()) + 0.02


def test_khat_of_the_exact_posterior_and_of_a_narrow_one(float64):
    x, y = (a.double() for a in data(30))
    loc, cov = exact(x, y)

    def guide(scale):
        q = dist.MultivariateNormal(loc, scale * cov)
        return lambda x, y: pyro.sample("w", q)

    def run(scale):
        return call(guide(scale), x, y, model=conjugate, num_samples=300, num_prior_samples=0)

    perfect = run(1.0)
    ratio = perfect["sample_stats"]["log_p"] - perfect["sample_stats"]["log_q"]
    assert float(ratio.std()) < 1e-9  # the log evidence, whatever the draw
    evidence = dist.MultivariateNormal(torch.zeros(30), x @ x.T + 0.25 * torch.eye(30)).log_prob(y)
    assert float(ratio.mean()) == pytest.approx(evidence.item())
    assert vi_quality(perfect).verdict == "good"
    assert vi_quality(run(0.15)).verdict == "bad"
    wide = run(1.5)
    again = importance_resample(wide, seed=1)
    before, after = (float(i["posterior"]["w"].var("draw").sum()) for i in (wide, again))
    truth = cov.diagonal().sum().item()
    assert abs(after - truth) < 0.5 * abs(before - truth)


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior_of(y):
    """That of ``mu``, and the log evidence."""
    precision = 1.0 + len(y)
    evidence = dist.MultivariateNormal(torch.zeros(len(y)), torch.eye(len(y)) + 1.0).log_prob(y)
    return dist.Normal(y.sum() / precision, precision**-0.5), evidence.item()


def check_exact(idata, evidence, num_samples):
    """The ratio is the evidence, up to a rounding that has few values."""
    ratio = idata["sample_stats"]["log_p"] - idata["sample_stats"]["log_q"]
    np.testing.assert_allclose(ratio, evidence, rtol=1e-5)
    assert 1 < len(np.unique(ratio)) < num_samples
    found = vi_quality(idata)
    assert (found.khat, found.verdict) == (-np.inf, "good")
    assert found.effective_draws == pytest.approx(num_samples)


@pytest.mark.parametrize("num_data", [1, 40])
def test_the_exact_posterior_is_good_in_float32(num_data):
    y = data(num_data)[1]
    posterior, evidence = posterior_of(y)
    guide = lambda y: pyro.sample("mu", posterior)  # noqa: E731
    idata = call(guide, y, model=normal, num_samples=300, num_prior_samples=0)
    check_exact(idata, evidence, 300)


@pytest.mark.parametrize("num_data", [1, 40])
def test_the_exact_posterior_is_good_with_many_draws(num_data):
    """Densities as above, but of 4,000 draws at once."""
    y = data(num_data)[1]
    posterior, evidence = posterior_of(y)
    mu = posterior.sample((4000,))
    log_p = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu[:, None], 1.0).log_prob(y).sum(1)
    stats = {"log_p": log_p, "log_q": posterior.log_prob(mu)}
    made = build({"sample_stats": {k: Variable(v.double().numpy(), ()) for k, v in stats.items()}})
    check_exact(made, evidence, 4000)


# ----------------------------------------------------------------------- two fitted models


@pytest.fixture(scope="module")
def fitted():
    """A linear model and one without inputs, fitted by SVI to the same data."""
    pyro.set_rng_seed(0)
    x, y = data(40)

    def constant(x, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    found = {}
    with pyro.get_param_store().scope():
        for name, model in {"linear": regression, "constant": constant}.items():
            guide = AutoNormal(model)
            svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            for _ in range(200):
                svi.step(x, y)
            found[name] = call(guide, x, y, model=model, num_samples=300, num_prior_samples=50)
    return found


@pytest.mark.filterwarnings(
    "ignore:Estimated shape parameter",  # 300 draws are few
    "ignore:The inplace keyword",  # ArviZ 0.23 on pandas 3.1
)
def test_arviz_summarises_and_compares(fitted):
    summary = az.summary(fitted["linear"], var_names=["w", "noise"])
    assert list(summary.index) == ["w[0]", "w[1]", "w[2]", "noise"]
    assert (summary["mean"][:3] - 1).abs().max() < 0.5
    loo = az.loo(fitted["linear"], pointwise=True)
    assert loo.n_data_points == 40
    table = az.compare(fitted)
    assert list(table.index) == ["linear", "constant"]
    lost, error = elpd_lost(table)
    assert lost.iloc[0] == 0
    assert lost.iloc[1] > 2 * error.iloc[1]


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_arviz_plots(fitted, plot):
    drawn = [a.has_data() for a in plot(fitted["linear"])]
    assert sum(drawn) >= (D if plot.__name__ in ("plot_trace", "plot_rank") else 1)
    plt.close("all")
