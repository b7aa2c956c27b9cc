"""Arrays to ArviZ's groups, with ArviZ 0.2x and 1.x, and without torch."""

import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import arviz as az
import numpy as np
import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_flipout"
if importlib.util.find_spec("torch") is None:
    stub = types.ModuleType("pyro_flipout")
    stub.__path__ = [str(PACKAGE)]
    sys.modules["pyro_flipout"] = stub
groups = importlib.import_module("pyro_flipout._arviz_groups")
quality = importlib.import_module("pyro_flipout.vi_quality")
names = importlib.import_module("tests.arviz_names")
check_equal, datasets, read_zarr, write_zarr = (
    names.check_equal, names.datasets, names.read_zarr, names.write_zarr
)  # fmt: skip
elpd, elpd_lost, elpd_terms = names.elpd, names.elpd_lost, names.elpd_terms
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


def test_netcdf_round_trip(tmp_path):
    _, idata = example()
    path = str(tmp_path / "fit.nc")
    idata.to_netcdf(path)
    check_equal(idata, az.from_netcdf(path))


@pytest.mark.filterwarnings("ignore:.*(consolidated|Zarr|zarr|string|dtype).*")
def test_zarr_round_trip(tmp_path):
    _, idata = example()
    path = str(tmp_path / "fit.zarr")
    write_zarr(idata, path)
    check_equal(idata, read_zarr(path))


def test_arviz_reads_it():
    _, idata = example()
    assert list(az.summary(idata).index) == ["w[a]", "w[b]"]
    found = az.loo(idata, pointwise=True)
    assert elpd_terms(found).shape == (N,)
    assert elpd_terms(found).sum() == pytest.approx(elpd(found))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 on pandas 3.1
def test_arviz_compares():
    fits = {name: example()[1] for name in ("good", "bad")}
    fits["bad"].log_likelihood["y"].values[:] -= 2.0
    table = az.compare(fits)
    assert list(table.index) == ["good", "bad"]
    lost, _ = elpd_lost(table)
    assert float(lost.iloc[1]) == pytest.approx(2.0 * N, abs=0.2)


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


def test_resampling_is_exact_for_equal_ratios():
    idata = with_ratios(np.full(200, -7.0))
    again = datasets(quality.importance_resample(idata))
    np.testing.assert_array_equal(again["posterior"]["w"][0], np.arange(200))


EQUAL = "the positive ratios are equal to within 1 %: they have no tail"


def changed(ratios, where, value):
    ratios[where] = value
    return ratios


@pytest.mark.parametrize("size", [100, 300, 4000])
@pytest.mark.parametrize(
    ("ratios", "khat", "verdict", "effective", "words"),
    [
        (lambda n: np.full(n, -7.0), -np.inf, "good", 1.0, EQUAL),
        # Few distinct values, as the rounding of float32 gives them.
        (lambda n: 1e-6 * (np.arange(n) % 5) - 30.0, -np.inf, "good", 1.0, EQUAL),
        (lambda n: changed(np.full(n, -7.0), slice(0, n, n // 2), -np.inf), -np.inf, "good",
         None, f"{EQUAL}; density 0 under the model for 2 of the draws"),
        # Half of q is where p is e^5 times rarer.
        (lambda n: changed(np.zeros(n), slice(0, n, 2), -5.0), -np.inf, "good",
         (1 + np.exp(-5)) ** 2 / (2 * (1 + np.exp(-10))), "largest ratios are equal to within 1 %"),
        # One draw has it all, and the tail below it is a single value.
        (lambda n: changed(np.zeros(n), 3, 30.0), np.nan, "unknown", None, "no Pareto tail fits"),
        (lambda n: changed(np.full(n, -np.inf), slice(0, n // 50), 1.0), np.nan, "unknown",
         1 / 50, "too few for a tail"),
        # Beyond the range of float64: nearly all weights are 0, so q is nowhere near p.
        (lambda n: -2000.0 * np.arange(n), np.inf, "bad", None, "q misses too much"),
    ],
    ids=["equal", "rounding", "two -inf", "bounded", "ties", "nearly all -inf", "underflow"],
)  # fmt: skip
def test_ratios_without_a_tail_to_fit(size, ratios, khat, verdict, effective, words):
    found = quality.vi_quality(with_ratios(ratios(size)))
    np.testing.assert_equal(found.khat, khat)
    assert found.verdict == verdict
    assert words in str(found)
    if effective is not None:
        assert found.effective_draws == pytest.approx(effective * size, rel=1e-4)
    assert np.logaddexp.reduce(found.log_weights) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_ratio_that_is_no_number_is_an_error(bad):
    ratios = np.zeros(200)
    ratios[[7, 9]] = bad
    for judge in (quality.vi_quality, quality.importance_resample):
        with pytest.raises(ValueError, match="for 2 of 200 draws, the first of them number 7"):
            judge(with_ratios(ratios))
    with pytest.raises(ValueError, match="-inf for all 200 draws"):
        quality.vi_quality(with_ratios(np.full(200, -np.inf)))
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
