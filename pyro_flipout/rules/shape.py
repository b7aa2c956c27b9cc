# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Linear maps of a weight by itself: views, copies, concatenation, masks.

The result is a flipped weight again, as long as each sign factor still varies along one
dimension only; else there is no rule (as for a flattened matrix split anew).

A weight divided by a norm of its own is not linear in it, and shared: the direction of weight
norm (its length is flipped), spectral norm, orthogonal parametrisations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout._modes import looked_at, recorded, transformed
from pyro_flipout.rules._product import per_example
from pyro_flipout.tensor import Factor, FlipoutTensor, NoRule, Term, implements, unwrap

ValueMap = Callable[[Tensor], Tensor]
FLIPS = "the result is a flipped weight"


def map_values(weight: FlipoutTensor, fn: ValueMap, plain: Tensor | None = None) -> FlipoutTensor:
    """Applies a linear map that keeps every entry in its place."""
    terms = [Term(fn(t.delta), t.draws, t.factors) for t in weight.terms]
    plain = fn(weight.plain) if plain is None else plain
    return FlipoutTensor.build(plain, fn(weight.center), terms, weight.execution, weight.lead_dims)


def map_entries(weight: FlipoutTensor, fn: ValueMap, picked: Collection[int] = ()) -> FlipoutTensor:
    """Applies a map that moves, drops or repeats entries: signs move along.

    :param picked: dimensions of the weight that a tensor of indices picks entries from.
    """
    terms = [
        Term(fn(t.delta), t.draws, map_factors(t, weight.shape, fn, picked)) for t in weight.terms
    ]
    plain, lead = fn(weight.plain), weight.lead_dims
    lead = lead if plain.shape[:lead] == weight.shape[:lead] else 0
    return FlipoutTensor.build(plain, fn(weight.center), terms, weight.execution, lead)


def map_factors(
    term: Term, shape: torch.Size, fn: ValueMap, picked: Collection[int] = ()
) -> tuple[Factor, ...]:
    return tuple((draw, _map_codes(codes, shape, fn, picked)) for draw, codes in term.factors)


def _map_codes(codes: Tensor, shape: torch.Size, fn: ValueMap, picked: Collection[int]) -> Tensor:
    mapped = fn(codes.expand(shape))
    if not recorded():
        return _collapse(mapped, mapped, range(mapped.dim()))
    # Entries that repeat in what is recorded may not in what is replayed: their places tell.
    places = _places(codes, codes.shape, shape, fn)
    dims: Collection[int] = range(mapped.dim())
    if any(codes.size(dim) > 1 for dim in picked):
        dims = _unpicked(codes, shape, fn, picked)
    return _collapse(mapped, places, dims)


def _places(like: Tensor, size: Sequence[int], shape: torch.Size, fn: ValueMap) -> Tensor:
    """Where the entries of a tensor of shape ``size``, expanded to ``shape``, are mapped to."""

    def look() -> Tensor:
        return fn(torch.arange(math.prod(size), device=like.device).reshape(size).expand(shape))

    return looked_at(look)


def _unpicked(codes: Tensor, shape: torch.Size, fn: ValueMap, picked: Collection[int]) -> set[int]:
    """Dimensions of the result along which a dimension of the weight lies that is not picked."""
    found: set[int] = set()
    for dim in set(range(len(shape))) - set(picked):
        along = [size if d == dim else 1 for d, size in enumerate(shape)]
        places = _places(codes, along, shape, fn)
        found |= {d for d in range(places.dim()) if not _is_constant(places, d)}
    return found


def common_lead(plain: Tensor, *weights: Any) -> int:
    """Number of particle dimensions of a result: of a weight that it has the dimensions of."""
    return max(
        (
            w.lead_dims
            for w in weights
            if isinstance(w, FlipoutTensor)
            and w.dim() == plain.dim()
            and w.shape[: w.lead_dims] == plain.shape[: w.lead_dims]
        ),
        default=0,
    )


