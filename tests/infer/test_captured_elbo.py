"""Replayed steps: the same numbers as those of the program, without running it."""

import contextlib
import copy
import functools
import itertools
import math
import pickle
import random
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_flipout import FlipoutError, flipout
from pyro_flipout.infer import (
    AutoMeanField,
    MeanFieldELBO,
    _tensor_loss,
    captured,
    captured_elbo,
    tempered,
)
from pyro_flipout.nn import bayesianize


class Normed(nn.Module):
    """Buffers that the forward pass changes, and noise that is not the guide's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.layers(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.lstm(x.reshape(-1, 3, 2))[0][:, -1])


class Tokens(nn.Module):
    """Embeddings of tokens and of positions, attention, and rows picked by data."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 4), nn.Embedding(6, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        ids = (x * 2).long().abs() % 11
        h = self.tokens(ids) + self.positions(torch.arange(6))
        return self.out(self.layer(h).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    )


NETS = {
    "dense": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "convolutional": convolutional,
    "normed": Normed,
    "recurrent": Recurrent,
    "tokens": Tokens,
}

ELBOS = {
    "MeanFieldELBO": MeanFieldELBO,
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "tempered": lambda: tempered(MeanFieldELBO(), 0.1),
}


def classifier(net):
    def model(x, y):
        logits = net(x)
        with pyro.plate("data", len(x)), poutine.scale(scale=100 / len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def batches(count, size=4):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def train(model, guide, elbo, data, each=lambda step: None, wrap=flipout):
    """Losses and final parameters; every call starts from the same state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(wrap(model), guide(model), pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = []
    for i, batch in enumerate(data):
        each(i)
        losses.append(svi.step(*batch))
    stored = pyro.get_param_store().named_parameters()
    return losses, {name: value.detach().clone() for name, value in stored}


def assert_same(found, expected, exact=True):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(value, expected[1][name], **tolerance)


# ---------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    ("net", "guide", "elbo"),
    [
        *itertools.product(["dense"], [AutoMeanField, AutoNormal], ELBOS),
        ("convolutional", AutoMeanField, "Trace_ELBO"),
        ("normed", AutoNormal, "MeanFieldELBO"),
        ("recurrent", AutoMeanField, "MeanFieldELBO"),
        ("tokens", AutoMeanField, "tempered"),
    ],
)
@pytest.mark.filterwarnings("ignore:flipout. sites .* keep their shared draws. examples mix")
def test_parameters_are_the_same_to_the_last_bit(net, guide, elbo):
    found = []
    for wrap in (captured, lambda e: e):
        pyro.set_rng_seed(1)
        layers = bayesianize(NETS[net]())
        run = train(classifier(layers), guide, wrap(ELBOS[elbo]()), batches(7))
        found.append((*run, list(layers.buffers())))
    assert_same(*found)
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("elbo", [MeanFieldELBO, Trace_ELBO])
def test_particles(elbo):
    model = classifier(bayesianize(NETS["dense"]()))
    found = [
        train(model, AutoMeanField, wrap(elbo(num_particles=3)), batches(6))
        for wrap in (captured, lambda e: e)
    ]
    assert_same(*found, exact=False)


def test_vectorized_particles():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 6]).to_event(2))
        mean = F.linear(x, w).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y.float())

    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    found = [
        train(model, AutoMeanField, wrap(MeanFieldELBO(**options)), batches(6))
        for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, MeanFieldELBO])
@pytest.mark.parametrize("guide", [AutoDelta, AutoMultivariateNormal])
def test_other_guides(guide, elbo):
    model = classifier(bayesianize(NETS["dense"]()))
    found = [
        train(model, guide, wrap(elbo()), batches(6), wrap=lambda m: m)
        for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)


@pytest.mark.filterwarnings("ignore:flipout. no site of the model can be flipped")
def test_score_functions():
    """Of sites that cannot be reparametrised, with dependence that plates tell."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(z + x[:, 0], 1.0), obs=y.float())

    def guide(_):
        def run(x, y):
            slope = pyro.param("slope", torch.tensor(0.3))
            spread = pyro.param("spread", torch.tensor(0.7), constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=slope * x[:, 0] / spread))

        return run

    found = [
        train(model, guide, wrap(Trace_ELBO()), batches(7)) for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)


def test_subsamples_are_drawn_anew():
    x, y = batches(1, 9)[0]

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        with pyro.plate("data", 9, subsample_size=4) as index:
            logits = F.linear(x[index], w)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y[index])

    found = [
        train(model, AutoMeanField, wrap(MeanFieldELBO()), [()] * 8)
        for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)
    assert len(set(found[0][0])) == 8


