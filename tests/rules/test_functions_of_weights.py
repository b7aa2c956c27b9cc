"""Weights that are functions of weights: what is flipped, what is refused, and with which words."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from pyro_flipout import FlipoutWarning, MissingRuleError, flipout
from pyro_flipout.tensor import Execution, FlipoutTensor, flip
from pyro_flipout.testing import check_rule, random_weight
from tests.helpers import kinds
from tests.rules.cases import N, data, weights
from tests.rules.networks import CLOSE, assert_same, by_example, flipped

pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------ products of weights
def test_low_rank_signs():
    """The left factor is flipped by its rows, the right one by its columns."""
    u, v = weights((4, 2), (2, 3))
    product = u @ v
    F.linear(data(N, 3), product)
    for weight, dim in ((u, 1), (v, 0)):
        signs = ((weight.materialize() - weight.center) / weight.delta).sign()
        assert (signs == signs.narrow(dim + 1, 0, 1)).all()
        assert signs.unique().tolist() == [-1, 1]
        assert len(signs.unique(dim=0)) > 1
    assert len(product.terms) == 3
    torch.testing.assert_close(product.materialize(), u.materialize() @ v.materialize(), **CLOSE)


def test_low_rank_with_a_parameter_of_pyro():
    """``pyro.param`` returns tensors that are no ``nn.Parameter``."""

    def model(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))
        v = pyro.param("v", torch.randn(2, 3))
        w = u @ v
        assert isinstance(w, FlipoutTensor)
        return F.linear(x, w)

    assert flipout(model, on_missing_rule="error")(data(N, 3)).shape == (N, 4)


def test_low_rank_after_use_is_shared():
    x = data(N, 2)
    u, v = weights((4, 2), (2, 3))
    F.linear(x, u)
    with pytest.warns(FlipoutWarning) as record:
        out = u @ v
    assert type(out) is torch.Tensor
    assert "'w0' met the examples before, with signs along the dimension" in str(record[0].message)
    torch.testing.assert_close(out, u.plain @ v.plain)


def test_low_rank_middle_factor_has_no_signs_left():
    u, d, v = weights((4, 2), (2, 2), (2, 3))
    with pytest.warns(FlipoutWarning, match="all signs of site 'w1' are summed over"):
        u @ d @ v


def test_low_rank_middle_factor_error():
    execution = Execution(on_missing_rule="error")
    d, v = (random_weight(*s, execution=execution) for s in ((2,), (2, 3)))
    with pytest.raises(MissingRuleError, match="all signs of site 'weight' are summed over; regis"):
        d @ v


def test_low_rank_in_a_transformed_factor_drops_signs_everywhere():
    """A view made before the product sees the same signs as the weight."""
    u, v = weights((4, 2), (2, 3))
    transposed = u.t()
    out = F.linear(data(N, 3), u @ v)
    assert out.shape == (N, 4)
    torch.testing.assert_close(transposed.materialize(), u.materialize().mT, **CLOSE)


def test_two_flipped_weights_and_data_in_einsum():
    u, v = weights((4, 2), (2, 3))
    with pytest.warns(FlipoutWarning, match="contract them one after the other"):
        torch.einsum("ok,ki,bi->bo", u, v, data(N, 3))


def test_normalised_direction_is_shared():
    v, g = weights((2, 3), (2, 1))
    with pytest.warns(FlipoutWarning, match=r"v / \|\|v\|\| is not linear in v; hide v"):
        torch._weight_norm(v, g, 0)
    with pytest.warns(FlipoutWarning, match="norm along a dimension is not linear"):
        random_weight(2, 3).norm(dim=1, keepdim=True)


def test_dropout_mask_is_that_of_the_shared_draw():
    w = random_weight(20, 30)
    torch.manual_seed(0)
    expected = F.dropout(w.plain, 0.3)
    torch.manual_seed(0)
    torch.testing.assert_close(F.dropout(w, 0.3).plain, expected, atol=1e-15, rtol=1e-15)


# ---------------------------------------------------------------------- functional_call


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).tanh().flatten(1))


def test_functional_call():
    net, x = Net().eval(), data(N, 2, 6)
    values = flipped(net)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    assert_same(functional_call(net, values, (x,)), by_example(net, values, x), values)
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())


def test_functional_call_ties_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    x, w = data(N, 3), random_weight(3, 3)
    values = {"0.weight": w}
    assert_same(functional_call(net, values, (x,)), by_example(net, values, x), values)


# -------------------------------------------------------------------- parametrizations


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


class LowRankUpdate(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.u = nn.Parameter(torch.randn(rows, 1))
        self.v = nn.Parameter(torch.randn(1, columns))

    def forward(self, w):
        return w + self.u @ self.v


def net(parametrization, out=3):
    layer = nn.Linear(3, out)
    parametrize.register_parametrization(layer, "weight", parametrization)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(out, 2))


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda: net(Symmetric()), id="symmetric"),
        pytest.param(lambda: net(LowRankUpdate(4, 3), 4), id="low rank update"),
    ],
)
def test_parametrization(module):
    module, x = module(), data(N, 3)
    values = flipped(module)
    assert_same(functional_call(module, values, (x,)), by_example(module, values, x), values)


def test_parametrization_cached():
    module, x = net(Symmetric()), data(N, 3)
    values = flipped(module)
    with parametrize.cached():
        out = functional_call(module, values, (x,))
    assert_same(out, by_example(module, values, x), values)


def test_weight_norm_flips_the_length():
    module, x = parametrizations.weight_norm(nn.Linear(3, 2)), data(N, 3)
    values = flipped(module, only={"parametrizations.weight.original0", "bias"})
    assert_same(functional_call(module, values, (x,)), by_example(module, values, x), values)


def test_weight_norm_leaves_the_direction_shared():
    module, x = parametrizations.weight_norm(nn.Linear(3, 2)), data(N, 3)
    values = flipped(module)
    with pytest.warns(FlipoutWarning, match="hide v and flip g alone"):
        out = functional_call(module, values, (x,))
    direction = "parametrizations.weight.original1"
    assert [v.site for v in values.values() if not v.terms] == [direction]
    values[direction] = values[direction].plain
    assert_same(out, by_example(module, values, x), values)


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_is_shared(training):
    module, x = parametrizations.spectral_norm(nn.Linear(3, 2)).train(training), data(N, 3)
    values = flipped(module, only={"parametrizations.weight.original"})
    with pytest.warns(FlipoutWarning, match="'parametrizations.weight.original' keeps its shared"):
        out = functional_call(module, values, (x,))
    module.eval()
    plain = {name: getattr(v, "plain", v) for name, v in values.items()}
    torch.testing.assert_close(out, functional_call(module, plain, (x,)), **CLOSE)


# -------------------------------------------------------------------------- checkpoint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 8)
        self.b = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.b(self.dropout(self.a(x).tanh()))


def test_a_perturbation_first_used_without_gradients_has_them_later():
    grads = []
    for before in (False, True):
        torch.manual_seed(0)
        loc, scale = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
        w, x = flip(loc + scale * torch.randn(2, 3), loc), torch.randn(5, 3)
        if before:
            with torch.no_grad():
                F.linear(x, w)
        grads.append(torch.autograd.grad(F.linear(x, w).pow(2).sum(), (loc, scale)))
    torch.testing.assert_close(*grads)
    assert grads[0][1].abs().max() > 0.1


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, counted):
    """The same signs and the same dropout mask in the recomputation as in the forward pass."""
    block, x = Block(), data(N, 3)
    losses = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        values = flipped(block)
        if counted:
            values["a.weight"].execution.count(N, "")

        def call(x, values=values):
            return functional_call(block, values, (x,))

        leaves = [x] + [t for v in values.values() for t in (v.center, v.terms[0].delta)]
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(1)
        loss = run(call, x).square().sum()
        loss.backward()
        losses.append((loss.detach(), [leaf.grad for leaf in leaves]))
    (loss, expected), (same, actual) = losses
    torch.testing.assert_close(same, loss, **CLOSE)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_checkpoint_with_weights_as_arguments():
    w, x = random_weight(2, 3), data(N, 3)
    out = checkpoint(F.linear, x, w, use_reentrant=False)
    assert_same(out, F.linear(x, w), {"w": w})


def test_reentrant_checkpoint_with_weights_as_arguments_is_shared():
    """Its backward pass runs on other tensors, which do not know that they are flipped."""
    w, x = random_weight(2, 3), data(N, 3)
    leaves = (x, w.center, w.terms[0].delta)
    match = "'weight' keeps its shared draw: in torch.utils.checkpoint with .* use_reentrant=False"
    with pytest.warns(FlipoutWarning, match=match) as caught:
        out = checkpoint(F.linear, x, w, use_reentrant=True)
    assert len(caught) == 1
    out.sin().sum().backward()
    expected = F.linear(x, leaves[1] + leaves[2])
    torch.testing.assert_close(out, expected)
    for leaf, grad in zip(leaves, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(leaf.grad, grad)


# ------------------------------------------------------------------------------- exact


def test_delta_zero_gives_the_plain_function():
    center, x = torch.randn(4, 2), data(N, 3)
    u = flip(center, center, execution=(execution := Execution()))
    v = random_weight(2, 3, execution=execution)
    v = flip(v.center, v.center, execution=execution)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(F.linear(x, u @ v), F.linear(x, u.center @ v.center))


@pytest.mark.parametrize("op", [torch.mm, torch.matmul, torch.mul, torch.add, torch.bmm])
def test_a_result_that_is_written_into_out_keeps_the_shared_draw(op):
    shape = (2, 3, 3) if op is torch.bmm else (3, 3)
    x, center, delta = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    weight, out = flip(center + delta, center, delta), torch.empty(shape)
    with pytest.warns(FlipoutWarning, match="the result is written into out="):
        assert op(x, weight, out=out) is out
    assert torch.equal(out, op(x, center + delta))


@pytest.mark.parametrize("op", [torch.add, torch.mul])
def test_a_weight_changed_in_place_is_used_as_it_is_then(op):
    w, u = weights((4, 3), (4, 3))
    x = data(N, 3)
    changed = w * 1
    with pytest.warns(FlipoutWarning, match="__setitem__"):
        changed[0] = 0.0
    expected = w.plain.detach().clone()
    expected[0] = 0.0
    combined = op(changed, u)
    torch.testing.assert_close(combined.plain.detach(), op(expected, u.plain.detach()))
    torch.testing.assert_close(combined.materialize(N), op(expected, u.materialize(N)), **CLOSE)
    out = F.linear(x, combined)
    torch.testing.assert_close(out[:, 0], F.linear(x, op(expected[0], u[0])), **CLOSE)


def test_one_example_needs_no_rule():
    """It sees the shared draw, so that no weight has to be left shared for the batches to come."""
    execution = Execution(on_missing_rule="error")
    w = random_weight(1, execution=execution)
    x = data(1, 3)
    y = F.linear(x, random_weight(1, 3, execution=execution)) + w
    torch.testing.assert_close(y**2 + w.exp(), (y**2 + w.plain.exp()))
    assert type(y) is torch.Tensor
    assert not w.draws[0].shared


FIRST = {
    "cat": lambda x, mask, t: torch.cat([t.expand(len(x), 1, 3), x], 1),
    "where": torch.where,
    "where, expanded": lambda x, mask, t: x.where(mask, t.expand_as(x)),
    "add": lambda x, mask, t: x + t,
    "mix": lambda x, mask, t: x * mask + t * ~mask,
}


class FirstToken(PyroModule):
    """Its first operation is on data and a token ``(1, 1, 3)``."""

    def __init__(self, first):
        super().__init__()
        self.first = (lambda x, mask, t: first(mask, x, t)) if first is torch.where else first
        self.token = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1, 3]).to_event(3))
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y):
        h = self.first(x, torch.rand(len(x), 4, 1) < 0.5, self.token)
        mean = F.linear(h.tanh(), self.weight).mean(1).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", FIRST)
def test_one_example_of_which_nothing_counted_yet(name, strict):
    """It has no rule for tanh, which is nobody's business: one example sees the shared draw."""
    model = FirstToken(FIRST[name])
    handler = flipout(on_missing_rule="error" if strict else "warn")
    svi = SVI(handler(model), AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO())
    for size in (1, 5, 1, 5):
        svi.step(torch.randn(size, 4, 3), torch.randn(size))
    assert kinds(handler.decisions) == {"token": "flipped", "weight": "flipped"}


