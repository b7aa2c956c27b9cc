"""Arrays to ArviZ's groups, with ArviZ 0.2x and 1.x, and without torch.

With ArviZ 1.x: ``pytest --noconftest -c /dev/null tests/test_arviz_groups.py`` on Python 3.12.
"""

import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

PACKAGE = Path(__file__).parents[1] / "pyro_flipout"
if importlib.util.find_spec("torch") is None:
    stub = types.ModuleType("pyro_flipout")
    stub.__path__ = [str(PACKAGE)]
    sys.modules["pyro_flipout"] = stub
groups = importlib.import_module("pyro_flipout._arviz_groups")
quality = importlib.import_module("pyro_flipout.vi_quality")
Variable, build, site_dims = groups.Variable, groups.build, groups.site_dims

S, N = 120, 4
rng = np.random.default_rng(0)


def example(**kwargs):
    w, y = rng.normal(size=(S, 2)), rng.normal(size=(S, N))
    log_q = -0.5 * (w**2).sum(1)
    found = {
        "posterior": {"w": Variable(w, ("feature",))},
        "posterior_predictive": {"y": Variable(y, ("data",))},
        "log_likelihood": {"y": Variable(-1 - 0.01 * y**2, ("data",))},
        "sample_stats": {"log_p": Variable(log_q + 3.0, ()), "log_q": Variable(log_q, ())},
        "predictions": {"y": Variable(y[:, :3], ("data",))},
        "prior": {"w": Variable(w[:7], ("feature",))},
        "observed_data": {"y": Variable(y[0], ("data",), sampled=False)},
        "posterior_summary": {},
    }
    coords = {"feature": ["a", "b"], "data": [3, 5, 7, 9]}
    return found, build(found, coords, {"data": [10, 11, 12]}, **kwargs)


def datasets(idata):
    return dict(groups.groups_of(idata))


def test_values_dims_and_coords():
    found, idata = example(attrs={"posterior": {"note": "x"}})
    made = datasets(idata)
    assert set(made) == {g for g in found if g != "posterior_summary"}
    assert made["posterior"]["w"].dims == ("chain", "draw", "feature")
    np.testing.assert_array_equal(made["posterior"]["w"][0], found["posterior"]["w"].values)
    assert list(made["posterior"]["feature"].values) == ["a", "b"]
    assert made["posterior"].sizes["draw"] == S
    assert made["prior"].sizes["draw"] == 7
    assert list(made["log_likelihood"]["data"].values) == [3, 5, 7, 9]
    assert list(made["predictions"]["data"].values) == [10, 11, 12]
    assert made["observed_data"]["y"].dims == ("data",)
    assert made["posterior"].attrs["inference_library"] == "pyro_flipout"
    assert made["posterior"].attrs["note"] == "x"


def test_container_is_that_of_the_version():
    import arviz as az

    _, idata = example()
    assert type(idata).__name__ == ("InferenceData" if az.__version__[0] == "0" else "DataTree")
    assert idata["posterior"]["w"].shape == (1, S, 2)
    assert idata.posterior["w"].shape == (1, S, 2)


@pytest.mark.parametrize(
    ("shape", "plates", "named", "expected"),
    [
        ((), {}, None, ()),
        ((3, 2), {}, None, ("w_dim_0", "w_dim_1")),
        ((5, 2), {0: "data"}, None, ("data", "w_dim_1")),
        ((5, 2), {0: "data"}, ["class"], ("data", "class")),
        ((5, 2), {0: "data"}, ["row", "class"], ("row", "class")),
    ],
)
def test_site_dims(shape, plates, named, expected):
    assert site_dims("w", shape, plates, named) == expected


def test_errors_say_what_and_where():
    with pytest.raises(ValueError, match=r"dims has \['a', 'b', 'c'\] for 'w'.*expected 1 names"):
        site_dims("w", (5, 2), {0: "data"}, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"coords has \(2,\) values for dimension 'd'.*length 3"):
        build({"posterior": {"w": Variable(np.zeros((S, 3)), ("d",))}}, {"d": [1, 2]})
    with pytest.raises(ValueError, match="dimension 'd' has length 2 in 'v' and 3"):
        build({"posterior": {"w": Variable(np.zeros((S, 3)), ("d",)),
                             "v": Variable(np.zeros((S, 2)), ("d",))}})  # fmt: skip
    with pytest.raises(ValueError, match="'w' has dimensions .*distinct"):
        build({"posterior": {"w": Variable(np.zeros((S, 3, 3)), ("d", "d"))}})


def check_equal(a, b):
    a, b = datasets(a), datasets(b)
    assert set(a) == set(b)
    for name in a:
        assert a[name].equals(b[name]), name


def test_netcdf_round_trip(tmp_path):
    import arviz as az
    import xarray as xr

    _, idata = example()
    path = str(tmp_path / "fit.nc")
    idata.to_netcdf(path)
    if groups.has_inference_data():
        check_equal(idata, az.from_netcdf(path))
    else:
        with xr.open_datatree(path) as back:
            check_equal(idata, back)


@pytest.mark.filterwarnings("ignore:.*(consolidated|Zarr|zarr|string|dtype).*")
def test_zarr_round_trip(tmp_path):
    pytest.importorskip("zarr")
    import arviz as az
    import xarray as xr

    _, idata = example()
    path = str(tmp_path / "fit.zarr")
    tree = idata.to_datatree() if groups.has_inference_data() else idata
    tree.to_zarr(path)
    with xr.open_datatree(path, engine="zarr") as back:
        if groups.has_inference_data():
            back = az.InferenceData.from_datatree(back)
        check_equal(idata, back)