@pytest.mark.parametrize(
    "pick",
    [
        lambda w, y: w[y],
        lambda w, y: w.index_select(0, y),
        lambda w, y: w[None, ..., y, :][0],
        lambda w, y: w.T[:, y].T,
    ],
)
def test_rows_that_data_pick(pick):
    """An index that repeats one row while the program is recorded, and does not later."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        mean = F.linear(x, pick(w, y)[None].squeeze(0)).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, 1.0), obs=x[:, 0])

    rows = [[1, 1]] * 2 + [[0, 2]] * 5
    data = [(x, torch.tensor(r)) for (x, _), r in zip(batches(7), rows, strict=True)]
    found = [
        train(model, AutoMeanField, wrap(MeanFieldELBO()), data) for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)


def test_what_no_one_uses():
    """Draws, and statistics of a batch, go on though nothing depends on them; and odd slices."""

    def run(elbo):
        pyro.set_rng_seed(1)
        norm = nn.BatchNorm1d(6)

        def model(x, y):
            norm(x)
            torch.rand(3)
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
            logits = F.linear(x[:, ::2], w[:, 1::2]) + F.linear(x[:, -2:], w[:, 1:3])
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        found = train(model, AutoMeanField, elbo, batches(8))
        return found, norm.running_mean, norm.num_batches_tracked

    ours, theirs = run(captured(MeanFieldELBO())), run(MeanFieldELBO())
    assert_same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


def test_what_a_program_writes_to():
    """Its own state, through a view, and an argument: once a step, while they are compared too."""

    def run(elbo):
        state = torch.zeros(2, 3)

        def model(x, y):
            x += 0.5
            state[0].mul_(0.9).add_(x[:, :3].mean(0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
            with pyro.plate("data", len(x)):
                logits = F.linear(x, w) + state[0]
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

        data = batches(7)
        return train(model, AutoMeanField, elbo, data), state, torch.stack([x for x, _ in data])

    ours, theirs = run(captured(MeanFieldELBO())), run(MeanFieldELBO())
    assert_same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])


def test_a_step_runs_no_program():
    net = bayesianize(NETS["dense"]())
    calls = []
    model = classifier(net)

    def counted(x, y):
        calls.append(len(x))
        model(x, y)

    guide = AutoMeanField(model)
    wrapped = flipout(counted, audit=False)  # which would run the program, too
    svi = SVI(wrapped, guide, pyro.optim.Adam({"lr": 0.01}), captured(MeanFieldELBO()))
    for batch in batches(9):
        svi.step(*batch)
    assert calls == [4] * 3  # as it is, recorded, compared


# --------------------------------------------------------------------- what may change


def regression(factor=lambda x: 1.0, scale=lambda: 1.0):
    """A model whose data Python may multiply by a factor, and whose noise it may set."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 6]).to_event(2))
        mean = factor(x) * F.linear(x, w).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale()), obs=y.float())

    return model


class Switch(nn.Module):
    """Reads its mode where no forward runs."""

    def model(self, x, y):
        return regression(lambda x: 1.0 if self.training else 3.0)(x, y)


class Box:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x, y):
        self.net.model(x, y)


SWITCH = types.SimpleNamespace(net=None)


def model_of_a_global(x, y):
    helper_of_a_global(x, y)


def helper_of_a_global(x, y):
    SWITCH.net.model(x, y)


def in_a_list(net):
    nets = {"first": [[net]]}

    def model(x, y):
        nets["first"][0][0].model(x, y)

    return model


def by_default(net):
    def model(x, y, *, used=net):
        used.model(x, y)

    return model


def of_a_global(net):
    SWITCH.net = net
    return model_of_a_global


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net.model,
        lambda net: functools.partial(net.model),
        lambda net: lambda x, y: net.model(x, y),
        lambda net: poutine.scale(net.model, scale=2.0),
        in_a_list,
        by_default,
        Box,
        of_a_global,
    ],
    ids=["method", "partial", "closure", "handler", "list", "default", "slots", "global"],
)
def test_modes_of_modules_that_are_not_called(wrap):
    modes = [True] * 5 + [False] * 5 + [True] * 2

    def run(elbo):
        net = Switch()
        each = lambda i: net.train(modes[i])  # noqa: E731
        return train(wrap(net), AutoMeanField, elbo, batches(12), each)

    elbo = captured(MeanFieldELBO())
    assert_same(run(elbo), run(MeanFieldELBO()))
    assert counted_programs(elbo) == 2


