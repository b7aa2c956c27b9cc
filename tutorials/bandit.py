# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Thompson sampling in batches: the wheel bandit
#
# A bandit sees a context, takes one of several actions and learns the reward of that action
# only. Thompson sampling explores by acting on a *draw* of its model: actions that might be good
# are taken now and then. Where contexts come in batches, as requests of many users do, one draw
# for the whole batch makes one and the same bet on all of them. With flipout every context has
# its own pseudo-independent draw, for two matrix products in place of one.
#
# The wheel (Riquelme, Tucker, Snoek 2018): contexts are uniform on the unit disk. Action 0 pays
# 1.2. The others pay 1.0, but outside of radius delta one of them, which depends on the
# quadrant, pays 50. Whoever stops exploring too early takes the 1.2 for ever.
#
#     python tutorials/bandit.py            # a few minutes
#     python tutorials/bandit.py --smoke    # every stage in a few seconds
#
# [1] `Deep Bayesian Bandits Showdown`, Carlos Riquelme, George Tucker, Jasper Snoek,
#     https://arxiv.org/abs/1802.09127

# %%
from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_flipout import flipout
from pyro_flipout.infer import AutoMeanField

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description="Thompson sampling on the wheel bandit")
parser.add_argument("--rounds", type=int, default=60, help="batches of contexts")
parser.add_argument("--batch-size", type=int, default=64, help="contexts acted on at once")
parser.add_argument("--train-steps", type=int, default=15, help="after each round")
parser.add_argument("--delta", type=float, default=0.7, help="radius of the inner disk")
parser.add_argument("--epsilon", type=float, default=0.05, help="of epsilon-greedy")
parser.add_argument("--seeds", type=int, default=4)
parser.add_argument("--out", type=Path, default=Path("bandit.png"), help="file of the figure")
parser.add_argument("--smoke", action="store_true", help="every stage in a few seconds, for CI")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.smoke:
    args.rounds, args.seeds, args.train_steps = 4, 2, 2
NUM_ACTIONS, UNIT, NOISE = 5, 10.0, 0.3  # the networks see rewards in units of 10
torch.set_num_threads(1)


# %% [markdown]
# ## The wheel


# %%
def wheel(rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Contexts ``(size, 2)``, and the mean reward of each action ``(size, 5)``."""
    radius, angle = np.sqrt(rng.random(size)), 2 * math.pi * rng.random(size)
    contexts = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    rewards = np.full((size, NUM_ACTIONS), 1.0)
    rewards[:, 0] = 1.2
    quadrant = 2 * (contexts[:, 1] < 0) + (contexts[:, 0] < 0)
    outside = radius > args.delta
    rewards[outside, 1 + quadrant[outside]] = 50.0
    return torch.tensor(contexts, dtype=torch.float), torch.tensor(rewards, dtype=torch.float)


# %% [markdown]
# ## The networks
#
# The Bayesian one is a plain Pyro model. Both have two hidden layers of 50 units, and an output
# for each action.


# %%
class Rewards(PyroModule):
    """Normal rewards of the actions that were taken."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [2, 50, 50, NUM_ACTIONS]
        self.layers = PyroModule[nn.ModuleList](
            [PyroModule[nn.Linear](a, b) for a, b in itertools.pairwise(sizes)]
        )
        for layer in self.layers:
            prior = dist.Normal(0.0, math.sqrt(2 / layer.in_features))
            layer.weight = PyroSample(prior.expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))

    def forward(
        self,
        x: Tensor,  # (N, 2)
        action: Tensor | None = None,  # (N,)
        reward: Tensor | None = None,  # (N,)
        total: int = 1,
    ) -> Tensor:
        first, second, last = self.layers
        means = last(torch.relu(second(torch.relu(first(x)))))  # (N, 5)
        if action is not None:
            own = means.gather(1, action[:, None]).squeeze(1)
            with pyro.plate("data", len(x)), poutine.scale(scale=total / len(x)):
                pyro.sample("reward", dist.Normal(own, NOISE), obs=reward)
        return means