def repeats(weight: FlipoutTensor, dim: int) -> bool:
    """Whether a weight is the same all along a dimension, signs included."""
    if weight.plain.numel() == 0:
        return False
    if weight.plain.stride(dim) == 0:
        return True
    if transformed() or any(
        codes.size(dim) > 1 for term in weight.terms for _, codes in term.factors
    ):
        return False
    values = weight.plain, weight.center, *(term.delta for term in weight.terms)
    return all(_is_constant(value, dim) for value in values)


def _is_constant(x: Tensor, dim: int) -> bool:
    return looked_at(lambda: bool((x == x.narrow(dim, 0, 1)).all()))


def _collapse(codes: Tensor, places: Tensor, dims: Collection[int]) -> Tensor:
    """Drops repetition: of ``dims``, those along which ``places`` are constant get size 1."""
    for dim in dims:
        if codes.size(dim) > 1 and (codes.stride(dim) == 0 or _is_constant(places, dim)):
            codes, places = codes.narrow(dim, 0, 1), places.narrow(dim, 0, 1)
    return codes


def expand_weight(weight: FlipoutTensor, shape: Sequence[int]) -> FlipoutTensor:
    """``weight.expand(shape)`` that keeps the sign factors as small as they are."""
    if tuple(shape) == tuple(weight.shape):
        return weight
    extra = len(shape) - weight.dim()
    terms = [
        Term(
            t.delta.expand(shape),
            t.draws,
            tuple((d, c.reshape((1,) * extra + tuple(c.shape))) for d, c in t.factors),
        )
        for t in weight.terms
    ]
    plain = weight.plain.expand(shape)
    lead = common_lead(plain, weight)
    return FlipoutTensor.build(plain, weight.center.expand(shape), terms, weight.execution, lead)


def align(weight: Tensor, ndim: int, dim: int) -> Tensor:
    """Views a weight ``(C,)`` so that it broadcasts along ``dim`` of ``ndim`` dimensions."""
    return torch.reshape(weight, (-1, *(1,) * (ndim - 1 - dim)))


_GETTERS = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH)


@implements(
    *(getter.__get__ for getter in _GETTERS),  # type: ignore[attr-defined]
    torch.t,
    Tensor.t,
    torch.transpose,
    Tensor.transpose,
    torch.swapaxes,
    Tensor.swapaxes,
    torch.swapdims,
    Tensor.swapdims,
    torch.permute,
    Tensor.permute,
    torch.movedim,
    Tensor.movedim,
    torch.moveaxis,
    Tensor.moveaxis,
    Tensor.adjoint,
    torch.adjoint,
    torch.squeeze,
    Tensor.squeeze,
    torch.unsqueeze,
    Tensor.unsqueeze,
    torch.narrow,
    Tensor.narrow,
    torch.select,
    Tensor.select,
    Tensor.__getitem__,
    torch.index_select,
    Tensor.index_select,
    torch.flip,
    Tensor.flip,
    torch.roll,
    Tensor.roll,
    Tensor.repeat,
    torch.tile,
    Tensor.tile,
    flips=FLIPS,
)
def view(op: Callable[..., Tensor], input: FlipoutTensor, *args: Any, **kwargs: Any) -> Tensor:
    if any(isinstance(arg, FlipoutTensor) for arg in args):
        raise NoRule("a flipped weight cannot be an index")
    if any(_picks(arg) for arg in args):
        input.execution.picked.update(draw.site for draw in input.draws)
    picked: Collection[int] = ()
    if op is Tensor.__getitem__:
        picked = _picked_dims(args[0], input.dim())
    elif op in (torch.index_select, Tensor.index_select):
        picked = {(args[0] if args else kwargs["dim"]) % input.dim()}
    return map_entries(input, lambda value: op(value, *args, **kwargs), picked)


def _picked_dims(index: Any, ndim: int) -> set[int]:
    """The dimensions that tensors in an index pick entries from."""
    items = [i for i in (index if isinstance(index, tuple) else (index,)) if i is not None]
    widths = [i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in items]
    free = ndim - sum(w for i, w in zip(items, widths, strict=True) if i is not ...)
    found: set[int] = set()
    dim = 0
    for item, width in zip(items, widths, strict=True):
        if isinstance(item, Tensor):
            found |= set(range(dim, dim + width))
        dim += free if item is ... else width
    return found


