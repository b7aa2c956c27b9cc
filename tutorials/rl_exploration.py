# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Exploring with many policies at once
#
# Noise on the *weights* of a policy makes it act differently in a consistent way: the same
# state gets the same action for as long as the noise stays. A vectorised environment steps N
# environments with one mini-batch, and flipout gives each of its rows a policy of its own, for
# two matrix products in place of one. We use that twice:
#
# 1. *Evolution strategies.* The rows are the members of a population, an episode is their
#    fitness, and `FlipES` turns fitness into a gradient (CartPole and Acrobot).
# 2. *Exploration.* A double DQN that learns from a sparse reward (Deep Sea) acts with noisy
#    weights: one perturbation for all environments, or, by flipout, one for each. They are
#    compared with ε-greedy, and with independent perturbations of explicit weights.
#
#     pip install "pyro-flipout[rl]"
#     python tutorials/rl_exploration.py            # about ten minutes
#     python tutorials/rl_exploration.py --smoke    # every stage in a few seconds
#
# [1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
#     Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
#     https://arxiv.org/abs/1803.04386
# [2] `Parameter Space Noise for Exploration`, Matthias Plappert et al.,
#     https://arxiv.org/abs/1706.01905
# [3] `Behaviour Suite for Reinforcement Learning`, Ian Osband et al.,
#     https://arxiv.org/abs/1908.03568

# %%
from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from pyro_flipout.infer import Exploration, FlipES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description="Evolution strategies and exploration in RL")
parser.add_argument("--parts", nargs="+", choices=["es", "dqn"], default=["es", "dqn"])
parser.add_argument("--members", type=int, default=64, help="of the population")
parser.add_argument("--updates", type=int, default=15, help="of evolution strategies")
parser.add_argument("--depth", type=int, default=20, help="of the sea, and of an episode")
parser.add_argument("--envs", type=int, default=16, help="environments that DQN acts in at once")
parser.add_argument("--steps", type=int, default=1500, help="of all environments, and of DQN")
parser.add_argument("--sigma", type=float, default=0.3, help="of DQN's perturbations")
parser.add_argument("--epsilon", type=float, default=0.1, help="of epsilon-greedy")
parser.add_argument("--stagger", action="store_true", help="episodes end at different times")
parser.add_argument("--behaviours", nargs="+", default=[""], help="parts of their names")
parser.add_argument("--seeds", type=int, default=8)
parser.add_argument("--out", type=Path, default=Path("rl_exploration.png"), help="the figure")
parser.add_argument("--smoke", action="store_true", help="every stage in a few seconds, for CI")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.smoke:
    args.members, args.updates, args.seeds = 8, 1, 2
    args.depth, args.envs, args.steps = 4, 4, 60
torch.set_num_threads(1)
ES_SEEDS = min(args.seeds, 5)