def test_a_module_that_changes_its_mode_while_it_runs():
    """What counts is the mode before the call."""
    norm = nn.Dropout(0.5)

    def frozen(x):
        norm.eval()
        features = norm(x)
        norm.train()
        return features[:, 0]

    elbo = captured(MeanFieldELBO())
    found = [
        train(regression(frozen), AutoMeanField, e, batches(8)) for e in (elbo, MeanFieldELBO())
    ]
    assert_same(*found)
    assert counted_programs(elbo) == 1


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store")
@pytest.mark.parametrize("registered", [True, False])
def test_parameters_that_are_frozen_and_unfrozen(registered):
    def run(elbo):
        pyro.set_rng_seed(1)
        net = nn.Linear(6, 6)

        def program(x, y):
            if registered:
                pyro.module("net", net)
            regression()(net(x), y)

        def each(i):
            net.weight.requires_grad_(not 4 <= i < 7)
            net.bias.requires_grad_(i >= 7)
            states.append(net.bias.detach().clone())

        states = []
        run = train(program, AutoMeanField, elbo, batches(11), each)
        return run, torch.stack(states), net.weight.grad

    ours, theirs = run(captured(MeanFieldELBO())), run(MeanFieldELBO())
    assert_same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert registered == (len(ours[1].unique(dim=0)) > 1)
    assert registered or torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("group_size", (1, 2)),
        ("hide", (None, frozenset({"w"}))),
        ("expose", (None, frozenset({"b"}))),
        ("hide_fn", (None, lambda site: site["name"] == "w")),
        ("expose_fn", (None, lambda site: site["name"] == "b")),
    ],
)
def test_options_of_our_handler(name, values, around):
    """Set between steps, of the handler that wraps the model or is around the step."""

    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        regression(lambda x: 1.0 + b)(x, y)

    def run(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        handler = flipout()
        program = model if around else handler(model)
        svi = SVI(program, AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = []
        for i, batch in enumerate(batches(12)):
            setattr(handler, name, values[5 <= i < 9])
            with handler if around else contextlib.nullcontext():
                losses.append(svi.step(*batch))
        return losses, {k: v.detach() for k, v in pyro.get_param_store().named_parameters()}

    elbo = captured(MeanFieldELBO())
    assert_same(run(elbo), run(MeanFieldELBO()))
    assert counted_programs(elbo) == 2


def handler_set_between_steps(handler, change):
    model = regression()

    def run(elbo):
        changed = handler()
        each = lambda i: change(changed, i)  # noqa: E731
        return train(model, AutoMeanField, elbo, batches(10), each, lambda m: changed(flipout(m)))

    return run(captured(MeanFieldELBO())), run(MeanFieldELBO())


def test_options_of_pyros_handlers():
    found = handler_set_between_steps(
        lambda: poutine.scale_messenger.ScaleMessenger(2.0),
        lambda handler, i: setattr(handler, "scale", 2.0 + (i > 4)),
    )
    assert_same(*found)


def test_options_that_are_changed_in_place():
    def change(handler, i):
        if i == 5:
            handler.hide.add("w")

    def made():
        handler = flipout()
        handler.hide = set()
        return handler

    def run(elbo):
        handler = made()
        each = lambda i: change(handler, i)  # noqa: E731
        return train(regression(), AutoMeanField, elbo, batches(10), each, lambda m: handler(m))

    assert_same(run(captured(MeanFieldELBO())), run(MeanFieldELBO()))


def test_sites_that_a_tempering_handler_hides():
    def run(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        handler, model = tempered(factor=0.5), regression()
        svi = SVI(flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = []
        for i, batch in enumerate(batches(10)):
            handler.hide = frozenset({"w"} if i > 4 else ())
            with handler:
                losses.append(svi.step(*batch))
        return losses, {}

    assert_same(run(captured(MeanFieldELBO())), run(MeanFieldELBO()))


@pytest.mark.parametrize("view", [True, False])
def test_explicit_statistics_of_batch_norm(view):
    """A replay that is compared with the program does not update them twice."""

    def run(elbo):
        mean, var = torch.zeros(2, 6), torch.ones(2, 6)
        mean, var = (mean[0], var[1]) if view else (mean[0].clone(), var[1].clone())
        norm = lambda x: F.batch_norm(x, mean, var, training=True)[:, 0]  # noqa: E731
        return train(regression(norm), AutoMeanField, elbo, batches(14)), mean, var

    ours, theirs = run(captured(MeanFieldELBO())), run(MeanFieldELBO())
    assert_same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])


def test_numbers_of_tensors_that_the_program_holds():
    """They may be read, and are looked at before each replay."""
    held, table = torch.tensor(0.7), torch.tensor([0.5, 2.0])

    def run(elbo):
        table[1] = 2.0
        factor = lambda x: held.item() * float(table.numpy()[1])  # noqa: E731

        def each(i):
            held.fill_(0.9 if 4 <= i < 7 else 0.7)
            table[1] = 2.0 if i < 9 else 3.0

        return train(regression(factor), AutoMeanField, elbo, batches(13), each)

    elbo = captured(MeanFieldELBO())
    assert_same(run(elbo), run(MeanFieldELBO()))
    assert counted_programs(elbo) == 3


def test_shapes_that_do_not_change_may_depend_on_data():
    found = [
        train(regression(lambda x: x[torch.arange(4) < 2].mean()), AutoMeanField, e, batches(6))
        for e in (captured(MeanFieldELBO()), MeanFieldELBO())
    ]
    assert_same(*found)


def test_kernels_that_torch_takes_only_while_nothing_is_recorded():
    """A frozen encoder in evaluation mode has a fast path; its last bits are others."""
    pyro.set_rng_seed(1)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval().requires_grad_(False)
    model = regression(lambda x: layer(x[None])[0, :, 0])
    elbo = captured(MeanFieldELBO())
    found = [train(model, AutoMeanField, e, batches(12)) for e in (elbo, MeanFieldELBO())]
    assert_same(*found, exact=False)
    assert counted_programs(elbo) == 1


def counted_programs(elbo):
    return sum(map(len, elbo._programs.recorded.values()))


def test_a_smaller_last_batch_is_a_program_of_its_own():
    model = classifier(bayesianize(NETS["dense"]()))
    data = [b for a, c in zip(batches(5), batches(5, 3), strict=True) for b in (a, c)]
    elbo = captured(MeanFieldELBO())
    found = [train(model, AutoMeanField, e, data) for e in (elbo, MeanFieldELBO())]
    assert_same(*found)
    assert counted_programs(elbo) == 2


@pytest.mark.filterwarnings("ignore:flipout. sites .* keep their shared draws. examples mix")
def test_modes_of_modules():
    modes = [True] * 4 + [False] * 4 + [True] * 2 + [False] * 2

    def run(elbo):
        pyro.set_rng_seed(1)
        net = bayesianize(Normed())
        each = lambda i: net.train(modes[i])  # noqa: E731
        return train(classifier(net), AutoMeanField, elbo, batches(12), each)

    assert_same(run(captured(MeanFieldELBO())), run(MeanFieldELBO()))


@pytest.mark.parametrize("outside", [True, False])
def test_annealed_factor(outside):
    """A number that changes at every step and is no argument: in the ELBO, or around the step."""
    model = classifier(bayesianize(NETS["dense"]()))
    found = []
    for wrap in (captured, lambda e: e):
        handler = tempered(factor=1.0)
        elbo = wrap(MeanFieldELBO() if outside else handler(MeanFieldELBO()))
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = []
        for i, batch in enumerate(batches(9)):
            handler.factor = i / 8
            if outside:
                with handler:
                    losses.append(svi.step(*batch))
            else:
                losses.append(svi.step(*batch))
        stored = pyro.get_param_store().named_parameters()
        found.append((losses, {k: v.detach().clone() for k, v in stored}))
        if wrap is captured:
            assert counted_programs(elbo) == 1
    assert_same(*found)


def test_handlers_around_a_step():
    """One that comes and goes is told from none."""
    model = classifier(bayesianize(NETS["dense"]()))
    found = []
    for elbo in (captured(MeanFieldELBO()), MeanFieldELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        scaled, losses = poutine.scale(scale=3.0), []
        for i, batch in enumerate(batches(12)):
            with scaled if i % 2 else contextlib.nullcontext():
                losses.append(svi.step(*batch))
        found.append((losses, {}))
    assert_same(*found)


@pytest.mark.usefixtures("float64")
def test_annealed_factor_in_double_precision():
    """A prior of one element, whose KL term is a tensor without dimensions."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y.double())

    data = [(x.double(), y) for x, y in batches(6)]
    found = [
        train(model, AutoMeanField, wrap(tempered(MeanFieldELBO(), 0.3)), data)
        for wrap in (captured, lambda e: e)
    ]
    for name, value in found[0][1].items():
        assert value.dtype == torch.float64
        assert torch.equal(value, found[1][1][name])


def test_numbers_are_looked_at_and_tensors_followed():
    shift = torch.zeros(())

    def model(x, y, factor, *, more=0.0):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        with pyro.plate("data", len(x)):
            logits = factor * F.linear(x, w) + more + shift * x[:, :3]
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    found = []
    for elbo in (captured(MeanFieldELBO()), MeanFieldELBO()):
        data = [(*b, float(i % 2)) for i, b in enumerate(batches(10))]
        found.append(train(model, AutoMeanField, elbo, data, lambda i: shift.fill_(i / 10)))
    assert_same(*found)


def test_a_closure_that_was_an_argument():
    """The same tensor, once as an argument that changes and once as a constant."""
    data = batches(7)
    fixed = data[1][0]  # that of the call which is recorded

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=F.linear(x + fixed, w)), obs=y)

    data[2] = data[1]  # so that the comparison does not see it
    found = [
        train(model, AutoMeanField, wrap(MeanFieldELBO()), data) for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)


def test_a_new_parameter_store():
    """Parameters of the same name that are not the same."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=F.linear(x, w)), obs=y)

    def guide(x, y):
        loc = pyro.param("loc", lambda: torch.randn(3, 6))
        scale = pyro.param("scale", torch.full((3, 6), 0.1), constraint=constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(2))

    elbo = captured(MeanFieldELBO())
    first = train(model, lambda _: guide, elbo, batches(6))
    second = train(model, lambda _: guide, elbo, batches(6))
    assert_same(first, second)
    assert_same(first, train(model, lambda _: guide, MeanFieldELBO(), batches(6)))
    assert counted_programs(elbo) == 1  # those of the old store are forgotten


def test_autocast():
    net = bayesianize(NETS["dense"]())

    def inside(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
            with torch.autocast("cpu", enabled=False):
                logits = logits.float() + x[:, :3] @ (torch.arange(9.0).reshape(3, 3) / 7)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits.float()), obs=y)

    found = [
        train(inside, AutoMeanField, wrap(MeanFieldELBO()), batches(6))
        for wrap in (captured, lambda e: e)
    ]
    assert_same(*found)
    with torch.autocast("cpu", torch.bfloat16):
        within = train(inside, AutoMeanField, captured(MeanFieldELBO()), batches(6))
        expected = train(inside, AutoMeanField, MeanFieldELBO(), batches(6))
    assert_same(within, expected)
    outside = []
    for elbo in (captured(MeanFieldELBO()), MeanFieldELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = classifier(net)
        svi = SVI(flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = []
        for i, batch in enumerate(batches(12)):
            with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
                losses.append(svi.step(*batch))
        outside.append((losses, {}))
    assert_same(*outside)


def test_validation_comes_first_and_is_back_afterwards():
    prior = dist.Normal(torch.zeros(3, 6), 1.0, validate_args=True).to_event(2)

    def model(x, y):
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=F.linear(x, w)), obs=y)

    x, y = batches(1)[0]
    elbo = captured(Trace_ELBO())
    svi = SVI(flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(3):  # a call that fails does not count as the first
        with pytest.raises(ValueError, match="support"):
            svi.step(x, y + 7)
    for _ in range(5):
        svi.step(x, y)
    assert prior._validate_args or prior.base_dist._validate_args
    assert counted_programs(elbo) == 1
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(torch.full((3, 6), float("nan")))


# ------------------------------------------------------------------- gradients and Pyro


def test_torch_optimisers_and_modules():
    """``differentiable_loss``, as with an optimiser of torch; plain parameters have gradients."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = bayesianize(nn.Linear(6, 5))
            self.plain = nn.Linear(5, 3)
            self.spread = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x, y):
            logits = self.plain(self.net(x)) / self.spread
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    found = []
    for wrap in (captured, lambda e: e):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        model = Model()
        guide = AutoMeanField(model)
        program = flipout(model)
        elbo = wrap(MeanFieldELBO())
        loss_fn = elbo(program, guide)
        loss_fn(*batches(1)[0])
        optimizer = torch.optim.SGD(loss_fn.parameters(), 0.05)
        losses = []
        for batch in batches(8):
            optimizer.zero_grad()
            loss = loss_fn(*batch)
            (0.5 * loss).backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, dict(loss_fn.named_parameters())))
    assert any("plain" in name for name in found[0][1])
    assert_same(*found)


def test_second_derivatives_are_refused():
    model = classifier(bayesianize(NETS["dense"]()))
    guide, elbo, program = AutoMeanField(model), captured(MeanFieldELBO()), flipout(model)
    for batch in batches(4):
        loss = elbo.differentiable_loss(program, guide, *batch)
    (grad,) = torch.autograd.grad(loss.square(), guide.parameters(), create_graph=True)[:1]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_are_added():
    model = classifier(bayesianize(NETS["dense"]()))
    program, guide, found = flipout(model), AutoMeanField(model), []
    guide(*batches(1)[0])
    for elbo in (captured(MeanFieldELBO()), MeanFieldELBO()):
        guide.zero_grad()
        pyro.set_rng_seed(0)
        for batch in batches(6):
            elbo.loss_and_grads(program, guide, *batch)
        found.append([p.grad.clone() for p in guide.parameters()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_gradients_share_no_memory():
    """Two parameters with one gradient, and one whose gradient is an expanded number."""
    data = torch.arange(3.0)

    def model():
        a, b = (pyro.param(name, torch.zeros(3)) for name in "ab")
        c = pyro.param("c", torch.zeros(3))
        pyro.factor("loss", (data * (a + b)).sum() + c.sum())

    def guide():
        pass

    elbo = captured(Trace_ELBO())
    for _ in range(5):
        elbo.loss_and_grads(model, guide)
        params = dict(pyro.get_param_store().named_parameters())
        for p in params.values():
            p.grad, grad = None, p.grad
            grad.mul_(0).sub_(1)  # as a clipper would
            assert grad.stride() == p.stride()
    elbo.loss_and_grads(model, guide)
    assert torch.equal(params["a"].grad, -data)
    assert torch.equal(params["b"].grad, -data)
    assert torch.equal(params["c"].grad, -torch.ones(3))
    assert torch.equal(data, torch.arange(3.0))
    params["a"].grad.zero_()
    assert torch.equal(params["b"].grad, -data)


def test_svi_learns_the_same_parameters():
    """The optimiser is given all of them at each step, and handlers see constrained values."""
    model = classifier(bayesianize(NETS["dense"]()))
    seen = []

    class Optimizer(pyro.optim.PyroOptim):
        def __call__(self, params, *args, **kwargs):
            seen.append(len(params))
            return super().__call__(params, *args, **kwargs)

    guide, optim = AutoNormal(model), Optimizer(torch.optim.Adam, {"lr": 0.01})
    svi = SVI(flipout(model), guide, optim, captured(MeanFieldELBO()))
    for batch in batches(6):
        svi.step(*batch)
    assert seen == [8] * 6


def test_handlers_see_parameters():
    """Constrained ones, as the program gives them."""

    def model():
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        loc = pyro.param("loc", torch.zeros(2))
        pyro.factor("loss", (scale * loc).sum())

    class Watch(poutine.messenger.Messenger):
        def _pyro_post_param(self, msg):
            seen[msg["name"]] = msg["value"]

    def guide():
        pass

    elbo, watch = captured(Trace_ELBO()), Watch()
    for i in range(6):
        seen = {}
        with watch:
            elbo.loss_and_grads(model, guide)
        assert set(seen) == {"scale", "loc"}
        torch.testing.assert_close(seen["scale"], torch.full((2,), 1.0 + i))
        with torch.no_grad():
            seen["scale"].unconstrained().copy_(torch.full((2,), 2.0 + i).log())


def test_nothing_is_captured_without_gradients():
    calls = []

    def model(x, y):
        calls.append(1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=F.linear(x, w)), obs=y)

    guide, elbo = AutoMeanField(model), captured(MeanFieldELBO())
    x, y = batches(1)[0]
    guide(x, y)
    calls.clear()
    for _ in range(5):
        elbo.loss(model, guide, x, y)
        with torch.no_grad():
            elbo.differentiable_loss(model, guide, x, y)
    assert len(calls) == 10
    assert counted_programs(elbo) == 0


# ---------------------------------------------------------------- copies and other ELBOs


def test_copies_and_wrappers_start_anew():
    model = classifier(bayesianize(NETS["dense"]()))
    elbo = captured(tempered(MeanFieldELBO(), 0.1))
    expected = train(model, AutoMeanField, tempered(MeanFieldELBO(), 0.1), batches(6))
    assert_same(train(model, AutoMeanField, elbo, batches(6)), expected)
    assert isinstance(elbo, MeanFieldELBO)
    for other in (copy.copy(elbo), copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        assert counted_programs(other) == 0
        assert counted_programs(elbo) == 1
        assert_same(train(model, AutoMeanField, other, batches(6)), expected)
        assert counted_programs(other) == 1
    plain = captured(MeanFieldELBO())
    train(model, AutoMeanField, plain, batches(6))
    hot = tempered(plain, 0.1)
    assert_same(train(model, AutoMeanField, hot, batches(6)), expected)
    assert_same(train(model, AutoMeanField, pickle.loads(pickle.dumps(hot)), batches(6)), expected)


def test_a_wrapper_does_not_replay_what_it_wraps():
    """It has what the other has recorded of the same model and guide."""
    model = classifier(bayesianize(NETS["dense"]()))
    guide, program, plain = AutoMeanField(model), flipout(model), captured(MeanFieldELBO())
    for batch in batches(5):
        plain.loss_and_grads(program, guide, *batch)
    found = []
    for elbo in (tempered(plain, 0.0), tempered(MeanFieldELBO(), 0.0)):
        pyro.set_rng_seed(0)
        found.append([elbo.loss_and_grads(program, guide, *batch) for batch in batches(5)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Own(Trace_ELBO):
    """An ELBO of one's own: the negative log joint density of a draw."""

    def differentiable_loss(self, model, guide, *args, **kwargs):
        traces = self._get_traces(model, guide, args, kwargs)
        return -sum(trace.log_prob_sum() for trace, _ in traces)

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


def test_an_elbo_of_ones_own():
    model = classifier(bayesianize(NETS["dense"]()))
    found = [train(model, AutoMeanField, e, batches(6)) for e in (captured(Own()), Own())]
    assert_same(*found)


# ------------------------------------------------------------------------------- errors


def step(model, guide, elbo, *batch, times=3):
    svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(times):
        svi.step(*batch)


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (lambda: captured(classifier(None)), TypeError, "expected an ELBO such as"),
        (lambda: captured(MeanFieldELBO), TypeError, "expected an ELBO such as"),
        (lambda: captured(JitTrace_ELBO()), TypeError, "which torch.jit compiles"),
        (lambda: captured(TraceGraph_ELBO()), TypeError, "has no differentiable_loss"),
        (lambda: captured(captured(Trace_ELBO())), ValueError, "captured already"),
    ],
)
def test_what_cannot_be_captured(made, error, match):
    with pytest.raises(error, match=match):
        made()


def test_numbers_that_are_read():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        logits = F.linear(x, w)
        if x.mean() > 5:
            logits = -logits
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    match = (
        r"cannot be recorded, at line \d+ of test_captured_elbo.py: .*read a number off a tensor"
    )
    with pytest.raises(FlipoutError, match=match):
        step(model, AutoMeanField(model), captured(MeanFieldELBO()), *batches(1)[0])


def test_an_elbo_that_reads_numbers():
    model = classifier(bayesianize(NETS["dense"]()))
    with pytest.raises(FlipoutError, match="cannot be recorded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(
            model,
            AutoMeanField(model),
            captured(TraceEnum_ELBO(max_plate_nesting=1)),
            *batches(1)[0],
        )


@pytest.mark.parametrize("what", ["counter", "random"])
def test_what_changes_unseen_is_found(what):
    rng, count = random.Random(0), [0]

    def model(x, y):
        count[0] += 1
        factor = {"counter": lambda: count[0], "random": rng.random}[what]()
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 6]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=factor * F.linear(x, w)), obs=y)

    guide = AutoMeanField(model)
    wrapped = flipout(model, audit=False)  # which would say that it cannot be run twice
    svi = SVI(wrapped, guide, pyro.optim.Adam({"lr": 0.01}), captured(MeanFieldELBO()))
    with pytest.raises(FlipoutError, match="replayed, the loss is .* but the program gives"):
        for batch in batches(4):
            svi.step(*batch)


