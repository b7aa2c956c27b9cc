"""Measured variances against exact ones: streaming, pieces, batches, no trace left behind."""

import sys
import warnings
from collections import OrderedDict, UserDict, deque
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.util import get_rng_state
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from pyro_flipout import FlipoutMessenger, flipout
from pyro_flipout._containers import leaves
from pyro_flipout.infer import AutoMeanField, gradient_variance
from pyro_flipout.infer._gradients import Piece
from pyro_flipout.infer._minibatches import Data
from pyro_flipout.infer._moments import Moments, Spread
from pyro_flipout.nn import FlipoutLinear
from tests.helpers import Regression, mlp

QUIET = {"progress": False}


def regression(guide_class=AutoNormal, rows=12):
    model = Regression(mlp((3, 4, 2)), scale=1.0)
    args = torch.randn(rows, 3), torch.randn(rows, 2)
    guide = guide_class(model, init_scale=0.3)
    guide(*args)
    return model, guide, args


class Recorder(Trace_ELBO):
    """Keeps every gradient."""

    def __init__(self):
        super().__init__()
        self.grads, self.batches = [], []

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = super().loss_and_grads(model, guide, *args, **kwargs)
        self.grads.append({name: p.grad.clone() for name, p in guide.named_parameters()})
        self.batches.append(args)
        return loss


def test_moments_are_exact(float64):
    draws = [[torch.randn(2, 3) * 5 + 1e3, torch.randn(4)] for _ in range(9)]
    first = Piece("a[s]", "s", 0, torch.tensor([0, 2]), 2)
    second = Piece("b", "t", 1, None, 4)
    moments = Moments([[first], [second], [first, second]], entries=True)
    for grads in draws:
        moments.add(grads)
    a, b = (torch.stack([d[i] for d in draws]) for i in range(2))
    for kept, stacked in zip(moments.variances, (a, b), strict=True):
        torch.testing.assert_close(kept, stacked.var(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(moments.means[1], b.mean(0))
    parts = [a.var(0).flatten()[[0, 2]], b.var(0)]
    for spread, expected in zip(moments.spreads, [*parts, torch.cat(parts)], strict=True):
        assert spread.mean == pytest.approx(expected.mean().item(), rel=1e-10)
        assert spread.count == 8


def test_error_of_a_variance():
    """Increments of independent Gaussians are independent: Var(s²) = 2 σ⁴ / (R - 1)."""
    pieces = [[Piece("a", "a", 0, None, 50)]]
    moments = Moments(pieces)
    for _ in range(2000):  # entries that move together: no averaging within one gradient
        moments.add([2 * torch.randn(1).expand(50)])
    assert moments.spreads[0].error == pytest.approx(4 * (2 / 1999) ** 0.5, rel=0.15)


def test_spread():
    spread = Spread()
    assert np.isnan(spread.error)
    values = np.random.default_rng(0).normal(size=20)
    for value in values:
        spread.add(float(value))
    assert spread.mean == pytest.approx(values.mean())
    assert spread.error == pytest.approx(values.std(ddof=1) / 20**0.5)


@pytest.mark.parametrize("divide_by", [None, 50.0])
def test_variances_are_those_of_the_gradients(float64, divide_by):
    model, guide, args = regression()
    elbo = Recorder()
    options = {"elbo": elbo, "entries": True, "batch_sizes": [3, 8], "num_repeats": 6, **QUIET}
    found = gradient_variance(model, guide, args, divide_by=divide_by, **options)
    assert dict(found.sizes)["estimator"] == 2
    assert len(elbo.grads) == 4 * 6
    runs = iter(elbo.grads)
    for estimator in ("shared", "flipout"):
        for size in (3, 8):
            grads = [next(runs) for _ in range(6)]
            at = {"estimator": estimator, "batch_size": size}
            for name, _ in guide.named_parameters():
                stacked = torch.stack([g[name] for g in grads]) / (divide_by or size)
                label = f"AutoNormal.{name}".removesuffix("_unconstrained")
                entries = found[f"{label}_entries"].sel(at).values
                np.testing.assert_allclose(entries, stacked.var(0), rtol=1e-9)
                whole = found.variance.sel(**at, parameter=label).item()
                assert whole == pytest.approx(stacked.var(0).mean().item(), rel=1e-9)


def test_a_site_averages_over_its_parameters(float64):
    model, guide, args = regression()
    found = gradient_variance(model, guide, args, num_repeats=5, batch_sizes=[4], **QUIET)
    for site in found.site.values:
        mine = found.variance.where(found.site_of_parameter == site, drop=True)
        weights = found.num_entries.where(found.site_of_parameter == site, drop=True)
        expected = (mine * weights).sum("parameter") / weights.sum()
        np.testing.assert_allclose(found.site_variance.sel(site=site), expected, rtol=1e-10)
    assert set(found.site.values) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}


@pytest.mark.parametrize("guide_class", [AutoDiagonalNormal, AutoMeanField])
def test_a_flat_parameter_is_cut_by_site(float64, guide_class):
    model, guide, args = regression(guide_class)
    options = {"num_repeats": 4, "batch_sizes": [4], "entries": True, "parameters": ["*loc"]}
    found = gradient_variance(model, guide, args, **options, **QUIET)
    name = f"{guide_class.__name__}.loc"
    assert [str(p) for p in found.parameter.values] == [f"{name}[{s}]" for s in found.site.values]
    sizes = {"net.0.weight": 12, "net.0.bias": 4, "net.2.weight": 8, "net.2.bias": 2}
    flat, start = found[f"{name}_entries"].values, 0
    for site in guide.prototype_trace.stochastic_nodes:
        if site not in sizes:
            continue
        own = flat[..., start : start + sizes[site]].mean(-1)
        np.testing.assert_allclose(found.site_variance.sel(site=site), own, rtol=1e-9)
        start += sizes[site]
    assert start == 26


def test_a_parameter_of_several_sites_stays_whole():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        scale = pyro.param("noise", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, scale.exp()), obs=x)

    def guide(x):
        both = pyro.param("both", torch.zeros(2))
        pyro.sample("a", dist.Normal(both.sum(), 1.0))
        pyro.sample("b", dist.Normal(both.sum(), 1.0))

    found = gradient_variance(
        model, guide, (torch.randn(5),), estimators="shared", num_repeats=3, **QUIET
    )
    assert sorted(found.site.values) == ["both", "noise"]