def mean_and_error(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the first dimension, the seeds; the standard error is 0 for a single one."""
    spread = runs.std(0, ddof=1) if len(runs) > 1 else 0.0 * runs[0]
    return runs.mean(0), spread / math.sqrt(len(runs))


# %% [markdown]
# ## Evolution strategies
#
# Within `es.perturb(N)` row n of the observations is seen by member n, from the start of the
# episode to its end. The fitness is the return. No value function, no backpropagation, no
# replay: only N numbers an update. Rademacher noise makes one base perturbation as good as
# independent members, and ranks make the step independent of the units of the reward.


# %%
def policy(env: VectorEnv) -> nn.Sequential:
    """A small network from observations to preferences among the actions."""
    inputs, actions = env.single_observation_space.shape[0], env.single_action_space.n
    # No biases: noise on them is large beside what a small angle of the pole adds.
    return nn.Sequential(
        nn.Linear(inputs, 16, bias=False), nn.Tanh(), nn.Linear(16, actions, bias=False)
    )


def returns(env: VectorEnv, net: nn.Module, seed: int) -> Tensor:
    """The return of one episode in each environment ``(N,)``."""
    observation, _ = env.reset(seed=seed)
    total, running = np.zeros(env.num_envs), np.ones(env.num_envs, dtype=bool)
    while running.any():
        values = net(torch.as_tensor(observation, dtype=torch.float))  # (N, actions)
        observation, reward, end, cut, _ = env.step(values.argmax(1).numpy())
        total += reward * running
        running &= ~(end | cut)
    return torch.as_tensor(total)


def evolve(name: str, updates: int, seed: int) -> np.ndarray:
    """Mean return of the unperturbed policy, before the first update and after each."""
    torch.manual_seed(seed)
    mode = "vector_entry_point" if name.startswith("CartPole") else "sync"
    env, test = (
        gymnasium.make_vec(name, num_envs=n, vectorization_mode=mode) for n in (args.members, 16)
    )
    net = policy(env)
    es = FlipES(net, sigma=0.3, distribution="rademacher", fitness_shaping="rank", seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    curve = []
    for step in tqdm(range(updates + 1), desc=f"{name}, seed {seed}", disable=args.smoke):
        with torch.no_grad():
            curve.append(returns(test, net, 10_000 * seed + step).mean().item())
        if step == updates:
            break
        optimizer.zero_grad()
        with es.perturb(args.members):
            fitness = returns(env, net, 10_000_000 + 10_000 * seed + step)
        es.backward(fitness)
        optimizer.step()
    env.close()
    test.close()
    return np.array(curve)


evolved = {}
for name in ("CartPole-v1", "Acrobot-v1") if "es" in args.parts else ():
    runs = np.stack([evolve(name, args.updates, seed) for seed in range(ES_SEEDS)])
    evolved[name] = runs
    each = ", ".join(f"{r:.0f}" for r in sorted(runs[:, -1]))
    print(f"{name}: return {runs[:, 0].mean():.0f} at first, {runs[:, -1].mean():.0f} ({each})")
    print(f"    after {args.updates} updates of {args.members} episodes, {ES_SEEDS} seeds")


# %% [markdown]
# ## A sea with one treasure
#
# Deep Sea [3] is a grid of L rows, L columns. A diver starts at the top left and sinks one row a
# step, to the left or to the right; steps to the right cost 0.01 / L. The treasure of 1 lies at the
# bottom right, so that only the diver who goes right *every* time finds it, and all that is
# felt before is that going right does not pay. Uniformly random actions find it once in
# 2^L episodes; going right *consistently* is what it takes.
#
# Row and column are observed as one-hot vectors of L entries each, and action 1 is right
# everywhere. That lets a network generalise, which is what noise on weights lives from: the
# sea with one input for each cell and actions whose meaning is drawn for each cell, as [3] has it
# too, is no easier for a random network than for a coin.


# %%
class DeepSea(VectorEnv):
    """N seas of depth L, with observations ``(N, 2 L)``; actions are 0, left, and 1, right."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, depth: int) -> None:
        self.num_envs, self.depth = num_envs, depth
        self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (2 * depth,))
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.row = np.zeros(self.num_envs, dtype=int)
        self.column = np.zeros(self.num_envs, dtype=int)
        if options and options.get("stagger"):  # then episodes end at different times
            self.row = np.arange(self.num_envs) % self.depth
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple:
        right = np.asarray(action) == 1
        last = self.row == self.depth - 1
        found = last & right & (self.column == self.depth - 1)
        reward = found - right * 0.01 / self.depth
        self.column = np.clip(self.column + np.where(right, 1, -1), 0, self.depth - 1)
        self.row, self.column = np.where(last, 0, self.row + 1), np.where(last, 0, self.column)
        return self._observe(), reward, last, np.zeros_like(last), {}

    def _observe(self) -> np.ndarray:
        eye = np.eye(self.depth, dtype=np.float32)
        return np.concatenate([eye[self.row], eye[self.column]], 1)


# %% [markdown]
# ## A double DQN, and four ways to act
#
# The agent is the same for all: a replay buffer of all it saw, a target network, and one step of
# Adam for each step of the environments. Only the behaviour differs.
#
# `Exploration` holds one policy for each environment. `resample(ended)` gives new ones to the
# environments whose episode ended; the others keep theirs. With `num_envs=1` all the rows belong
# to one policy: that is the shared perturbation.


