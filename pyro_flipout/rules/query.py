# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Questions about a weight, answered by its shared draw without a warning.

Attribute reads (``w.shape``, ``w.dtype``, ``w.grad``) are questions too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_flipout.errors import FlipoutError
from pyro_flipout.tensor import FlipoutTensor, NoRule, implements, queries, refuses

queries(
    # size and type
    Tensor.dim,
    Tensor.ndimension,
    Tensor.size,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
    Tensor.stride,
    Tensor.storage_offset,
    Tensor.element_size,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_signed,
    Tensor.get_device,
    Tensor.untyped_storage,
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.result_type,
    # the value, for a log line
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__hash__,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    # tests of the value
    Tensor.isnan,
    Tensor.isinf,
    Tensor.isfinite,
    torch.isnan,
    torch.isinf,
    torch.isfinite,
    torch.equal,
    Tensor.equal,
    torch.allclose,
    Tensor.allclose,
    *(getattr(torch, name) for name in ("eq", "ne")),
    *(getattr(Tensor, name) for name in ("eq", "ne")),
    *(getattr(Tensor, f"__{name}__") for name in ("eq", "ne")),  # an order makes masks: no rule
    # new tensors of the same kind
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
    Tensor.new_tensor,
    # autograd and copies
    Tensor.requires_grad_,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
)


_NO_GRADIENT = "the gradient with respect to a flipped weight is another one for each example"

refuses(
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad,
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    reason=_NO_GRADIENT,
    remedy=(
        "register hooks on the parameters of the guide, or hide the site with flipout(hide=[...])"
    ),
)

refuses(
    Tensor.data_ptr,
    reason="code that reads the memory of a weight sees one draw for all examples",
    remedy="compute with torch functions, or hide the site with flipout(hide=[...])",
)


@implements(
    torch.autograd.grad,
    flips="nothing: the gradient with respect to the shared draw, if examples have not seen others",
    limits="the gradient with respect to a weight that was used: an error",
)
def grad(op: Callable[..., Any], outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = inputs if isinstance(inputs, (list, tuple)) else (inputs,)
    weights = [w for w in inputs if isinstance(w, FlipoutTensor) and w.has_signs]
    used = dict.fromkeys(draw.site for w in weights for draw in w.draws if draw.used)
    if used:
        raise FlipoutError(
            f"flipout: torch.autograd.grad was asked for the gradient with respect to "
            f"{sorted(used)}, but the examples have used draws of their own, so that it is another "
            "one for each example; ask for the gradient with respect to parameters of the guide, "
            "or hide the site with flipout(hide=[...])"
        )
    raise NoRule(_NO_GRADIENT, remedy="ask for that of parameters of the guide, or hide the site")


@implements(
    Tensor.norm,
    torch.norm,
    torch.linalg.norm,
    torch.linalg.vector_norm,
    torch.linalg.matrix_norm,
    flips="nothing: the norm of the whole shared draw, as for a log line or a penalty",
    limits="a norm along a dimension, with which to normalise the weight: no rule",
)
def norm(op: Callable[..., Tensor], input: FlipoutTensor, *args: Any, **kwargs: Any) -> Tensor:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    out = op(input.plain, *args, **kwargs)
    if dim is not None or out.numel() != 1:
        raise NoRule("a norm along a dimension is not linear in the weight")
    return out


@implements(Tensor.detach, flips="nothing: the shared draw")
def detach(op: Callable[..., Tensor], input: FlipoutTensor) -> Tensor:
    return op(input.plain)
