# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Evolution strategies: exact for the explicit population, unbiased, and clear about errors."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_flipout import FlipoutError
from pyro_flipout.infer import FlipES, _es_base, _es_fitness, flip_es
from pyro_flipout.infer._es_population import MemberDraw, Population, sign_sums
from pyro_flipout.signs import dense_signs, draw_codes
from tests.helpers import Z, mlp

MEMBERS = 6


class ConvPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.grouped(torch.tanh(self.conv(x))).amax((2, 3)))


class LSTMPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.norm(self.lstm(x)[0]))[:, -1]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.bag = nn.EmbeddingBag(7, 4, mode="sum")
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens):
        h = self.body(self.embed(tokens)).mean(1) + self.bag(tokens)
        return h @ self.embed.weight.t()


POLICIES = {
    "mlp": (mlp, lambda n: torch.randn(n, 4)),
    "conv": (ConvPolicy, lambda n: torch.randn(n, 2, 6, 6)),
    "lstm": (LSTMPolicy, lambda n: torch.randn(n, 4, 3)),
    "tokens": (Tokens, lambda n: torch.randint(7, (n, 5))),
}


def evaluate(es, x, num_members=MEMBERS, rows=1):
    """Output, and the explicit members."""
    with es.perturb(num_members):
        out = es.module(x)
    members = [es.member(n) for n in range(num_members)]
    per_member = x.unflatten(0, (num_members, rows))
    expected = [
        functional_call(es.module, w, (v,)) for w, v in zip(members, per_member, strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected).detach(), atol=1e-10, rtol=1e-10)
    return out, members


def explicit_gradient(es, members, values, sigma):
    """Of minus the fitness, from eq. 5 on explicit weights."""
    out = {}
    for name, w in es.module.named_parameters():
        if name not in members[0]:
            continue
        s = sigma(name) if callable(sigma) else sigma
        terms = [u * (m[name] - w.detach()) for u, m in zip(values, members, strict=True)]
        out[name] = -sum(terms) / len(members) / s**2
    return out


def assert_gradients(es, expected):
    for name, p in es.module.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-10, rtol=1e-10)
        else:
            assert p.grad is None


# -------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("num_bases", "keep_draws"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_explicit_population(policy, rows, num_bases, keep_draws, antithetic, float64):
    make, data = POLICIES[policy]
    es = FlipES(
        make(),
        sigma=0.3,
        num_bases=num_bases,
        keep_draws=keep_draws,
        antithetic=antithetic,
        fitness_shaping="none",
    )
    _, members = evaluate(es, data(MEMBERS * rows), rows=rows)
    fitness = torch.randn(MEMBERS)
    es.backward(fitness)
    assert_gradients(es, explicit_gradient(es, members, fitness, 0.3))
    assert all(p.grad is not None for p in es.module.parameters())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_single_member(rows, float64):
    es = FlipES(mlp(), sigma=0.3, fitness_shaping="none")
    for _ in range(3):
        es.module.zero_grad()
        _, members = evaluate(es, torch.randn(rows, 4), 1, rows)
        es.backward(torch.ones(1))
        assert_gradients(es, explicit_gradient(es, members, [1.0], 0.3))


def test_planted_bug_in_the_estimate(float64, monkeypatch):
    # Sums over the wrong members: those of a population without signs for the columns.
    monkeypatch.setattr(MemberDraw, "combined", property(lambda self: self.codes[0]))
    es = FlipES(mlp(), sigma=0.3)
    with pytest.raises(AssertionError):
        evaluate(es, torch.randn(MEMBERS, 4))


def test_planted_bug_in_the_layout(float64, monkeypatch):
    # Two rows in a row belong to one member, of three that should.
    monkeypatch.setattr(Population, "group_size", property(lambda self: 2))
    es = FlipES(nn.Linear(4, 3, bias=False), sigma=0.3)
    with pytest.raises(AssertionError, match="not close"):
        evaluate(es, torch.randn(MEMBERS * 3, 4), rows=3)