# %%
class EpsilonGreedy:
    """Now and then an action drawn uniformly."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    @torch.no_grad()
    def act(self, x: Tensor) -> Tensor:
        values = self.net(x)
        uniform = torch.randint(values.size(1), (len(x),))
        return uniform.where(torch.rand(len(x)) < args.epsilon, values.argmax(1))

    def end(self, ended: Tensor) -> None:
        """Nothing lives for an episode."""


class Shared:
    """One perturbed network acts everywhere, for as long as environment 0's episode lasts."""

    def __init__(self, net: nn.Module) -> None:
        self.explore = Exploration(net, args.sigma, num_envs=1)

    def act(self, x: Tensor) -> Tensor:
        return self.explore(x).argmax(1)

    def end(self, ended: Tensor) -> None:
        if ended[0]:
            self.explore.resample()


class PerEnvironment:
    """Every environment has a policy of its own, by flipout, until its episode ends."""

    def __init__(self, net: nn.Module) -> None:
        self.explore = Exploration(net, args.sigma, num_envs=args.envs)

    def act(self, x: Tensor) -> Tensor:
        return self.explore(x).argmax(1)

    def end(self, ended: Tensor) -> None:
        # Without an argument the sizes of the perturbations are drawn anew as well.
        self.explore.resample(None if ended.all() else ended)


class Independent:
    """The same with weights of its own for every environment, each drawn and stored."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.noise = {n: torch.empty(args.envs, *p.shape) for n, p in net.named_parameters()}
        self.end(torch.ones(args.envs, dtype=torch.bool))

    @torch.no_grad()
    def act(self, x: Tensor) -> Tensor:
        own = {name: p + self.noise[name] for name, p in self.net.named_parameters()}
        return vmap(lambda w, row: functional_call(self.net, w, (row,)))(own, x).argmax(1)

    def end(self, ended: Tensor) -> None:
        for noise in self.noise.values():
            noise[ended] = args.sigma * torch.randn_like(noise[ended])


Behaviour = EpsilonGreedy | Shared | PerEnvironment | Independent
BEHAVIOURS: dict[str, Callable[[nn.Module], Behaviour]] = {
    "ε-greedy": EpsilonGreedy,
    "one perturbation for all": Shared,
    "flipout: one for each": PerEnvironment,
    "independent weights for each": Independent,
}


# %%
class Replay:
    """The last transitions of all environments, at most ``capacity``."""

    def __init__(self, capacity: int, width: int) -> None:
        self.before, self.after = torch.empty(2, capacity, width)
        self.action = torch.empty(capacity, dtype=torch.long)
        self.reward, self.goes_on = torch.empty(2, capacity)
        self.count = 0

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.before, self.action, self.reward, self.goes_on, self.after

    def add(self, *transitions: Tensor) -> None:
        """Observations, actions, rewards, 0 where it ended or 1, next observations."""
        rows = torch.arange(self.count, self.count + len(transitions[0])) % len(self.action)
        for part, new in zip(self.parts, transitions, strict=True):
            part[rows] = new.to(part.dtype)
        self.count += len(rows)

    def sample(self, size: int) -> tuple[Tensor, ...]:
        rows = torch.randint(min(self.count, len(self.action)), (size,))
        return tuple(part[rows] for part in self.parts)


def q_network(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 2))


def loss(net: nn.Module, target: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Of double Q-learning: the network chooses the next action, the target network rates it."""
    x, action, reward, goes_on, after = batch
    with torch.no_grad():
        best = net(after).argmax(1, keepdim=True)
        wanted = reward + 0.99 * goes_on * target(after).gather(1, best)[:, 0]
    return F.smooth_l1_loss(net(x).gather(1, action[:, None])[:, 0], wanted)


@torch.no_grad()
def greedy_return(net: nn.Module) -> float:
    """Of one episode without noise; the sea and the policy are deterministic."""
    sea, total = DeepSea(1, args.depth), 0.0
    x, _ = sea.reset()
    for _ in range(args.depth):
        x, reward, *_ = sea.step(net(torch.as_tensor(x)).argmax(1).numpy())
        total += reward.item()
    return total


@dataclass
class Dives:
    """What one agent did.

    :ivar greedy: return without noise, after every L steps of all environments.
    :ivar found: treasures in these L steps, as a fraction of the episodes.
    :ivar seconds: of choosing actions, in all.
    """

    greedy: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    seconds: float = 0.0


