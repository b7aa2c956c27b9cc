# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""One training step of a Bayesian network, as a ratio to the plain network's step.

A step is the guide, the model, the ELBO, its gradient and the optimiser. All estimators take
turns, round after round, since other programs disturb them; what is printed are medians over the
rounds of the ratio to the plain step of the *same* round. Beside it the peak of the memory that a
step allocates and the bytes it saves for the backward pass, both over the plain step's. Writes
OUT/NET.md and OUT/NET.png.

    python benchmarks/step.py --nets fc --threads 1
    python benchmarks/step.py --nets fc convle --estimators "AutoMeanField, flipout" --sizes 1024
    python benchmarks/step.py --device cuda --dtype bf16
    python benchmarks/step.py --device cuda --graph

"captured" replays the same step without Python, "compiled" what torch.compile makes of it; both on
a CPU. With --graph every step is captured as a CUDA graph and replayed: what is left is the time of
the GPU, without Python's. Pyro's losses cannot be captured, so all estimators have MeanFieldELBO
then.
"""

import argparse
import functools
import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import matplotlib
import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import convle, fc

from pyro_flipout import flipout
from pyro_flipout.infer import AutoMeanField, MeanFieldELBO, captured
from pyro_flipout.nn import bayesianize

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ------------------------------------------------------------------------------- networks


class CharLSTM(nn.Module):
    """A 1x512 LSTM that predicts one of 65 characters at each of 100 steps."""

    def __init__(self):
        super().__init__()
        self.lstm, self.output = nn.LSTM(512, 512, batch_first=True), nn.Linear(512, 65)

    def forward(self, x):
        return self.output(self.lstm(x)[0])


class Transformer(nn.Module):
    """A 2-layer encoder of width 128 over 32 tokens, 10 classes."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(128, 10)

    def forward(self, x):
        return self.output(self.encoder(x).mean(1))


def wide():
    """So wide that a GPU is busy with its products."""
    act = nn.ReLU
    return nn.Sequential(
        nn.Linear(1024, 4096), act(), nn.Linear(4096, 4096), act(), nn.Linear(4096, 10)
    )


class Net:
    """A network, the shape of an example, its classes and the batch sizes worth running.

    :param peer: whether bayesian-torch can convert it.
    """

    def __init__(self, make, shape, sizes, labels=(), classes=10, peer=True):
        self.make, self.shape, self.sizes = make, shape, sizes
        self.labels, self.classes, self.peer = labels, classes, peer

    def batch(self, size, device):
        x = torch.randn(size, *self.shape, device=device)
        return x, torch.randint(self.classes, (size, *self.labels), device=device)


