# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The paper's networks, as Pyro models whose weights are sites, and the images they classify."""

import gzip
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

# ------------------------------------------------------------------------------------ data


def load(data_dir=None):
    """Images ``(M, side, side)`` in [0, 1] and labels: MNIST's IDX files, or the 8x8 digits."""
    if data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images, dtype=torch.float) / 16, torch.tensor(digits.target)
    parts = {kind: sorted(Path(data_dir).glob(f"*{kind}*ubyte*")) for kind in ("images", "labels")}
    if not parts["images"] or len(parts["images"]) != len(parts["labels"]):
        raise SystemExit(
            f"{data_dir}: expected MNIST's IDX files, *images-idx3-ubyte[.gz] and labels"
        )
    images, labels = (torch.cat([_read(path) for path in paths]) for paths in parts.values())
    return images / 255.0, labels.long()


def _read(path):
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * len(dims) :]), dtype=torch.uint8).view(dims)


# -------------------------------------------------------------------------------- networks


def fc(side, width=512):
    """FC 512-512-10."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(side * side, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )


def convle(side):
    """5x5 convolutions of 32 and 64 filters with 2x2 max-pools, FC 1024."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, side)), nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * (side // 4) ** 2, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def vgg(side, width=16):
    """VGG-style: pairs of 3x3 convolutions of 1, 2 and 4 times ``width`` filters, no batch norm."""
    layers, channels = [nn.Unflatten(1, (1, side))], 1
    for filters in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    size = channels * (side // 8) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 10))


class RowLSTM(nn.Module):
    """A 2-layer LSTM that reads an image row by row."""

    def __init__(self, side, width=128):
        super().__init__()
        self.lstm = nn.LSTM(side, width, num_layers=2, batch_first=True)
        self.output = nn.Linear(width, 10)

    def forward(self, x):
        return self.output(self.lstm(x)[0][:, -1])


NETWORKS = {"fc": fc, "convle": convle, "vgg": vgg, "lstm": RowLSTM}


def train(net, x, y, accuracy, lr=1e-3, batch=128, max_steps=5000):
    """Trains a plain network until a running training accuracy is reached; returns it."""
    optimizer, running, step = torch.optim.Adam(net.parameters(), lr), 0.0, 0
    while step < max_steps and running < accuracy:
        step += 1
        rows = torch.randint(len(x), (batch,))
        logits = net(x[rows])
        F.cross_entropy(logits, y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        hits = (logits.argmax(-1) == y[rows]).float().mean().item()
        running = 0.9 * running + 0.1 * hits
    return running, step


# ---------------------------------------------------------------------- models and guides


class Classifier:
    """A network whose weights (not biases) are sites named as its parameters."""

    def __init__(self, net, num_train):
        self.net, self.num_train = net.requires_grad_(False), num_train
        self.sites = {n: p for n, p in net.named_parameters() if "weight" in n}

    def model(self, x, y):
        """Likelihood scaled to the data set, prior Normal of variance 1 / fan-in."""
        weights = {}
        for name, p in self.sites.items():
            prior = dist.Normal(torch.zeros_like(p), 1 / math.sqrt(p[0].numel()))
            weights[name] = pyro.sample(name, prior.to_event(p.dim()))
        logits = functional_call(self.net, weights, (x,))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=self.num_train / len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    def guide(self, noise, scale):
        """The posterior around the network's weights, with parameters ``loc_*`` and ``scale_*``.

        :param noise: ``"multiplicative"``: N(w, (scale * w)²); or ``"mean-field"``: N(w, s²) with
            s = scale * (root mean square of the layer's weights) at the start.
        """

        def guide(x=None, y=None):
            for name, p in self.sites.items():
                loc = pyro.param(f"loc_{name}", p.clone)
                if noise == "multiplicative":
                    width = scale * loc.abs() + 1e-12
                else:
                    start = torch.full_like(p, float(scale * p.square().mean().sqrt()))
                    width = pyro.param(f"log_scale_{name}", start.log).exp()
                pyro.sample(name, dist.Normal(loc, width).to_event(p.dim()))

        return guide


class NegativeLogLikelihood:
    """The expected loss alone, without KL term."""

    def loss(self, model, guide, *args, **kwargs):
        return self._loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self._loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def _loss(self, model, guide, *args, **kwargs):
        drawn = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=drawn))
        return -trace.get_trace(*args, **kwargs).log_prob_sum(
            lambda name, site: site["is_observed"]
        )
