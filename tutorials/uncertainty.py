# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # What a Bayesian classifier knows that it does not know
#
# We train a Bayesian network on handwritten digits 0 to 7, take the fit to ArviZ in one call, and
# ask in turn: do data drawn from the posterior look like the data (posterior predictive check)?
# Which of two models predicts better (LOO)? Is it right as often as it says (calibration)? Does
# it notice the digits 8 and 9, which it has never seen (out-of-distribution detection)?
#
#     python tutorials/uncertainty.py

# %%
from __future__ import annotations

import argparse
import itertools
import math
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroSample
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_flipout import flipout, metrics, to_arviz
from pyro_flipout.vi_quality import vi_quality

matplotlib.use("Agg")
import matplotlib.pyplot as plt

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces version 1.0
    import arviz as az

parser = argparse.ArgumentParser(description="A Bayesian classifier, evaluated with ArviZ")
parser.add_argument("--steps", type=int, default=1000, help="SVI steps")
parser.add_argument("--draws", type=int, default=200, help="of the posterior")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("uncertainty.png"), help="file of the figure")
parser.add_argument("--smoke", action="store_true", help="every stage in a few seconds, for CI")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.smoke:
    args.steps, args.draws = 20, 120
torch.set_num_threads(1)
NUM_CLASSES = 8

# %%
pixels, digits = load_digits(return_X_y=True)
pixels = torch.as_tensor((pixels - pixels.mean()) / pixels.std(), dtype=torch.float32)
digits = torch.as_tensor(digits)
known = np.flatnonzero(digits < NUM_CLASSES)
train, test = train_test_split(
    known, test_size=0.3, stratify=digits[known], random_state=args.seed
)  # fmt: skip
x_train, y_train, x_test, y_test = pixels[train], digits[train], pixels[test], digits[test]
x_new = pixels[digits >= NUM_CLASSES]  # the digits 8 and 9
num_train = len(train)
print(f"{num_train} images to train, {len(test)} to test, {len(x_new)} of unknown digits")


# %% [markdown]
# ## Two models
#
# A linear classifier and one with a hidden layer of 50. `PyroSample` makes every weight and bias
# a sample site. The mini-batch stands for the whole training set, hence the scale; `to_arviz`
# removes it from the log likelihood again.


# %%
class Classifier(PyroModule):
    def __init__(self, num_hidden: int) -> None:
        super().__init__()
        sizes = [64, num_hidden, NUM_CLASSES] if num_hidden else [64, NUM_CLASSES]
        self.layers = PyroModule[nn.ModuleList](
            [PyroModule[nn.Linear](*pair) for pair in itertools.pairwise(sizes)]
        )
        for layer in self.layers:
            prior = dist.Normal(0.0, 2 / math.sqrt(layer.in_features))
            for name, parameter in list(layer.named_parameters()):
                setattr(layer, name, PyroSample(prior.expand(parameter.shape).to_event()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if i else x)
        with pyro.plate("image", len(x)), poutine.scale(scale=num_train / len(x)):
            pyro.deterministic("probs", x.softmax(-1), event_dim=1)
            return pyro.sample("y", dist.Categorical(logits=x), obs=y)


def train_model(model: Classifier, name: str) -> AutoNormal:
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.05)
    guide(x_train, y_train)  # the first call makes the parameters
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(flipout(model), guide, optim, Trace_ELBO())
    for _ in tqdm(range(args.steps), desc=name, disable=None):
        rows = torch.randint(num_train, (256,))
        svi.step(x_train[rows], y_train[rows])
    return guide


# %% [markdown]
# ## To ArviZ
#
# `sites` keeps the last layer's biases and the probabilities: the weights are many, and nobody
# looks at each. `predictions` are for the test images; a second call scores them.

# %%
pyro.settings.set(module_local_params=True)
models = {"linear": Classifier(0), "hidden layer": Classifier(50)}
fits = {}
guides = {}
for name, model in models.items():
    guides[name] = train_model(model, name)
    last = f"layers.{len(model.layers) - 1}.bias"
    fits[name] = to_arviz(
        model, guides[name], x_train, y_train, num_samples=args.draws, num_prior_samples=50,
        predictions=x_test, sites=[last], dims={last: ["digit"], "probs": ["digit"]},
        seed=args.seed,
    )  # fmt: skip
print(fits["hidden layer"])
print(az.summary(fits["hidden layer"], kind="stats"))

# %% [markdown]
# ## Which model predicts better?
#
# `az.compare` estimates the log density that each model would give to an image it was not trained
# on, from the pointwise log likelihood. Images whose Pareto k is high are the doubtful ones. Of the
# network with a hidden layer they are most: to leave out one image changes so flexible a posterior
# too much, and its LOO is then no more than a rough guide. The test set is the better judge. The
# Pareto k of the whole variational posterior is nearly always bad for a network, whose hidden
# units may be permuted and whose weights depend on each other: it is no verdict on the
# predictions.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # of high Pareto k, which we print
    print(az.compare(fits))
    khat = {name: az.loo(fit, pointwise=True).pareto_k.values for name, fit in fits.items()}