def tiny():
    """So small that what is left is the cost of Pyro, the guide and the handler."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))


NETS = {
    "fc": Net(lambda: fc(28), (28, 28), [32, 128, 1024, 8192]),
    "convle": Net(lambda: convle(28), (28, 28), [32, 128, 1024]),
    "lstm": Net(CharLSTM, (100, 512), [32, 128], (100,), 65, peer=False),
    "transformer": Net(Transformer, (32, 128), [32, 128, 1024], peer=False),
    "wide": Net(wide, (1024,), [1024, 8192]),
    "tiny": Net(tiny, (8,), [1]),
}

USUAL = ["fc", "convle", "lstm", "transformer"]

# ----------------------------------------------------------------------------- estimators


class Plain:
    """The network itself, trained by Adam."""

    def __init__(self, net, args):
        self.net, self.autocast = net, args.autocast
        self.forward = torch.compile(net) if args.compile else net
        self.optimizer = torch.optim.Adam(net.parameters(), 1e-3, capturable=args.graph)

    def step(self, x, y):
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.forward(x)
        self.loss(logits.float(), y).backward()
        self.optimizer.step()

    def loss(self, logits, y):
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())


class BayesianTorch(Plain):
    """bayesian-torch's layers in place of the network's, their KL added."""

    def __init__(self, net, args, kind):
        from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

        options = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0}
        options |= {"posterior_rho_init": -3.0, "type": kind, "moped_enable": False}
        dnn_to_bnn(net, options)
        super().__init__(net.to(args.device), args)

    def loss(self, logits, y):
        from bayesian_torch.models.dnn_to_bnn import get_kl_loss

        return super().loss(logits, y) + get_kl_loss(self.net) / 60_000


class Pyro:
    """The network with a prior on every parameter, trained by SVI.

    :param group_size: of flipout; 0 for shared draws.
    :param replay: whether the step is recorded and replayed.
    :param fuse: whether what is recorded is compiled.
    """

    def __init__(self, net, args, guide, group_size, replay=False, fuse=False):
        net = bayesianize(net)
        forward = torch.compile(net) if args.compile else net

        def model(x, y):
            with args.autocast():
                logits = forward(x)
            with pyro.plate("data", len(x)), pyro.poutine.scale(scale=60_000 / len(x)):
                classes = pyro.distributions.Categorical(logits=logits.float())
                pyro.sample("y", classes.to_event(y.dim() - 1), obs=y)

        self.guide = guide(model)
        elbo = Trace_ELBO() if guide is AutoNormal and not args.graph else MeanFieldELBO()
        elbo = captured(elbo, compile=fuse) if replay else elbo
        options = {"on_missing_rule": "error", "group_size": group_size}
        program = flipout(model, **options) if group_size else model
        self.svi = SVI(program, self.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        self.loss = functools.partial(elbo.differentiable_loss, program, self.guide)
        self.graph, self.optimizer = args.graph, None

    def step(self, x, y):
        if not self.graph:
            self.svi.step(x, y)
            return
        if self.optimizer is None:
            self.guide(x, y)  # makes its parameters
            self.optimizer = torch.optim.Adam(self.guide.parameters(), 1e-3, capturable=True)
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()


ESTIMATORS = {
    "plain": Plain,
    "AutoNormal, shared": lambda net, args: Pyro(net, args, AutoNormal, 0),
    "AutoNormal, flipout": lambda net, args: Pyro(net, args, AutoNormal, 1),
    "AutoMeanField, shared": lambda net, args: Pyro(net, args, AutoMeanField, 0),
    "AutoMeanField, flipout": lambda net, args: Pyro(net, args, AutoMeanField, 1),
    "AutoNormal, flipout, captured": lambda net, args: Pyro(net, args, AutoNormal, 1, True),
    "AutoMeanField, flipout, captured": lambda net, args: Pyro(net, args, AutoMeanField, 1, True),
    "AutoNormal, flipout, compiled": lambda net, args: Pyro(net, args, AutoNormal, 1, True, True),
    "AutoMeanField, flipout, compiled": lambda net, args: Pyro(
        net, args, AutoMeanField, 1, True, True
    ),
    "AutoMeanField, groups of 64": lambda net, args: Pyro(net, args, AutoMeanField, 64),
    "AutoMeanField, groups of 128": lambda net, args: Pyro(net, args, AutoMeanField, 128),
    "bayesian-torch, reparam.": lambda net, args: BayesianTorch(net, args, "Reparameterization"),
    "bayesian-torch, flipout": lambda net, args: BayesianTorch(net, args, "Flipout"),
}

# ------------------------------------------------------------------------------ measuring


class Stepper:
    """An estimator with a parameter store of its own."""

    def __init__(self, name, net, args):
        pyro.set_rng_seed(0)
        self.args, self.state = args, {"params": {}, "constraints": {}}
        self.scope, self.graph = pyro.get_param_store().scope, None
        with self.scope(self.state) as self.state:
            self.estimator = ESTIMATORS[name](net.make().to(args.device), args)

    def step(self, x, y):
        """Seconds of one step."""
        with self.scope(self.state) as self.state:
            step = self._replay(x, y) if self.args.graph else self.estimator.step
            self._synchronize()
            start = self.args.clock()
            step(x, y)
            self._synchronize()
            return self.args.clock() - start

    def _replay(self, x, y):
        """Replays a step on ``x`` and ``y``, which is captured when it is first asked for."""
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.estimator.step(x, y)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.estimator.step(x, y)
        return lambda x, y: self.graph.replay()

    def peak(self, x, y):
        """Bytes allocated at the highest point of a step, above what was there before."""
        if self.args.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(x, y)
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[CPU], profile_memory=True) as profile:
            self.step(x, y)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    def saved(self, x, y):
        """Bytes saved for the backward pass, each storage once, without data and parameters."""
        known = {t.untyped_storage().data_ptr() for t in (x, y)}
        found = {}

        def pack(t):
            storage = t.untyped_storage()
            if t.is_leaf and t.requires_grad:
                known.add(storage.data_ptr())
            found[storage.data_ptr()] = storage.nbytes(), t  # holds the storage's address
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.step(x, y)
        return sum(size for address, (size, _) in found.items() if address not in known)

    def _synchronize(self):
        if self.args.device == "cuda":
            torch.cuda.synchronize()


os.environ.setdefault("KINETO_LOG_LEVEL", "5")
CPU = torch.profiler.ProfilerActivity.CPU


def measure(args, net, size):
    """Rows ``name -> (ratio, its quartiles, ms, peak, saved)`` at one batch size."""
    names = [n for n in args.estimators if net.peer or "bayesian-torch" not in n]
    if args.device == "cuda" or args.compile:
        names = [n for n in names if not n.endswith(("captured", "compiled"))]
    steppers = {name: Stepper(name, net, args) for name in ["plain", *names]}
    x, y = net.batch(size, args.device)
    ratios, seconds = interleave(args, steppers, x, y)
    rows = {}
    for name, stepper in steppers.items():
        middle = statistics.median(ratios[name])
        low, high = quartiles(ratios[name])
        memory = (stepper.peak(x, y), stepper.saved(x, y)) if args.memory else (0, 0)
        rows[name] = middle, low, high, 1e3 * statistics.median(seconds[name]), *memory
    return rows


def interleave(args, steppers, x, y):
    """Ratios to the plain step of the same round, and seconds, by name."""
    ratios, seconds = defaultdict(list), defaultdict(list)
    names, generator = list(steppers), random.Random(0)
    for round_ in range(args.warmup + args.rounds):
        # In an order of its own: who comes after a step like its own finds the caches warm.
        generator.shuffle(names)
        took = {
            name: statistics.median(steppers[name].step(x, y) for _ in range(args.steps))
            for name in names
        }
        if round_ >= args.warmup:
            for name, s in took.items():
                seconds[name].append(s)
                ratios[name].append(s / took["plain"])
    return ratios, seconds


def quartiles(values):
    return (min(values), max(values)) if len(values) < 4 else statistics.quantiles(values)[::2]


def table(args, found):
    """Markdown: one row an estimator and batch size."""
    yield "| N | estimator | time / plain | quartiles | ms | peak memory | saved for backward |"
    yield "| --- " * 7 + "|"
    for size, rows in found.items():
        plain = rows["plain"]
        for name, (middle, low, high, ms, peak, saved) in rows.items():
            memory = [f"{peak / plain[4]:.2f}", f"{saved / plain[5]:.2f}"] if args.memory else "--"
            spread = f"{low:.2f} to {high:.2f}"
            yield f"| {size} | {name} | {middle:.2f} | {spread} | {ms:.1f} | {' | '.join(memory)} |"


COLOURS = {"plain": "k", "AutoNormal": "C0", "AutoMeanField": "C1", "bayesian-torch": "C2"}
STYLES = {
    "plain": "--",
    "shared": ":o",
    "reparam.": ":o",
    "flipout": "-o",
    "captured": "-^",
    "compiled": "-s",
    "groups of 64": "--v",
    "groups of 128": "--D",
}


def draw(name, found, path):
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for estimator in next(iter(found.values())):
        rows = [rows[estimator] for rows in found.values()]
        middle, low, high = ([row[i] for row in rows] for i in range(3))
        words = estimator.split(", ")
        style = {"color": COLOURS[words[0]], "fmt": STYLES[words[-1]], "markersize": 5}
        bars = [[m - a for m, a in zip(middle, low, strict=True)]]
        bars += [[b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(list(found), middle, bars, label=estimator, **style)
    axes.set(xscale="log", xlabel="mini-batch size N", ylabel="time of a step / plain step")
    axes.set(ylim=(0, None), title=name, xticks=list(found), xticklabels=map(str, found))
    axes.minorticks_off()
    figure.legend(loc="outside center right", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=USUAL, choices=list(NETS))
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS))
    parser.add_argument("--sizes", type=int, nargs="+", help="default: those that suit the net")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=1, help="in a row, as in training; their median counts"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph of the step")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use")
    parser.add_argument("--out", type=Path, default=Path("step"))
    args = parser.parse_args()
    args.estimators = [n for n in args.estimators or ESTIMATORS if n != "plain"]
    if args.graph and args.device != "cuda":
        parser.error("--graph is of CUDA graphs: add --device cuda")
    args.memory = args.memory and not args.graph
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    enabled = args.dtype == "bf16"
    args.autocast = lambda: torch.autocast(args.device, torch.bfloat16, enabled=enabled)
    return args


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    args.out.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    for name in args.nets:
        net = NETS[name]
        found = {size: measure(args, net, size) for size in args.sizes or net.sizes}
        text = (
            f"## {name}\n\ntorch {torch.__version__} on {where}, {args.threads} thread(s), "
            f"{args.dtype}{', compiled' if args.compile else ''}"
            f"{', CUDA graph' if args.graph else ''}, {args.rounds} rounds.\n\n"
            f"`{' '.join(['python', *sys.argv])}`\n\n" + "\n".join(table(args, found)) + "\n"
        )
        (args.out / f"{name}.md").write_text(text)
        draw(name, found, args.out / f"{name}.png")
        print(text, flush=True)


if __name__ == "__main__":
    main()