def _picks(index: Any) -> bool:
    if isinstance(index, tuple):
        return any(_picks(i) for i in index)
    return isinstance(index, Tensor) and not (
        index.is_floating_point() or index.dtype == torch.bool
    )


@implements(
    Tensor.view,
    torch.reshape,
    Tensor.reshape,
    torch.flatten,
    Tensor.flatten,
    torch.unflatten,
    Tensor.unflatten,
    torch.ravel,
    Tensor.ravel,
    Tensor.view_as,
    Tensor.reshape_as,
    flips=FLIPS + ", where its sign factors still vary along one dimension each",
    limits="a reshape that mixes the dimensions of the signs: no rule",
)
def reshape(op: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, FlipoutTensor):  # x.view_as(w)
        return op(input, *unwrap(args), **unwrap(kwargs))
    if op is Tensor.view and any(isinstance(arg, torch.dtype) for arg in args):
        raise NoRule("reinterpreting the bytes of a flipped weight is not linear")
    if "size" in kwargs:  # of view, which becomes a reshape
        args = (*args, kwargs.pop("size"))
    for name in ("view", "view_as"):
        if op is getattr(Tensor, name):  # expanded codes may need a copy where the weight does not
            op = getattr(Tensor, name.replace("view", "reshape"))
    return map_entries(input, lambda value: op(value, *args, **kwargs))


