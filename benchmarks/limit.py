# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What a flipout step costs that is written by hand, without Pyro: the limit for step.py's ratios.

The dense network of step.py with one vector of locations and one of scales, noise drawn at once,
the KL term in closed form, Adam, and two products a layer. Its signs are ready-made before the
clock starts, which no implementation can have. "Two products" is the same step with both products
and no sign at all, by hand and by the library with its flips taken out: what flips cost is the
difference. Prints ratios to the plain network's step of the same round, medians over the rounds.

    python benchmarks/limit.py --sizes 128 1024 8192 --cpu-time
"""

import contextlib
import statistics
import sys
from pathlib import Path
from unittest import mock

import pyro
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import step

from pyro_flipout.rules import _fused_product
from pyro_flipout.signs import Signs

SHAPES = [(512, 784), (512, 512), (10, 512)]


class ByHand:
    """Mean-field FC 784-512-512-10 in plain PyTorch.

    :param signs: per layer, those of its inputs ``(N, in)``, outputs and bias ``(N, out)``;
        None for one draw that the mini-batch shares.
    :param products: of a layer that has no signs.
    """

    def __init__(self, signs, clock, products=1):
        self.signs, self.clock, self.products = signs, clock, products
        self.sizes = [n for out, in_ in SHAPES for n in (out * in_, out)]
        self.loc = nn.Parameter(0.03 * torch.randn(sum(self.sizes)))
        self.rho = nn.Parameter(torch.full_like(self.loc, -3.0))
        self.optimizer = torch.optim.Adam([self.loc, self.rho], 1e-3)

    def step(self, x, y):
        """Seconds of one step."""
        start = self.clock()
        self.optimizer.zero_grad()
        scale = F.softplus(self.rho)
        delta = scale * torch.randn_like(scale)
        h = x.flatten(1)
        locs, deltas = self.loc.split(self.sizes), delta.split(self.sizes)
        for i, shape in enumerate(SHAPES):
            center, bias = locs[2 * i].view(shape), locs[2 * i + 1]
            dw, db = deltas[2 * i].view(shape), deltas[2 * i + 1]
            if self.signs is None and self.products == 1:
                h = F.linear(h, center + dw, bias + db)
            elif self.signs is None:
                h = F.linear(h, center, bias) + F.linear(h, dw, db)
            else:
                s, r, t = self.signs[i]
                h = F.linear(h, center, bias) + F.linear(h * s, dw) * r + db * t
            h = F.relu(h) if i < 2 else h
        kl = (self.loc.square().sum() + scale.square().sum()) / 2 - scale.log().sum()
        (F.cross_entropy(h, y) + kl / 60_000).backward()
        self.optimizer.step()
        return self.clock() - start


class WithoutSigns(step.Stepper):
    """The library's step with all that it does to flip taken out, the products left."""

    def step(self, x, y):
        """Seconds of one step."""
        instead = {
            "add_times": lambda signs, out, x, *dims: out.add_(x),
            "add_vectors": lambda signs, out, center, delta, *dims: out.add_(center + delta),
            "sum_times": lambda signs, x: x.sum(0),
        }
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(_fused_product, "_flip", lambda x, placed: x))
            stack.enter_context(mock.patch.multiple(Signs, **instead))
            return super().step(x, y)


def signs(size):
    """Ready-made signs of every layer."""
    return [
        [torch.randint(2, (size, d)).mul_(2).sub_(1).float() for d in (in_, out, out)]
        for out, in_ in SHAPES
    ]


def main():
    args = step.parse()
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    net = step.NETS["fc"]
    print("| N | step | time / plain | quartiles | ms |\n" + "| --- " * 5 + "|")
    for size in args.sizes or [128, 1024, 8192]:
        x, y = net.batch(size, "cpu")
        steppers = {
            name: step.Stepper(name, net, args)
            for name in ("plain", "AutoMeanField, shared", "AutoMeanField, flipout")
        }
        name = "AutoMeanField, flipout"
        steppers["AutoMeanField, two products"] = WithoutSigns(name, net, args)
        steppers["by hand, shared"] = ByHand(None, args.clock)
        steppers["by hand, two products"] = ByHand(None, args.clock, products=2)
        steppers["by hand, flipout"] = ByHand(signs(size), args.clock)
        ratios, seconds = step.interleave(args, steppers, x, y)
        for name, found in ratios.items():
            low, high = step.quartiles(found)
            ms = 1e3 * statistics.median(seconds[name])
            middle = statistics.median(found)
            print(f"| {size} | {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {ms:.1f} |")


if __name__ == "__main__":
    main()
