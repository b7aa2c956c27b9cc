# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What every torch function does with a flipped weight, one file per family.

Importing this package fills :data:`pyro_flipout.tensor.RULES`.
"""

from pyro_flipout.rules import (
    attention,
    contraction,
    conv,
    elementwise,
    embedding,
    linear,
    normalization,
    query,
    recurrent,
    shape,
)

__all__ = [
    "attention",
    "contraction",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "normalization",
    "query",
    "recurrent",
    "shape",
]