@pytest.mark.filterwarnings("ignore:flipout. no site of the model can be flipped")
def test_a_point_has_no_variance_on_a_fixed_batch():
    def guide(x, y):
        loc = pyro.param("loc", torch.zeros(1, 3))
        pyro.sample("w", dist.Delta(loc).to_event(2))

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(F.linear(x, w).squeeze(-1), 1.0), obs=y)

    args = torch.randn(8, 3), torch.randn(8)
    found = gradient_variance(model, guide, args, batches="fixed", num_repeats=3, **QUIET)
    assert (found.variance == 0).all()
    found = gradient_variance(model, guide, args, num_repeats=3, **QUIET)
    assert (found.variance > 0).all()


def test_nothing_is_left_behind():
    model, guide, args = regression()
    marks = [torch.full_like(p, 7.0) for p in guide.parameters()]
    for parameter, mark in zip(guide.parameters(), marks, strict=True):
        parameter.grad = mark
    before = [p.detach().clone() for p in guide.parameters()]
    state = get_rng_state()
    gradient_variance(model, guide, args, num_repeats=3, batch_sizes=[2], **QUIET)
    for p, value, mark in zip(guide.parameters(), before, marks, strict=True):
        assert torch.equal(p, value)
        assert p.grad is mark
        assert (mark == 7).all()
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    np.testing.assert_array_equal(state["numpy"][1], get_rng_state()["numpy"][1])


