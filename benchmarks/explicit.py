# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Flipped layers by two products and by explicit weights, as ratios to the plain layer.

Forward and backward of one layer with a flipped weight and bias. The three take turns, round
after round; what is printed are medians over the rounds of the ratio to the plain layer of the
same round. This is what the limits ``min_uses`` of the rules stand on.

    python benchmarks/explicit.py --threads 1
"""

import argparse
import dataclasses
import statistics
import time
from unittest import mock

import torch
import torch.nn.functional as F

from pyro_flipout import flip
from pyro_flipout.rules import _product
from pyro_flipout.rules._explicit import plan_explicit
from pyro_flipout.tensor import Execution

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--rounds", type=int, default=7)
PARSER.add_argument("--threads", type=int, default=1)

WAYS = {
    "two products": lambda *args: None,
    "explicit weights": lambda kernel, *args: plan_explicit(
        dataclasses.replace(kernel, min_uses=0), *args
    ),
}


def dense(tokens, inputs, outputs, group_size=1):
    """A dense layer on ``tokens`` rows of each of its examples."""
    count = 64 if tokens > 1 else 4096
    shape = (count, tokens, inputs) if tokens > 1 else (count, inputs)
    name = f"dense {inputs}-{outputs}, " + (
        f"{tokens} tokens" if tokens > 1 else f"groups of {group_size}"
    )
    return name, F.linear, shape, (outputs, inputs), group_size


def conv(side, inputs, outputs, kernel, stride=1):
    """A convolution of square images."""

    def op(x, w, b):
        return F.conv2d(x, w, b, stride, kernel // 2)

    name = f"conv {inputs}-{outputs}, {kernel}x{kernel}, stride {stride}, {side}x{side} pixels"
    return name, op, (64, inputs, side, side), (outputs, inputs, kernel, kernel), 1


LAYERS = [
    dense(128, 512, 512),
    dense(100, 512, 2048),
    dense(64, 64, 64),
    dense(32, 128, 384),
    dense(16, 128, 384),
    conv(28, 1, 32, 5),
    conv(14, 32, 64, 5),
    conv(32, 64, 64, 3),
    conv(16, 128, 128, 3),
    conv(8, 128, 128, 3),
    conv(32, 64, 128, 3, stride=2),
    conv(16, 256, 64, 1),
    dense(1, 784, 512, group_size=32),
    dense(1, 784, 512, group_size=64),
    dense(1, 784, 512, group_size=128),
]


class Layer:
    """Forward and backward of one layer, plain or flipped."""

    def __init__(self, op, data, weight, group_size):
        self.op, self.group_size = op, group_size
        shapes = data, weight, weight, weight[:1], weight[:1]
        self.leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        self.grad = torch.randn_like(self.plain())

    def plain(self):
        x, weight, _, bias, _ = self.leaves
        return self.op(x, weight, bias)

    def flipped(self):
        x, *parts = self.leaves
        execution = Execution(group_size=self.group_size)
        weight, bias = (
            flip(center + delta, center, delta, execution=execution)
            for center, delta in (parts[:2], parts[2:])
        )
        return self.op(x, weight, bias)

    def seconds(self, forward):
        start = time.process_time()
        forward().backward(self.grad)
        return time.process_time() - start


def measure(layer, rounds):
    """Ratios to the plain layer by way, medians over the rounds."""
    ratios = {way: [] for way in WAYS}
    for round_ in range(rounds + 1):
        plain = layer.seconds(layer.plain)
        for way, plan in WAYS.items():
            with mock.patch.object(_product, "plan_explicit", plan):
                ratio = layer.seconds(layer.flipped) / plain
            if round_:  # the first one warms up
                ratios[way].append(ratio)
    return {way: statistics.median(values) for way, values in ratios.items()}


def main():
    args = PARSER.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.rounds} rounds\n")
    print("| layer | " + " | ".join(WAYS) + " |\n| --- | --- | --- |")
    for name, *what in LAYERS:
        found = measure(Layer(*what), args.rounds)
        print(f"| {name} | " + " | ".join(f"{found[way]:.2f}" for way in WAYS) + " |", flush=True)


if __name__ == "__main__":
    main()