@pytest.mark.parametrize("num_members", [1, 2, 5, 64, 100])
def test_sign_sums(num_members, float64):
    codes, values = draw_codes((7, 3)), torch.randn(num_members)
    expected = torch.einsum("n,nij->ij", values, dense_signs(codes, num_members, torch.float64))
    torch.testing.assert_close(sign_sums(codes, values), expected)


def test_half_precision():
    net = mlp().bfloat16()
    es = FlipES(net, sigma=0.1)
    with es.perturb(8):
        out = net(torch.randn(8, 4).bfloat16())
    es.backward(out.float().sum(1))
    assert net[0].weight.grad.dtype == torch.bfloat16
    assert net[0].weight.grad.isfinite().all()


def test_members_keep_their_weights_within_perturb(float64):
    net = mlp()
    es = FlipES(net, sigma=0.3)
    with es.perturb(4):
        one, two = net(x := torch.randn(4, 4)), net(x.repeat_interleave(2, 0))
        again = net(x)
    torch.testing.assert_close(one, again)
    torch.testing.assert_close(two, one.repeat_interleave(2, 0))
    with es.perturb(4):
        assert not torch.allclose(net(x), one)


class StepPolicy(nn.Module):
    """A recurrent policy that is called once a step of an episode."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x, state):
        state = self.cell(x, state)
        return self.head(state), state


@pytest.mark.parametrize("num_bases", [1, 2])
def test_a_recurrent_policy_over_an_episode(num_bases, float64):
    net, x = StepPolicy(), torch.randn(4, MEMBERS, 3)
    es = FlipES(net, sigma=0.3, num_bases=num_bases, fitness_shaping="none")
    state = torch.zeros(MEMBERS, 5)
    with es.perturb(MEMBERS):
        for step in x:
            out, state = net(step, state)
    members = [es.member(n) for n in range(MEMBERS)]
    for n, own in enumerate(members):
        state = torch.zeros(1, 5)
        for step in x:
            expected, state = functional_call(net, own, (step[n : n + 1], state))
        torch.testing.assert_close(out[n : n + 1], expected.detach(), atol=1e-10, rtol=1e-10)
    es.backward(out[:, 0])
    assert_gradients(es, explicit_gradient(es, members, out[:, 0], 0.3))


# ------------------------------------------------------------------------- statistics


def quadratic_gradients(es, target, repeats, num_members):
    """Estimates for the fitness ``-|w - target|^2 / 2``, whose answer is ``w - target``."""
    grads = []
    for _ in range(repeats):
        es.module.weight.grad = None
        with es.perturb(num_members):
            w = es.module(torch.eye(3).repeat(num_members, 1))  # columns of each member's weight
        w = w.view(num_members, 3, -1).mT
        es.backward(30 - (w - target).pow(2).sum((1, 2)) / 2)
        grads.append(es.module.weight.grad.clone())
    return torch.stack(grads)


OPTIONS = [
    {"fitness_shaping": "none"},
    {"fitness_shaping": "center"},
    {"fitness_shaping": "center", "num_bases": 4},
    {"antithetic": True},
    {"antithetic": True, "num_bases": 2},
    {"distribution": "rademacher"},
]


def check_unbiased(options):
    torch.manual_seed(0)
    net, target = nn.Linear(3, 2, bias=False), torch.ones(2, 3)
    es = FlipES(net, sigma=0.5, seed=1, **options)
    grads = quadratic_gradients(es, target, 200, 64)
    error = grads.mean(0) - (net.weight.detach() - target)
    assert (error.abs() < Z * grads.std(0) / len(grads) ** 0.5).all()
    return grads.var(0).sum()


@pytest.mark.parametrize("options", OPTIONS)
def test_unbiased_for_a_quadratic(options, float64):
    check_unbiased(options)


def test_unbiased_planted_bug(float64, monkeypatch):
    right = flip_es.SHAPINGS["center"]
    monkeypatch.setitem(flip_es.SHAPINGS, "center", lambda f, antithetic: 3 * right(f, antithetic))
    with pytest.raises(AssertionError):
        check_unbiased({"fitness_shaping": "center"})


def test_center_and_antithetic_have_less_variance(float64):
    raw, center = check_unbiased(OPTIONS[0]), check_unbiased(OPTIONS[1])
    antithetic = check_unbiased(OPTIONS[3])
    assert center < 0.5 * raw
    assert antithetic < 0.5 * raw


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize("num_bases", [1, 2])
def test_antithetic(num_bases, float64):
    net = ConvPolicy()
    es = FlipES(net, sigma=0.3, antithetic=True, num_bases=num_bases)
    with es.perturb(8):
        net(torch.randn(8, 2, 6, 6))
    members = [es.member(n) for n in range(8)]
    for name, p in net.named_parameters():
        for n in range(0, 8, 2):
            torch.testing.assert_close(members[n][name] + members[n + 1][name], 2 * p.detach())
    flat = torch.stack([torch.cat([w.flatten() for w in m.values()]) for m in members])
    assert len(flat.unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("shaping", "fitness", "values"),
    [
        ("none", [3.0, 1.0, 4.0, 1.0], [3.0, 1.0, 4.0, 1.0]),
        ("center", [3.0, 1.0, 4.0, 0.0], [4 / 3, -4 / 3, 8 / 3, -8 / 3]),
        ("normalize", [3.0, 1.0, 3.0, 1.0], [1.0, -1.0, 1.0, -1.0]),
        ("normalize", [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]),
        ("rank", [30.0, 1.0, 400.0, 2.0], [1 / 6, -1 / 2, 1 / 2, -1 / 6]),
        ("rank", [3.0, 1.0, 4.0, 1.0], [1 / 6, -1 / 3, 1 / 2, -1 / 3]),
        ("rank", [2, 2, 2, 2], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_fitness_shaping(shaping, fitness, values, float64):
    es = FlipES(mlp(), sigma=0.3, fitness_shaping=shaping, num_bases=2)
    _, members = evaluate(es, torch.randn(4, 4), 4)
    es.backward(torch.tensor(fitness))
    assert_gradients(es, explicit_gradient(es, members, values, 0.3))


@pytest.mark.parametrize(
    ("shaping", "dtype", "scale", "count"),
    [
        ("normalize", torch.float16, 1000.0, 512),
        ("normalize", torch.float32, 1e20, 4),
        ("rank", torch.float16, 1.0, 70_000),
    ],
)
def test_shaping_does_not_overflow(shaping, dtype, scale, count):
    fitness = torch.linspace(-1, 1, count).mul(scale).to(dtype)
    shaped = _es_fitness.SHAPINGS[shaping](_es_fitness.checked_fitness(fitness, count), False)
    expected = fitness.double() / scale
    if shaping == "normalize":
        expected = (expected - expected.mean()) / expected.std(correction=0)
    else:  # ties share a rank
        expected = expected / 2
    torch.testing.assert_close(shaped.double(), expected, atol=2e-3, rtol=1e-3)


def test_groups_and_hidden_weights(float64):
    net = mlp((4, 8, 8, 3))
    sigmas = {"0.weight": 0.1, "*.bias": 0.2, nn.Linear: 0.4}
    es = FlipES(net, sigma=sigmas, hide=["2"], fitness_shaping="none")
    _, members = evaluate(es, torch.randn(MEMBERS, 4))
    assert set(members[0]) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    fitness = torch.randn(MEMBERS)
    es.backward(fitness)
    sigma = {"0.weight": 0.1, "0.bias": 0.2, "4.weight": 0.4, "4.bias": 0.2}
    assert_gradients(es, explicit_gradient(es, members, fitness, sigma.get))
    spread = torch.cat([m["4.weight"] - net[4].weight.detach() for m in members]).pow(2).mean()
    assert 0.1 < spread.sqrt() < 1


def test_frozen_parameters(float64):
    net = mlp()
    net[0].requires_grad_(False)
    assert [w.name for w in FlipES(net, sigma=0.1).weights] == ["2.weight", "2.bias"]
    es = FlipES(net.requires_grad_(False), sigma=0.1)
    evaluate(es, torch.randn(MEMBERS, 4))
    es.backward(torch.randn(MEMBERS))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert all(p.grad is not None for p in net.parameters())


def test_weight_decay_and_accumulation(float64):
    net = mlp()
    twice = [copy.deepcopy(net), net]
    fitness = torch.randn(2, MEMBERS)
    for model, decay in zip(twice, (0.0, 0.25), strict=True):
        es = FlipES(model, sigma=0.3, weight_decay=decay, num_bases=2, seed=0)
        for own in fitness:
            evaluate(es, torch.randn(MEMBERS, 4))
            es.backward(own)
    for a, b in zip(*(m.parameters() for m in twice), strict=True):
        torch.testing.assert_close(b.grad, a.grad + 2 * 0.25 * a)


def test_seed():
    def run(seed):
        torch.manual_seed(5)
        net = mlp()
        state = torch.get_rng_state()
        es = FlipES(net, sigma=0.3, seed=seed, num_bases=2)
        out = []
        for _ in range(2):
            with es.perturb(4):
                out.append(net(torch.ones(4, 4)))
        assert seed is None or torch.equal(torch.get_rng_state(), state)
        return torch.stack(out)

    assert torch.equal(run(3), run(3))
    assert torch.equal(run(None), run(None))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(*run(3))


def test_rademacher():
    es = FlipES(mlp((40, 30)), sigma=0.25, distribution="rademacher")
    with es.perturb(2):
        moved = es.member(0)["0.weight"] - es.module[0].weight.detach()
    torch.testing.assert_close(moved.abs(), torch.full((30, 40), 0.25))
    assert moved.sum().abs() < Z * 0.25 * 1200**0.5


def test_time_major(float64):
    net = nn.LSTM(3, 4)
    es = FlipES(net, sigma=0.3, example_dim=1)
    x, state = torch.randn(5, 4, 3), (torch.randn(1, 4, 4), torch.randn(1, 4, 4))
    with es.perturb(4):
        out = net(x, state)[0]
    for n in range(4):
        own = [s[:, n : n + 1] for s in state]
        expected = functional_call(net, es.member(n), (x[:, n : n + 1], own))[0]
        torch.testing.assert_close(out[:, n : n + 1], expected)


def test_several_arguments_and_results(float64):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, x, state=None, scale=1.0):
            h = self.cell(x, state["h"]) * scale
            return {"h": h}, (h.sum(1), None)

    net = Two()
    es = FlipES(net, sigma=0.3, num_bases=2)
    x, h = torch.randn(4, 3), torch.randn(4, 4)
    with es.perturb(4):
        state, (total, nothing) = net(x, state={"h": h}, scale=2.0)
    assert nothing is None
    for n in range(4):
        args = x[n : n + 1], {"h": h[n : n + 1]}, 2.0
        expected = functional_call(net, es.member(n), args)
        torch.testing.assert_close(state["h"][n : n + 1], expected[0]["h"])
        torch.testing.assert_close(total[n : n + 1], expected[1][0])


# ----------------------------------------------------------------- nothing else moves


def test_module_is_left_as_it_was():
    net = LSTMPolicy()
    before, x = dict(net.named_parameters()), torch.randn(4, 3, 3)
    values, quiet = copy.deepcopy(net.state_dict()), net(x)
    es = FlipES(net, sigma=0.3)
    with es.perturb(4):
        assert not net(x).requires_grad
        assert "forward" in vars(net)
        assert "weight" not in vars(net.head)
    with pytest.raises(ZeroDivisionError), es.perturb(4):
        net(x)
        raise ZeroDivisionError
    assert "forward" not in vars(net)
    assert torch.equal(net(x), quiet)
    assert net(x).requires_grad
    assert all(p is before[name] for name, p in net.named_parameters())
    assert all(torch.equal(v, values[name]) for name, v in net.state_dict().items())
    with pytest.raises(RuntimeError, match="there is no population"):
        es.backward(torch.zeros(4))


def test_an_optimizer_climbs():
    net = nn.Linear(3, 1)
    es = FlipES(net, sigma=0.1, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    x = torch.randn(256, 3)
    for _ in range(100):
        optimizer.zero_grad()
        with es.perturb(256):
            out = net(x)
        es.backward(-(out[:, 0] - 2).pow(2))
        optimizer.step()
    torch.testing.assert_close(net.bias.detach(), torch.tensor([2.0]), atol=0.2, rtol=0)


def test_memory_does_not_grow_with_the_population():
    net = nn.Linear(40, 30)
    es = FlipES(net, sigma=0.1, num_bases=4, keep_draws=False)
    sizes = []
    for num_members in (8, 4096):
        with es.perturb(num_members):
            pass
        kept = [base._kept for base in es._bases]
        codes = [c.numel() for base in es._bases for d in base.draws for c in d.codes]
        sizes.append((kept, sum(codes)))
    assert sizes[0] == sizes[1] == ([None] * 4, 4 * (40 + 30 + 30))


class Largest(TorchDispatchMode):
    """Watches for the number of elements of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *(t.numel() for t in tensors)])
        return out