def test_gradients_are_restored_after_an_error():
    model, guide, args = regression()

    class Broken(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            super().loss_and_grads(*args, **kwargs)
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        gradient_variance(model, guide, args, elbo=Broken(), **QUIET)
    assert all(p.grad is None for p in guide.parameters())


def test_seed():
    model, guide, args = regression()
    options = {"num_repeats": 3, "batch_sizes": [4], **QUIET}
    runs = [gradient_variance(model, guide, args, seed=s, **options) for s in (1, 1, 2)]
    assert (runs[0].variance == runs[1].variance).all()
    assert (runs[0].variance != runs[2].variance).all()
    state = get_rng_state()["torch"]
    gradient_variance(model, guide, args, seed=None, **options)
    assert not torch.equal(state, get_rng_state()["torch"])


# ------------------------------------------------------------------------ mini-batches


def batches_of(args, **options):
    """The first argument of each call."""
    model, guide, _ = regression()
    elbo = Recorder()
    options = {"num_repeats": 2, "estimators": ["shared"], "elbo": elbo, **options}
    found = gradient_variance(model, guide, args, **options, **QUIET)
    return found, [batch[0] for batch in elbo.batches]


def test_fixed_batches_are_the_first_rows():
    args = torch.randn(6, 3), torch.randn(6, 2)
    _, seen = batches_of(args, batches="fixed", batch_sizes=[2, 5])
    assert [len(x) for x in seen] == [2, 2, 5, 5]
    assert all(torch.equal(x, args[0][: len(x)]) for x in seen)


def test_resampled_batches_are_rows_of_the_data():
    args = torch.arange(6.0)[:, None].expand(6, 3), torch.randn(6, 2)
    found, seen = batches_of(args, batch_sizes=[40])
    assert found.attrs["batches"] == "resampled"
    assert all(set(x[:, 0].tolist()) <= set(range(6)) for x in seen)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("labels", [(7,), (1, 7), (7, 2)])
def test_labels_go_with_their_rows(labels):
    """Data (T, N, features), and labels that have no time."""
    rows = torch.arange(7.0)
    y = rows.expand(labels) if labels[-1] == 7 else rows[:, None].expand(labels)
    data = Data((rows[:, None].expand(4, 7, 3), y), {}, 1, "resampled")
    (x, y), _ = data.batch(20)
    number = x[0, :, 0]
    assert not torch.equal(number, number[:1].expand(20))
    picked = y.reshape(-1, 20)[0] if labels[-1] == 7 else y[:, 0]
    assert torch.equal(picked, number)


@pytest.mark.parametrize("kind", ["handler", "layers"])
def test_a_model_that_flips_itself_is_refused(kind):
    model, guide, args = regression()
    if kind == "handler":
        model = flipout(model)
    else:
        net = PyroModule[torch.nn.Sequential](FlipoutLinear(3, 2))

        def model(x, y):
            mean = net(x)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

        guide = AutoNormal(model)
    with pytest.raises(ValueError, match="flips its sites .* itself, expected the bare model"):
        gradient_variance(model, guide, args, num_repeats=2, **QUIET)


def test_batches_of_a_function():
    def batch(size):
        return torch.ones(size, 3), torch.ones(size, 2)

    _, seen = batches_of((), batches=batch, batch_sizes=[4])
    assert all(torch.equal(x, torch.ones(4, 3)) for x in seen)


def test_other_tensors_and_keyword_arguments():
    seen = []

    def model(x, width, *, y, flag=None):
        seen.append((x.shape, width.shape, y.shape, flag))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        with pyro.plate("data", x.size(1)):
            mean = F.linear(x, w).squeeze(-1)[-1]
            pyro.sample("y", dist.Normal(mean, width[0]), obs=y[0])

    def guide(*args, **kwargs):
        loc = pyro.param("loc", torch.zeros(1, 3))
        pyro.sample("w", dist.Normal(loc, 1.0).to_event(2))

    args = torch.randn(5, 7, 3), torch.ones(2)
    options = {"kwargs": {"y": torch.randn(1, 7), "flag": "on"}, "example_dim": 1}
    found = gradient_variance(
        model,
        guide,
        args,
        num_repeats=2,
        batch_sizes=[3],
        estimators=["shared"],
        **options,
        **QUIET,
    )
    assert found.attrs["num_repeats"] == 2
    assert set(seen) == {((5, 3, 3), (2,), (1, 3), "on")}


# ------------------------------------------------------------------------- containers


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "some"
    length: int = field(init=False)

    def __post_init__(self):
        self.length = len(self.x)


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Stale:
    x: torch.Tensor
    y: torch.Tensor = field(init=False)


@dataclass
class Needs:
    x: torch.Tensor
    again: InitVar[int]


class Plain:
    def __init__(self, x):
        self.x = x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


CONTAINERS = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "named tuple": Pair,
    "torch's named tuple": lambda x, y: torch.return_types.max((x, y)),
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered dict": lambda x, y: OrderedDict(x=x, y=y),
    "user dict": lambda x, y: UserDict(x=x, y=y),
    "proxy": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "dataclass": Example,
    "frozen dataclass": Frozen,
    "nested": lambda x, y: {"a": [Pair(x, {"y": y})], "b": None, "c": "text"},
}