class Positions(FirstToken):
    """The token is joined to constant positions, which are normalised: no rule."""

    def forward(self, x, y):
        positions = torch.cat([self.token, torch.ones(1, 3, 3)], 1)
        return super().forward(x + F.layer_norm(positions, (3,)), y)


def test_one_row_that_was_a_constant():
    """Several examples turn up later, and what was held back is told, of the right site."""
    model = Positions(lambda x, mask, t: x)
    handler = flipout()
    svi = SVI(handler(model), AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO())
    svi.step(torch.randn(1, 4, 3), torch.randn(1))
    assert handler.decisions["token"].startswith("flipped")
    with pytest.warns(FlipoutWarning, match="'token' keeps its shared draw.*layer_norm") as told:
        svi.step(torch.randn(5, 4, 3), torch.randn(5))
    assert len(told) == 1
    assert handler.decisions["weight"].startswith("flipped")
    strict = flipout(Positions(lambda x, mask, t: x), on_missing_rule="error")
    with pytest.raises(MissingRuleError, match="'token': in torch.nn.functional.layer_norm"):
        SVI(strict, AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO()).step(
            torch.randn(5, 4, 3), torch.randn(5)
        )


def test_nothing_is_held_back_without_a_handler():
    w = random_weight(1, 2, 3)
    with pytest.warns(FlipoutWarning, match="there is no flipout rule"):
        torch.cat([w, torch.ones(1, 2, 1)], 2).tanh()


