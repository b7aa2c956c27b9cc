"""Programs that run without flipout run with it: shared draws and a warning, never an error."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from pyro_flipout import ExampleDimError, FlipoutWarning, MissingRuleError, flipout
from pyro_flipout.nn import weight_noise_
from pyro_flipout.poutine import independent, local_reparameterization
from pyro_flipout.tensor import FlipoutTensor
from tests.helpers import Recording, bayesian, kinds

N = 5
pytestmark = pytest.mark.usefixtures("float64")


def sample(*shape, name="w", device=None):
    zeros = torch.zeros(shape, device=device)
    prior = dist.Normal(zeros, 1.0, validate_args=False).to_event(len(shape))
    return pyro.sample(name, prior)


def check_shared(program, *data, words, **options):
    """The model warns once, then runs silently on the draw that its site keeps."""
    handler = Recording(**options)
    with pytest.warns(FlipoutWarning, match=words) as told:
        out = handler(program)(*data)
    assert len([w for w in told if w.category is FlipoutWarning]) == 1
    drawn = handler.seen["w"].plain
    torch.testing.assert_close(dense(out), dense(poutine_run(program, drawn, *data)))
    assert handler.decisions["w"].startswith("shared: ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler(program)(*data)


def poutine_run(program, value, *data):
    return pyro.poutine.condition(program, {"w": value})(*data)


def dense(x):
    return x.to_dense() if x.layout != torch.strided else x


# ------------------------------------------------------------- dimension 0 is used up

USED_UP = {
    "(w @ x.T).T": lambda x: (sample(4, 3) @ x.T).T,
    "(w @ x.mT).mT": lambda x: (sample(4, 3) @ x.mT).mT,
    "torch.mm(w, x.t())": lambda x: torch.mm(sample(4, 3), x.t()).t(),
    "torch.addmm(c, w, x.T)": lambda x: torch.addmm(torch.ones(4, 1), sample(4, 3), x.T).T,
    "einsum": lambda x: torch.einsum("oi,in->no", sample(4, 3), x.T),
    "tensordot": lambda x: torch.tensordot(sample(4, 3), x.T, 1).T,
    "inner of a vector": lambda x: sample(3) @ x.T,
    "x @ (w @ constant)": lambda x: x @ (sample(3, 4) @ torch.ones(4, 2)),
}


@pytest.mark.parametrize("name", USED_UP)
def test_data_without_a_free_first_dimension(name):
    x, words = torch.randn(N, 3), r"dimension 0 of data of shape .* x @ w\.T in place of \(w @ x"
    check_shared(USED_UP[name], x, words=words)
    with pytest.raises(ExampleDimError, match="you said example_dim=0"):
        flipout(USED_UP[name], example_dim=0)(x)


def test_columns_of_examples_beside_rows():
    """As in the textbook's W x for one layer, and torch's own way for the other."""

    def program(x):
        return (sample(4, 3) @ x.T).T + x @ sample(4, 3, name="v").T

    handler, x = Recording(), torch.randn(N, 3)
    with pytest.warns(FlipoutWarning, match="site 'w' keeps its shared draw"):
        handler(program)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = handler(program)(x)
    assert handler.decisions["v"].startswith("flipped")
    v = handler.seen["v"].materialize()
    shared = out - torch.einsum("ni,noi->no", x, v)
    torch.testing.assert_close(shared[1:] - shared[0], (x[1:] - x[0]) @ shared_weight(shared, x).T)


def shared_weight(out, x):
    return torch.linalg.lstsq(x, out).solution.T


def test_one_column_is_not_told_of():
    """One example sees the shared draw anyway; of several later the audit finds the dimension."""

    def program(x):
        mean = (sample(1, 3) @ x.T)[0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(len(x)))

    handler = flipout()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler(program)(torch.randn(1, 3))
    assert kinds(handler.decisions) == {"w": "flipped"}
    handler(program)(torch.randn(N, 3))
    assert handler.decisions == {"w": "flipped (verified)"}
    match = r"dimension 0 of data of shape \(3, 5\)"
    with pytest.warns(FlipoutWarning, match=match), flipout():
        program(torch.randn(N, 3))


# ---------------------------------------------------------------------- recurrent layers

LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 2),
    "GRU": lambda: nn.GRU(3, 2),
    "RNN": lambda: nn.RNN(3, 2),
}


class LastStep(nn.Module):
    """A time-major layer as torch makes it by default, and a head on its last step."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(2, 4)

    def forward(self, x):  # (T, N, 3)
        return self.head(self.layer(x)[0][-1])


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_time_major_layers(make):
    plain, x = LastStep(make()), torch.randn(4, N, 3)
    handler = Recording()
    model = handler(bayesian(copy.deepcopy(plain)))
    with pytest.warns(FlipoutWarning, match=r"in torch\..* set example_dim, as in flipout\(exam"):
        out = model(x)
    assert out.shape == (N, 4)
    assert {n for n, d in handler.decisions.items() if d.startswith("flipped")} == {
        "head.weight",
        "head.bias",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(x)
        known = Recording(example_dim=1)
        known(bayesian(copy.deepcopy(plain)))(x)
    assert set(kinds(known.decisions).values()) == {"flipped"}
    with pytest.raises(ExampleDimError, match="sequences in dimension 1"):
        flipout(bayesian(copy.deepcopy(plain)), example_dim=0)(x)


def test_time_major_layer_with_noise():
    net = weight_noise_(LastStep(nn.GRU(3, 2)), "gaussian", 0.1)
    with pytest.warns(FlipoutWarning, match="keeps its shared noise from now on: in torch.gru"):
        net(torch.randn(4, N, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(4, N, 3))


# --------------------------------------------------------------------------- sparse data

SPARSE = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}
PRODUCTS = {
    "x @ w": lambda x: x @ sample(4, 3),
    "F.linear": lambda x: F.linear(x, sample(3, 4)),
    "F.linear with a bias": lambda x: F.linear(x, sample(3, 4), torch.ones(3)),
    "torch.mm": lambda x: torch.mm(x, sample(4, 3)),
    "torch.mv": lambda x: torch.mv(x, sample(4)),
    "torch.addmm": lambda x: torch.addmm(torch.ones(N, 3), x, sample(4, 3)),
    "torch.sparse.mm": lambda x: torch.sparse.mm(x, sample(4, 3)),
    "x * w": lambda x: x * sample(4),
    "w @ x.T": lambda x: sample(3, 4) @ x.t(),
}


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.parametrize("layout", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("name", PRODUCTS)
def test_sparse_data(name, layout):
    x = layout(torch.randn(N, 4) * (torch.rand(N, 4) > 0.5))
    try:
        PRODUCTS[name](x)
    except (RuntimeError, NotImplementedError):
        assert name in ("x * w", "torch.mv"), name
        pytest.skip("torch has no such product of this layout")
    words = "no flipout rule" if name == "torch.sparse.mm" else r"data are sparse \(torch.sparse_"
    check_shared(PRODUCTS[name], x, words=words)


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.parametrize("layout", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("estimator", [independent, local_reparameterization])
def test_sparse_data_of_other_estimators(estimator, layout):
    x = layout(torch.eye(N, 4))
    if estimator is local_reparameterization and x.layout == torch.sparse_coo:
        out = estimator(PRODUCTS["F.linear"])(x)  # squares and products are all it needs
        assert out.shape == (N, 3)
        return
    with pytest.warns(FlipoutWarning, match=r"the data are sparse"):
        out = estimator(PRODUCTS["F.linear"])(x)
    assert out.shape == (N, 3)


def test_sparse_data_and_a_flipped_summand():
    x = torch.eye(N, 4).to_sparse()
    handler = Recording()
    out = handler(lambda x: torch.addmm(sample(3), x, torch.ones(4, 3)))(x)
    expected = x.to_dense() @ torch.ones(4, 3) + handler.seen["w"].materialize()
    torch.testing.assert_close(out, expected)


# -------------------------------------------------------------- values without numbers


def layer(x):
    return F.linear(x, sample(2, 3, device=x.device))


def test_meta_tensors():
    handler = flipout()
    with pytest.warns(FlipoutWarning, match="its value is on the meta device and has no numbers"):
        out = handler(layer)(torch.randn(N, 3, device="meta"))
    assert out.is_meta
    assert out.shape == (N, 2)
    with warnings.catch_warnings():  # it is flipped again where it has numbers
        warnings.simplefilter("error")
        assert handler(layer)(torch.randn(N, 3)).shape == (N, 2)
    assert kinds(handler.decisions) == {"w": "flipped"}


def test_fake_tensors():
    handler = flipout()
    with pytest.warns(FlipoutWarning, match="its value is a FakeTensor"), FakeTensorMode():
        out = handler(layer)(torch.randn(N, 3))
        assert out.shape == (N, 2)
    assert type(out).__name__ == "FakeTensor"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler(layer)(torch.randn(N, 3))
    assert kinds(handler.decisions) == {"w": "flipped"}


def test_one_warning_for_all_fake_sites():
    with pytest.warns(FlipoutWarning) as told, FakeTensorMode():
        flipout(lambda x: layer(x) + sample(2, name="b"))(torch.randn(N, 3))
    assert len(told) == 1


def test_noise_of_meta_weights():
    net = weight_noise_(nn.Linear(3, 2, device="meta"), "gaussian", 0.1)
    with pytest.warns(FlipoutWarning, match="weights keep their shared noise in this call: its"):
        assert net(torch.randn(N, 3, device="meta")).shape == (N, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(N, 3, device="meta"))


# ------------------------------------------------------------------- parts of a complex one


@pytest.mark.parametrize("part", ["real", "imag"])
def test_a_part_that_is_set_is_told_of(part):
    """It would change the shared draw, and no example's weight."""

    def program(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2)) * (1 + 1j)
        setattr(w, part, torch.zeros(3, 2))
        return getattr(x.to(w.dtype) @ w, part)

    handler = flipout()
    with pytest.warns(FlipoutWarning, match=rf"in torch.Tensor.{part}.__set__, there is no flip"):
        out = handler(program)(torch.randn(N, 3))
    assert not out.any()
    with pytest.raises(MissingRuleError, match=f"{part}.__set__"):
        flipout(program, on_missing_rule="error")(torch.randn(N, 3))


def test_pairs_with_signs_of_their_own():
    """Their complex numbers would have no sign."""
    words = "the real and the imaginary part have signs of their own"
    check_shared(lambda x: x * torch.view_as_complex(sample(3, 2)), torch.randn(N, 3), words=words)


def test_a_part_is_a_flipped_weight():
    seen = {}

    def program(x):
        seen["w"] = (sample(3, 2) * (1 + 1j)).real
        return x @ seen["w"]

    flipout(program)(torch.randn(N, 3))
    assert type(seen["w"]) is FlipoutTensor