def largest_tensor(num_members, width=128):
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
    es, x = FlipES(net, sigma=0.1), torch.zeros(num_members, width)
    with Largest() as largest:
        with es.perturb(num_members):
            out = net(x)
        es.backward(out[:, 0])
    return largest.size


@pytest.mark.parametrize("num_members", [2, 64, 1024])
def test_no_weights_of_a_member_are_ever_made(num_members):
    # The largest are a weight, or the data of all members, whichever is larger.
    assert largest_tensor(num_members) <= 128 * max(128, num_members)


def test_planted_bug_in_memory(monkeypatch):
    def dense(codes, values):
        signs = dense_signs(codes, len(values), values.dtype)
        return torch.einsum("n,n...->...", values, signs)

    monkeypatch.setattr(_es_base, "sign_sums", dense)
    assert largest_tensor(64) >= 64 * 128 * 128


def test_draws_made_again_are_the_same():
    grads = []
    for keep_draws in (True, False):
        torch.manual_seed(0)
        net = mlp()
        es = FlipES(net, sigma=0.3, num_bases=2, keep_draws=keep_draws, seed=7)
        with es.perturb(8):
            out = net(torch.ones(8, 4))
        es.backward(out.sum(1))
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*grads)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": 0.0}, r"sigma=0.0 for '\*'.*hide"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sigma": {"0": 0.1}}, "no group of sigma means '2.weight'.*'\\*'"),
        ({"sigma": {"9": 0.1, "*": 0.1}}, "group '9', which means none"),
        ({"num_bases": 0}, "num_bases=0"),
        ({"distribution": "cauchy"}, "'cauchy', expected one of .*'rademacher'"),
        ({"fitness_shaping": "ranks"}, "'ranks', expected one of .*'rank'"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"example_dim": -1}, "example_dim=-1"),
        ({"hide": ["nowhere"]}, "'nowhere'"),
        ({"sigma": "0.1"}, "sigma='0.1' for"),
        ({"sigma": True}, "sigma=True for"),
        ({"sigma": {"*": None}}, "sigma=None for"),
        ({"sigma": {}}, "no group of sigma means '0.weight'"),
        ({"num_bases": 1.0}, "num_bases=1.0"),
        ({"weight_decay": "0"}, "weight_decay='0'"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"seed": 0.5}, "FlipES: got seed=0.5, expected an integer"),
        ({"seed": "1"}, "seed='1'"),
    ],
)
def test_options(options, words):
    with pytest.raises(ValueError, match=words):
        FlipES(mlp(), **{"sigma": 0.1, **options})


