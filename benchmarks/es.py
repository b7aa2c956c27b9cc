"""Time per update of evolution strategies: FlipES against explicit populations.

One update evaluates every member on one sample and forms the gradient; the optimizer's step is
not in it. FC d-h-h-10 with ReLU on random data (784 inputs, as MNIST), the fitness minus the
cross-entropy, one thread unless said otherwise. All evaluate the same number of members:

    flipes           one base perturbation for all members
    flipes 40        40 members for each base, as Wen et al. (2018) have it
    one at a time    each member's weights drawn and put in, one forward call each
    vmap             torch.func.vmap over explicit weights, in chunks that fit --gigabytes
    evotorch         its PGPE, with a vectorized problem (if it can be imported)

Rounds are interleaved; a number is the median, a ratio the median of the rounds' ratios. What
costs the same for each member (one at a time, and vmap beyond one chunk) is measured on some
members and scaled, which the table marks with ~.

    python benchmarks/es.py
    python benchmarks/es.py --units 512 --members 5000 --rounds 5 --memory
    python benchmarks/es.py --conv 0.25
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from pyro_flipout.infer import FlipES

SIGMA = 0.02


def dense(units):
    sizes = 784, units, units, 10
    layers = []
    for i in range(3):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv(scale):
    a, b, c = (max(1, int(scale * n)) for n in (32, 64, 1024))
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(49 * b, c), nn.ReLU(), nn.Linear(c, 10)),
    )


# ------------------------------------------------------------------------ the updates


def flipes(net, x, y, num_bases):
    es = FlipES(net, SIGMA, num_bases=num_bases, keep_draws=num_bases == 1, seed=0)

    def update():
        with es.perturb(len(x)):
            out = net(x)
        es.backward(-F.cross_entropy(out, y, reduction="none"))

    return update, 1.0


def one_at_a_time(net, x, y, sample):
    """Weights are put in as they come; the noise is drawn again for the gradient (Salimans)."""
    parameters = list(net.parameters())

    @torch.no_grad()
    def update():
        fitness = torch.empty(sample)
        for n in range(sample):
            generator = torch.Generator().manual_seed(n)
            noise = [torch.randn(p.shape, generator=generator) for p in parameters]
            for p, eps in zip(parameters, noise, strict=True):
                p.add_(eps, alpha=SIGMA)
            fitness[n] = -F.cross_entropy(net(x[n : n + 1]), y[n : n + 1])
            for p, eps in zip(parameters, noise, strict=True):
                p.sub_(eps, alpha=SIGMA)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for n in range(sample):
            generator = torch.Generator().manual_seed(n)
            for p in parameters:
                eps = torch.randn(p.shape, generator=generator)
                p.grad.add_(eps, alpha=-fitness[n].item() / SIGMA / sample)

    return update, len(x) / sample


def vmapped(net, x, y, chunk, sample):
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def member(own, x):
        return functional_call(net, own, (x.unsqueeze(0),))[0]

    @torch.no_grad()
    def update():
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        for start in range(0, sample, chunk):
            rows = slice(start, min(start + chunk, sample))
            size = rows.stop - rows.start
            eps = {name: torch.randn(size, *w.shape) for name, w in weights.items()}
            own = {name: w.add(eps[name], alpha=SIGMA) for name, w in weights.items()}
            fitness = -F.cross_entropy(vmap(member)(own, x[rows]), y[rows], reduction="none")
            for name in weights:
                total[name] += torch.tensordot(fitness, eps[name], 1)
        for name, p in net.named_parameters():
            p.grad = total[name] / (-SIGMA * len(x))

    return update, len(x) / sample


def evotorch(net, x, y):
    import evotorch.logging  # noqa: F401
    from evotorch import Problem
    from evotorch.algorithms import PGPE

    shapes = {name: p.shape for name, p in net.named_parameters()}
    sizes = [s.numel() for s in shapes.values()]

    def evaluate(flat):  # (members, parameters)
        parts = flat.split(sizes, 1)
        own = {n: p.unflatten(1, s) for (n, s), p in zip(shapes.items(), parts, strict=True)}

        def member(own, x):
            return functional_call(net, own, (x.unsqueeze(0),))[0]

        rows = slice(0, len(flat))
        return F.cross_entropy(vmap(member)(own, x[rows]), y[rows], reduction="none")

    problem = Problem(
        "min", evaluate, solution_length=sum(sizes), initial_bounds=(0, 0.01), vectorized=True
    )
    search = PGPE(
        problem,
        popsize=len(x) - len(x) % 2,
        center_learning_rate=0.1,
        stdev_learning_rate=0.0,
        stdev_init=SIGMA,
        symmetric=True,
        ranking_method="centered",
    )
    return search.step, 1.0


# ------------------------------------------------------------------------ measurement


def contenders(net, args, x, y):
    """Functions to time by name, each with the factor to scale its time by."""
    count = sum(p.numel() for p in net.parameters())
    chunk = max(1, min(len(x), int(args.gigabytes * 1e9 / (count * 4 * 3))))
    sample = min(len(x), chunk if chunk < len(x) else len(x))
    out = {"flipes": flipes(net, x, y, 1)}
    if len(x) % 40 == 0 and not args.fast:
        out["flipes 40"] = flipes(net, x, y, len(x) // 40)
    out["one at a time"] = one_at_a_time(net, x, y, min(args.sample, len(x)))
    out["vmap"] = vmapped(net, x, y, chunk, sample)
    if args.evotorch and count * len(x) * 4 * 4 < args.gigabytes * 1e9:
        out["evotorch"] = evotorch(net, x, y)
    return out


def measure(cases, rounds):
    """Seconds of every round, by name."""
    times = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, (update, factor) in cases.items():
            start = time.perf_counter()
            update()
            if i:  # the first warms up
                times[name].append((time.perf_counter() - start) * factor)
    return times


def row(title, net, args):
    x, y = torch.randn(args.members, 784), torch.randint(10, (args.members,))
    cases = contenders(net, args, x, y)
    times = measure(cases, args.rounds)
    cells = []
    for name in ("flipes", "flipes 40", "one at a time", "vmap", "evotorch"):
        if name not in times:
            cells.append("—")
            continue
        mark = "~" if cases[name][1] > 1 else ""
        ratios = [t / own for t, own in zip(times[name], times["flipes"], strict=True)]
        ratio = "" if name == "flipes" else f" ({statistics.median(ratios):.1f}x)"
        cells.append(f"{mark}{statistics.median(times[name]):.3g} s{ratio}")
    print(f"| {title} | {' | '.join(cells)} |", flush=True)


def peak(units, members, num_bases):
    """Peak memory in MB of a fresh process after some updates."""
    code = (
        "import resource, torch, benchmarks.es as b\n"
        f"torch.set_num_threads(1); net = b.dense({units}); n = {members}\n"
        "x, y = torch.randn(n, 784), torch.randint(10, (n,))\n"
        f"update = b.flipes(net, x, y, {num_bases})[0]\n"
        "out = torch.zeros(n, 784 + 4 * net[0].out_features); del out\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(2): update()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


def memory(units):
    count = sum(p.numel() for p in dense(units).parameters()) * 4 / 1e6
    print(f"\nFC {units}, {count:.1f} MB of weights. MB above imports, data and outputs:\n")
    print("| members | flipes | flipes 40 | explicit weights |\n| --- | --- | --- | --- |")
    for n in (40, 400, 4000):
        own = f"{peak(units, n, 1)} | {peak(units, n, n // 40)}"
        print(f"| {n} | {own} | {count * n:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--conv", type=float, nargs="*", default=[], help="scales of the conv net")
    parser.add_argument("--members", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=100, help="members timed one at a time")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="for explicit weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="without flipes 40")
    parser.add_argument("--evotorch", action="store_true")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory:
        for units in args.units:
            memory(units)
        return
    print(f"{args.members} members, {torch.get_num_threads()} thread(s), {args.rounds} rounds\n")
    print("| net | flipes | flipes 40 | one at a time | vmap | evotorch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for units in args.units:
        row(f"FC {units}", dense(units), args)
    for scale in args.conv:
        row(f"conv {scale}", conv(scale), args)


if __name__ == "__main__":
    main()
