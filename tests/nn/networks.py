"""Networks to convert, as people write them."""

import torch
import torch.nn.functional as F
from torch import nn

V, N = 7, 4


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, groups=2, bias=False),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 3)
        self.skipped = None
        self.register_module("nothing", None)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x):
        h = self.features[:3](x)
        return self.head(self.features[3:](h).flatten(1) + self.shift)


class Sequences(nn.Module):
    """Packed, stacked, bidirectional."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 3, padding_idx=0)
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens):
        return F.linear(self.body(self.embed(tokens)), self.embed.weight)


class TiedLM(nn.Module):
    """Embedding and decoder are one parameter; one block is used twice under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.decode = nn.Linear(4, V)
        self.decode.weight = self.embed.weight
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])

    def forward(self, tokens):
        h = torch.tanh(self.block(self.embed(tokens))) * self.scales[0]
        return self.decode(torch.tanh(self.again(h)))


def image():
    return torch.randn(N, 1, 8, 8)


def tokens():
    return torch.randint(1, V, (N, 5))


NETWORKS = {
    "lenet": (LeNet, image),
    "lstm": (Sequences, tokens),
    "transformer": (Transformer, tokens),
    "tied": (TiedLM, tokens),
}
