"""Sample efficiency of FlipES against fully independent perturbations (IdealES).

Digits (8x8, from scikit-learn), FC 64-h-10 with ReLU, Adam. At each update every member sees one
image drawn at random, and its fitness is minus its cross-entropy, as in Figure 2 of Wen et al.
(2018). IdealES draws explicit weights for each member and uses torch.func.vmap. Prints the
training loss on all the images along the way, mean ± standard error over seeds that share
initial weights and images, the paired difference to IdealES, and the variance of the gradient
at the initial weights where all members see the same 16 images, so that nothing but the
perturbations varies.

    python benchmarks/es_digits.py
    python benchmarks/es_digits.py --members 1600 --seeds 5 --updates 150
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, vmap

from pyro_flipout.infer import FlipES


class IdealES:
    """The estimate of eq. 5 with independent Gaussian noise for every member."""

    def __init__(self, net, sigma, seed):
        self.net, self.sigma = net, sigma
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, x, y):  # (members, k, 64), (members, k)
        eps = {
            name: torch.randn(len(x), *p.shape, generator=self.generator)
            for name, p in self.net.named_parameters()
        }
        own = {n: p + self.sigma * eps[n] for n, p in self.net.named_parameters()}
        out = vmap(lambda w, x: functional_call(self.net, w, (x,)))(own, x)
        fitness = -F.cross_entropy(out.mT, y, reduction="none").mean(1)
        values = (fitness - fitness.mean()) / (len(x) - 1) / -self.sigma
        for name, p in self.net.named_parameters():
            p.grad = torch.tensordot(values, eps[name], 1)


class Flip:
    """FlipES with the same interface."""

    def __init__(self, net, sigma, seed, num_bases=1, **options):
        self.es = FlipES(net, sigma, seed=seed, num_bases=num_bases, **options)

    def update(self, x, y):
        self.es.module.zero_grad()
        with self.es.perturb(len(x)):
            out = self.es.module(x.flatten(0, 1)).unflatten(0, y.shape)
        self.es.backward(-F.cross_entropy(out.mT, y, reduction="none").mean(1))


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float), torch.tensor(data.target)


def network(units, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))


def methods(sigma, members, per_base):
    return {
        "IdealES": lambda net, seed: IdealES(net, sigma, seed),
        f"FlipES, {per_base} a base": lambda net, seed: Flip(
            net, sigma, seed, num_bases=members // per_base
        ),
        "FlipES, one base": lambda net, seed: Flip(net, sigma, seed),
        "FlipES, one Rademacher base": lambda net, seed: Flip(
            net, sigma, seed, distribution="rademacher"
        ),
    }


def train(make, x, y, seed, units, members, updates, every, lr):
    """Training losses on all the data, after every few updates."""
    net = network(units, seed)
    es, optimizer = make(net, seed), torch.optim.Adam(net.parameters(), lr=lr)
    draws = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(1, updates + 1):
        batch = torch.randint(len(x), (members, 1), generator=draws)
        es.update(x[batch], y[batch])
        optimizer.step()
        if step % every == 0:
            with torch.no_grad():
                losses.append(F.cross_entropy(net(x), y))
    return torch.stack(losses)


def gradient_variance(make, x, y, units, members, repeats):
    """Variance of the estimate, summed over the weights, and its standard error."""
    net = network(units, 0)
    es = make(net, 1)
    grads = []
    for _ in range(repeats):
        es.update(x[:16].expand(members, -1, -1), y[:16].expand(members, -1))
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    squares = (torch.stack(grads) - torch.stack(grads).mean(0)).pow(2).sum(1)
    return squares.mean().item(), (squares.std() / repeats**0.5).item()


def mean_and_error(values):
    return values.mean(0), values.std(0) / len(values) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=1600)
    parser.add_argument("--per-base", type=int, default=40)
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sigma", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = digits()
    every = args.updates // 5
    print(
        f"{args.members} members, sigma {args.sigma}, FC 64-{args.units}-10, {args.seeds} seeds\n"
    )
    steps = " | ".join(str(every * (i + 1)) for i in range(5))
    print(f"| loss after updates | {steps} | last, less IdealES | gradient variance |")
    print("| --- " * 8 + "|")
    ideal = None
    for name, make in methods(args.sigma, args.members, args.per_base).items():
        runs = torch.stack(
            [
                train(make, x, y, s, args.units, args.members, args.updates, every, args.lr)
                for s in range(args.seeds)
            ]
        )
        ideal = runs if ideal is None else ideal
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(*mean_and_error(runs), strict=True)]
        mean, error = mean_and_error(runs[:, -1] - ideal[:, -1])
        variance, noise = gradient_variance(make, x, y, args.units, args.members, args.repeats)
        row = [*cells, f"{mean:+.4f} ± {error:.4f}", f"{variance:.3g} ± {noise:.2g}"]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
