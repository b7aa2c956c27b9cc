# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What the audit costs: the first step of a model, and the steps after it.

The first step is that of a model that was never run before, in plain steps of the same network.
Afterwards ``flipout(model)``, made anew at each step, takes turns with
``flipout(model, audit=False)``; what is printed are medians of the ratios of neighbouring steps.

    python benchmarks/audit.py
    python benchmarks/audit.py --sizes 784 512 512 10 --batch 1024 --rounds 20
"""

import argparse
import itertools
import statistics
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_flipout import FlipoutWarning, flipout
from pyro_flipout.nn import bayesianize

CASES = [((4, 8, 3), 32), ((784, 512, 512, 10), 128), ((784, 512, 512, 10), 1024)]


class Classifier(PyroModule):
    """A Bayesian multi-layer perceptron.

    :param mixes: whether its examples mix, so that the audit searches and leaves all sites shared.
    """

    def __init__(self, sizes, mixes=False):
        super().__init__()
        layers = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.net, self.mixes = bayesianize(nn.Sequential(*layers[:-1])), mixes

    def forward(self, x, y=None):
        logits = self.net(x)
        logits = logits - logits.mean(0) if self.mixes else logits
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def ready(sizes, batch, mixes=False):
    """A new model, and steps of it that are wrapped by a function of the model."""
    pyro.clear_param_store()
    model = Classifier(sizes, mixes)
    x, y = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
    guide = AutoNormal(model, init_scale=0.01)
    guide(x, y)
    optim = pyro.optim.Adam({"lr": 1e-3})

    def step(wrap):
        return SVI(wrap(model), guide, optim, Trace_ELBO()).step(x, y)

    return step


def seconds(fn, *args):
    """The time of one call."""
    start = time.perf_counter()
    fn(*args)
    return time.perf_counter() - start


def plain(model):
    return model


def first_step(sizes, batch, rounds, mixes=False):
    """The first step of new models, in plain steps."""
    ratios = []
    for _ in range(rounds):
        step = ready(sizes, batch, mixes)
        step(plain)  # allocates the optimiser's state
        before = [seconds(step, plain) for _ in range(3)]
        first = seconds(step, flipout)
        after = [seconds(step, plain) for _ in range(3)]
        ratios.append(first / statistics.median(before + after))
    return ratios


def later_steps(sizes, batch, rounds):
    """Steps after the first one, over those of a model that is not audited."""
    step = ready(sizes, batch)
    without = lambda model: flipout(model, audit=False)  # noqa: E731
    for wrap in (flipout, without, plain):
        step(wrap)
    ratios, over_plain = [], []
    for turn in range(10 * rounds):
        order = (flipout, without) if turn % 2 else (without, flipout)
        took = {wrap: seconds(step, wrap) for wrap in order}
        ratios.append(took[flipout] / took[without])
        over_plain.append(took[flipout] / seconds(step, plain))
    return ratios, over_plain


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FlipoutWarning)
    cases = [(tuple(args.sizes), args.batch)] if args.sizes else CASES
    print(
        "| network | N | first step, in plain steps (worst) | of a model that mixes "
        "| later steps, over audit=False | over plain |\n|---|---|---|---|---|---|"
    )
    for sizes, batch in cases:
        first = first_step(sizes, batch, args.rounds)
        mixes = first_step(sizes, batch, max(args.rounds // 3, 1), mixes=True)
        later, over_plain = later_steps(sizes, batch, args.rounds)
        print(
            f"| {'-'.join(map(str, sizes))} | {batch} "
            f"| {statistics.median(first):.1f} ({max(first):.1f}) "
            f"| {statistics.median(mixes):.1f} "
            f"| {statistics.median(later):.3f} | {statistics.median(over_plain):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