@pytest.mark.parametrize("elbo", [MeanFieldELBO, Trace_ELBO, lambda: Trace_ELBO(num_particles=3)])
@pytest.mark.parametrize("rate", [3e-5, 3e-6])
@pytest.mark.parametrize("start", [0, 6])
def test_a_number_that_changes_slowly_is_found(rate, start, elbo):
    """By a few units in the seventh digit; and one that is constant at first."""
    step = [0]
    model = regression(scale=lambda: math.exp(-rate * max(0, step[0] - start)))
    svi = SVI(flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), captured(elbo()))
    data = batches(12)
    found = 9 if start else 2  # the steps in which a replay is compared
    for step[0] in range(found):
        svi.step(*data[step[0]])
    step[0] = found
    with pytest.raises(FlipoutError, match=r"replayed, .* but the program gives .*annealed"):
        svi.step(*data[found])


def test_a_loss_that_changes_slowly_is_found():
    """Its gradient does not."""
    step = [0]

    def model(x, y):
        pyro.factor("penalty", torch.tensor(10.0) * (1 + 1e-5 * step[0]))
        regression()(x, y)

    svi = SVI(
        flipout(model), AutoMeanField(model), pyro.optim.Adam({"lr": 0.01}), captured(Trace_ELBO())
    )
    data = batches(3)
    with pytest.raises(FlipoutError, match="replayed, the loss is"):
        for step[0] in range(3):
            svi.step(*data[step[0]])


