# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""One policy for each environment, which lives until its episode ends."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from pyro_flipout.infer import Exploration, exploration
from tests.helpers import Z, mlp
from tests.infer.test_flip_es import POLICIES, StepPolicy

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


class TokenPolicy(nn.Module):
    """Its first operation joins a class token to the data."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(3, 2)

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), 1, 3), x], 1)
        return torch.relu(self.head(tokens)).mean(1)


@pytest.mark.parametrize("envs", [1, 2])
def test_class_token_of_one_environment(envs, float64):
    explore = Exploration(TokenPolicy(), sigma=0.3, num_envs=envs)
    x = torch.randn(envs, 4, 3)
    for n, out in enumerate(explore(x)):
        own = functional_call(explore.module, explore.policy(n), (x[n : n + 1],))
        torch.testing.assert_close(out, own[0].detach(), atol=1e-10, rtol=1e-10)


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


def test_a_recurrent_policy_over_episodes(float64):
    explore = Exploration(StepPolicy(), {"*.bias*": 0.1, "*": 0.3}, num_envs=ENVS)
    state, own = torch.zeros(ENVS, 5), torch.zeros(ENVS, 5)
    for ended in (torch.arange(ENVS) == 1, torch.arange(ENVS) > 2, torch.ones(ENVS) > 0):
        for x in torch.randn(3, ENVS, 3):
            out, state = explore(x, state)
            each = [
                functional_call(explore.module, explore.policy(n), (x[n], own[n]))
                for n in range(ENVS)
            ]
            expected, own = (torch.stack(part).detach() for part in zip(*each, strict=True))
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        explore.resample(ended)
        state, own = state.masked_fill(ended[:, None], 0), own.masked_fill(ended[:, None], 0)


@pytest.mark.parametrize("rows", [1, 6])
def test_one_policy_for_all_rows(rows, float64):
    explore = Exploration(mlp(), sigma=0.3, num_envs=1)
    for _ in range(3):
        x = torch.randn(rows, 4)
        expected = functional_call(explore.module, explore.policy(0), (x,)).detach()
        torch.testing.assert_close(explore(x), expected, atol=1e-10, rtol=1e-10)
        explore.resample(torch.tensor([True]))


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
    for options, words in (
        ({"num_envs": 0}, "num_envs=0"),
        ({"num_envs": 2.0}, r"num_envs=2\.0"),
        ({"sigma": -1.0}, r"Exploration: got sigma=-1\.0"),
        ({"sigma": {"0": 1.0}}, r"Exploration: no group of sigma means '2\.weight'"),
        ({"distribution": "cauchy"}, "Exploration: got distribution='cauchy'"),
        ({"example_dim": -1}, "Exploration: got example_dim=-1"),
        ({"sigma": "1"}, "Exploration: got sigma='1'"),
        ({"seed": 1.5}, "Exploration: got seed=1.5, expected an integer"),
    ):
        with pytest.raises(ValueError, match=words):
            Exploration(net, **{"sigma": 0.1, "num_envs": ENVS, **options})
    explore = Exploration(net, 0.1, ENVS)
    with pytest.raises(ValueError, match=r"int64 tensor of shape \(2,\), expected torch.bool .*5"):
        explore.resample(torch.tensor([0, 1]))
    for ended in ([True] * ENVS, np.ones(ENVS, bool)):
        with pytest.raises(TypeError, match=r"of type .*, expected a tensor; write torch.as_tens"):
            explore.resample(ended)
    with pytest.raises(TypeError, match=r"Exploration: got module=<function .*torch.nn.Module"):
        Exploration(mlp, 0.1, ENVS)
    words = r"Exploration: got data .* 4 rows .*multiple of the 5 environments"
    with pytest.raises(ValueError, match=words):
        explore(x[:4])
    for number in (-1, ENVS, 0.5, True):
        with pytest.raises(IndexError, match=f"got {number}, expected .* from 0 to 4"):
            explore.policy(number)
    assert net(x).requires_grad
