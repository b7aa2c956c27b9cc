# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Multi-head attention: all tokens of an example meet its own projections.

``nn.MultiheadAttention`` hands its function ``(L, N, E)`` whatever its ``batch_first``, so
the examples are in dimension 1 here, for any ``example_dim``. Its fast path for evaluation,
and that of ``nn.TransformerEncoderLayer``, step aside for tensor subclasses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.errors import ExampleDimError
from pyro_flipout.rules._product import flipped_product, per_example
from pyro_flipout.rules.linear import LINEAR
from pyro_flipout.tensor import FlipoutTensor, NoRule, NotExamples, implements

NAME = "F.multi_head_attention_forward"
EXAMPLE_DIM = 1


class _Masks(NamedTuple):
    attention: Tensor | None  # (L, S) or (N * heads, L, S), added to the scores
    padding: Tensor | None  # (N, S), added to the scores
    is_causal: bool


@implements(
    F.multi_head_attention_forward,
    flips="all projections, their biases, bias_k and bias_v",
    limits="unbatched input has no example dimension: shared. Examples are in dimension 1, as "
    "the function gets them; another number of them than elsewhere: shared or error",
)
def multi_head_attention_forward(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else ()
    weights = (in_proj_weight, *separate, in_proj_bias, bias_k, bias_v, out_proj_weight)
    data = (query, key, value, static_k, static_v, attn_mask, key_padding_mask)
    if any(isinstance(item, FlipoutTensor) for item in data):
        raise NoRule("the query, key, value or a mask is itself a flipped weight")
    _count_examples((*weights, out_proj_bias), query)
    if query.size(-1) != embed_dim_to_check or embed_dim_to_check % num_heads:
        raise ValueError(
            f"{NAME}: got a query of shape {tuple(query.shape)} and {num_heads} heads, expected "
            f"an embedding of dimension {embed_dim_to_check}, divisible by the heads"
        )
    masks = _masks(query, attn_mask, key_padding_mask, is_causal, need_weights)
    q, k, v = (
        _separate_projection((query, key, value), separate, in_proj_bias)
        if use_separate_proj_weight
        else _packed_projection(query, key, value, in_proj_weight, in_proj_bias)
    )
    if bias_k is not None and bias_v is not None:
        if static_k is not None or static_v is not None:
            raise ValueError(f"{NAME}: bias_k and bias_v cannot be added to a static key or value")
        k = torch.cat([k, _repeat(bias_k, k.size(1))])
        v = torch.cat([v, _repeat(bias_v, v.size(1))])
        masks = _pad(masks)
    q = _split_heads(q, num_heads)
    k = _split_heads(k, num_heads) if static_k is None else static_k
    v = _split_heads(v, num_heads) if static_v is None else static_v
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        masks = _pad(masks)
    mask = _merge(masks, num_heads)
    dropout_p = dropout_p if training else 0.0
    scores = None
    if need_weights:
        heads, scores = _explicit_attention(q, k, v, mask, dropout_p)
        scores = scores.unflatten(0, (-1, num_heads))  # (N, heads, L, S)
        scores = scores.mean(1) if average_attn_weights else scores
    else:
        heads = _fused_attention(q, k, v, mask, dropout_p, masks.is_causal, num_heads)
    out = heads.transpose(0, 1).reshape(query.shape)  # (L, N, E)
    return _project(out, out_proj_weight, out_proj_bias), scores


# ------------------------------------------------------------------------- examples


def _count_examples(weights: tuple[Tensor | None, ...], query: Tensor) -> None:
    weight = next(w for w in weights if isinstance(w, FlipoutTensor) and w.terms)
    shape, execution = tuple(query.shape), weight.execution
    if query.dim() != 3:
        raise NotExamples(
            f"the unbatched query of shape {shape} has no example dimension; add one, as in "
            "x.unsqueeze(0) with batch_first=True"
        )
    if any(isinstance(w, FlipoutTensor) and w.dim() > 3 for w in weights):
        raise NoRule("a projection with leading batch dimensions is not covered")
    known, dim = execution.num_examples, execution.example_dim
    if known is not None and known != query.size(EXAMPLE_DIM):
        seen = f"in {NAME} met a query of shape {shape} (time, examples, features)"
        if known != query.size(0):
            raise NotExamples(
                f"the query of shape {shape} (time, examples, features) has {shape[1]} examples, "
                f"but this execution has {known}; keep the example dimension apart"
            )
        remedy = (
            "build nn.MultiheadAttention or nn.Transformer with batch_first=True; for a "
            "time-major model, set flipout(example_dim=1)"
            if dim == 0
            else f"set flipout(example_dim=0), since example_dim={dim} counts time here"
        )
        message = (
            f"this execution has {known} examples, counted in dimension {dim} of its data, which "
            f"attention takes for time; {remedy}"
        )
        if execution.example_dim_given:
            raise ExampleDimError(f"flipout: site '{weight.site}' {seen}, but {message}")
        raise NotExamples(
            f"the query of shape {shape} is (time, examples, features), but {message}"
        )
    execution.count(query.size(EXAMPLE_DIM), f"query of shape {shape}")


# ---------------------------------------------------------------------- projections


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # x (L, N, in)
    fused = None if isinstance(bias, FlipoutTensor) else bias
    if isinstance(weight, FlipoutTensor):
        out = flipped_product(
            weight,
            x,
            F.linear,
            {1: 2},
            {0: 2},
            EXAMPLE_DIM,
            kernel=LINEAR,
            bias=fused,
        )
    else:
        out = F.linear(x, weight, fused)
    return out + per_example(bias, 3, EXAMPLE_DIM) if isinstance(bias, FlipoutTensor) else out


def _packed_projection(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    assert weight is not None
    if query is key is value:
        return _project(query, weight, bias).chunk(3, -1)
    if key is not value:
        return _separate_projection((query, key, value), weight.chunk(3), bias)
    sizes = [query.size(-1), 2 * query.size(-1)]
    w_q, w_kv = weight.split(sizes)
    b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
    return _project(query, w_q, b_q), *_project(key, w_kv, b_kv).chunk(2, -1)


def _separate_projection(
    data: tuple[Tensor, ...], weights: tuple[Tensor | None, ...], bias: Tensor | None
) -> tuple[Tensor, ...]:
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(
        _project(x, w, b)  # type: ignore[arg-type]
        for x, w, b in zip(data, weights, biases, strict=True)
    )


def _repeat(bias: Tensor, num_examples: int) -> Tensor:  # (1, 1, E) to (1, N, E)
    if isinstance(bias, FlipoutTensor):
        bias = per_example(bias, 3, EXAMPLE_DIM)
    return bias.expand(-1, num_examples, -1)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:  # (L, N, E) to (N * heads, L, E / heads)
    return x.reshape(x.size(0), -1, x.size(2) // num_heads).transpose(0, 1)


# ---------------------------------------------------------------------------- masks


def _masks(
    query: Tensor,
    attention: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    need_weights: bool,
) -> _Masks:
    if is_causal and attention is None:
        raise RuntimeError(f"{NAME}: got is_causal=True without the attn_mask that it describes")
    if is_causal and padding is None and not need_weights:
        return _Masks(None, None, True)
    return _Masks(
        _additive(attention, query.dtype),
        _additive(padding, query.dtype),
        is_causal and padding is None,
    )


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _pad(masks: _Masks) -> _Masks:
    attention, padding = (None if m is None else F.pad(m, (0, 1)) for m in masks[:2])
    return _Masks(attention, padding, masks.is_causal)


def _merge(masks: _Masks, num_heads: int) -> Tensor | None:
    """The sum of both masks, ``(1, L, S)`` or ``(N * heads, 1 or L, S)``."""
    attention, padding = masks.attention, masks.padding
    if attention is not None and attention.dim() == 2:
        attention = attention.unsqueeze(0)
    if padding is None:
        return attention
    padding = padding[:, None, None].expand(-1, num_heads, -1, -1).flatten(0, 1)
    return padding if attention is None else attention + padding


# ------------------------------------------------------------------------ attention


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    q = q * math.sqrt(1.0 / q.size(-1))
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    scores = F.softmax(scores, dim=-1)
    if dropout_p > 0:
        scores = F.dropout(scores, p=dropout_p)
    return torch.bmm(scores, v), scores


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    num_heads: int,
) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, num_heads)) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.size(0) == 1 else mask.unflatten(0, (-1, num_heads))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal).flatten(0, 1)
