"""Warnings and errors say what came, what was expected and what to do."""

import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal

from pyro_flipout import (
    ExampleDimError,
    FlipoutError,
    FlipoutMessenger,
    FlipoutWarning,
    MissingRuleError,
    flip,
    flipout,
    implements,
)
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.nn import FlipoutLinear
from pyro_flipout.tensor import Execution, queries
from tests.helpers import Recording, kinds

X = torch.randn(6, 5, 3)


def weight(infer=None):
    prior = dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2)
    return pyro.sample("w", prior, infer=infer)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"example_dim": -1}, ValueError, "example_dim=-1, expected an integer >= 0"),
        ({"example_dim": "0"}, ValueError, "example_dim='0', expected an integer"),
        ({"example_dim": True}, ValueError, "example_dim=True, expected an integer"),
        ({"on_missing_rule": "ignore"}, ValueError, '\'ignore\', expected "warn" or "error"'),
        ({"hide": "w"}, TypeError, "hide='w', expected a list"),
        ({"hide": ["w"], "expose": ["w"]}, ValueError, r"\['w'\] are named in both"),
        (
            {"hide_fn": lambda m: True, "expose_fn": lambda m: True},
            ValueError,
            "both hide_fn and expose_fn",
        ),
        ({"exampledim": 1}, TypeError, r"unknown options \['exampledim'\], expected some of"),
    ],
)
def test_options(options, error, words):
    with pytest.raises(error, match=words):
        flipout(**options)
    with pytest.raises(error, match=words):
        flipout(lambda: None, **options)


@pytest.mark.parametrize("fn", [3, "model", torch.zeros(2), torch.nn.Linear])
def test_not_a_model(fn):
    with pytest.raises(TypeError, match=r"flipout: got .* expected a model: a function"):
        flipout(fn)


def test_example_dim_used_up_by_the_weight():
    with pytest.raises(ExampleDimError, match=r"site 'w' in F.linear .*\(6, 3\).*example_dim=1"):
        flipout(lambda x: F.linear(x, weight()), example_dim=1)(X[:, 0])
    with pytest.raises(ExampleDimError, match=r"site 'w' .*shape \(6, 5, 4, 3\).*example_dim=2"):
        w = flip(torch.ones(4, 3), torch.zeros(4, 3), site="w", execution=Execution(2))
        torch.ones(6, 5, 4, 3) * w


@pytest.mark.parametrize("example_dim", [None, 0, 1])
def test_example_dim_is_dimension_0_unless_given(example_dim):
    handler = Recording(example_dim=example_dim)
    assert handler.example_dim == (example_dim or 0)
    assert ("example_dim" in repr(handler)) == (example_dim is not None)
    handler(lambda x: F.linear(x, weight()))(X)
    assert handler.seen_execution.example_dim == (example_dim or 0)
    assert handler.seen_execution.example_dim_given == (example_dim is not None)


def test_example_dim_given_later():
    handler = flipout()
    handler.example_dim = 1
    with pytest.raises(ExampleDimError, match="you said example_dim=1"):
        handler(lambda x: F.linear(x, weight()))(X[:, 0])
    with pytest.raises(ValueError, match="example_dim=-1, expected an integer >= 0"):
        handler.example_dim = -1


@pytest.mark.parametrize("given", [True, False])
def test_example_dim_of_a_layer(given):
    """A layer says it for all of its execution; without, data that contradict are shared."""
    layer = FlipoutLinear(3, 2, bias=False, example_dim=0 if given else None)
    net = torch.nn.Sequential(layer)

    def columns(x):  # the weight by columns of data
        return torch.mm(layer.weight, x)

    layer.forward = columns
    expected = pytest.raises if given else pytest.warns
    kind = ExampleDimError if given else FlipoutWarning
    with expected(kind, match="dimension 0"):
        net(X[0].T)