def taken(batch, size=20, dim=0, **kwargs):
    """The arguments of one mini-batch."""
    return Data((batch,), kwargs, dim, "resampled").batch(size)[0][0]


def flat(obj):
    return [leaf for leaf in leaves(obj) if isinstance(leaf, (torch.Tensor, np.ndarray))]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_rows_go_together_in_a_container(kind):
    numbers = torch.arange(7.0)
    batch = CONTAINERS[kind](numbers[:, None].expand(7, 3), 10 * numbers)
    found = taken(batch)
    assert type(found) is type(batch)
    x, y = flat(found)
    assert x.shape == (20, 3)
    assert torch.equal(10 * x[:, 0], y)
    assert x.unique().numel() > 3
    if kind == "nested":
        assert (found["b"], found["c"]) == (None, "text")
    old_x, old_y = flat(batch)  # as it was
    assert old_x.shape == (7, 3)
    assert torch.equal(old_y, 10 * numbers)


def test_what_a_dataclass_computes_fits_its_rows():
    batch = Example(torch.randn(7, 3), torch.randn(7), "mine")
    found = taken(batch)
    assert (found.length, found.name, batch.length) == (20, "mine", 7)


def test_a_container_without_data_is_handed_over_itself():
    class Odd(tuple):
        __slots__ = ()

    options = {"widths": Odd((1, 2)), "scale": torch.ones(2), "net": torch.nn.Linear(7, 7)}
    args, kwargs = Data((torch.randn(7, 3), options), {"o": options}, 0, "resampled").batch(4)
    assert args[1] is options
    assert kwargs["o"] is options


@pytest.mark.parametrize("where", ["args", "kwargs"])
def test_variances_do_not_depend_on_the_container(float64, where):
    """The same rows are drawn, so that the variances are the same to the last bit."""

    def model(x, batch=None, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 10.0).expand([1, 3]).to_event(2))
        y = batch["y"] if y is None else y
        with pyro.plate("data", 64, subsample_size=len(x)):
            pyro.sample("y", dist.Normal((x @ w.T).squeeze(-1), 1.0), obs=y)

    x, y = torch.randn(64, 3), torch.randn(64)
    guide, options = AutoMeanField(model), {"batch_sizes": [16, 64], "num_repeats": 5, **QUIET}
    guide(x, y=y)  # its setting up draws random numbers
    plain = gradient_variance(model, guide, (x,), kwargs={"y": y}, **options)
    if where == "args":
        found = gradient_variance(model, guide, (x, {"y": y}), **options)
    else:
        found = gradient_variance(model, guide, (x,), kwargs={"batch": {"y": y}}, **options)
    assert (found.variance == plain.variance).all()


def test_arrays_and_lists_are_rows_too():
    numbers = np.arange(7)
    batch = {
        "x": torch.arange(7.0),
        "array": numbers[:, None] * np.ones(3),
        "names": [f"row {n}" for n in numbers],
        "targets": tuple({"boxes": torch.full((n % 3 + 8, 4), float(n))} for n in numbers),
        "sizes": torch.Size([7]),
    }
    found = taken(batch)
    rows = found["x"].int().tolist()
    np.testing.assert_array_equal(found["array"][:, 2], rows)
    assert found["names"] == [f"row {n}" for n in rows]
    assert [t["boxes"][0, 0].item() for t in found["targets"]] == rows
    assert found["sizes"] is batch["sizes"]


