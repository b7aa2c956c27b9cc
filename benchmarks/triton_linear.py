# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The flipped linear product on a GPU: the fused Triton kernel against two library calls.

Both and the plain layer on a shared draw take turns, round after round, each timed with CUDA
events over a few calls; with --graph, over replays of a CUDA graph of it, which shows the time of
the GPU where Python is slower. What is printed are medians over the rounds: milliseconds, and of
the same round's times the ratio fused / library (below 1 the kernel wins) and fused / plain. `auto`
says which of the two pyro_flipout chooses by itself; where it chooses the slower one, correct
`pyro_flipout.kernels._pays`. Needs a CUDA device and Triton.

    python benchmarks/triton_linear.py
    python benchmarks/triton_linear.py --graph
    python benchmarks/triton_linear.py --dtypes bfloat16 --sizes 8192x784x512 --rounds 30
"""

import argparse
import functools
import os
import statistics
import sys

import torch
import torch.nn.functional as F

from pyro_flipout import flip, kernels
from pyro_flipout.tensor import Execution

SIZES = [f"{n}x{d}x{d}" for d in (128, 512, 1024, 2048, 4096) for n in (128, 1024, 8192)]
PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--sizes", nargs="+", default=SIZES, help="examples x inputs x outputs")
PARSER.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
PARSER.add_argument("--tf32", action="store_true", help="let float32 products use TF32")
PARSER.add_argument("--graph", action="store_true", help="time replays of a CUDA graph")
PARSER.add_argument("--passes", nargs="+", default=["forward", "forward+backward"])
PARSER.add_argument("--calls", type=int, default=10, help="calls timed together")
PARSER.add_argument("--rounds", type=int, default=20)

MODES = {"fused": "1", "library": "0", "plain": "0"}


class Layer:
    """A linear layer of one size, with a Normal draw as its weight."""

    def __init__(self, size, dtype):
        examples, inputs, outputs = map(int, size.split("x"))
        options = {"device": "cuda", "dtype": dtype}
        self.input = torch.randn(examples, inputs, **options).requires_grad_()
        self.center = torch.randn(outputs, inputs, **options).requires_grad_()
        self.delta = (0.1 * torch.randn(outputs, inputs, **options)).requires_grad_()
        self.bias = torch.randn(outputs, **options).requires_grad_()
        self.grad = torch.randn(examples, outputs, **options)
        self.leaves = [self.input, self.center, self.delta, self.bias]

    def call(self, mode, backward):
        os.environ["PYRO_FLIPOUT_TRITON"] = MODES[mode]
        weight = value = self.center + self.delta
        if mode != "plain":
            weight = flip(value, self.center, self.delta, execution=Execution())
        with torch.set_grad_enabled(backward):
            output = F.linear(self.input, weight, self.bias)
        if backward:
            torch.autograd.grad(output, self.leaves, self.grad)

    def chosen(self, mode):
        os.environ["PYRO_FLIPOUT_TRITON"] = mode
        return kernels.available(self.input, self.center, self.delta, self.bias)

    def capture(self, mode, backward):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.call(mode, backward)
        return graph.replay

    def milliseconds(self, call, calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls


def measure(layer, backward, args):
    """Milliseconds of every mode in every round, after tuning and warming up."""
    calls = {}
    for mode in MODES:
        for _ in range(3):
            layer.call(mode, backward)
        torch.cuda.synchronize()
        by_hand = functools.partial(layer.call, mode, backward)
        calls[mode] = layer.capture(mode, backward) if args.graph else by_hand
    return [
        {mode: layer.milliseconds(calls[mode], args.calls) for mode in MODES}
        for _ in range(args.rounds)
    ]


def row(size, dtype, what, args):
    layer = Layer(size, getattr(torch, dtype))
    if not layer.chosen("1"):
        sys.exit(f"the fused kernel cannot run on {torch.cuda.get_device_name()} in {dtype}")
    rounds = measure(layer, "backward" in what, args)
    times = [f"{statistics.median(r[mode] for r in rounds):.3f}" for mode in MODES]
    ratios = [
        f"{statistics.median(r['fused'] / r[other] for r in rounds):.2f}"
        for other in ("library", "plain")
    ]
    auto = "fused" if layer.chosen("auto") else "library"
    return [size, dtype, what, *times, *ratios, auto]


def main():
    args = PARSER.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/triton_linear.py needs a CUDA device, and this machine has none")
    if not kernels._installed():
        sys.exit("benchmarks/triton_linear.py needs Triton; pip install triton")
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.manual_seed(0)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{where}, TF32 {args.tf32}, CUDA graph {args.graph}")
    print("| N x K x O | dtype | pass | fused ms | library ms | plain ms | f/l | f/p | auto |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        for size in args.sizes:
            for what in args.passes:
                print("|", " | ".join(row(size, dtype, what, args)), "|", flush=True)


if __name__ == "__main__":
    main()
