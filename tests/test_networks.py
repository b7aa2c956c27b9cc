"""Real networks of plain torch.nn, turned Bayesian: trained, and checked example by example."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_flipout import FlipoutWarning, flipout
from tests.helpers import Recording, bayesian, check_network
from tests.rules.test_oracle import always_explicit


class LeNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3),
        )  # fmt: skip


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(h)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4), nn.AvgPool2d(2), Block(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((-1, -2)))


class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (4, 4, "M", 6, 6, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(54, 8), nn.ReLU(True), nn.Linear(8, 3))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class TiedLSTM(nn.Module):
    """A two-layer language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 6, num_layers=2, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(9))

    def forward(self, tokens):
        out, _ = self.lstm(self.embed(tokens))
        return F.linear(out, self.embed.weight, self.bias)


class Encoder(nn.Module):
    """A Transformer encoder classifier with learned positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.randn(7, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens) + self.position).mean(1))


class Seq2Seq(nn.Module):
    """GRU encoder and decoder with dot-product attention."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(9, 5), nn.Embedding(9, 5)
        self.encoder = nn.GRU(5, 6, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(12, 6)
        self.decoder = nn.GRU(5, 6, batch_first=True)
        self.query = nn.Linear(6, 12)
        self.head = nn.Linear(18, 9)

    def forward(self, source, target):
        memory, h = self.encoder(self.source(source))
        h = torch.tanh(self.bridge(h.transpose(0, 1).flatten(1))).unsqueeze(0)
        states, _ = self.decoder(self.target(target), h)
        weights = (self.query(states) @ memory.transpose(1, 2)).softmax(-1)
        return self.head(torch.cat([states, weights @ memory], -1))


class GraphConv(nn.Module):
    """Two graph convolutions on dense adjacency matrices, one graph an example."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.eps = nn.Parameter(torch.zeros(()))

    def forward(self, nodes, adjacency):
        h = F.relu(adjacency @ self.first(nodes) + (1 + self.eps) * nodes.sum(-1, keepdim=True))
        return (adjacency @ self.second(h)).mean(1)


def images(n):
    return (torch.randn(n, 1, 12, 12),)


def tokens(n):
    return (torch.randint(1, 9, (n, 7)),)


NETS = {
    "lenet": (LeNet, images),
    "resnet": (ResNet, images),
    "vgg": (VGG, images),
    "tied lstm": (TiedLSTM, tokens),
    "transformer": (Encoder, tokens),
    "seq2seq": (Seq2Seq, lambda n: (*tokens(n), torch.randint(1, 9, (n, 4)))),
    "graph": (GraphConv, lambda n: (torch.randn(n, 5, 4), torch.rand(n, 5, 5))),
}


@pytest.mark.parametrize("way", ["as it is", "in groups of 3", "by explicit weights"])
@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("name", NETS)
def test_against_explicit_weights(name, guide, way, float64, monkeypatch):
    handler = Recording(on_missing_rule="error", group_size=3 if way == "in groups of 3" else 1)
    if way == "by explicit weights":
        always_explicit(monkeypatch, plans := [])
    make, data = NETS[name]
    net = make()
    if name == "resnet":  # batch statistics couple examples: compared in evaluation
        net(*data(20))
        net.eval()
    check_network(net, guide, *data(4), handler=handler)
    if way == "by explicit weights":
        assert any(plans)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("name", NETS)
def test_training(name, guide):
    make, data = NETS[name]
    net = bayesian(copy.deepcopy(make()), 0.5)
    args = data(12)

    def model(*args, y):
        out = net(*args)
        with pyro.plate("data", len(out)):
            pyro.sample("y", dist.Normal(out, 1.0).to_event(out.dim() - 1), obs=y)

    y = torch.randn_like(make()(*args))
    guide = guide(model, init_scale=0.05)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.01})
    handler = flipout(on_missing_rule="error")
    svi = SVI(handler(model), guide, optimizer, Trace_ELBO())
    if name == "resnet":  # batch statistics couple examples: what comes before them stays shared
        with pytest.warns(FlipoutWarning, match="keep their shared draws: examples mix"):
            losses = [svi.step(*args, y=y)]
        assert handler.decisions["head.weight"] == "flipped (verified)"
    else:
        losses = [svi.step(*args, y=y)]
        assert all(d == "flipped (verified)" for d in handler.decisions.values())
    losses += [svi.step(*args, y=y) for _ in range(14)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert torch.isfinite(torch.tensor(svi.step(*(a[:5] for a in args), y=y[:5])))