@pytest.mark.filterwarnings("ignore:Sparse C.. tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_rows_of_sparse_data(layout):
    dense = torch.randn(7, 5) * (torch.rand(7, 5) > 0.5)
    x, n = taken((dense.to_sparse(layout=layout), torch.arange(7)))
    assert x.layout == layout
    assert torch.equal(x.to_dense(), dense[n])


def refused():
    x = torch.randn(7, 3)
    lengths = torch.full((7,), 2)
    return {
        "Plain": Plain({"x": x}),
        "Slotted": Slotted(x),
        "TensorDataset": TensorDataset(x),
        "DataLoader": DataLoader(TensorDataset(x), batch_size=2),
        "Normal": dist.Normal(x, 1.0),
        "deque": deque(range(7)),
        "range": range(7),
        "PackedSequence": pack_padded_sequence(torch.randn(2, 7, 3), lengths),
        "DataArray": xr.DataArray(np.zeros((7, 2))),
    }


@pytest.mark.parametrize("kind", refused())
def test_data_that_cannot_be_cut(kind):
    words = rf"args\[0\]\['more'\], a {kind}, holds data of 7 rows.*batches=a function"
    with pytest.raises(TypeError, match=words):
        taken({"x": torch.randn(7, 3), "more": refused()[kind]})
    taken({"x": torch.randn(8, 3), "more": refused()[kind]})  # no rows of these data


def test_nested_tensors_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    with pytest.raises(TypeError, match="a Tensor, holds data of 2 rows"):
        taken([torch.randn(2, 5), nested])


def stale(x):
    batch = Stale(x)
    batch.y = x[:, 0]
    return batch


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (stale, r"a Stale, has rows of data in \['y'\].*remove init=False"),
        (lambda x: Needs(x, 1), "a Needs, anew with dataclasses.replace: .*'again' must be"),
        (lambda x: type("Odd", (tuple,), {})((x, 1)), "a Odd, anew .*named tuple"),
    ],
)
def test_containers_that_cannot_be_made_anew(make, words):
    with pytest.raises(TypeError, match=rf"gradient_variance: .*args\[0\], {words}"):
        taken(make(torch.randn(7, 3)))


@pytest.mark.parametrize("batches", ["resampled", lambda size: {"x": torch.randn(size, 3)}])
def test_arguments_are_a_tuple(batches):
    """Of a dict the keys would be the arguments, of a tensor the rows."""
    model, guide, args = regression()
    given = {"x": args[0], "y": args[1]} if batches == "resampled" else args
    with pytest.raises(TypeError, match=r"of type dict, expected a tuple .*\(batch,\)"):
        gradient_variance(model, guide, given, batches=batches, **QUIET)
    with pytest.raises(TypeError, match="args of type Tensor"):
        gradient_variance(model, guide, args[0], **QUIET)


# -------------------------------------------------------------------------------- options


def test_default_sizes_and_names():
    model, guide, args = regression(rows=20)
    options = {"num_repeats": 2, "elbo": TraceMeanField_ELBO(), **QUIET}
    found = gradient_variance(model, guide, args, **options)
    assert found.batch_size.values.tolist() == [1, 4, 16]
    assert found.variance.dims == ("estimator", "batch_size", "parameter")
    assert found.site_variance_se.dims == ("estimator", "batch_size", "site")
    assert (found.seconds > 0).all()