def test_programs_are_compared_again():
    """After 8, 16 and 32 replays."""
    calls = []

    def counted(x, y):
        calls.append(now[0])
        regression()(x, y)

    now = [0]
    guide, elbo = AutoMeanField(regression()), captured(MeanFieldELBO())
    wrapped = flipout(counted, audit=False)
    svi = SVI(wrapped, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for now[0], batch in enumerate(batches(40), 1):
        svi.step(*batch)
    assert calls == [1, 2, 3, 10, 18, 34]


def test_a_loss_that_is_not_pyros_is_found(monkeypatch):
    """The loss of an ELBO of Pyro is compared with that ELBO's."""
    ours = _tensor_loss._sampled
    monkeypatch.setattr(_tensor_loss, "_sampled", lambda *traces: ours(*traces) + 1.0)
    model = regression()
    with pytest.raises(FlipoutError, match="the recorded loss is .* but that of Trace_ELBO is"):
        step(model, AutoMeanField(model), captured(Trace_ELBO()), *batches(1)[0])


READS = {
    "tolist": lambda x: x.tolist()[0][0],
    "numpy": lambda x: float(x.numpy()[0, 0]),
    "detached": lambda x: float(np.mean(x.detach().cpu().numpy())),
    "asarray": lambda x: float(np.asarray(x)[0, 0]),
    "dlpack": lambda x: float(np.from_dlpack(x)[0, 0]),
    "a list of numbers": lambda x: torch.tensor([x[0, 0], x[0, 1]]).sum(),
    "rows": lambda x: next(row.tolist() for row in x)[0],
    "copy": lambda x: copy.deepcopy(x)[0, 0],
    "function of numbers": lambda x: x.clone().apply_(lambda v: v + 1)[0, 0],
    "split": lambda x: x.tensor_split((x[0, :1] > 9).long() + 1)[0].sum(),
    "item": lambda x: x[0, 0].item(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_numbers_that_functions_read(read):
    model = regression(lambda x: 1.0 + read(x))
    match = r"cannot be recorded, at line \d+ of test_captured_elbo.py: .*number"
    with pytest.raises(FlipoutError, match=match):
        step(model, AutoMeanField(model), captured(MeanFieldELBO()), *batches(1)[0])


def test_numbers_of_parameters():
    """Of which a new one would be read at each step."""

    def model():
        a = pyro.param("a", torch.tensor(1.0))
        pyro.factor("loss", a * float(a))

    def guide():
        pass

    match = r"at line \d+ of test_captured_elbo.py: item gives Python the numbers of a parameter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elbo = captured(Trace_ELBO())
        elbo.loss_and_grads(model, guide)
        with pytest.raises(FlipoutError, match=match):
            elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x[x > 0].mean(),
        lambda x: (x > 0).nonzero().size(0),
        lambda x: torch.where(x > 0)[0].float().mean(),
        lambda x: x.masked_select(x > 0).std(),
        lambda x: (x > 0).long().sum(1).repeat_interleave((x[:, 0] > 0).long()).sum(),
        lambda x: (9 * x).round().unique().sum(),
        lambda x: torch.bincount((9 * x[:, 0]).long().abs()).sum(),
    ],
    ids=["mask", "nonzero", "where", "masked_select", "repeat", "unique", "bincount"],
)
def test_shapes_that_depend_on_data(of):
    model = regression(lambda x: 1.0 + 0.1 * of(x))
    svi = SVI(
        flipout(model),
        AutoMeanField(model),
        pyro.optim.Adam({"lr": 0.01}),
        captured(MeanFieldELBO()),
    )
    x, y = batches(1)[0]
    for _ in range(4):
        svi.step(x, y)
    match = r"replayed, at line \d+ of test_captured_elbo.py, a result has the shape .*mask"
    with pytest.raises(FlipoutError, match=match):
        svi.step(3 * x.abs(), y)


def test_a_gradient_that_changes_unseen_is_found():
    """The loss is the same, its gradient is not."""
    count = [0]

    def model():
        count[0] += 1
        a = pyro.param("a", torch.zeros(3))
        pyro.factor("loss", 1.0 + count[0] * (a - a.detach()).sum())

    def guide():
        pass

    elbo = captured(Trace_ELBO())
    with pytest.raises(FlipoutError, match="the gradient of a is of norm"):
        for _ in range(3):
            elbo.loss_and_grads(model, guide)


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(
                x.reshape(-1, 3, 2), torch.tensor([3, 2, 2, 1]), batch_first=True
            )
            return self.out(self.rnn(packed)[1][0])

    model = classifier(bayesianize(Packed()))
    with pytest.raises(FlipoutError, match="RNN got a packed sequence"):
        step(model, AutoMeanField(model), captured(MeanFieldELBO()), *batches(1)[0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x.requires_grad_(), FlipoutError, r"shape \(4, 6\) that requires a gradient"),
        (lambda x: x.to_sparse(), FlipoutError, "expected a plain tensor"),
        (nn.Parameter, FlipoutError, "requires a gradient"),
        (lambda x: x.numpy(), TypeError, "argument of type ndarray"),
    ],
)
def test_bad_arguments(change, error, match):
    model = classifier(bayesianize(NETS["dense"]()))
    x, y = batches(1)[0]
    with pytest.raises(error, match=match):
        step(model, AutoMeanField(model), captured(MeanFieldELBO()), change(x), y)