def dive(name: str, seed: int) -> Dives:
    torch.manual_seed(seed)
    sea, log, found = DeepSea(args.envs, args.depth), Dives(), 0
    net = q_network(2 * args.depth)
    target, behaviour = copy.deepcopy(net), BEHAVIOURS[name](net)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    replay = Replay(100_000, 2 * args.depth)
    x = torch.as_tensor(sea.reset(options={"stagger": args.stagger})[0])
    for step in tqdm(range(1, args.steps + 1), desc=f"{name}, seed {seed}", disable=args.smoke):
        start = time.process_time()
        action = behaviour.act(x)
        log.seconds += time.process_time() - start
        after, reward, end = (torch.as_tensor(part) for part in sea.step(action.numpy())[:3])
        replay.add(x, action, reward, ~end, after)
        behaviour.end(end)
        x, found = after, found + int((reward > 0.5).sum())
        optimizer.zero_grad()
        loss(net, target, replay.sample(128)).backward()
        optimizer.step()
        if step % 20 == 0:
            target.load_state_dict(net.state_dict())
        if step % args.depth == 0:
            log.greedy.append(greedy_return(net))
            log.found.append(found / args.envs)
            found = 0
    return log


dives = {
    name: [dive(name, seed) for seed in range(args.seeds)]
    for name in BEHAVIOURS
    if "dqn" in args.parts and any(part in name for part in args.behaviours)
}

# %% [markdown]
# ## What came out
#
# *Mean* is the greedy return's mean over all the run, which rewards learning early. Then the
# greedy return in the last tenth of the run, the share of all episodes that found the treasure
# while exploring, and the median number of episodes until one did (those of a round end
# together, so that it is counted in rounds of N).


# %%
def first_found(runs: list[Dives]) -> str:
    firsts = [next((i + 1 for i, f in enumerate(r.found) if f), math.inf) for r in runs]
    median = float(np.median(np.array(firsts)))
    return "never" if math.isinf(median) else f"{median * args.envs:.0f}"


if dives:
    print(f"\nDeep Sea of depth {args.depth}, {args.envs} environments, {args.seeds} seeds")
    print("| behaviour | mean | at the end | episodes that found it | first | ms to act |")
    print("| --- | --- | --- | --- | --- | --- |")
for name, runs in dives.items():
    greedy = np.array([r.greedy for r in runs])  # (seeds, rounds)
    tail = greedy[:, -max(1, greedy.shape[1] // 10) :].mean(1)
    found = 100 * np.array([np.mean(r.found) for r in runs])
    cells = ["{:.2f} ± {:.2f}".format(*mean_and_error(each)) for each in (greedy.mean(1), tail)]
    cells.append("{:.1f} ± {:.1f} %".format(*mean_and_error(found)))
    cells += [first_found(runs), f"{1e3 * np.mean([r.seconds for r in runs]) / args.steps:.2f}"]
    print(f"| {name} | {' | '.join(cells)} |")


# %%
def curve(axis: plt.Axes, x: np.ndarray, runs: np.ndarray, label: str, style: str = "-") -> None:
    """The mean over seeds with a band of one standard error."""
    mean, error = mean_and_error(runs)
    (line,) = axis.plot(x, mean, style, label=label)
    axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, lw=0)


widths = [1.0] * len(evolved) + [1.7] * bool(dives)
figure, axes = plt.subplots(
    1,
    len(widths),
    figsize=(3.6 * sum(widths), 3.9),
    width_ratios=widths,
    layout="constrained",
    squeeze=False,
)
for axis, (name, runs) in zip(axes[0], evolved.items(), strict=False):
    curve(axis, args.members * np.arange(runs.shape[1]), runs, "FlipES")
    axis.set(xlabel="episodes of members", ylabel="return without noise")
    axis.set_title(f"FlipES on {name}, {len(runs)} seeds", fontsize=10)
if dives:
    axis = axes[0, -1]
    for (name, runs), style in zip(dives.items(), ("-", "-", "-", "--"), strict=False):
        greedy = np.array([r.greedy for r in runs])
        curve(axis, args.envs * np.arange(1, greedy.shape[1] + 1), greedy, name, style)
    axis.set(xlabel="episodes in all environments", ylabel="greedy return", ylim=(-0.05, 1.05))
    axis.set_title(f"DQN on Deep Sea, depth {args.depth}, {args.seeds} seeds", fontsize=10)
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.06), fontsize=8)
figure.savefig(args.out, dpi=150)
print(f"figure: {args.out}")