def test_what_is_no_module():
    with pytest.raises(TypeError, match="FlipES: got module=3, expected a torch.nn.Module"):
        FlipES(3, sigma=0.1)


@pytest.mark.parametrize("num_members", [4.0, 2.5, True, "4", 0, -2])
def test_numbers_of_members(num_members):
    es = FlipES(mlp(), sigma=0.1)
    words = f"num_members={num_members!r}, expected a positive multiple"
    with pytest.raises(ValueError, match=words):
        es.perturb(num_members).__enter__()


def evaluated(num_members=4, **options):
    net = mlp()
    es = FlipES(net, sigma=0.1, **options)
    with es.perturb(num_members):
        net(torch.randn(num_members, 4))
    return es


@pytest.mark.parametrize(
    ("fitness", "error", "words"),
    [
        (torch.zeros(3), ValueError, r"shape \(3,\), expected \(4,\).*view\(4, -1\).mean\(1\)"),
        (torch.zeros(4, 1), ValueError, r"shape \(4, 1\)"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
        (
            torch.tensor([0, float("nan"), 0, float("inf")]),
            ValueError,
            r"1 \(nan\), 3 \(inf\) of 4",
        ),
        ([0.0] * 4, TypeError, "type list"),
        (torch.zeros(4, dtype=torch.cfloat), TypeError, "complex64"),
    ],
)
def test_fitness_errors(fitness, error, words):
    es = evaluated()
    with pytest.raises(error, match=words):
        es.backward(fitness)
    es.backward(torch.zeros(4))  # the population is there still


def test_backward_needs_a_population():
    es = evaluated()
    es.backward(torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"no population.*with es.perturb"):
        es.backward(torch.zeros(4))
    with es.perturb(4):
        es.module[0](torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="Sequential was not called within perturb"):
        es.backward(torch.zeros(4))
    with es.perturb(4):
        es.module(torch.zeros(4, 4))
        with pytest.raises(RuntimeError, match="leave perturb first"):
            es.backward(torch.zeros(4))
    for number in (4, -1, 0.5, True, "0"):
        with pytest.raises(IndexError, match=f"got {number!r}, but the population has 4 members"):
            es.member(number)


def test_perturb_errors():
    es = FlipES(mlp(), sigma=0.1, num_bases=2, antithetic=True)
    with pytest.raises(ValueError, match="num_members=3, expected a positive multiple .*=2"):
        es.perturb(3).__enter__()
    with pytest.raises(ValueError, match="num_members=6, which is 3 for each base.*pairs"):
        es.perturb(6).__enter__()
    with es.perturb(4):
        with pytest.raises(RuntimeError, match="active already"):
            es.perturb(4).__enter__()
        with pytest.raises(
            ValueError, match=r"\(6, 4\) with 6 rows.*positive multiple of the 4 members"
        ):
            es.module(torch.zeros(6, 4))
        with pytest.raises(ValueError, match="no argument of the module is a tensor"):
            es.module(3)


def test_layouts_that_cannot_be_divided():
    class Rows(nn.LSTM):
        pass

    net = Rows(3, 4, batch_first=True)
    es = FlipES(net, sigma=0.1, num_bases=2)
    x, state = torch.zeros(4, 2, 3), (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))
    with es.perturb(4):
        with pytest.raises(ValueError, match=r"one of shape \(1, 4, 4\) beside data of 4 rows"):
            net(x, state)
        with pytest.raises(ValueError, match=r"result .*shape \(1, 2, 4\) for 2 rows"):
            net(x)