def test_estimators_of_your_own():
    model, guide, args = regression()
    handler = FlipoutMessenger(hide=["net.0.weight"])
    own = {"bare": lambda fn: fn, "partly": handler}
    found = gradient_variance(
        model, guide, args, estimators=own, num_repeats=2, batch_sizes=[4], **QUIET
    )
    assert found.estimator.values.tolist() == ["bare", "partly"]
    assert handler.decisions["net.0.weight"] == "shared: it is hidden"
    assert handler.decisions["net.2.weight"].startswith("flipped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimators": ["Flipout"]}, r"expected some of \['shared', 'flipout'"),
        ({"estimators": []}, r"got estimators=\[\]"),
        ({"num_repeats": 1}, "expected at least 2"),
        ({"batch_sizes": [0, 2]}, "expected integers >= 1"),
        ({"batch_sizes": []}, "expected integers >= 1"),
        ({"batch_sizes": [13], "batches": "fixed"}, "args have 12 rows in their dimension 0"),
        ({"batches": "fresh"}, 'expected "resampled", "fixed" or a function'),
        ({"parameters": ["*mean*"]}, "expected names or patterns of some of .*locs"),
        ({"parameters": ["*locs*", "locks"]}, r"\['locks'\] mean nothing"),
        ({"parameters": []}, r"parameters=\[\]"),
        ({"estimators": 3}, r"got estimators=\[3\]"),
        ({"estimators": [flipout]}, r"expected some of \['shared', 'flipout'"),
        ({"num_repeats": 2.5}, "num_repeats=2.5, expected at least 2, an integer"),
        ({"num_repeats": True}, "num_repeats=True"),
        ({"batch_sizes": [2.5]}, r"batch_sizes=\[2.5\], expected integers >= 1"),
        ({"batch_sizes": [True]}, "expected integers >= 1"),
        ({"batch_sizes": 4}, "batch_sizes=4, expected a list of integers"),
        ({"batch_sizes": "48"}, "batch_sizes='48', expected a list of integers"),
        ({"divide_by": 0}, "divide_by=0, expected a finite number > 0"),
        ({"divide_by": -2.0}, "divide_by=-2.0, expected a finite number > 0"),
        ({"divide_by": float("nan")}, "divide_by=nan, expected"),
        ({"divide_by": "12"}, "divide_by='12', expected"),
        ({"example_dim": -1}, "example_dim=-1, expected an integer >= 0"),
        ({"example_dim": 2}, "args have 0 rows in their dimension 2"),
        ({"example_dim": 0.0}, "example_dim=0.0, expected"),
        ({"seed": -1}, "seed=-1, expected an integer >= 0"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_wrong_options(options, message):
    model, guide, args = regression()
    with pytest.raises(ValueError, match=message):
        gradient_variance(model, guide, args, **QUIET, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "got model=3, expected a function or module"),
        ({"guide": None}, "got guide=None, expected"),
        ({"elbo": Trace_ELBO}, r"expected an object with loss .*such as Trace_ELBO\(\)"),
        ({"elbo": "elbo"}, "got elbo='elbo'"),
        ({"kwargs": [1]}, "kwargs of type list, expected a dict"),
        ({"kwargs": ()}, "kwargs of type tuple, expected a dict"),
    ],
)
def test_wrong_types(options, message):
    model, guide, args = regression()
    given = {"model": model, "guide": guide, "args": args, **QUIET, **options}
    with pytest.raises(TypeError, match=message):
        gradient_variance(**given)


def test_one_pattern_is_not_its_letters():
    model, guide, args = regression()
    options = {"num_repeats": 2, "batch_sizes": [np.int64(4)], "estimators": "shared", **QUIET}
    found = gradient_variance(model, guide, args, parameters="*scales*weight*", **options)
    assert len(found.parameter) == 2


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (lambda model: None, "estimator 'mine' turned the model into None"),
        ("flipout", "estimator 'mine' is 'flipout', expected a function"),
    ],
)
def test_estimators_that_wrap_nothing(estimator, message):
    model, guide, args = regression()
    with pytest.raises(TypeError, match=message):
        gradient_variance(model, guide, args, estimators={"mine": estimator}, **QUIET)


def test_no_data():
    model, guide, _ = regression()
    with pytest.raises(ValueError, match="args have 0 rows"):
        gradient_variance(model, guide, (), batch_sizes=[2], **QUIET)
    for empty in ((torch.zeros(0, 3), torch.zeros(0, 2)), ({"x": torch.zeros(0, 3)},)):
        with pytest.raises(ValueError, match="args have 0 rows"):
            gradient_variance(model, guide, empty, batch_sizes=[2], **QUIET)


def test_progress_bar(capsys, monkeypatch):
    model, guide, args = regression()
    options = {"num_repeats": 3, "batch_sizes": [2], "estimators": ["shared"]}
    gradient_variance(model, guide, args, **options)
    assert "3/3" in capsys.readouterr().err
    gradient_variance(model, guide, args, progress=False, **options)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    gradient_variance(model, guide, args, **options)
    assert not capsys.readouterr().err
