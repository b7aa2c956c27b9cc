"""Examples in groups that share their signs: ``flipout(group_size=k)``."""

import warnings

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_flipout import FlipoutWarning, flipout
from pyro_flipout.poutine import independent, local_reparameterization
from pyro_flipout.tensor import Execution, flip
from tests.helpers import Recording, Regression, bayesian, check_network, mlp, randomize


def setup(batch=12):
    torch.manual_seed(0)
    model = Regression(mlp((3, 4, 2)), scale=1.0)
    x, y = torch.randn(batch, 3), torch.randn(batch, 2)
    guide = AutoNormal(model, init_scale=0.3)
    guide(x, y)
    return model, randomize(guide, 0.2), x, y


@pytest.mark.parametrize("group_size", [1, 2, 5, 32, 64])
def test_groups_see_one_weight(group_size, float64):
    """In an execution of 100 examples; the last group is smaller, or the only one."""
    handler = Recording(on_missing_rule="error", group_size=group_size)
    check_network(mlp(), AutoNormal, torch.randn(100, 4), handler=handler)
    own = handler.seen["0.weight"].materialize()
    group = torch.arange(100) // group_size
    same = torch.stack([(own[n] == own).flatten(1).all(1) for n in range(100)])
    assert torch.equal(same, group == group[:, None])


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x):
        return self.lstm(x)[0]


def test_time_major(float64):
    handler = Recording(on_missing_rule="error", group_size=3, example_dim=1)
    check_network(TimeMajor(), AutoNormal, torch.randn(5, 7, 3), handler=handler, example_dim=1)
    own = handler.seen["lstm.weight_ih_l0"].materialize()
    assert torch.equal(own[3], own[5])
    assert not torch.equal(own[2], own[3])


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 8])
def test_one_group_sees_the_shared_draw(batch, recurrent):
    net = bayesian(TimeMajor() if recurrent else mlp())
    x = torch.randn(5, batch, 3) if recurrent else torch.randn(batch, 4)
    guide = AutoNormal(net)
    guide(x)
    trace = poutine.trace(randomize(guide)).get_trace(x)
    alone, bare = (
        poutine.replay(fn, trace=trace)(x)
        for fn in (flipout(net, group_size=8, example_dim=int(recurrent)), net)
    )
    assert torch.equal(alone, bare)


def test_a_constant_in_the_only_group():
    """One row is one example of one, but none of five that are one group."""
    execution = Execution(group_size=8, on_missing_rule="error")
    w, scale = (flip(v, v, execution=execution) for v in (torch.randn(1, 3), torch.randn(1, 1)))
    x = torch.randn(5, 3)
    F.linear(x, w)
    row = torch.ones(1, 3) * scale
    assert torch.equal(F.linear(x, row), F.linear(x, torch.ones(1, 3) * scale.plain))


@pytest.mark.parametrize("count", [3, 8, 9])
def test_a_class_token_in_the_only_group(count):
    execution = Execution(group_size=8, on_missing_rule="error")
    token, w = (flip(v, v, execution=execution) for v in (torch.randn(1, 1, 4), torch.randn(4, 4)))
    h = F.linear(torch.randn(count, 5, 4), w)
    joined = torch.cat([token.expand(count, 1, 4), h], 1)
    torch.testing.assert_close(joined[:, 0], token.materialize()[:, 0, 0])


def test_one_group_is_told_once():
    model, guide, x, y = setup()
    svi = SVI(flipout(model, group_size=12), guide, pyro.optim.Adam({}), Trace_ELBO())
    with pytest.warns(FlipoutWarning, match="all 12 examples are one group .* group_size=12; set"):
        svi.step(x, y)
    svi.step(x, y)  # warnings are errors


def test_a_last_smaller_mini_batch_is_not_told():
    model, guide, x, y = setup()
    svi = SVI(flipout(model, group_size=4), guide, pyro.optim.Adam({}), Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (12, 3, 1):
            svi.step(x[:n], y[:n])


@pytest.mark.parametrize("group_size", [0, -1, 2.0, "2", True, None])
def test_not_a_size(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size!r}, expected an integer >= 1"):
        flipout(group_size=group_size)
    handler = flipout(group_size=2)
    with pytest.raises(ValueError, match=f"group_size={group_size!r}, expected an integer >= 1"):
        handler.group_size = group_size
    assert handler.group_size == 2


def test_numpy_integers_are_integers():
    handler = flipout(group_size=np.int64(4), example_dim=np.int32(1))
    assert repr(handler) == repr(flipout(group_size=4, example_dim=1))


@pytest.mark.parametrize("handler", [independent, local_reparameterization])
def test_estimators_without_signs(handler):
    with pytest.raises(ValueError, match=f"{handler.__name__}: got group_size=2, expected 1"):
        handler(group_size=2)


def test_repr():
    assert "group_size=3" in repr(flipout(group_size=3))
    assert "group_size" not in repr(flipout())
