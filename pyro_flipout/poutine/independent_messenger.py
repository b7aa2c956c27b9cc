# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The reference that flipout approximates: a draw of its own for every example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.poutine._own_draws import (
    TRANSPOSES,
    OwnDrawsMessenger,
    OwnDrawsTensor,
    transposes,
)
from pyro_flipout.rules._product import check_layout
from pyro_flipout.tensor import FlipoutTensor, NoRule

__all__ = ["IndependentMessenger", "IndependentTensor"]


class IndependentTensor(OwnDrawsTensor):
    """A weight of which every example sees an independent draw, kept explicitly."""

    estimator = "independent"
    rules = dict.fromkeys(TRANSPOSES, transposes)

    _origin: Any

    def materialize(self, num_examples: int | None = None) -> Tensor:
        """The explicit weights, shape ``(N, *self.shape)``."""
        origin, known = self._origin, self.execution.num_examples
        if known is None or num_examples not in (None, known):
            raise ValueError(f"materialize: got N = {num_examples}, but {known} is known")
        if not origin.used:
            fn, view = origin.found.fn, origin.found.view
            self.mark_used()
            origin.explicit = torch.stack([view(fn.rsample()) for _ in range(known)])
        return torch.vmap(self.image)(origin.explicit)


class IndependentMessenger(OwnDrawsMessenger):
    r"""Gives every example of a mini-batch an independent draw of the weights.

    That is :math:`W_n \sim q` for each example, N times the memory and no product that the
    examples share: for small nets, as the reference that flipout is compared with. It supports
    ``F.linear``, ``matmul`` (data on the left), convolutions, a weight added to or multiplied
    with data, and transposes of weights; a site that meets another torch function keeps its
    shared draw, with a warning. Parameters as for :class:`~pyro_flipout.FlipoutMessenger`.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     return torch.nn.functional.linear(x, w).squeeze(-1)
    >>> IndependentMessenger()(model)(torch.ones(4, 3)).unique().shape
    torch.Size([4])
    """

    tensor = IndependentTensor

    def why_not(self, found: Any) -> str | None:
        """The reason to leave a symmetric draw shared, if there is one."""
        if found.fn is None or not found.fn.has_rsample:
            return "its distribution has no reparametrised draws (rsample)"
        return None


def _over_examples(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs ``op(data, *weights, ...)`` example by example, vectorised."""
    weights = [a for a in args if isinstance(a, IndependentTensor)]
    data = args[0]
    execution = weights[0].execution
    dim = execution.example_dim
    if isinstance(data, FlipoutTensor) or not isinstance(data, Tensor):
        raise NoRule("the data must be its first argument, and plain")
    check_layout(data)
    if data.dim() <= dim:
        raise NoRule(f"data of shape {tuple(data.shape)} have no dimension {dim} of examples")
    execution.count(data.size(dim), f"data of shape {tuple(data.shape)}")
    if data.size(dim) == 0:
        return op(data, *(getattr(a, "plain", a) for a in args[1:]), **kwargs)
    explicit = [a.materialize() if isinstance(a, IndependentTensor) else None for a in args[1:]]

    def one(x: Tensor, *own: Any) -> Any:
        rest = [a if o is None else o for a, o in zip(args[1:], own, strict=True)]
        return op(x, *rest, **kwargs)

    in_dims = (dim, *(None if e is None else 0 for e in explicit))
    return torch.vmap(one, in_dims, out_dims=dim)(data, *explicit)


def _layer(
    op: Callable[..., Any], input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Any:
    return _over_examples(op, input, weight, bias, *args, **kwargs)


def _product(op: Callable[..., Any], a: Any, b: Any) -> Any:
    return _over_examples(torch.matmul, a, b)  # torch.mm wants the example dimension


def _commuted(op: Callable[..., Any], a: Any, b: Any) -> Any:
    data, weight = (b, a) if isinstance(a, IndependentTensor) else (a, b)
    if isinstance(data, Tensor) and data.dim() <= weight.dim():
        raise NoRule(f"data of shape {tuple(data.shape)} have no dimension of examples")
    return _over_examples(op, data, weight)


_LAYERS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_COMMUTE = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
)

IndependentTensor.rules.update(dict.fromkeys(_LAYERS, _layer))
IndependentTensor.rules.update(dict.fromkeys(_PRODUCTS, _product))
IndependentTensor.rules.update(dict.fromkeys(_COMMUTE, _commuted))