@implements(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, flips=FLIPS)
def expand(op: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(input, FlipoutTensor):  # x.expand_as(w)
        return op(input, *unwrap(args), **unwrap(kwargs))
    return expand_weight(input, op(input.plain, *args, **kwargs).shape)


@implements(torch.broadcast_tensors, flips=FLIPS)
def broadcast_tensors(op: Callable[..., Any], *tensors: Any) -> list[Tensor]:
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return [
        expand_weight(t, shape) if isinstance(t, FlipoutTensor) else t.expand(shape)
        for t in tensors
    ]


@implements(
    torch.chunk,
    Tensor.chunk,
    torch.split,
    Tensor.split,
    torch.tensor_split,
    Tensor.tensor_split,
    torch.unbind,
    Tensor.unbind,
    Tensor.__iter__,
    flips=FLIPS,
)
def split(op: Callable[..., Any], input: FlipoutTensor, *args: Any, **kwargs: Any) -> Any:
    pieces = torch.unbind if op is Tensor.__iter__ else op

    def piece(i: int) -> Tensor:
        return map_entries(input, lambda value: pieces(value, *args, **kwargs)[i])

    parts = [piece(i) for i in range(len(pieces(input.plain, *args, **kwargs)))]
    return iter(parts) if op is Tensor.__iter__ else tuple(parts)


@implements(
    Tensor.clone,
    torch.clone,
    Tensor.contiguous,
    Tensor.to,
    Tensor.type_as,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    *(getattr(Tensor, name) for name in ("cfloat", "cdouble")),
    Tensor.cpu,
    Tensor.cuda,
    torch.positive,
    Tensor.positive,
    Tensor.__pos__,
    torch.resolve_neg,
    Tensor.resolve_neg,
    flips=FLIPS,
)
def copy(op: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(input, FlipoutTensor):  # x.type_as(w)
        return op(input, *unwrap(args), **unwrap(kwargs))
    out = map_values(input, lambda value: op(value, *args, **kwargs))
    if out.device == input.device:
        return out
    terms = [
        Term(t.delta, t.draws, tuple((d, c.to(out.device)) for d, c in t.factors))
        for t in out.terms
    ]
    return FlipoutTensor.build(out.plain, out.center, terms, out.execution, out.lead_dims)


@implements(
    Tensor.real.__get__,  # type: ignore[attr-defined]
    Tensor.imag.__get__,  # type: ignore[attr-defined]
    torch.real,
    torch.imag,
    torch.conj,
    Tensor.conj,
    torch.conj_physical,
    Tensor.conj_physical,
    torch.resolve_conj,
    Tensor.resolve_conj,
    flips=FLIPS + "; both parts of a complex entry have one sign",
)
def complex_part(op: Callable[..., Tensor], input: FlipoutTensor) -> Tensor:
    return map_values(input, op)


@implements(
    torch.view_as_real,
    torch.view_as_complex,
    flips=FLIPS,
    limits="torch.view_as_complex of a weight whose two parts have signs of their own: no rule",
)
def pairs(op: Callable[..., Tensor], input: FlipoutTensor) -> Tensor:
    def move(codes: Tensor) -> Tensor:
        if op is torch.view_as_real:
            return codes.unsqueeze(-1)
        if codes.size(-1) > 1:
            raise NoRule("the real and the imaginary part have signs of their own")
        return codes.squeeze(-1)

    terms = [
        Term(op(t.delta), t.draws, tuple((source, move(codes)) for source, codes in t.factors))
        for t in input.terms
    ]
    center, lead = op(input.center), input.lead_dims
    return FlipoutTensor.build(op(input.plain), center, terms, input.execution, lead)


@implements(
    torch.tril,
    Tensor.tril,
    torch.triu,
    Tensor.triu,
    flips=FLIPS,
)
def triangle(op: Callable[..., Tensor], input: FlipoutTensor, *args: Any, **kwargs: Any) -> Tensor:
    return map_values(input, lambda value: op(value, *args, **kwargs))


@implements(torch.masked_fill, Tensor.masked_fill, flips=FLIPS)
def masked_fill(
    op: Callable[..., Tensor], input: FlipoutTensor, mask: Tensor, value: Any
) -> Tensor:
    if isinstance(mask, FlipoutTensor) or isinstance(value, FlipoutTensor):
        raise NoRule("only the tensor that is filled can be a flipped weight")
    plain = op(input.plain, mask, value)
    input = expand_weight(input, plain.shape)
    terms = [Term(t.delta.masked_fill(mask, 0), t.draws, t.factors) for t in input.terms]
    center = op(input.center, mask, value)
    return FlipoutTensor.build(plain, center, terms, input.execution, common_lead(plain, input))


@implements(F.dropout, flips=FLIPS + ", with one mask for all examples")
def dropout(
    op: Callable[..., Tensor],
    input: FlipoutTensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if inplace:
        raise NoRule("a flipped weight cannot be changed in place")
    mask = op(torch.ones_like(input.plain), p, training)
    return map_values(input, lambda value: value * mask)


@implements(
    torch._weight_norm,
    flips="the length g: a flipped weight again",
    limits="v / ||v|| is not linear in the direction v, which is shared",
)
def weight_norm(op: Callable[..., Tensor], v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    if isinstance(v, FlipoutTensor) and v.terms:
        raise NoRule("v / ||v|| is not linear in v; hide v and flip g alone", v)
    assert isinstance(g, FlipoutTensor)
    direction = op(getattr(v, "plain", v), torch.ones_like(g.plain), dim)
    return map_values(expand_weight(g, v.shape), lambda value: value * direction)


@implements(F.pad, flips=FLIPS, limits="padding other than with a constant: no rule")
def pad(
    op: Callable[..., Tensor],
    input: FlipoutTensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Tensor:
    if mode != "constant":
        raise NoRule(f"padding a flipped weight with mode {mode!r} is not covered")

    def pad_codes(codes: Tensor) -> Tensor:
        # Where delta is zero the sign is free: codes stay constant where they are.
        widths = list(pad)
        for i in range(len(widths) // 2):
            if codes.size(-1 - i) == 1:
                widths[2 * i : 2 * i + 2] = 0, 0
        return op(codes, widths)

    plain = op(input.plain, pad, mode, value)
    terms = [
        Term(op(t.delta, pad), t.draws, tuple((d, pad_codes(c)) for d, c in t.factors))
        for t in input.terms
    ]
    center = op(input.center, pad, mode, value)
    return FlipoutTensor.build(plain, center, terms, input.execution, common_lead(plain, input))


@implements(
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.stack,
    flips=FLIPS + "; what repeats for every example, as a class token, goes beside data",
)
def cat(
    op: Callable[..., Tensor], tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any
) -> Tensor:
    dim = kwargs.pop("axis", dim)
    if kwargs:
        raise NoRule(f"arguments {sorted(kwargs)} are not covered")

    def join(parts: Sequence[Tensor]) -> Tensor:
        return op(list(parts), dim)

    known = (FlipoutTensor, torch.nn.Parameter)
    if op is not torch.stack and not all(isinstance(t, known) for t in tensors):
        explicit = _beside_data(tensors, dim % tensors[0].dim())
        if explicit is not None:
            return join(explicit)
    values = unwrap(list(tensors))
    plain = join(values)
    centers = [w.center if isinstance(w, FlipoutTensor) else w for w in tensors]
    terms = []
    for i, weight in enumerate(tensors):
        if isinstance(weight, FlipoutTensor):
            execution = weight.execution
            for t in weight.terms:

                def put(part: Tensor, i: int = i) -> Tensor:
                    return join(
                        [part if j == i else part.new_zeros(v.shape) for j, v in enumerate(values)]
                    )

                delta = put(t.delta.to(plain.dtype))
                terms.append(Term(delta, t.draws, _cat_factors(t, weight, op, dim, put)))
    lead = common_lead(plain, *tensors)
    return FlipoutTensor.build(plain, join(centers), terms, execution, lead)


def _beside_data(tensors: Sequence[Tensor], dim: int) -> list[Tensor] | None:
    """Data and the weights of all examples, ``None`` if the other tensors are constants.

    They are data if the weights repeat along the example dimension, as a class token does, with
    a dimension of tokens and one of features: a matrix may repeat its rows for another reason.
    """
    weights = [t for t in tensors if isinstance(t, FlipoutTensor)]
    example_dim = weights[0].execution.example_dim
    if dim == example_dim or tensors[0].dim() < 3 or example_dim >= tensors[0].dim():
        return None
    if any(w.lead_dims for w in weights):
        return None
    size, execution = weights[0].size(example_dim), weights[0].execution
    if execution.constants:
        return None
    if size == 1 and execution.num_examples != 1:  # perhaps one example, perhaps none
        execution.perhaps_one = True
        return None
    if not size or not all(repeats(w, example_dim) for w in weights):
        return None
    execution.count(size, f"data of shape {tuple(tensors[0].shape)}")
    return [_explicit_along(t, example_dim) if isinstance(t, FlipoutTensor) else t for t in tensors]


def _explicit_along(weight: FlipoutTensor, dim: int) -> Tensor:
    """The weights of all examples in place of the repetition along ``dim``."""
    one = map_entries(weight, lambda value: value.narrow(dim, 0, 1))
    # Of one group it is the shared draw, once.
    return per_example(one, weight.dim(), dim).expand(weight.shape)


def _cat_factors(
    term: Term, weight: FlipoutTensor, op: Callable[..., Tensor], dim: int, put: ValueMap
) -> tuple[Factor, ...]:
    # Where delta is zero the sign is free: a factor that does not vary along the
    # concatenated dimension goes on unchanged, the others are filled with zeros.
    if op is torch.stack:
        dim = dim % (weight.dim() + 1)
        return tuple((draw, codes.unsqueeze(dim)) for draw, codes in term.factors)
    dim = dim % weight.dim()
    return tuple(
        (
            draw,
            codes if codes.size(dim) == 1 else _narrow_like(put(codes.expand(weight.shape)), codes),
        )
        for draw, codes in term.factors
    )


def _narrow_like(codes: Tensor, like: Tensor) -> Tensor:
    """``codes`` of size 1 again in the dimensions along which ``like`` does not vary."""
    for dim in range(codes.dim()):
        if like.size(dim) == 1:
            codes = codes.narrow(dim, 0, 1)
    return codes
