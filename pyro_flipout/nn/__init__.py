# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Layers, conversion of networks, priors, and noise as a regulariser."""

from pyro_flipout.nn.attention import FlipoutMultiheadAttention
from pyro_flipout.nn.bayesian_module import tie_
from pyro_flipout.nn.bayesianize import bayesianize, bayesianize_
from pyro_flipout.nn.conv import (
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutConvTranspose1d,
    FlipoutConvTranspose2d,
    FlipoutConvTranspose3d,
)
from pyro_flipout.nn.embedding import FlipoutEmbedding, FlipoutEmbeddingBag
from pyro_flipout.nn.linear import FlipoutBilinear, FlipoutLinear
from pyro_flipout.nn.pretrained import init_to_pretrained, scale_fraction
from pyro_flipout.nn.priors import (
    Hierarchy,
    HorseshoePrior,
    IIDPrior,
    KaimingPrior,
    LaplacePrior,
    PretrainedPrior,
    StudentTPrior,
    XavierPrior,
)
from pyro_flipout.nn.recurrent import (
    FlipoutGRU,
    FlipoutGRUCell,
    FlipoutLSTM,
    FlipoutLSTMCell,
    FlipoutRNN,
    FlipoutRNNCell,
)
from pyro_flipout.nn.to_deterministic import to_deterministic
from pyro_flipout.nn.weight_noise import remove_weight_noise_, weight_noise_

__all__ = [
    "FlipoutBilinear",
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutConvTranspose1d",
    "FlipoutConvTranspose2d",
    "FlipoutConvTranspose3d",
    "FlipoutEmbedding",
    "FlipoutEmbeddingBag",
    "FlipoutGRU",
    "FlipoutGRUCell",
    "FlipoutLSTM",
    "FlipoutLSTMCell",
    "FlipoutLinear",
    "FlipoutMultiheadAttention",
    "FlipoutRNN",
    "FlipoutRNNCell",
    "Hierarchy",
    "HorseshoePrior",
    "IIDPrior",
    "KaimingPrior",
    "LaplacePrior",
    "PretrainedPrior",
    "StudentTPrior",
    "XavierPrior",
    "bayesianize",
    "bayesianize_",
    "init_to_pretrained",
    "remove_weight_noise_",
    "scale_fraction",
    "tie_",
    "to_deterministic",
    "weight_noise_",
]