def test_too_many_programs(monkeypatch):
    monkeypatch.setattr(captured_elbo, "MOST", 2)
    model, elbo = classifier(bayesianize(NETS["dense"]())), captured(MeanFieldELBO())
    guide = AutoMeanField(model)
    for size in (2, 3):
        step(model, guide, elbo, *batches(1, size)[0])
    with pytest.raises(FlipoutError, match="program number 3.*drop_last=True"):
        step(model, guide, elbo, *batches(1, 5)[0])


def test_numbers_that_are_new_at_each_step(monkeypatch):
    """They would never be replayed."""
    monkeypatch.setattr(captured_elbo, "MOST", 4)

    def model(x, factor):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(factor * w, 1.0), obs=x[:, 0])

    guide = AutoMeanField(model)
    svi = SVI(flipout(model), guide, pyro.optim.Adam({"lr": 0.01}), captured(MeanFieldELBO()))
    x = batches(1)[0][0]
    for i in range(4):
        svi.step(x, i / 10)
    with pytest.raises(FlipoutError, match="program number 5.*numbers as tensors"):
        svi.step(x, 0.9)


def test_modes_are_not_too_many_either(monkeypatch):
    monkeypatch.setattr(captured_elbo, "MOST", 2)
    net = bayesianize(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.1), nn.Dropout(0.1)))
    model = classifier(net)
    guide, elbo = AutoMeanField(model), captured(MeanFieldELBO())
    x, y = batches(1)[0]
    step(model, guide, elbo, x, y)
    net[1].eval()
    program = flipout(model)
    with pytest.raises(FlipoutError, match="program number 3"):
        for part in (net[1], net[2], net):
            part.train(not part.training)
            elbo.loss_and_grads(program, guide, x, y)
            elbo.loss_and_grads(program, guide, x, y)