for name, fit in fits.items():
    print(f"{name}: {np.mean(khat[name] > 0.7):.1%} of images have k > 0.7; q: {vi_quality(fit)}")

# %% [markdown]
# ## Scores on the test images, and on digits never seen
#
# The entropy of a prediction is split in two: *aleatoric*, what remains if we knew the weights (an
# image that is truly ambiguous), and *epistemic*, the draws' disagreement.


# %%
def draws_of(name: str, x: Tensor) -> np.ndarray:
    idata = to_arviz(
        models[name], guides[name], x_train[:2], y_train[:2], num_samples=args.draws,
        num_prior_samples=0, predictions=x, sites=[], seed=args.seed,
    )  # fmt: skip
    return idata["predictions"]["probs"].values[0]  # (draws, N, classes)


labels = y_test.numpy()
entropies = {}
print(f"\n{'':24}" + "".join(f"{name:>15}" for name in fits))
table: dict[str, list[float]] = {}
for name, fit in fits.items():
    draws = fit["predictions"]["probs"].values[0]
    probs = draws.mean(0)
    familiar, unfamiliar = (
        metrics.predictive_uncertainty(d) for d in (draws, draws_of(name, x_new))
    )  # fmt: skip
    entropies[name] = familiar, unfamiliar
    ood = {
        kind: metrics.ood_scores(getattr(familiar, kind), getattr(unfamiliar, kind))
        for kind in ("total", "epistemic")
    }
    scores = {
        "accuracy": metrics.accuracy(probs, labels),
        "NLL": metrics.nll(probs, labels),
        "Brier": metrics.brier(probs, labels),
        "ECE": metrics.ece(probs, labels),
        "adaptive ECE": metrics.adaptive_ece(probs, labels),
        "OOD AUROC, total": ood["total"].auroc,
        "OOD AUROC, epistemic": ood["epistemic"].auroc,
        "OOD AUPR, epistemic": ood["epistemic"].aupr,
        "OOD FPR95, epistemic": ood["epistemic"].fpr95,
    }
    for label, value in scores.items():
        table.setdefault(label, []).append(value)
for label, values in table.items():
    print(f"{label:24}" + "".join(f"{value:15.3f}" for value in values))

# %% [markdown]
# ## The figure
#
# **Top left:** how often each digit occurs in the training data (bars) and in draws from the
# posterior predictive (90 % intervals). **Top right:** reliability on the test images.
# **Bottom left:** the Pareto k of each training image in LOO. **Bottom right:** the epistemic part
# of the entropy for digits that were trained on, and for 8 and 9.

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
colors = {"linear": "#c8553d", "hidden layer": "#2f6690"}
classes = np.arange(NUM_CLASSES)
axes[0, 0].bar(classes, np.bincount(y_train, minlength=NUM_CLASSES), color="0.85", label="data")
for offset, (name, fit) in zip((-0.15, 0.15), fits.items(), strict=True):
    drawn = fit["posterior_predictive"]["y"].values[0]
    counts = np.stack([(drawn == c).sum(1) for c in classes])  # (classes, draws)
    low, middle, high = np.quantile(counts, [0.05, 0.5, 0.95], axis=1)
    error = [middle - low, high - middle]
    axes[0, 0].errorbar(classes + offset, middle, error, fmt="o", color=colors[name], label=name)
    probs = fit["predictions"]["probs"].values[0].mean(0)
    found = metrics.reliability(probs, labels, bins=10, adaptive=True)
    metrics.plot_reliability(found, axes[0, 1], color=colors[name], label=name)
    axes[1, 0].plot(np.sort(khat[name]), color=colors[name], label=name)
    familiar, unfamiliar = entropies[name]
    for part, style, what in ((familiar, "-", "0 to 7"), (unfamiliar, "--", "8 and 9")):
        label = f"{name}, {what}"
        axes[1, 1].ecdf(part.epistemic, linestyle=style, color=colors[name], label=label)
axes[0, 0].set(xlabel="digit", ylabel="images", title="Posterior predictive check")
axes[0, 0].margins(y=0.35)  # room for the legend
axes[0, 1].set(title="Reliability on test images")
axes[1, 0].axhline(0.7, linestyle=":", color="0.3")
axes[1, 0].set(xlabel="training image, by rank", ylabel="Pareto k", title="LOO")
axes[1, 1].set(xlabel="epistemic entropy, nats", ylabel="share of images", title="Unknown digits")
for ax in axes.flat:
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
figure.savefig(args.out, dpi=120)
print(f"\nfigure: {args.out}")
