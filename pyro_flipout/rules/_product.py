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

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from types import FrameType

import torch
from torch import Tensor

from pyro_flipout._modes import autocast, has_own_gradients
from pyro_flipout.rules._explicit import Explicit, plan_explicit
from pyro_flipout.rules._fused_product import apply_flipped
from pyro_flipout.rules._kernel import Bias, Kernel, Placed
from pyro_flipout.signs import flip_signs
from pyro_flipout.tensor import (
    Execution,
    FlipoutTensor,
    NoExampleDim,
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


def check_layout(data: Tensor) -> None:
    """Refuses data that signs cannot multiply.

    :raises NotExamples: if they are nested.
    :raises NoExampleDim: if they are sparse.
    """
    if data.is_nested:
        raise NotExamples(NESTED)
    if data.layout is not torch.strided:
        raise NoExampleDim(
            f"the data are sparse ({data.layout}), and signs are for dense data; pass x.to_dense()"
        )


def find_examples(weight: FlipoutTensor, data: Tensor, used: Sequence[int], name: str) -> int:
    """Finds the dimension of ``data`` that counts the examples, and counts them.

    :param used: dimensions of ``data`` that the weight uses up, not negative.
    :returns: the dimension, ``example_dim`` unless that is used up and dimension 0 has
        the known number of examples (a time-major model after taking its last step).
    :raises NotExamples: if ``data`` have no free dimension or another number of rows.
    :raises NoExampleDim: if they are sparse, or if dimension 0 is used up.
    :raises ExampleDimError: if it is used up and ``example_dim`` was given.
    """
    execution = weight.execution
    if data.is_nested or data.layout is not torch.strided:
        check_layout(data)
    shape, dim = data.shape, execution.example_dim
    if dim not in used and dim < len(shape):
        if shape[dim] != execution.num_examples:  # else the words are for nobody
            execution.count(shape[dim], f"data of shape {tuple(shape)}")
        return dim
    free = [dim for dim in range(len(shape)) if dim not in used]
    if not free:
        raise NotExamples(
            f"data of shape {tuple(shape)} have no example dimension; add one in front, "
            "as in x.unsqueeze(0)"
        )
    if weight.lead_dims:
        raise NoRule(
            "the weight has particle dimensions; use a layer such as F.linear, or "
            "vectorize_particles=False"
        )
    if not (0 in free and shape[0] == execution.num_examples):
        if all(shape[dim] == 1 for dim in free):
            execution.perhaps_one = True
        raise example_dim_error(weight, name, shape)
    return 0


def calling_frame(functions: Collection[object]) -> FrameType | None:
    """The frame of a function, by its code, that called a torch function which a rule computes."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None or frame.f_code in functions:
            return frame
        frame = frame.f_back
    return None


_FRAMES = 50
"""Those of the dispatch are a few; every mode of torch functions adds its own."""


def flipped_product(
    weight: FlipoutTensor,
    data: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor],
    data_dims: Mapping[int, int],
    out_dims: Mapping[int, int],
    example_dim: int,
    out_example_dim: int | None = None,
    groups: int = 1,
    out_groups: int = 1,
    kernel: Kernel | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes ``apply(x_n, W_n)`` for every example with one product a term.

    :param apply: the operation, linear in the weight and in the data.
    :param data_dims: for weight dimensions contracted with the data, the dimension of
        ``data``, neither negative.
    :param out_dims: for weight dimensions that survive, the dimension of the output.
    :param example_dim: dimension of ``data`` that counts the examples.
    :param out_example_dim: the same for the output, if it differs.
    :param groups: the weight's contracted dimension serves this many blocks of the data.
    :param out_groups: the same for the surviving dimension and the output.
    :param kernel: the operation with its gradient, where one is written for it: less
        memory and fewer passes than autograd's.
    :param bias: shape ``(d,)``, plain or flipped; needs ``kernel``.
    :raises NoRule: if a sign can move neither onto the data nor onto the output.
    """
    if weight.execution.is_single:
        return _of_center(apply, kernel, data, weight.plain, bias if bias is None else plain(bias))
    out_example_dim = example_dim if out_example_dim is None else out_example_dim
    out: Tensor | None = None
    fused = kernel if has_own_gradients() and not data.is_complex() else None
    for term in weight.terms:
        into_data, into_out = _route(term, data_dims, out_dims)
        before = _place(weight.execution, into_data, data, example_dim, groups)
        after = _place(weight.execution, into_out, data, out_example_dim, out_groups)
        if out is None and fused is not None and max(len(before), len(after)) < 2:
            taken = _take_bias(bias, weight, fused, data, out_example_dim)
            bias = bias if taken is None else None
            pair = weight.center, term.delta
            by_dim = data_dims, out_dims
            out = _fused(fused, data, *pair, taken or NO_BIAS, before, after, by_dim)
            continue
        x = data
        for placed in before:
            x = flip_signs(x, *placed)
        y = apply(x, term.delta)
        for signs, *dims in after:
            y = flip_signs(y, signs.to(y.dtype), *dims)
        out = y + (apply(data, weight.center) if out is None else out)
    out = apply(data, weight.center) if out is None else out
    if bias is None or kernel is None:
        return out
    return torch.add(
        out, torch.reshape(bias, (-1, *(1,) * (out.dim() - 1 - _bias_dim(kernel, out))))
    )


NO_BIAS: Bias = (None, None, None)


def _take_bias(
    bias: Tensor | None, weight: FlipoutTensor, kernel: Kernel, data: Tensor, example_dim: int
) -> Bias | None:
    """A bias apart, or ``None`` if it is one that the fused product cannot add."""
    parts, dim = bias_parts(bias, weight), _bias_dim(kernel, data)
    if parts is None:
        return None
    center, delta, codes = parts
    if codes is None:
        return center, None, None
    if dim == example_dim:
        return None
    return center, delta, (weight.execution.factored_signs(codes, data.dtype), example_dim, dim)


def bias_parts(
    bias: Tensor | None, weight: FlipoutTensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Centre, perturbation and codes of a bias, ``None`` if it has more than these.

    A bias that is not flipped is its own centre, without the others.
    """
    if not isinstance(bias, FlipoutTensor):
        return bias, None, None
    terms = bias.terms
    if bias.dim() != 1 or bias.execution is not weight.execution or len(terms) > 1:
        return None
    if not terms:
        return bias.center, None, None
    codes = terms[0].codes
    if len(codes) != 1 or codes[0].shape != bias.shape:
        return None
    return bias.center, terms[0].delta, codes[0]


def _bias_dim(kernel: Kernel, like: Tensor) -> int:
    return kernel.bias_dim % like.dim()


def _fused(
    kernel: Kernel,
    data: Tensor,
    center: Tensor,
    delta: Tensor,
    bias: Bias,
    before: list[Placed],
    after: list[Placed],
    dims: tuple[Mapping[int, int], Mapping[int, int]],
) -> Tensor:
    x, center, delta, *biases = autocast(data, center, delta, *bias[:2])
    signs = before[0] if before else None, after[0] if after else None, bias[2]
    placed = [p and (p[0].to(x.dtype), *p[1:]) for p in signs]
    explicit = _explicit(kernel, x, center, placed[:2], dims)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return apply_flipped(x, center, delta, *biases, kernel, *placed, explicit)
    return apply_flipped(x, center, delta, *biases, kernel, *placed, explicit)


def _explicit(
    kernel: Kernel,
    data: Tensor,
    weight: Tensor,
    placed: Sequence[Placed | None],
    dims: tuple[Mapping[int, int], Mapping[int, int]],
) -> Explicit | None:
    """The way to make the examples' weights, where that pays."""
    if torch.compiler.is_compiling():
        return None
    given = [
        (p[0], next(own for own, where in along.items() if where == p[2]))
        for p, along in zip(placed, dims, strict=True)
        if p is not None
    ]
    example_dim = next((p[1] for p in placed if p is not None), 0)
    return plan_explicit(kernel, data, weight, given, example_dim)


def _of_center(
    apply: Callable[[Tensor, Tensor], Tensor],
    kernel: Kernel | None,
    data: Tensor,
    center: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return apply(data, center) if kernel is None else kernel.forward(*autocast(data, center, bias))


def _route(
    term: Term, data_dims: Mapping[int, int], out_dims: Mapping[int, int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    into_data: dict[int, Tensor] = {}
    into_out: dict[int, Tensor] = {}
    for codes in term.codes:
        varying = [dim for dim, size in enumerate(codes.shape) if size != 1]
        if len(varying) > 1:
            raise NoRule("the weight's signs do not factorise along its dimensions")
        dim = varying[0] if varying else next(iter(out_dims or data_dims), -1)
        if dim in out_dims:
            target, where = into_out, out_dims[dim]
        elif dim in data_dims:
            target, where = into_data, data_dims[dim]
        else:
            raise NoRule("a dimension of the weight is summed over without the data")
        flat = codes.flatten()
        target[where] = target[where] ^ flat if where in target else flat
    return into_data, into_out


def _place(
    execution: Execution, where: dict[int, Tensor], like: Tensor, example_dim: int, blocks: int
) -> list[Placed]:
    """Signs of flat codes in the dtype of ``like``, each repeated for ``blocks``."""
    placed = []
    for dim, codes in where.items():
        if dim == example_dim:
            raise NoRule(f"dimension {dim} of the data is both the example and the weight's")
        codes = codes if blocks == 1 or codes.numel() == 1 else codes.repeat(blocks)
        placed.append((execution.factored_signs(codes, like.dtype), example_dim, dim))
    return placed


def per_example(weight: FlipoutTensor, ndim: int, example_dim: int) -> Tensor:
    """Explicit weights, aligned right in ``ndim`` dimensions, examples in ``example_dim``.

    :returns: tensor of ``ndim`` dimensions, of size N in ``example_dim``, in which the
        weight must be absent or of size 1.
    """
    if weight.execution.is_single:
        return weight.plain
    out, terms = weight.center, weight.terms
    for term in terms:
        codes = [c.reshape((1,) * (ndim - c.dim()) + tuple(c.shape)) for c in term.codes]
        combined = reduce(torch.bitwise_xor, codes)
        signs = weight.execution.signs(combined, term.delta.dtype)  # (N, *)
        out = out + term.delta * signs.movedim(0, example_dim).squeeze(example_dim + 1)
    return out