class Thompson:
    """Acts on draws from a mean-field posterior: one for each context, or one for the batch."""

    def __init__(self, flips: bool) -> None:
        pyro.clear_param_store()
        model = Rewards()
        self.model = flipout(model) if flips else model
        self.guide = AutoMeanField(model, init_loc_fn=_scaled_down, init_scale=0.05)
        optimizer = pyro.optim.Adam({"lr": 0.01})
        self.svi = SVI(self.model, self.guide, optimizer, TraceMeanField_ELBO())

    @torch.no_grad()
    def act(self, x: Tensor) -> Tensor:
        trace = poutine.trace(self.guide).get_trace(x)
        return poutine.replay(self.model, trace=trace)(x).argmax(1)

    def train(self, x: Tensor, action: Tensor, reward: Tensor, total: int) -> None:
        self.svi.step(x, action, reward, total)


def _scaled_down(site: dict) -> Tensor:
    return 0.5 * site["fn"].sample()


class EpsilonGreedy:
    """The same network without uncertainty."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.net = nn.Sequential(
            *(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU()),
            nn.Linear(50, NUM_ACTIONS),
        )
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)

    @torch.no_grad()
    def act(self, x: Tensor) -> Tensor:
        explore = torch.rand(len(x)) < self.epsilon
        return self.net(x).argmax(1).where(~explore, torch.randint(NUM_ACTIONS, (len(x),)))

    def train(self, x: Tensor, action: Tensor, reward: Tensor, total: int) -> None:
        self.optimizer.zero_grad()
        own = self.net(x).gather(1, action[:, None]).squeeze(1)
        (own - reward).pow(2).mean().backward()
        self.optimizer.step()


AGENTS = {
    f"ε-greedy, ε = {args.epsilon}": lambda: EpsilonGreedy(args.epsilon),
    "Thompson, one draw a batch": lambda: Thompson(False),
    "Thompson, flipout": lambda: Thompson(True),
}


# %% [markdown]
# ## The game
#
# Regret is what the best action would have paid more; it is divided by the regret of choosing
# uniformly at random, so that 1 is no skill and 0 is perfect. All agents see the same contexts.


# %%
def play(name: str, seed: int) -> np.ndarray:
    """Cumulative regret after each round, divided by that of uniform choice."""
    rng = np.random.default_rng(seed)
    pyro.set_rng_seed(seed)
    agent = AGENTS[name]()
    contexts, actions, rewards = [], [], []
    regret, uniform = [], []
    for _ in tqdm(range(args.rounds), desc=f"{name}, seed {seed}", disable=args.smoke):
        x, means = wheel(rng, args.batch_size)
        action = agent.act(x)
        mean = means.gather(1, action[:, None]).squeeze(1)
        best = means.amax(1)
        regret.append((best - mean).sum().item())
        uniform.append((best - means.mean(1)).sum().item())
        contexts.append(x)
        actions.append(action)
        rewards.append((mean + 0.01 * torch.randn(len(x))) / UNIT)
        data = torch.cat(contexts), torch.cat(actions), torch.cat(rewards)
        for _ in range(args.train_steps):
            batch = torch.randint(len(data[0]), (min(256, len(data[0])),))
            agent.train(*(d[batch] for d in data), len(data[0]))
    return np.cumsum(regret) / np.cumsum(uniform)


curves = {name: np.stack([play(name, s) for s in range(args.seeds)]) for name in AGENTS}
seen = args.batch_size * np.arange(1, args.rounds + 1)
print(f"\nregret / that of uniform choice after {seen[-1]} contexts, {args.seeds} seeds")
for name, runs in curves.items():
    error = runs[:, -1].std(ddof=1) / math.sqrt(len(runs))
    each = ", ".join(f"{r:.2f}" for r in sorted(runs[:, -1]))
    print(f"{name:28} {runs[:, -1].mean():.3f} ± {error:.3f}   ({each})")

# %%
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for name, runs in curves.items():
    mean, error = runs.mean(0), runs.std(0, ddof=1) / math.sqrt(len(runs))
    (line,) = axis.plot(seen, mean, label=name)
    axis.fill_between(seen, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)
axis.set(
    xlabel="contexts seen",
    ylabel="cumulative regret / that of uniform choice",
    title=f"Wheel bandit, δ = {args.delta}, batches of {args.batch_size}",
    ylim=(0, None),
)
axis.legend(frameon=False)
figure.savefig(args.out, dpi=150)
print(f"figure: {args.out}")