def test_what_nothing_counts_is_told_by_the_plate():
    def model(size):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 2, 3]).to_event(3))
        with pyro.plate("data", size):
            scale = (torch.cat([w, torch.ones(1, 2, 1)], 2) ** 2).sum()
            pyro.sample("y", dist.Normal(0.0, 1 + scale), obs=torch.zeros(size))

    svi = SVI(flipout(model), AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO())
    svi.step(1)
    with pytest.warns(FlipoutWarning, match="'w' keeps its shared draw.*no flipout rule"):
        svi.step(4)


@pytest.mark.parametrize("rows", [N, N + 1])
def test_a_kernel_chosen_against_a_constant(rows):
    const, mask = data(rows, 2, 3), torch.rand(rows, 2, 3) < 0.5
    const = const.detach()
    check_rule(
        lambda x, w: F.conv1d(x, torch.where(mask, w, const)), data(N, 2, 6), random_weight(1, 2, 3)
    )


def test_a_weight_joined_to_a_constant_is_not_one_example():
    pad = torch.zeros(1, 2, 1, dtype=torch.float64)
    check_rule(
        lambda x, w: F.conv1d(x, torch.cat([w, pad], 2)), data(N, 2, 6), random_weight(1, 2, 3)
    )


def test_a_mask_with_as_many_rows_as_examples_is_no_data():
    w, v = weights((3,), (2, 3))
    x, mask = data(N, 3), torch.arange(N)[:, None] > 1
    y = F.linear(x, v)
    with pytest.warns(FlipoutWarning, match="'w0' keeps its shared draw.* larger than what"):
        masked = torch.where(mask, w, 0.0)
    assert type(masked) is torch.Tensor
    torch.testing.assert_close(masked, torch.where(mask, w.plain, 0.0))
    assert not v.draws[0].shared
    assert y.shape == (N, 2)


