# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # A Bayesian neural network for handwritten digits, with and without flipout
#
# Variational inference trains a *distribution* over weights. In Pyro, each step draws the weights
# once and uses them for the whole mini-batch: all its examples share one piece of noise, which
# does not average out over them. However large the mini-batch, that noise stays in the gradient.
#
# Flipout (Wen et al., ICLR 2018) multiplies the weights' perturbation by random signs, different
# for every example. The examples' noise is then nearly independent, and their average gets
# quieter as the mini-batch grows. The change to a Pyro program is one word, `flipout(model)`.
# This script trains the same network both ways and measures what that word does to the variance
# of the gradient, to training and to the predictions.
#
#     python tutorials/digits_bnn.py                       # scikit-learn's 8x8 digits, a minute
#     python tutorials/digits_bnn.py --data-dir my/mnist   # MNIST's IDX files, gzipped or not

# %%
from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_flipout import flipout

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description="A Bayesian digit classifier, with/without flipout")
parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files; default: digits")
parser.add_argument("--steps", type=int, default=1000, help="SVI steps of each of the two runs")
parser.add_argument("--batch-size", type=int, default=512)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("digits_bnn.png"), help="file of the figure")
parser.add_argument("--smoke", action="store_true", help="every stage in a few seconds, for CI")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.smoke:
    args.steps = min(args.steps, 30)
