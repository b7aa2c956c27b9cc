"""The parts of a variance: the fit on exact variances, and a model whose parts are known."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from pyro.infer import TraceMeanField_ELBO

from pyro_flipout import flipout
from pyro_flipout.infer import decompose_variance, gradient_variance, plot_gradient_variance
from pyro_flipout.infer.variance_accessor import VarianceAccessor
from pyro_flipout.infer.variance_decomposition import design

SIZES = np.array([1, 4, 32, 512])
PARTS = {"w": (8.0, 0.5, 0.01), "b": (3.0, 0.2, 0.0)}


def variance(estimator, size, alpha, beta, gamma):
    pairs = (size - 1) / size
    return {
        "independent": alpha / size,
        "flipout": alpha / size + pairs * gamma,
        "shared": alpha / size + pairs * (beta + gamma),
    }.get(estimator, 1e9)


def measured(estimators=("shared", "flipout"), sizes=SIZES, relative=0.05, noise=None):
    """A Dataset with the exact variances, or noisy ones."""
    shape = len(estimators), len(sizes)
    values = np.zeros((*shape, 2))
    for i, estimator in enumerate(estimators):
        for k, parts in enumerate(PARTS.values()):
            values[i, :, k] = variance(estimator, sizes, *parts)
    if noise is not None:
        values = values * (1 + relative * noise.normal(size=values.shape))
    dims = "estimator", "batch_size", "site"
    return xr.Dataset(
        {"site_variance": (dims, values), "site_variance_se": (dims, relative * values)},
        {"estimator": list(estimators), "batch_size": sizes, "site": list(PARTS)},
    )


@pytest.mark.parametrize("more", [(), ("independent",), ("local_reparameterization",)])
def test_exact_variances_give_exact_parts(more):
    found = measured(("shared", *more, "flipout"))
    parts = decompose_variance(found)
    for site, expected in PARTS.items():
        at = parts.sel(site=site)
        for name, value in zip(("alpha", "beta", "gamma"), expected, strict=True):
            assert at[name].item() == pytest.approx(value, abs=1e-9)
        alpha, beta, gamma = expected
        assert at.helps_from.item() == pytest.approx(alpha / (beta + gamma))
        assert at.chi_square.item() < 1e-12
    assert parts.helps_until.sel(site="w").item() == pytest.approx(800)
    assert parts.helps_until.sel(site="b").item() > 1e9  # gamma = 0
    assert 100 < parts.helps_until_lower.sel(site="b").item() < 1e5
    assert "local_reparameterization" not in parts.estimator.values
    same = found.site_variance.sel(estimator=parts.estimator)
    np.testing.assert_allclose(parts.predicted, same, rtol=1e-9)


def test_errors_are_those_of_the_fit():
    """Over many noisy measurements: no bias, and standard errors that are the spread."""
    rng = np.random.default_rng(0)
    fits = [decompose_variance(measured(noise=rng)).sel(site="w") for _ in range(300)]
    for index, name in enumerate(("alpha", "beta", "gamma")):
        estimates = np.array([fit[name].item() for fit in fits])
        spread = estimates.std(ddof=1)
        claimed = np.mean([fit[f"{name}_se"].item() for fit in fits])
        assert abs(estimates.mean() - PARTS["w"][index]) < 5 * spread / 300**0.5
        assert spread == pytest.approx(claimed, rel=0.25)  # 6 standard errors of a spread
    ratios = np.array([fit.helps_from.item() for fit in fits])
    claimed = np.mean([fit.helps_from_se.item() for fit in fits])
    assert ratios.std(ddof=1) == pytest.approx(claimed, rel=0.25)
    chi = np.array([fit.chi_square.item() for fit in fits])
    assert chi.mean() == pytest.approx(5, abs=1)  # degrees of freedom: 8 - 3
    assert fits[0].degrees_of_freedom.item() == 5


def test_by_parameter():
    found = measured().rename(
        site="parameter", site_variance="variance", site_variance_se="variance_se"
    )
    assert decompose_variance(found, "parameter").alpha.dims == ("parameter",)


@pytest.mark.parametrize(
    ("estimators", "sizes", "by", "message"),
    [
        (("shared",), SIZES, "site", "expected 'shared', 'flipout' and at least two sizes"),
        (("shared", "flipout"), SIZES[:1], "site", "at least two sizes"),
        (("shared", "flipout"), SIZES, "layer", 'expected "site" or "parameter"'),
    ],
)
def test_what_cannot_be_told_apart(estimators, sizes, by, message):
    with pytest.raises(ValueError, match=message):
        decompose_variance(measured(estimators, sizes), by)


def test_equal_sizes_are_one_size():
    with pytest.raises(ValueError, match="at least two sizes"):
        decompose_variance(measured(sizes=np.array([4, 4])))


@pytest.mark.parametrize("function", [decompose_variance, plot_gradient_variance])
def test_what_is_no_measurement(function):
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name}: got found of type DataArray, expected the xarr"):
        function(measured().site_variance)
    with pytest.raises(ValueError, match=rf"{name}: got a Dataset without \['variance', 'varianc"):
        function(measured(), "parameter")
    with pytest.raises(ValueError, match=r"without \['site_variance', .*select several values"):
        function(measured().sel(estimator="flipout"))


def test_two_repeats_have_no_standard_errors():
    linear = Linear()
    options = {"batch_sizes": [1, 8], "num_repeats": 2, "progress": False}
    found = gradient_variance(linear.model, linear.guide, (linear.x, linear.y), **options)
    with pytest.raises(ValueError, match="site_variance_se is nan.*num_repeats=3"):
        decompose_variance(found)


def test_design_knows_its_arguments():
    with pytest.raises(ValueError, match="estimator='flip', expected one of"):
        design("flip", [1])
    with pytest.raises(ValueError, match=r"batch_size=\[0, 1\], expected values >= 1"):
        design("flipout", [0, 1])


def test_a_site_without_variance():
    found = measured()
    found.site_variance.loc[{"site": "b"}] = 0.0
    parts = decompose_variance(found)
    assert np.isnan(parts.alpha.sel(site="b"))
    assert parts.alpha.sel(site="w") > 0


# ----------------------------------------------------------- linear-Gaussian model


class Linear:
    """Linear regression with a Normal guide: all three parts in closed form."""

    def __init__(self, rows=40):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 3, generator=generator) + 0.5
        noise = torch.randn(rows, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5]).to(self.x) + noise
        self.loc = torch.tensor([0.3, -0.2, 0.1]).to(self.x)
        self.scale = torch.tensor([0.5, 0.8, 0.3]).to(self.x)

    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(F.linear(x, w[None]).squeeze(-1), 1.0), obs=y)

    def guide(self, x, y):
        loc = pyro.param("loc", self.loc.clone())
        scale = pyro.param("scale", self.scale.clone())
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    def parts(self):
        """Of the gradients (b + sum_i s_i e_i x_i) x_j, for scales times e_j, b = x loc - y."""
        x, s = self.x, self.scale
        b = (x @ self.loc - self.y)[:, None]
        v = (x**2 @ s**2)[:, None]
        both = (x.T @ x / len(x)) ** 2  # (E x_i x_j)²
        linear = (b * x).mean(0)  # E b x_j
        own = 2 * s**2 * both.diag()
        rest = both @ s**2 - s**2 * both.diag()  # over i != j
        return {
            "loc": (((b**2 + v) * x**2).mean(0) - linear**2, both @ s**2, 0 * s),
            "scale": (
                ((b**2 + v + 2 * s**2 * x**2) * x**2).mean(0) - s**2 * both.diag(),
                linear**2 + rest,
                own,
            ),
        }


def z_scores(linear, estimators=("shared", "flipout"), repeats=300):
    options = {"elbo": TraceMeanField_ELBO(), "batch_sizes": [1, 64], "progress": False}
    found = gradient_variance(
        linear.model,
        linear.guide,
        (linear.x, linear.y),
        estimators=estimators,
        num_repeats=repeats,
        **options,
    )
    fit = decompose_variance(found, "parameter")
    scores = []
    for parameter, parts in linear.parts().items():
        at = fit.sel(parameter=parameter)
        for name, exact in zip(("alpha", "beta", "gamma"), parts, strict=True):
            error = at[name].item() - exact.mean().item()
            scores.append(abs(error) / at[f"{name}_se"].item())
    return scores


LIMIT = 5.2  # one failure in a million over the six, for a normal score


def test_linear_gaussian_parts(float64):
    assert max(z_scores(Linear())) < LIMIT


@pytest.mark.parametrize(
    "bug",
    [
        {"shared": lambda fn: fn, "flipout": lambda fn: fn},  # a handler that does nothing
        {"shared": flipout, "flipout": flipout},  # one that leaks
    ],
)
def test_linear_gaussian_parts_notice_a_bug(float64, bug):
    assert max(z_scores(Linear(), bug, 150)) > LIMIT


def test_the_closed_form_itself(float64):
    """Against direct simulation of the two gradients, example by example."""
    linear = Linear()
    x, s, num = linear.x, linear.scale, 400_000
    rows = torch.randint(len(x), (2, num))
    eps = torch.randn(num, 3)
    signs = torch.randint(2, (2, num, 3)) * 2.0 - 1
    for flip, at in ((0, slice(1, 3)), (1, slice(2, 3))):
        pair = []
        for n in range(2):
            e = eps * signs[n] if flip else eps
            out = (x[rows[n]] * (linear.loc + s * e)).sum(-1) - linear.y[rows[n]]
            grad = out[:, None] * x[rows[n]]
            pair.append({"loc": grad, "scale": grad * e})
        for name, parts in linear.parts().items():
            a, b = (g[name] - g[name].mean(0) for g in pair)
            for product, exact in ((a * a, parts[0]), (a * b, sum(parts[at]))):
                error = (product.mean(0) - exact).abs() / (product.std(0) / num**0.5)
                assert error.max() < LIMIT


# -------------------------------------------------------------------------------- plot


def test_plot():
    pytest.importorskip("matplotlib").use("Agg")
    found = measured(("shared", "flipout", "local_reparameterization"))
    axes = found.flipout.plot()
    styles = {c.get_label(): c.lines[0].get_linestyle() for c in axes.containers}
    assert styles["w, shared"] == ":"
    assert styles["w, flipout"] == "-"
    assert len(styles) == 6
    assert axes.get_xscale() == axes.get_yscale() == "log"
    same = plot_gradient_variance(found, only=["b"], predicted=True, ax=axes.figure.add_subplot())
    assert [line.get_label() for line in same.lines if "," in str(line.get_label())] == [
        "b, shared",
        "b, flipout",
    ]
    line = next(line for line in same.lines if line.get_label() == "b, flipout")
    x, y = line.get_data()
    np.testing.assert_allclose(y, variance("flipout", x, *PARTS["b"]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected some of \['w', 'b'\]"):
        found.flipout.plot(only=["c"])
    with pytest.raises(ValueError, match='expected "site" or "parameter"'):
        found.flipout.plot(by="layer")
    for bars in (-1, np.nan, "2"):
        with pytest.raises(ValueError, match=f"bars={bars!r}, expected a finite number >= 0"):
            found.flipout.plot(bars=bars)
    assert len(found.flipout.plot(only="b").containers) == 3


def test_accessor_decomposes():
    found = measured()
    assert isinstance(found.flipout, VarianceAccessor)
    assert found.flipout.decompose().alpha.dims == ("site",)