def test_rows_that_are_not_examples():
    def model(x):
        w = weight()
        a = F.linear(x, w)
        b = F.linear(x.reshape(-1, 3), w)  # (N * T, 3)
        return a, b

    handler = Recording()
    with pytest.warns(FlipoutWarning, match=r"'w' .*\(30, 3\) has 30 rows .*6 examples; keep"):
        handler(model)(X)
    assert "30 rows" in handler.decisions["w"]
    with warnings.catch_warnings():  # told once; shared from now on
        warnings.simplefilter("error")
        a, b = handler(model)(X)
    assert torch.equal(a.reshape(-1, 2), b)


@pytest.mark.parametrize(("plate_size", "words"), [(5, "6 examples were counted in dimension 0")])
def test_wrong_example_dim_against_the_data_plate(plate_size, words):
    def model(x, y):  # time-major (6 steps of 5 examples)
        h = F.linear(x, weight())[-1]
        with pyro.plate("data", plate_size):
            pyro.sample("y", dist.Normal(h, 1.0).to_event(1), obs=y)

    y = torch.zeros(5, 2)
    handler = Recording()
    # Around inference there is no second run, so that the plates alone can tell.
    match = words + r".*'y' is in plates of sizes {'data': 5}"
    with pytest.warns(FlipoutWarning, match=match), handler:
        model(X, y)
    assert handler.decisions["w"].startswith("shared: 6 examples were counted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with handler:  # from now on
            model(X, y)
        with flipout(example_dim=1):
            model(X, y)
    wrapped = Recording()
    wrapped(model)(X, y)
    assert wrapped.decisions == {"w": "flipped (verified)"}


def test_no_example_dimension():
    with pytest.warns(FlipoutWarning, match=r"'w' .*\(3,\) have no example dimension; add one"):
        flipout(lambda x: F.linear(x, weight()))(X[0, 0])


def test_missing_rule_warns_once_and_shares():
    def model(x):
        return F.linear(x, weight().exp())

    handler = Recording()
    with pytest.warns(
        FlipoutWarning, match=r"site 'w'.*: in torch.Tensor.exp, there is no flipout rule; register"
    ):
        handler(model)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler(model)(X)
    assert handler.decisions["w"].startswith("shared")


def test_missing_rule_error():
    handler = flipout(on_missing_rule="error")
    with (
        pytest.raises(MissingRuleError, match=r"site 'w': in .*exp, there is no .*hide=\[...\]"),
        handler,
    ):
        weight().exp()


def test_queries_are_silent():
    with warnings.catch_warnings(), flipout(on_missing_rule="error"):
        warnings.simplefilter("error")
        w = weight()
        assert w.shape == (2, 3)
        assert w.dtype == torch.float
        assert len(w) == 2
        assert w.dim() == 2
        assert w.size(0) == 2
        assert w.numel() == 6
        for plain in (w.norm(), w.detach(), torch.zeros_like(w), w == 0, w.isnan()):
            assert type(plain) is torch.Tensor
        assert "tensor(" in repr(w)
        assert "tensor(" in str(w)
        assert f"{w.norm():.1f}"
        assert w.device.type == "cpu"
        assert not w.requires_grad
        assert len(w.tolist()) == 2
        assert w.numpy().shape == (2, 3)


@pytest.mark.parametrize("mask", [lambda w: w > 0, lambda w: w <= 0, lambda w: torch.lt(w, 0.1)])
def test_a_mask_from_a_weight_is_told_of(mask):
    """It would be the shared draw's mask on every example's weight."""
    with pytest.warns(FlipoutWarning, match="'w' keeps its shared draw.* no flipout rule"):

        def model(x):
            w = weight()
            return F.linear(x, torch.where(mask(w), w, 0.0)), mask(w.detach())

        out, _ = flipout(model)(X[:, 0])
    assert out.shape == (len(X), 2)


def test_marks_on_a_site():
    x = X[:, 0]
    handler = Recording()
    handler(lambda: F.linear(x, weight({"flipout": False})))()
    assert handler.decisions == {"w": "shared: it is hidden"}
    with pytest.raises(ValueError, match=r"site 'w' .*'yes'.*expected True or False"):
        flipout(lambda: weight({"flipout": "yes"}))()


def test_a_marked_site_that_cannot_be_flipped():
    def model(x):
        w = weight({"flipout": True})
        pyro.sample("y", dist.Normal(F.linear(x, w), 1.0).to_event(3), obs=torch.zeros(6, 5, 2))

    def flagged(x):
        mvn = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
        pyro.sample("w", mvn, infer={"flipout": True})

    with pytest.raises(FlipoutError, match="'w' has infer=.*correlated; remove the mark"):
        flipout(flagged)(X)


@pytest.mark.parametrize(
    ("options", "flipped"),
    [
        ({"hide": ["a"]}, {"b"}),
        ({"expose": ["a"]}, {"a"}),
        ({"expose": ["local"]}, {"local"}),
        ({"hide_fn": lambda site: site["name"] == "b"}, {"a"}),
        ({"expose_fn": lambda site: site["name"] == "b"}, {"b"}),
        ({}, {"a", "b"}),
    ],
)
def test_choice_of_sites(options, flipped):
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("units", 3):
            local = pyro.sample("local", dist.Normal(0.0, 1.0))
        return x * a + b * x + x * local

    handler = Recording(**options)
    handler(model)(X)
    assert set(handler.seen) == flipped


@pytest.mark.parametrize("option", ["hide", "expose"])
def test_names_that_are_no_sites(option):
    handler = flipout(**{option: ["w", "net.0.wieght"]})
    with pytest.warns(FlipoutWarning, match=option + r" names \['net.0.wieght'\], .*\['w'\]"):
        handler(lambda: F.linear(X, weight()))()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler(lambda: F.linear(X, weight()))()


def test_warnings_point_at_the_users_line():
    with pytest.warns(FlipoutWarning) as caught:
        flipout(lambda: weight().exp())()
    assert caught[0].filename == __file__


def test_the_handler_shows_its_options():
    assert repr(flipout(example_dim=1, hide=["w"])) == (
        "FlipoutMessenger(example_dim=1, hide=frozenset({'w'}), on_missing_rule='warn')"
    )


def test_an_unknown_handler_may_have_set_the_value():
    class Setter(pyro.poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            msg["value"] = torch.ones(2, 3)

    handler = Recording()
    with pytest.warns(FlipoutWarning, match="'w' .*handler Setter may have set its value"):
        Setter()(handler(weight))()
    named = Recording(expose=["w"])
    Setter()(named(weight))()
    assert named.decisions["w"].startswith("flipped")


def test_one_warning_for_many_sites():
    def model():
        for i in range(5):
            pyro.sample(f"w{i}", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    svi = SVI(
        flipout(model), AutoLowRankMultivariateNormal(model), pyro.optim.Adam({}), Trace_ELBO()
    )
    with pytest.warns(FlipoutWarning) as caught:
        svi.step()
    assert len(caught) == 1


def test_detached_guides_keep_shared_draws():
    guide = AutoNormal(weight)
    trace = poutine.trace(guide).get_trace()
    trace.detach_()
    with pytest.warns(FlipoutWarning, match="not reparametrised .or detached"):
        poutine.replay(flipout(weight), trace=trace)()


def test_a_guide_run_without_gradients_keeps_shared_draws():
    guide = AutoMeanField(weight)
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace()
    with pytest.warns(FlipoutWarning, match="not reparametrised .or detached"):
        poutine.replay(flipout(weight), trace=trace)()
    with torch.no_grad():
        handler = FlipoutMessenger()
        poutine.replay(handler(weight), trace=trace)()
    assert set(kinds(handler.decisions).values()) == {"flipped"}


def test_materialize_errors():
    w = flip(torch.ones(2, 3), torch.zeros(2, 3), site="w")
    with pytest.raises(ValueError, match="site 'w' is not known yet.*pass num_examples"):
        w.materialize()
    assert w.materialize(4).shape == (4, 2, 3)
    F.linear(torch.ones(5, 3), w)
    assert w.materialize().shape == (5, 2, 3)
    with pytest.raises(ValueError, match="num_examples=4, but .*5 examples"):
        w.materialize(4)


def test_the_registry_refuses_duplicates():
    with pytest.raises(ValueError, match="has a flipout rule already"):
        implements(F.linear, flips="")(lambda op: None)
    with pytest.raises(ValueError, match="registered already"):
        queries(F.linear)
