# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""One policy for each environment, which lives until its episode ends."""

import pytest
import torch
from torch.func import functional_call

from pyro_flipout.infer import Exploration, exploration
from tests.helpers import Z, mlp
from tests.infer.test_flip_es import POLICIES

ENVS = 5


def assert_explicit(explore, x, rows=1):
    out = explore(x)
    assert not out.requires_grad
    per_env = x.unflatten(0, (ENVS, rows))
    expected = [
        functional_call(explore.module, explore.policy(n), (per_env[n],)) for n in range(ENVS)
    ]
    torch.testing.assert_close(out, torch.cat(expected).detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_explicit_policies(policy, rows, float64):
    make, data = POLICIES[policy]
    explore = Exploration(make(), sigma=0.3, num_envs=ENVS)
    for ended in ([0, 0, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]):
        explore.resample(torch.tensor(ended, dtype=torch.bool))
        assert_explicit(explore, data(ENVS * rows), rows)


def test_planted_bug(float64, monkeypatch):
    # The rows of environments are mixed up.
    right = exploration._PolicySigns.__init__
    monkeypatch.setattr(
        exploration._PolicySigns,
        "__init__",
        lambda self, dense, rows: right(self, dense.roll(1, 0), rows),
    )
    with pytest.raises(AssertionError):
        assert_explicit(Exploration(mlp(), sigma=0.3, num_envs=ENVS), torch.randn(ENVS, 4))


def test_only_those_that_ended_change(float64):
    explore = Exploration(mlp(), sigma=0.3, num_envs=ENVS, seed=0)
    x = torch.randn(ENVS, 4)
    before = explore(x)
    assert torch.equal(explore(x), before)
    ended = torch.tensor([False, True, False, True, False])
    explore.resample(ended)
    after = explore(x)
    assert torch.equal(after[~ended], before[~ended])
    assert not torch.isclose(after[ended], before[ended]).any(1).any()
    old = explore.policy(0)["0.weight"] - explore.module[0].weight
    explore.resample()
    new = explore.policy(0)["0.weight"] - explore.module[0].weight
    assert not torch.isclose(old.abs(), new.abs()).any()


def test_policies_follow_the_weights(float64):
    explore = Exploration(mlp(), sigma=0.3, num_envs=ENVS)
    moved = explore.policy(2)["0.weight"] - explore.module[0].weight.detach()
    with torch.no_grad():
        explore.module[0].weight.add_(1.0)
    assert_explicit(explore, torch.randn(ENVS, 4))
    again = explore.policy(2)["0.weight"] - explore.module[0].weight.detach()
    torch.testing.assert_close(again, moved)


def test_successive_policies_are_uncorrelated(float64):
    explore = Exploration(mlp((8, 6)), sigma=1.0, num_envs=1, distribution="rademacher", seed=0)
    center = explore.module[0].weight.detach()
    signs = []
    for _ in range(400):
        signs.append(explore.policy(0)["0.weight"] - center)
        explore.resample(torch.tensor([True]))
    signs = torch.stack(signs) * signs[0]
    products = signs[1:] * signs[:-1]
    for sample in (signs[1:], products):
        assert sample.mean(0).abs().max() < Z * 400**-0.5


def test_numbers_differ():
    assert len(exploration._scatter(0, 10**6).unique()) == 10**6


def test_numbers_run_out(float64, monkeypatch):
    monkeypatch.setattr(exploration, "_MAX_NUMBER", ENVS + 2)
    monkeypatch.setattr(exploration, "_scatter", lambda start, n: torch.arange(start, start + n))
    explore = Exploration(mlp(), sigma=0.3, num_envs=ENVS)
    one = torch.arange(ENVS) == 1
    kept = []
    for _ in range(4):
        kept.append(explore.policy(0)["0.weight"])
        explore.resample(one)
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[2], kept[3])
    assert_explicit(explore, torch.randn(ENVS, 4))


def test_seed_and_errors():
    x = torch.randn(ENVS, 4)
    net = mlp()
    same = [Exploration(net, 0.1, ENVS, seed=3)(x) for _ in range(2)]
    assert torch.equal(*same)
    with pytest.raises(ValueError, match="num_envs=0"):
        Exploration(net, 0.1, 0)
    explore = Exploration(net, 0.1, ENVS)
    with pytest.raises(ValueError, match=r"int64 tensor of shape \(2,\), expected torch.bool .*5"):
        explore.resample(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="4 rows"):
        explore(x[:4])
    assert net(x).requires_grad