def test_arviz_reads_it():
    import arviz as az

    _, idata = example()
    assert list(az.summary(idata).index) == ["w[a]", "w[b]"]
    found = az.loo(idata, pointwise=True)
    assert np.isfinite(getattr(found, "elpd_loo", getattr(found, "elpd", np.nan)))


ARVIZ_1 = not groups.has_inference_data()  # with 0.2x, tests/test_io_arviz.py plots real fits


@pytest.mark.skipif(not ARVIZ_1, reason="these are ArviZ 1.x's names")
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_arviz_1_compares():
    import arviz as az

    fits = {name: example()[1] for name in ("good", "bad")}
    fits["bad"].log_likelihood["y"].values[:] -= 2.0
    table = az.compare(fits)
    assert list(table.index) == ["good", "bad"]
    assert float(table["elpd_diff"].iloc[1]) == pytest.approx(-2.0 * N, abs=0.2)


@pytest.mark.skipif(not ARVIZ_1, reason="these are ArviZ 1.x's names")
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize(
    ("plot", "kwargs"),
    [
        ("plot_ppc_dist", {}),
        ("plot_loo_pit", {"var_names": ["y"]}),
        ("plot_trace", {"var_names": ["w"]}),
        ("plot_rank", {"var_names": ["w"], "method": "envelope"}),  # the other needs more chains
    ],
    ids=["ppc", "loo_pit", "trace", "rank"],
)
def test_arviz_1_plots(plot, kwargs):
    import arviz as az
    import matplotlib.pyplot as plt

    getattr(az, plot)(example()[1], backend="matplotlib", **kwargs)
    drawn = [ax for ax in plt.gcf().axes if ax.has_data()]
    assert len(drawn) >= len(kwargs.get("var_names", ["y"]))
    plt.close("all")


def with_ratios(log_ratio, w=None):
    w = np.arange(len(log_ratio)) if w is None else w
    return build(
        {
            "posterior": {"w": Variable(w, ())},
            "sample_stats": {"log_p": Variable(log_ratio, ()), "log_q": Variable(0.0 * w, ())},
            "prior": {"w": Variable(w[:5], ())},
            "observed_data": {"y": Variable(np.ones(3), ("d",), sampled=False)},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "verdict"),
    [(0.2, "good"), (0.44, "good"), (0.56, "usable"), (0.64, "usable"), (0.76, "bad")],
)  # fmt: skip
def test_khat_is_the_shape_of_the_ratios_tail(shape, verdict):
    """Ratios that are Pareto by construction, at its quantiles, have its shape."""
    ratio = ((np.arange(20_000) + 0.5) / 20_000) ** -shape
    found = quality.vi_quality(with_ratios(np.log(ratio)))
    assert abs(found.khat - shape) < 0.04
    assert found.verdict == verdict
    assert verdict in str(found)


def test_verdict_and_resampling_are_exact_for_equal_ratios_and_for_few_heavy_ones():
    idata = with_ratios(np.full(200, -7.0))
    found = quality.vi_quality(idata)
    assert found.effective_draws == pytest.approx(200)
    again = datasets(quality.importance_resample(idata))
    np.testing.assert_array_equal(again["posterior"]["w"][0], np.arange(200))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_ratio_that_is_no_number_is_an_error(bad):
    ratios = np.zeros(200)
    ratios[[7, 9]] = bad
    for judge in (quality.vi_quality, quality.importance_resample):
        with pytest.raises(ValueError, match="for 2 of 200 draws, the first of them number 7"):
            judge(with_ratios(ratios))
    ratios[[7, 9]] = -np.inf
    again = datasets(quality.importance_resample(with_ratios(ratios)))
    assert not {7, 9} & set(again["posterior"]["w"][0].values)


def test_resampling_gives_the_expectation_under_p():
    """Draws of N(0, 1), ratios to N(0.5, 0.8): the mean and sd become those of p."""
    w = np.random.default_rng(1).normal(size=4000)
    ratio = -0.5 * ((w - 0.5) / 0.8) ** 2 - np.log(0.8) + 0.5 * w**2
    idata = with_ratios(ratio, w)
    again = datasets(quality.importance_resample(idata, 3000, seed=2))
    assert again["posterior"].sizes["draw"] == 3000
    assert again["sample_stats"].sizes["draw"] == 3000
    assert again["prior"].sizes["draw"] == 5
    error = 5 / np.sqrt(quality.vi_quality(idata).effective_draws)
    assert abs(float(again["posterior"]["w"].mean()) - 0.5) < 0.8 * error
    assert abs(float(again["posterior"]["w"].std()) - 0.8) < 0.8 * error


def test_quality_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="log_p and log_q"):
        quality.vi_quality(build({"posterior": {"w": Variable(np.zeros(200), ())}}))
    with pytest.raises(ValueError, match="got 20 draws, expected at least 100"):
        quality.vi_quality(with_ratios(np.zeros(20)))
    with pytest.raises(ValueError, match="num_samples=0"):
        quality.importance_resample(with_ratios(np.zeros(200)), 0)


def test_conversion_needs_no_torch():
    path = str(PACKAGE / "_arviz_groups.py")
    code = f"""
import sys, importlib.util, warnings
warnings.simplefilter("ignore")
class NoTorch:
    def find_spec(self, name, *_):
        assert name.split(".")[0] not in ("torch", "pyro", "pyro_flipout"), name
sys.meta_path.insert(0, NoTorch())
spec = importlib.util.spec_from_file_location("g", {path!r})
g = importlib.util.module_from_spec(spec); sys.modules["g"] = g; spec.loader.exec_module(g)
import numpy as np
print(g.build({{"posterior": {{"w": g.Variable(np.zeros((5, 2)), ("d",))}}}}).posterior["w"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 5, 2)"