@dataclass
class Batch:
    x: torch.Tensor
    scale: float = 2.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        return self.net(batch.x) * batch.scale


def test_bases_cut_dataclasses(float64):
    """Each block of rows meets its own base, as the members' weights say."""
    es, x = FlipES(Scaled(), sigma=0.3, num_bases=2), torch.randn(4, 4)
    with es.perturb(4):
        out = es.module(Batch(x))
        for n in range(4):
            weights = es.member(n)
            plain = functional_call(Scaled(), weights, (Batch(x[n : n + 1]),))
            torch.testing.assert_close(out[n : n + 1], plain, rtol=1e-10, atol=1e-10)


def test_bases_refuse_what_they_cannot_cut():
    class Plain:
        def __init__(self, x):
            self.x = x

    class Takes(Scaled):
        def forward(self, x, more):
            return self.net(x)

    es, x = FlipES(Takes(), sigma=0.1, num_bases=2), torch.randn(4, 4)
    with es.perturb(4):
        for more in (Plain(x), x.numpy()):
            words = f"a {type(more).__name__} that holds data of 4 rows; use num_bases=1"
            with pytest.raises(TypeError, match=words):
                es.module(x, more)
        assert es.module(x, Plain(x[:3])).shape == (4, 3)


def test_a_weight_that_cannot_be_flipped():
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.transpose(0, 1).flatten(0, 1))

    net = Flattens()
    es = FlipES(net, sigma=0.1)
    words = r"weight 'linear.weight' cannot .*12 rows.*hide="
    with pytest.raises(FlipoutError, match=words), es.perturb(4):
        net(torch.zeros(4, 3, 4))
    assert "weight" not in vars(net.linear)
