# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Training step of a recurrent layer: flipout against torch's fused layer on a shared draw.

A step draws every weight from its Normal, runs the layer, and differentiates the sum of its
output with respect to all locations and scales. Rounds of both alternate, since other programs
disturb them; what is printed are medians over the rounds, and the median of the ratios.

    python benchmarks/lstm.py --threads 2
"""

import argparse
import platform
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call

from pyro_flipout import flip
from pyro_flipout.tensor import Execution

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--kind", default="LSTM", choices=["LSTM", "GRU", "RNN"])
PARSER.add_argument("--batch", type=int, default=32)
PARSER.add_argument("--length", type=int, default=100)
PARSER.add_argument("--hidden", type=int, default=512)
PARSER.add_argument("--rounds", type=int, default=15)
PARSER.add_argument("--threads", type=int, default=2)
PARSER.add_argument("--device", default="cpu")


class Step:
    """One training step of a layer whose weights are Normal."""

    def __init__(self, args):
        self.layer = getattr(nn, args.kind)(args.hidden, args.hidden, batch_first=True)
        self.layer.to(args.device)
        self.input = torch.randn(args.batch, args.length, args.hidden, device=args.device)
        self.loc = {k: p.detach().clone() for k, p in self.layer.named_parameters()}
        self.scale = {k: torch.full_like(p, 0.01) for k, p in self.loc.items()}
        self.leaves = [p.requires_grad_() for p in (*self.loc.values(), *self.scale.values())]

    def __call__(self, flipout):
        execution, weights = Execution(), {}
        for name, loc in self.loc.items():
            delta = self.scale[name] * torch.randn_like(loc)
            value = loc + delta
            weights[name] = (
                flip(value, loc, delta, site=name, execution=execution) if flipout else value
            )
        output, _ = functional_call(self.layer, weights, (self.input,))
        torch.autograd.grad(output.sum(), self.leaves)

    def seconds(self, flipout):
        self._synchronize()
        start = time.perf_counter()
        self(flipout)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self):
        if self.input.is_cuda:
            torch.cuda.synchronize()


def main():
    args = PARSER.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = Step(args)
    step(True), step(False)
    rounds = [(step.seconds(True), step.seconds(False)) for _ in range(args.rounds)]
    flipout, shared = (statistics.median(times) * 1e3 for times in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    best = min(a for a, _ in rounds) / min(b for _, b in rounds)
    print(f"nn.{args.kind}, batch {args.batch}, length {args.length}, hidden {args.hidden}")
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.machine()}, {args.device}")
    print(f"flipout {flipout:.0f} ms, shared {shared:.0f} ms")
    print(f"ratio {ratio:.2f}, of the minima {best:.2f}")


if __name__ == "__main__":
    main()