REPEATS, DRAWS = (4, 4) if args.smoke else (64, 100)
WINDOW = min(50, max(1, args.steps // 3))  # of the running mean of the loss, in steps
BATCH_SIZES = {4, 64} if args.smoke else {1, 4, 16, 64, 256, 1024}
torch.set_num_threads(1)  # the matrices are too small to be worth sharing out


# %% [markdown]
# ## Data
#
# By default the 1,797 digits that come with scikit-learn, 30 % of them held out. In a folder of
# IDX files, `train-*` is to train and `t10k-*` to test; if only one is there, 20 % is held out.


# %%
def read_idx(path: Path) -> np.ndarray:
    """An IDX file: 0, 0, 8 for bytes, the number of dimensions, the dimensions, the data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        sys.exit(f"{path}: starts with {data[:4]!r}, expected an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_idx_folder(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sets of images and labels that are there: train, t10k, or both."""
    found = []
    for name in ("train", "t10k"):
        images = sorted(folder.glob(f"{name}-images?idx3-ubyte*"))
        labels = sorted(folder.glob(f"{name}-labels?idx1-ubyte*"))
        if images and labels:
            found.append((read_idx(images[0]), read_idx(labels[0])))
    if not found:
        here = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        sys.exit(
            f"--data-dir {folder}: found {here}, expected train-images-idx3-ubyte and "
            "train-labels-idx1-ubyte, the same names with t10k, or both pairs; .gz is fine"
        )
    return found


def load_data() -> list[Tensor]:
    """Standardised pixels and classes to train, and the same to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    sets = read_idx_folder(args.data_dir) if args.data_dir else [load_digits(return_X_y=True)]
    if len(sets) == 2:
        (x, y), (x_new, y_new) = sets
    else:
        (x, y), share = sets[0], 0.2 if args.data_dir else 0.3
        x, x_new, y, y_new = train_test_split(
            x, y, test_size=share, stratify=y, random_state=args.seed
        )
    scaled = [(a.reshape(len(a), -1) - x.mean()) / x.std() for a in (x, x_new)]
    pixels = [torch.as_tensor(a, dtype=torch.float32) for a in scaled]  # (N, pixels)
    classes = [torch.as_tensor(a, dtype=torch.long) for a in (y, y_new)]  # (N,)
    return [pixels[0], classes[0], pixels[1], classes[1]]


x_train, y_train, x_test, y_test = load_data()
num_train, num_pixels = x_train.shape
num_classes = int(y_train.max()) + 1
batch_size = min(args.batch_size, num_train)
print(f"{num_train} images to train, {len(x_test)} to test; mini-batches of {batch_size}")


# %% [markdown]
# ## A stock Pyro model and a stock guide
#
# One hidden layer of 100 units, and a Normal prior on every weight and bias, each a sample site.
# Nothing here knows of flipout. The guide is `AutoNormal`: a mean and a scale for each weight.
# The means start at a draw from the prior, the scales at 0.05.


# %%
class BayesianMLP(PyroModule):
    def __init__(self, num_hidden: int = 100) -> None:
        super().__init__()
        self.hidden = PyroModule[nn.Linear](num_pixels, num_hidden)
        self.output = PyroModule[nn.Linear](num_hidden, num_classes)
        for layer in (self.hidden, self.output):
            prior = dist.Normal(0.0, 2 / math.sqrt(layer.in_features))
            for name, parameter in list(layer.named_parameters()):
                setattr(layer, name, PyroSample(prior.expand(parameter.shape).to_event()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.output(torch.relu(self.hidden(x)))  # (N, classes)
        # The mini-batch stands for the whole training set, hence the scale.
        with pyro.plate("data", len(x)), poutine.scale(scale=num_train / len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
            return pyro.deterministic("probs", logits.softmax(-1), event_dim=1)


# Each guide keeps its own parameters; in Pyro's global store the second would take the first's.
pyro.settings.set(module_local_params=True)
model = BayesianMLP()


def new_guide() -> AutoNormal:
    pyro.set_rng_seed(args.seed)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.05)
    guide(x_train, y_train)  # the first call makes the parameters
    return guide


# %% [markdown]
# ## Training, twice
#
# `train` takes a program: the model, or the model under flipout. Everything else is equal: the
# seed, the initial guide, the mini-batches, Adam and its learning rate, the number of steps.
#
# The mini-batches are large, 512 of the 1,257 digits, because that is where flipout matters. The
# variance of the gradient of a mini-batch of N examples is
#
#     (one example's noise) / N  +  (noise that any two examples have in common)
#
# and flipout lowers the second term. At N = 1 it can gain nothing. At N = 512 the first term is
# small, and with a shared draw of the weights nearly all of their noise is in the second.


# %%
class Run(NamedTuple):
    guide: AutoNormal
    losses: np.ndarray  # (steps,), negative ELBO per training image, one draw in each step
    milliseconds: float  # per step, median


def train(program: Callable, name: str) -> Run:
    guide = new_guide()
    svi = SVI(program, guide, Adam({"lr": 0.01}), Trace_ELBO())
    generator = torch.Generator().manual_seed(args.seed)  # its own: both see the same mini-batches
    losses, times = [], []
    for _ in (progress := tqdm(range(args.steps), desc=f"train, {name}")):
        rows = torch.randperm(num_train, generator=generator)[:batch_size]
        start = time.perf_counter()
        losses.append(svi.step(x_train[rows], y_train[rows]) / num_train)
        times.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return Run(guide, np.array(losses), 1e3 * float(np.median(times)))


runs = {"shared": train(model, "shared"), "flipout": train(flipout(model), "flipout")}


# %% [markdown]
# ## The variance of the gradient
#
# We fix a guide and a mini-batch, compute the gradient of the loss again and again, and take each
# entry's variance over the repeats, averaged over the means of a layer's weights. The mini-batch is
# fixed to see the noise of the weights alone; fresh ones would add the data's to both.
#
# Both estimators are measured *at the same guide*: at the start of training, and at the end of the
# run without flipout.


# %%
def gradient_variance(program: Callable, guide: AutoNormal, size: int) -> dict[str, float]:
    pyro.set_rng_seed(args.seed)
    means = [guide.locs.hidden.weight, guide.locs.output.weight]
    gradients = []
    for _ in range(REPEATS):
        loss = Trace_ELBO().differentiable_loss(program, guide, x_train[:size], y_train[:size])
        gradients.append(torch.autograd.grad(loss / num_train, means))
    hidden, output = (torch.stack(g).var(0).mean().item() for g in zip(*gradients, strict=True))
    return {"hidden": hidden, "output": output}


sizes = sorted(n for n in BATCH_SIZES | {batch_size} if n <= num_train)
variance: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
for when, guide in {"start": new_guide(), "end": runs["shared"].guide}.items():
    for name, program in {"shared": model, "flipout": flipout(model)}.items():
        todo = tqdm(sizes, desc=f"variance, {name}, {when} of training")
        variance[name, when] = {n: gradient_variance(program, guide, n) for n in todo}


# %% [markdown]
# ## The posterior predictive
#
# Predictions average the class probabilities over draws from the guide, with the bare model:
# flipout is for training. Their quality in three numbers: accuracy; negative log-likelihood (NLL)
# of the right class; expected calibration error (ECE), which sorts the test images into ten bins by
# the confidence of their prediction and averages the gap between confidence and accuracy.


# %%
def predict(guide: AutoNormal) -> Tensor:
    pyro.set_rng_seed(args.seed)
    posterior = Predictive(model, guide=guide, num_samples=DRAWS, return_sites=["probs"])
    return posterior(x_test)["probs"].mean(0)  # (N, classes)


def reliability(probs: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Number of test images, mean confidence and accuracy, in each bin that is not empty."""
    confidence, predicted = probs.max(-1)
    which = (confidence * bins).long().clamp(max=bins - 1)
    count = which.bincount(minlength=bins)
    sums = [which.bincount(a, bins) for a in (confidence, (predicted == y_test).float())]
    full = count > 0
    return count[full], *(s[full] / count[full] for s in sums)


def mean(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std() / math.sqrt(len(values)):.3f}"


@torch.no_grad()
def scores(guide: AutoNormal, probs: Tensor) -> dict[str, str]:
    pyro.set_rng_seed(args.seed)
    losses = [Trace_ELBO().loss(model, guide, x_train, y_train) for _ in range(DRAWS)]
    count, confidence, accuracy = reliability(probs)
    return {
        "loss (negative ELBO per image), final guide": mean(torch.tensor(losses) / num_train),
        "test accuracy": mean((probs.argmax(-1) == y_test).float()),
        "test NLL": mean(-probs[range(len(y_test)), y_test].log()),
        "test ECE": f"{(count * (confidence - accuracy).abs()).sum() / count.sum():.3f}",
    }


# %% [markdown]
# ## What was measured
#
# `±` is one standard error: over draws of the weights for the loss, over images for the scores.
# The loss of both guides is evaluated in the same way, on all training images without flipout.
# "Steps" counts until the running mean of the training loss is as low as the shared run ends.


# %%
def running_mean(losses: np.ndarray) -> np.ndarray:
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


probs = {name: predict(run.guide) for name, run in runs.items()}
rows = {name: scores(run.guide, probs[name]) for name, run in runs.items()}
target = running_mean(runs["shared"].losses)[-1]
for name, run in runs.items():
    reached = np.flatnonzero(running_mean(run.losses) <= target)
    rows[name][f"steps to a loss of {target:.2f}"] = (
        str(reached[0] + WINDOW) if len(reached) else "not reached"
    )
    rows[name]["milliseconds per step"] = f"{run.milliseconds:.1f}"

print(f"\n{'':49}{'shared':>15}{'flipout':>15}{'ratio':>8}")
for when in ("start", "end"):
    for layer in ("hidden", "output"):
        a, b = (variance[name, when][batch_size][layer] for name in runs)
        label = f"gradient variance, {layer} layer, {when} of training"
        print(f"{label:49}{a:15.1e}{b:15.1e}{a / b:8.1f}")
for label in rows["shared"]:
    print(f"{label:49}{rows['shared'][label]:>15}{rows['flipout'][label]:>15}")


# %% [markdown]
# ## The figure
#
# **Left:** the loss of every step (pale) and its running mean. **Middle:** the variance of the
# gradient against the size of the mini-batch. With a shared draw it stops falling after a few dozen
# images; with flipout it stays on the 1/N line at the start of training. At the end, flipout's too
# levels off, but much lower: `Trace_ELBO` estimates the KL term from the draw of the weights, and
# that noise belongs to no example. **Right:** reliability. Points on the diagonal are as accurate
# as they are confident, points above it too modest, which is common where many weights meet few
# data. The larger a point, the more images; bars are one standard error, and bins of fewer than
# ten images are left out.
#
# On the default run flipout gets to the shared run's final loss in about half the steps, and ends
# lower. (So it did at each learning rate we tried, from 0.003 to 0.03.) Expect less on the test
# scores: both runs have the same optimum, and one or two standard errors are little evidence. A
# step costs more with flipout, two products in place of one: see the table's last row, which is
# rough on a busy machine.

# %%
COLORS = {"shared": "#c8553d", "flipout": "#2f6690"}
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")

for name, run in runs.items():
    left.plot(run.losses, color=COLORS[name], alpha=0.3, linewidth=0.6)
    smooth = running_mean(run.losses)
    left.plot(np.arange(len(smooth)) + WINDOW / 2, smooth, color=COLORS[name], label=name)
left.set(xlabel="step", ylabel="negative ELBO per training image", title="Training loss")
left.set_yscale("log")
left.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
left.yaxis.set_major_formatter("{x:g}")
left.yaxis.set_minor_formatter("")

for (name, when), found in variance.items():
    line = "o-" if when == "start" else "s--"
    values = [v["hidden"] for v in found.values()]
    label = f"{name}, {when} of training"
    middle.loglog(sizes, values, line, color=COLORS[name], markersize=4, label=label)
one_over_n = variance["flipout", "start"][sizes[0]]["hidden"] * sizes[0] / np.array(sizes)
middle.loglog(sizes, one_over_n, ":", color="0.3", label="1/N")
middle.set(xlabel="mini-batch size N", ylabel="variance", title="Gradient of the hidden weights")

right.plot([0, 1], [0, 1], ":", color="0.3", label="calibrated")
for name in runs:
    bins = torch.stack(reliability(probs[name]))
    count, confidence, accuracy = bins[:, bins[0] >= 10]
    error = (accuracy * (1 - accuracy) / count).sqrt()
    right.errorbar(confidence, accuracy, error, color=COLORS[name], capsize=2, label=name)
    right.scatter(confidence, accuracy, 10 + 500 * count / len(y_test), COLORS[name], alpha=0.6)
right.set(xlabel="confidence", ylabel="accuracy", title="Reliability on the test images")

middle.xaxis.set_major_formatter("{x:g}")
for axes in (left, middle, right):
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(args.out, dpi=150)
print(f"\nfigure: {args.out}")