def test_a_condition_with_more_examples_than_the_data_has_no_rule():
    """Positions (N, D) that all examples share, as many as there are examples."""
    w, v = weights((3,), (2, 3))
    F.linear(data(N, N, 3), v)
    mask, positions = torch.rand(N, N, 1) > 0.5, data(N, 3)
    with pytest.warns(FlipoutWarning, match="'w0' keeps its shared draw.* larger than what"):
        out = torch.where(mask, w, positions)
    torch.testing.assert_close(out, torch.where(mask, w.plain, positions))


def test_rows_of_a_parameter_are_data():
    table = nn.Parameter(torch.randn(9, 3))
    w = random_weight(3, 2)
    out = table[2 : 2 + N] @ w
    expected = [table[2 + n] @ w.materialize()[n] for n in range(N)]
    torch.testing.assert_close(out, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize(
    "pick", [lambda e, i: e[i], lambda e, i: (e + 1)[i], lambda e, i: e[i, None]]
)
def test_picked_entries_name_the_lookup(pick):
    index = torch.tensor([0, 2, 2, 1, 0])
    effects = random_weight(3)
    with pytest.warns(FlipoutWarning, match=r"write F.embedding\(index, .* in place of w\[index\]"):
        pick(effects, index) ** 2


def test_other_operations_do_not_name_the_lookup():
    w = random_weight(3)
    w[:2], w[torch.tensor([True, False, True])], w[0]
    with pytest.warns(FlipoutWarning, match="there is no flipout rule; register a rule"):
        w**2


def test_lookup_of_random_effects():
    index = torch.tensor([0, 2, 2, 1, 0])
    check_rule(
        lambda i, e, m: F.embedding(i, (e + m).unsqueeze(-1)).squeeze(-1) ** 2,
        index,
        *weights((3,), ()),
    )


def test_no_examples_beside_a_class_token():
    token, x = random_weight(1, 1, 3), data(0, 4, 3)
    out = torch.cat([token.expand(0, -1, -1), x], 1)
    assert out.shape == (0, 5, 3)


def test_weights_made_inside_vmap_meet_a_constant():
    mask = torch.ones(3, 3)

    def run(center, delta, x):
        return F.conv2d(x, flip(center + delta, center, delta) * mask)

    args = [torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3), torch.randn(2, N, 2, 5, 5)]
    assert torch.func.vmap(run, randomness="same")(*args).shape == (2, N, 4, 3, 3)
