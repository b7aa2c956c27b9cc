# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Bayes by Backprop with large mini-batches: Figure 3 of Wen et al. (2018).

Trains a mean-field posterior with Adam and the KL term divided by 10, from the same start, with
each estimator, and counts iterations and seconds of training until the training loss stays below
fixed levels. The loss is that of the posterior at hand, whatever the estimator: every --every
iterations the negative log-likelihood of a fixed part of the training images, averaged over a few
shared draws of the weights; the time it takes is not counted. Writes OUT/ARCH.csv (all curves),
OUT/ARCH.md and OUT/ARCH.png.

    python benchmarks/large_batch.py --data-dir my/mnist
    python benchmarks/large_batch.py --arch fc --iterations 100 --seeds 0 1 2 --data-dir my/mnist
"""

import argparse
import csv
import statistics
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from networks import NETWORKS, Classifier, NegativeLogLikelihood, load

from pyro_flipout.infer import ESTIMATORS, AutoMeanField, tempered

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--arch", nargs="+", default=["fc", "convle"], choices=["fc", "convle"])
PARSER.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files; default: digits")
PARSER.add_argument("--batch-size", type=int, default=8192)
PARSER.add_argument("--iterations", type=int, default=500)
PARSER.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
PARSER.add_argument("--lr", type=float, default=0.003)
PARSER.add_argument("--kl", type=float, default=0.1, help="factor of the KL term")
PARSER.add_argument("--init-scale", type=float, default=0.05)
PARSER.add_argument("--levels", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.2, 0.1, 0.05])
PARSER.add_argument("--every", type=int, default=5, help="iterations between evaluations")
PARSER.add_argument("--eval-images", type=int, default=2000)
PARSER.add_argument("--eval-draws", type=int, default=4)
PARSER.add_argument("--estimators", nargs="+", help="default: all that the network allows")
PARSER.add_argument("--out", type=Path, default=Path("large_batch"))
PARSER.add_argument("--threads", type=int, default=1)
PARSER.add_argument(
    "--clock",
    default="wall",
    choices=["wall", "cpu"],
    help="cpu: this process's, for a machine that others use too; summed over threads",
)


def train(args, arch, estimator, seed, x, y):
    """The curve: iteration, seconds of training so far, training loss."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    classifier = Classifier(NETWORKS[arch](x.size(-1)), len(x))
    start = {name: p.detach().clone() for name, p in classifier.sites.items()}
    guide = AutoMeanField(
        classifier.model,
        init_loc_fn=lambda site: start[site["name"]],
        init_scale=args.init_scale,
    )
    guide(x[:2], y[:2])
    elbo = tempered(TraceMeanField_ELBO(), args.kl)
    program = ESTIMATORS[estimator](classifier.model)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": args.lr}), elbo)
    rows = torch.Generator().manual_seed(seed)  # its own: all estimators see the same batches
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    seconds, curve = 0.0, []
    for iteration in tqdm(range(args.iterations + 1), desc=f"{arch}, {estimator}, seed {seed}"):
        if iteration % args.every == 0:
            curve.append((iteration, seconds, evaluate(args, classifier, guide, x, y)))
        # Without replacement where there are enough images, as an epoch would have it.
        batch = torch.randperm(len(x), generator=rows)[: args.batch_size]
        begin = clock()
        svi.step(x[batch], y[batch])
        seconds += clock() - begin
    return curve


@torch.no_grad()
def evaluate(args, classifier, guide, x, y):
    """Negative log-likelihood per image; leaves the random state as it was."""
    n, loss = args.eval_images, NegativeLogLikelihood()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [loss.loss(classifier.model, guide, x[:n], y[:n]) for _ in range(args.eval_draws)]
    return statistics.mean(draws) / len(x)  # the model scales its likelihood to the data set


def reached(curve, level):
    """First iteration, and its time, from which on the running mean of three is below a level."""
    for i in range(len(curve) - 2):
        if statistics.mean(point[2] for point in curve[i : i + 3]) <= level:
            return curve[i + 1][:2]
    return None


def report(args, curves, estimators):
    """Markdown: iterations and seconds per seed, and the ratios to the shared draw's."""
    yield "| loss | seed | " + " | ".join(f"{e}: iterations, seconds" for e in estimators) + " |"
    yield "| --- " * (len(estimators) + 2) + "|"
    for level in args.levels:
        for seed in args.seeds:
            points = [reached(curves[e, seed], level) for e in estimators]
            if any(points):
                cells = [f"{p[0]}, {p[1]:.1f}" if p else "not reached" for p in points]
                yield f"| {level:g} | {seed} | " + " | ".join(cells) + " |"
    yield ""
    for name in estimators:
        ends = [curves[name, seed][-1] for seed in args.seeds]
        losses = ", ".join(f"{end[2]:.4f}" for end in ends)
        per_step = statistics.median(1e3 * end[1] / end[0] for end in ends)
        end = f"training loss after {ends[0][0]} iterations {losses}"
        yield f"- {name}: {end}; {per_step:.0f} ms each"


def draw(args, arch, curves, estimators, path):
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for at, (axes, label) in enumerate(zip(both, ("iteration", "seconds"), strict=True)):
        for color, name in enumerate(estimators):
            for k, seed in enumerate(args.seeds):
                points = [(p[at], p[2]) for p in curves[name, seed]]
                axes.semilogy(*zip(*points, strict=True), f"C{color}", label=None if k else name)
        axes.set(xlabel=label, ylabel="training loss", title=f"{arch}, N = {args.batch_size}")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    args = PARSER.parse_args()
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    warnings.simplefilter("error")  # a FlipoutWarning means that a layer is not flipped
    x, y = load(args.data_dir)
    args.batch_size = min(args.batch_size, len(x))
    args.out.mkdir(parents=True, exist_ok=True)
    for arch in args.arch:
        allowed = ["shared", "flipout", *(["local_reparameterization"] if arch == "fc" else [])]
        estimators = args.estimators or allowed
        curves = {}
        for seed in args.seeds:
            for name in estimators:
                curves[name, seed] = train(args, arch, name, seed, x, y)
        with (args.out / f"{arch}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["estimator", "seed", "iteration", "seconds", "loss"])
            writer.writerows([*key, *p] for key, curve in curves.items() for p in curve)
        draw(args, arch, curves, estimators, args.out / f"{arch}.png")
        text = (
            f"## {arch}, batches of {args.batch_size}\n\n{len(x)} images of "
            f"{x.size(-1)}x{x.size(-1)}; {args.threads} thread(s), {args.clock} time.\n\n"
            f"`{' '.join(['python', *sys.argv])}`\n\n"
        ) + "\n".join(report(args, curves, estimators))
        (args.out / f"{arch}.md").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