def test_nan_is_told():
    model = classifier(bayesianize(NETS["dense"]()))
    elbo, guide, program = captured(MeanFieldELBO()), AutoMeanField(model), flipout(model)
    for x, y in batches(4):
        elbo.loss_and_grads(program, guide, x, y)
    with pytest.warns(UserWarning, match="Encountered NaN: loss"):
        elbo.loss_and_grads(program, guide, x * float("nan"), y)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_refused():
    model = classifier(bayesianize(NETS["dense"]()).cuda())
    batch = [t.cuda() for t in batches(1)[0]]
    with pytest.raises(FlipoutError, match="got a tensor on cuda:0.*CUDA graph"):
        step(model, AutoMeanField(model), captured(MeanFieldELBO()), *batch)


# ------------------------------------------------------------------------------ compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")  # inductor's
@pytest.mark.parametrize(("net", "elbo"), [("dense", "Trace_ELBO"), ("normed", "MeanFieldELBO")])
def test_compiled(net, elbo):
    """With inductor, which needs a C++ compiler: equal up to rounding."""
    found = []
    for wrap in (lambda e: captured(e, compile=True), lambda e: e):
        pyro.set_rng_seed(1)
        layers = bayesianize(NETS[net]())
        run = train(classifier(layers), AutoMeanField, wrap(ELBOS[elbo]()), batches(7))
        found.append((*run, list(layers.buffers())))
    assert_same(*found, exact=False)
    torch.testing.assert_close(found[0][2], found[1][2])
