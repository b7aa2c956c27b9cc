"""What is drawn for the signs, and when: only for weights that several examples meet."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch.utils.checkpoint import checkpoint

from pyro_flipout import FlipoutMessenger, flip, flipout
from pyro_flipout.poutine import IndependentMessenger
from tests.helpers import Recording, kinds

X, Y = torch.randn(6, 3), torch.randn(6)
GROUP = torch.tensor([0, 1, 2, 0, 1, 2])


def normal(*shape):
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))


def observe(mean, y, scale=1.0):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def exponential(x, y):
    observe(0.0, y, normal().exp())


def entries(x, y):
    w = normal(3)
    observe(w[0].exp(), y, w[1].exp())


def transposed(x, y):
    observe(0.0, y, normal(2, 3).t().reshape(-1).exp().sum())


def picked(x, y):
    observe(normal(3)[GROUP].exp(), y)


def linear(x, y):
    observe(F.linear(x, normal(1, 3)).squeeze(-1), y)


def positive(x, y):
    observe(0.0, y, pyro.sample("w", dist.Gamma(2.0, 2.0)))


NOTHING = {
    "exp": (exponential, AutoNormal, {}),
    "entries": (entries, AutoNormal, {}),
    "transposed": (transposed, AutoNormal, {}),
    "picked": (picked, AutoNormal, {}),
    "positive": (positive, AutoNormal, {}),
    "hidden": (linear, AutoNormal, {"hide": ["w"]}),
    "points": (linear, AutoDelta, {}),
    "joint": (linear, AutoMultivariateNormal, {}),
}


def train(program, model, make, x=X, y=Y):
    """Losses of three steps, and the state in which they leave the generator."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(program, make(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(x, y) for _ in range(3)], torch.get_rng_state()


@pytest.mark.filterwarnings("ignore::pyro_flipout.FlipoutWarning")
@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_is_flipped_nothing_is_drawn(name):
    model, make, options = NOTHING[name]
    handler = FlipoutMessenger(**options)
    flipped = handler(model)
    losses, state = train(model, model, make)
    for _ in range(2):  # the second time with a handler that was used
        found, left = train(flipped, model, make)
        assert found == losses
        assert torch.equal(left, state)
    assert "flipped" not in kinds(handler.decisions).values()


def test_one_example_needs_no_signs():
    handler = FlipoutMessenger(on_missing_rule="error")
    bare = train(linear, linear, AutoNormal, X[:1], Y[:1])
    flipped = train(handler(linear), linear, AutoNormal, X[:1], Y[:1])
    assert flipped[0] == bare[0]
    assert torch.equal(flipped[1], bare[1])
    assert kinds(handler.decisions) == {"w": "flipped"}


def test_a_used_handler_gives_what_a_new_one_gives():
    flipped = flipout(linear)
    losses, state = train(flipped, linear, AutoNormal)
    found, left = train(flipped, linear, AutoNormal)
    assert found == losses != train(linear, linear, AutoNormal)[0]
    assert torch.equal(left, state)


def test_another_estimator_draws_no_signs():
    pyro.set_rng_seed(0)
    IndependentMessenger()(lambda: normal(2, 3))()
    state = torch.get_rng_state()
    pyro.set_rng_seed(0)
    normal(2, 3)
    assert torch.equal(torch.get_rng_state(), state)


def weights(*shapes):
    out = []
    for shape in shapes:
        center, delta = torch.randn(shape), torch.randn(shape)
        out.append([center.requires_grad_(), delta.requires_grad_()])
    return out


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_segments_that_draw_their_signs(reentrant, mapped):
    """Their recomputations see the dropout masks of the first run."""
    torch.manual_seed(0)
    x = torch.randn(5, 200, requires_grad=True)
    leaves = weights((200, 200), (200, 200))  # too large for codes in common

    def segment(w):
        def run(x):
            product = x @ w.t() if mapped else F.linear(x, w)
            return x + F.dropout(F.dropout(x) + product.tanh())

        return run

    found = []
    for call in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        x.grad = None
        torch.manual_seed(1)
        execution = flip(torch.zeros(1), torch.zeros(1)).execution
        h = x
        for center, delta in leaves:
            center.grad = delta.grad = None
            w = flip(center + delta, center, delta, execution=execution)
            h = call(segment(w), h)
        loss = h.square().sum()
        loss.backward()
        grads = [x.grad, *(leaf.grad for pair in leaves for leaf in pair)]
        found.append([loss.detach(), *grads, torch.get_rng_state()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "use", [F.linear, lambda x, w: x @ w.t(), lambda x, w: x @ w[:, [0, 2, 1]].t()]
)
def test_first_use_inside_vmap(use):
    """Signs are those of the execution, not of a call: drawn once, whatever its randomness."""
    torch.manual_seed(0)
    center, delta, x = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 5, 3)
    for randomness in ("error", "same", "different"):
        w = flip(center + delta, center, delta)
        mapped = torch.func.vmap(lambda x, w=w: use(x, w), randomness=randomness)(x)
        for k in range(4):
            torch.testing.assert_close(mapped[k], use(x[k], w))
        assert len(w.materialize(5).unique(dim=0)) > 1


def test_a_map_before_the_codes_are_drawn_is_the_map_of_the_signs():
    handler = Recording(on_missing_rule="error")

    def model(x):
        w = normal(4, 3)
        moved = torch.cat([w.flip(0)[1:], w[[2, 0]].roll(1, 1)])
        return F.linear(x, w), F.linear(x, moved)

    first, second = handler(model)(X)
    w = handler.seen["w"].materialize()
    moved = torch.cat([w.flip(1)[:, 1:], w[:, [2, 0]].roll(1, 2)], 1)
    torch.testing.assert_close(first, torch.einsum("ni,noi->no", X, w))
    torch.testing.assert_close(second, torch.einsum("ni,noi->no", X, moved))
