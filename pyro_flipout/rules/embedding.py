# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Embeddings: token :math:`i` of example :math:`n` looks up row :math:`i` of :math:`W_n`.

The sign of a row is found for each token from the code of the row, so no matrix of
examples by vocabulary is formed:

.. math:: y_{nt} = \bar W_i + r_{ni} \, s_n \circ \Delta W_i, \qquad i = \text{input}_{nt}.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout._modes import looked_at
from pyro_flipout.errors import FlipoutError
from pyro_flipout.rules._product import find_examples
from pyro_flipout.rules.shape import map_entries
from pyro_flipout.signs import paired_signs
from pyro_flipout.tensor import FlipoutTensor, NoRule, Term, implements


@implements(
    F.embedding,
    flips="rows and columns of the weight, one sign a row for all its tokens in an example",
    limits="max_norm: error. Indices without examples (positions 0, 1, 2, ... in one row, or "
    "another number of rows than there are examples) select rows: a flipped weight again",
    per_particle=True,
)
def embedding(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    table = _table(weight, max_norm, "F.embedding")
    _check_padding(padding_idx, table)

    def apply(value: Tensor) -> Tensor:
        return op(input, value, padding_idx, None, norm_type, scale_grad_by_freq, sparse)

    dim = _example_dim(table, input)
    if dim is None:
        return map_entries(table, lambda value: _select(value, input, apply), {0})
    shape = [1] * input.dim()
    shape[dim] = -1
    positions = torch.arange(input.size(dim), device=input.device).reshape(shape)
    examples = table.execution.numbers(positions)
    out = apply(table.center)  # (*input.shape, D)
    for term in table.terms:
        rows, columns = _split_codes(term)
        y = apply(term.delta)
        if rows is not None:
            y = y * paired_signs(rows[input], examples, y.dtype).unsqueeze(-1)
        if columns is not None:
            signs = table.execution.signs(columns, y.dtype)  # (N, D)
            y = y * signs.reshape(*shape, signs.size(-1))
        out = out + y
    return out


def _table(weight: Tensor, max_norm: float | None, name: str) -> FlipoutTensor:
    if not isinstance(weight, FlipoutTensor) or weight.dim() != 2:
        raise NoRule("the flipped weight is not the (num_embeddings, embedding_dim) table")
    if max_norm is not None:
        raise FlipoutError(
            f"flipout: site '{weight.site}' in {name}: max_norm={max_norm} renormalises the rows "
            "in place, and the rows of every example have a norm of their own; use max_norm=None "
            "with a prior that keeps norms small, or hide the site with "
            f"flipout(hide=['{weight.site}'])"
        )
    return weight


def _check_padding(padding_idx: int | None, table: Tensor) -> None:
    if padding_idx is not None and not -len(table) <= padding_idx < len(table):
        raise ValueError(
            f"F.embedding: got padding_idx={padding_idx}, expected one of the {len(table)} rows"
        )


def _example_dim(table: FlipoutTensor, input: Tensor) -> int | None:
    """Dimension of the indices that counts the examples; ``None`` if none does."""
    execution = table.execution
    if execution.constants or _is_positions(input):
        return None
    dim = execution.example_dim
    if execution.num_examples is not None:
        if input.dim() <= dim:  # one step of a time-major model
            dim = 0
        if input.dim() == 0 or input.size(dim) != execution.num_examples:
            return None
    return find_examples(table, input, [], "F.embedding") if input.dim() else None


def _is_positions(input: Tensor) -> bool:
    """Whether the indices are 0, 1, 2, ... in one row, as for a positional embedding."""
    count = input.numel()
    if count < 2 or count not in input.shape:
        return False
    return looked_at(
        lambda: bool((input.flatten() == torch.arange(count, device=input.device)).all())
    )


def _select(value: Tensor, input: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    return apply(value) if value.is_floating_point() else value[input]  # codes are integers


def _split_codes(term: Term) -> tuple[Tensor | None, Tensor | None]:
    """Codes of the rows ``(V,)`` and of the columns ``(D,)``, of size 1 if they do not vary."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for codes in term.codes:
        if codes.size(0) > 1 and codes.size(1) > 1:
            raise NoRule("the weight's signs do not factorise along its dimensions")
        (rows if codes.size(0) > 1 else columns).append(codes.flatten())
    xor = [reduce(torch.bitwise_xor, codes) if codes else None for codes in (rows, columns)]
    return xor[0], xor[1]


@implements(
    F.embedding_bag,
    flips="rows and columns of the weight; a bag is an example",
    limits="max_norm: error; nested input: no rule",
    per_particle=True,
)
def embedding_bag(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    table = _table(weight, max_norm, "F.embedding_bag")
    if isinstance(per_sample_weights, FlipoutTensor) or input.is_nested:
        raise NoRule("nested input, or a flipped weight as per_sample_weights, is not covered")

    def apply(value: Tensor, scales: Tensor | None, mode: str) -> Tensor:
        return op(
            input,
            value,
            offsets,
            None,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            scales,
            include_last_offset,
            padding_idx,
        )

    center = apply(table.center, per_sample_weights, mode)  # (N, D); checks the arguments
    bags = find_bags(input, offsets, include_last_offset)  # (*input.shape)
    find_examples(table, center, [1], "F.embedding_bag")
    kept = bags < len(center)
    if padding_idx is not None:
        kept = kept & (input != padding_idx % len(table))
    if mode == "max":
        return _max_bags(table, input[kept], bags[kept], len(center))
    count = torch.bincount(bags[kept], minlength=len(center)).clamp(min=1).unsqueeze(-1)
    out = center
    for term in table.terms:
        rows, columns = _split_codes(term)
        scales = per_sample_weights
        if rows is not None:
            signs = paired_signs(rows[input], table.execution.numbers(bags), center.dtype)
            scales = signs if scales is None else signs * scales
        if scales is None:
            y = apply(term.delta, None, mode)
        else:  # torch has no per_sample_weights for means
            y = apply(term.delta, scales, "sum")
            y = y / count if mode == "mean" else y
        if columns is not None:
            y = y * table.execution.signs(columns, y.dtype)
        out = out + y
    return out


def find_bags(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """Number of the bag of every token, ``len(offsets)`` or more if it is in none."""
    if offsets is None:
        return torch.arange(len(input), device=input.device).unsqueeze(-1).expand_as(input)
    starts = offsets[:-1] if include_last_offset else offsets
    positions = torch.arange(len(input), device=input.device, dtype=offsets.dtype)
    bags = torch.searchsorted(starts, positions, right=True) - 1
    return bags.where(positions < offsets[-1], len(offsets)) if include_last_offset else bags


def _max_bags(table: FlipoutTensor, tokens: Tensor, bags: Tensor, num_bags: int) -> Tensor:
    examples = table.execution.numbers(bags).unsqueeze(-1)
    values = table.center[tokens]  # (tokens, D)
    for term in table.terms:
        rows, columns = _split_codes(term)
        y = term.delta[tokens]
        for codes in (None if rows is None else rows[tokens].unsqueeze(-1), columns):
            if codes is not None:
                y = y * paired_signs(codes, examples, y.dtype)
        values = values + y
    empty = values.new_zeros(num_bags, values.size(-1))
    index = bags.unsqueeze(-1).expand_as(values)
    return empty.scatter_reduce(0, index, values, "amax", include_self=False)
