# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Inference with flipout: a guide, the factor of its KL term, and what flipout buys."""

from pyro_flipout.infer.autoguide import AutoMeanField
from pyro_flipout.infer.captured_elbo import captured
from pyro_flipout.infer.estimators import ESTIMATORS
from pyro_flipout.infer.exploration import Exploration
from pyro_flipout.infer.flip_es import FlipES
from pyro_flipout.infer.gradient_variance import gradient_variance
from pyro_flipout.infer.mean_field_elbo import MeanFieldELBO
from pyro_flipout.infer.tempering import TemperMessenger, tempered
from pyro_flipout.infer.variance_decomposition import decompose_variance
from pyro_flipout.infer.variance_plot import plot_gradient_variance

__all__ = [
    "ESTIMATORS",
    "AutoMeanField",
    "Exploration",
    "FlipES",
    "MeanFieldELBO",
    "TemperMessenger",
    "captured",
    "decompose_variance",
    "gradient_variance",
    "plot_gradient_variance",
    "tempered",
]
