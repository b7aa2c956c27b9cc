# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""The two computations that every rule is made of.

*Product.* For an operation linear in the weight, signs on a weight dimension that is
contracted with the data move onto the data, those on an output dimension onto the
output (Wen et al. 2018, eq. 4):

.. math:: y_n = f(x_n, \bar W) + r_n \circ f(x_n \circ s_n, \Delta W).

*Elementwise use.* The weights of all examples are built explicitly, at the size of one
weight for each example, and broadcast against the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from pyro_flipout.tensor import (
    Execution,
    FlipoutTensor,
    NoRule,
    NotExamples,
    Term,
    example_dim_error,
)


def plain(obj: Tensor) -> Tensor:
    """The shared draw of a flipped weight; any other tensor as it is."""
    return obj.plain if isinstance(obj, FlipoutTensor) else obj


NESTED = (
    "the data are a nested tensor, as nn.TransformerEncoder makes of padded data in evaluation "
    "if nothing in its first layer is flipped; build it with enable_nested_tensor=False"
)


def find_examples(weight: FlipoutTensor, data: Tensor, used: Sequence[int], name: str) -> int:
    """Finds the dimension of ``data`` that counts the examples, and counts them.

    :param used: dimensions of ``data`` that the weight uses up, not negative.
    :returns: the dimension, ``example_dim`` unless that is used up and dimension 0 has
        the known number of examples (a time-major model after taking its last step).
    :raises NotExamples: if ``data`` have no free dimension or another number of rows.
    :raises ExampleDimError: if ``example_dim`` is used up.
    """
    execution = weight.execution
    if data.is_nested:
        raise NotExamples(NESTED)
    free = [dim for dim in range(data.dim()) if dim not in used]
    if not free:
        raise NotExamples(
            f"data of shape {tuple(data.shape)} have no example dimension; add one in front, "
            "as in x.unsqueeze(0)"
        )
    dim = execution.example_dim
    if dim not in free:
        if not (0 in free and data.shape[0] == execution.num_examples):
            raise example_dim_error(weight, name, data.shape)
        dim = 0
    execution.count(data.shape[dim], f"data of shape {tuple(data.shape)}")
    return dim


def flipped_product(
    weight: FlipoutTensor,
    data: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor],
    data_dims: Mapping[int, int],
    out_dims: Mapping[int, int],
    example_dim: int,
    out_example_dim: int | None = None,
    groups: int = 1,
    apply_center: Callable[[Tensor, Tensor], Tensor] | None = None,
    out_groups: int = 1,
) -> Tensor:
    """Computes ``apply(x_n, W_n)`` for every example with one product a term.

    :param apply: the operation, linear in the weight and in the data.
    :param data_dims: for weight dimensions contracted with the data, the dimension of
        ``data``, neither negative.
    :param out_dims: for weight dimensions that survive, the dimension of the output.
    :param example_dim: dimension of ``data`` that counts the examples.
    :param out_example_dim: the same for the output, if it differs.
    :param groups: the weight's contracted dimension serves this many blocks of the data.
    :param apply_center: replaces ``apply`` for the product with the centre, where a
        bias of all examples is added for free.
    :param out_groups: the same for the surviving dimension and the output.
    :raises NoRule: if a sign can move neither onto the data nor onto the output.
    """
    out_example_dim = example_dim if out_example_dim is None else out_example_dim
    execution = weight.execution
    out = (apply_center or apply)(data, weight.center)
    for term in weight.terms:
        into_data, into_out = _route(term, data_dims, out_dims)
        x = data
        for dim, codes in into_data.items():
            codes = codes if groups == 1 else codes.repeat(groups)
            x = x * place_signs(execution, codes, data, example_dim, dim)
        y = apply(x, term.delta)
        for dim, codes in into_out.items():
            codes = codes if codes.numel() == 1 else codes.repeat(out_groups)
            y = y * place_signs(execution, codes, y, out_example_dim, dim)
        out = out + y
    return out


def _route(
    term: Term, data_dims: Mapping[int, int], out_dims: Mapping[int, int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    into_data: dict[int, Tensor] = {}
    into_out: dict[int, Tensor] = {}
    for codes in term.codes:
        varying = [dim for dim, size in enumerate(codes.shape) if size > 1]
        if len(varying) > 1:
            raise NoRule("the weight's signs do not factorise along its dimensions")
        dim = varying[0] if varying else next(iter(out_dims or data_dims))
        if dim in out_dims:
            target, where = into_out, out_dims[dim]
        elif dim in data_dims:
            target, where = into_data, data_dims[dim]
        else:
            raise NoRule(f"dimension {dim} of the weight is summed over without the data")
        flat = codes.flatten()
        target[where] = target[where] ^ flat if where in target else flat
    return into_data, into_out


def place_signs(
    execution: Execution, codes: Tensor, like: Tensor, example_dim: int, dim: int
) -> Tensor:
    """Signs of flat ``codes``, broadcastable to ``like``, examples in ``example_dim``."""
    if dim == example_dim:
        raise NoRule(f"dimension {dim} of the data is both the example and the weight's")
    signs = execution.signs(codes, like.dtype)  # (N, size)
    shape = [1] * like.dim()
    shape[example_dim], shape[dim] = signs.shape
    return (signs if example_dim < dim else signs.t()).reshape(shape)


def per_example(weight: FlipoutTensor, ndim: int, example_dim: int) -> Tensor:
    """Explicit weights, aligned right in ``ndim`` dimensions, examples in ``example_dim``.

    :returns: tensor of ``ndim`` dimensions, of size N in ``example_dim``, in which the
        weight must be absent or of size 1.
    """
    center, terms = weight.center, weight.terms
    out = center
    for term in terms:
        codes = [c.reshape((1,) * (ndim - c.dim()) + tuple(c.shape)) for c in term.codes]
        combined = reduce(torch.bitwise_xor, codes)
        signs = weight.execution.signs(combined, term.delta.dtype)  # (N, *)
        out = out + term.delta * signs.movedim(0, example_dim).squeeze(example_dim + 1)
    return out
