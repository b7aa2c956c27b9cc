"""Contract 1: in one execution every example sees one W_n, at every use of a site."""

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from tests.helpers import Recording, bayesian, check_network, mlp

GUIDES = [AutoNormal, AutoDiagonalNormal]


class Tied(nn.Module):
    """Encoder and decoder share one weight, and the decoder is called twice."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = torch.tanh(self.encode(x)) * self.scale
        h = torch.tanh(self.encode(h))
        return nn.functional.linear(h, self.encode.weight.t()) - self.scale


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(4, 4, 3, groups=2, stride=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.conv1(x))
        h = torch.relu(self.conv1(h[:, :2]))
        return self.head(self.norm(self.conv2(h)).flatten(1))


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_mlp(guide, batch, float64):
    check_network(mlp((4, 8, 3)), guide, torch.randn(batch, 4))


@pytest.mark.parametrize("guide", GUIDES)
def test_tied_and_called_twice(guide, float64):
    check_network(Tied(), guide, torch.randn(6, 4))


@pytest.mark.parametrize("guide", GUIDES)
def test_conv(guide, float64):
    check_network(ConvNet(), guide, torch.randn(5, 2, 6, 6))


def test_tokens_share_the_signs_of_their_example(float64):
    check_network(mlp((4, 8, 3)), AutoNormal, torch.randn(5, 6, 4))


def test_time_major(float64):
    check_network(mlp((4, 8, 3)), AutoNormal, torch.randn(6, 5, 4), example_dim=1)


def test_time_major_last_step(float64):
    class LastStep(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):  # (T, N, 4)
            return self.head(torch.tanh(self.body(x))[-1])

    model = bayesian(LastStep())
    guide = AutoNormal(model)
    x = torch.randn(6, 5, 4)
    trace = poutine.trace(guide).get_trace(x)
    handler = Recording(example_dim=1, on_missing_rule="error")
    out = poutine.replay(handler(model), trace=trace)(x)
    w = {name: value.materialize() for name, value in handler.seen.items()}
    h = torch.tanh(torch.einsum("tni,noi->tno", x, w["body.weight"]) + w["body.bias"])[-1]
    expected = torch.einsum("ni,noi->no", h, w["head.weight"]) + w["head.bias"]
    torch.testing.assert_close(out, expected)


def test_signs_of_different_sites_are_independent():
    model = bayesian(mlp((16, 16, 16)))
    guide = AutoNormal(model)
    x = torch.randn(512, 16)
    trace = poutine.trace(guide).get_trace(x)
    handler = Recording()
    poutine.replay(handler(model), trace=trace)(x)
    signs = [
        torch.sign((w.materialize() - w.center) / w.delta).reshape(512, -1)
        for name, w in handler.seen.items()
        if name.endswith("weight")
    ]
    # Pairwise independent signs of examples: the sum over 512 examples of a product of two
    # signs of different weights is 0 on average with variance 512.
    products = (signs[0][:, :, None] * signs[1][:, None, :16]).sum(0) / 512**0.5
    assert products.abs().mean() < 1.0
    assert products.pow(2).mean() < 2.0
    assert not torch.equal(signs[0], signs[1])


def test_examples_ignore_one_another(float64):
    model = bayesian(mlp())
    guide = AutoNormal(model)
    x = torch.randn(6, 4)
    trace = poutine.trace(guide).get_trace(x)
    outs = []
    for scale in (1.0, 100.0):
        torch.manual_seed(3)
        other = x * torch.tensor([scale, scale, 1.0, scale, scale, scale])[:, None]
        outs.append(poutine.replay(Recording()(model), trace=trace)(other))
    torch.testing.assert_close(outs[0][2], outs[1][2])
    assert not torch.allclose(outs[0][1], outs[1][1])
