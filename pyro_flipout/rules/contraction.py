# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Matrix products and ``einsum``, the weight on either side, or on both.

In a product of two weights :math:`UV`, signs along the index that is summed over do not
factorise: :math:`\sum_k \Delta U_{ok} r_{no} s_{nk} V_{ki}` is no matrix times signs. So both
factors are flipped, but :math:`U` by its rows and :math:`V` by its columns only. That is exact,

.. math:: U_n V_n = \bar U \bar V + r_n \circ (\Delta U \, \bar V) + (\bar U \Delta V) \circ t_n
    + r_n \circ (\Delta U \Delta V) \circ t_n,

and a valid flipout of each factor, with fewer signs. Where the data can be multiplied first, as
in ``(x @ V.T) @ U.T``, both keep all their signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_flipout.rules._product import find_examples, flipped_product, plain
from pyro_flipout.rules.shape import common_lead
from pyro_flipout.tensor import Factor, FlipoutTensor, NoRule, NotExamples, Term, implements

FLIPS = "contracted and surviving dimensions of the weight; of two weights those that survive"
LIMITS = (
    "two weights, one of which met examples before with signs along a summed dimension: no rule"
)


@implements(
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.mv,
    Tensor.mv,
    torch.inner,
    Tensor.inner,
    flips=FLIPS,
    limits=LIMITS,
)
def matmul(
    op: Callable[..., Tensor],
    input: Tensor,
    other: Any = None,
    *,
    mat2: Any = None,
    vec: Any = None,
) -> Tensor:
    given = [factor for factor in (other, mat2, vec) if factor is not None]
    if len(given) != 1:
        raise NoRule("the arguments are not two factors")
    a, b = input, given[0]
    if op is Tensor.__rmatmul__:
        a, b = b, a
        op = torch.matmul
    if not (a.dim() and b.dim()):
        raise NoRule("a factor without dimensions")
    if op in (torch.inner, Tensor.inner):
        left, right = _letters(a.dim() - 1), _letters(b.dim() - 1).upper()
        return contract(op, a, b, left + "K", right + "K", left + right)
    left, right = _letters(a.dim() - 2), _letters(b.dim() - 2)
    rows = "R" if a.dim() > 1 else ""
    cols = "C" if b.dim() > 1 else ""
    out = max(left, right, key=len) + rows + cols
    return contract(op, a, b, left + rows + "K", right + "K" + cols, out)


def _letters(count: int) -> str:
    # Batch dimensions broadcast aligned right, so letters count from the right.
    if count > len(_LETTERS):
        raise NoRule(f"the data have {count + 2} dimensions")
    return _LETTERS[:count][::-1] if count > 0 else ""


_LETTERS = "zyxwvutsqponmljihgfedba"
"""Without those of rows, columns, and what is summed over."""


def is_weight(tensor: Any) -> bool:
    """Whether a factor is a weight too, not data: flipped, or a parameter of torch or Pyro."""
    if isinstance(tensor, (FlipoutTensor, torch.nn.Parameter)):
        return True
    if not isinstance(tensor, Tensor):
        return False
    if hasattr(tensor, "unconstrained"):  # by pyro.param
        return True
    # The transpose of one. Other views, such as some rows or an expansion, may be data.
    base = tensor._base
    return (
        base is not None
        and tensor.dim() == 2
        and tensor.layout is torch.strided
        and tensor.shape == base.shape[::-1]
        and (tensor.stride() == base.stride()[::-1] and is_weight(base))
    )


def meets_constants(a: Any, b: Any) -> bool:
    """Whether the factors are a weight and a constant, the same for every example."""
    return any(isinstance(t, FlipoutTensor) and t.execution.constants for t in (a, b))


def contract(
    op: Callable[..., Tensor],
    a: Tensor,
    b: Tensor,
    lhs: str,
    rhs: str,
    out: str,
    alone: bool = True,
) -> Tensor:
    """Runs the bilinear ``op`` whose dimensions are named by the three strings.

    :param alone: whether ``op`` has no factors but these two.
    :returns: a flipped weight if both factors are weights.
    """
    if (is_weight(a) and is_weight(b)) or meets_constants(a, b):
        return _contract_weights(op, a, b, lhs, rhs, out)
    if isinstance(a, FlipoutTensor):
        weight, weight_names, data, data_names = a, lhs, b, rhs
        apply = lambda x, w: op(w, x)  # noqa: E731
    else:
        assert isinstance(b, FlipoutTensor)
        weight, weight_names, data, data_names = b, rhs, a, lhs
        apply = op
    # A letter on both sides where the weight has size 1 broadcasts: it is the data's own.
    own = {
        name: dim
        for dim, name in enumerate(weight_names)
        if weight.size(dim) > 1 or name not in data_names or name not in out
    }
    used = [dim for dim, name in enumerate(data_names) if _uses(weight, own, name, out)]
    dim = find_examples(weight, data, used, op.__name__)
    example = data_names[dim]
    if example not in out:
        raise NoRule("the product sums over the examples")
    if not own:  # it repeats one number
        own = {name: d for d, name in enumerate(weight_names) if name != example}
    sizes = [
        weight.size(own[name]) if size == 1 and name in own else size
        for name, size in zip(data_names, data.shape, strict=True)
    ]
    if sizes != list(data.shape):  # every entry of the weight has signs of its own
        data = data.expand(sizes)
    elif alone and len(own) == weight.dim() == 2 and not weight.execution.is_single:
        # As a dense layer, if it is one: that has a gradient of its own.
        at = weight_names.find(data_names[-1])
        fits = at >= 0 and weight.size(at) == data.size(-1)  # torch.tensordot may broadcast
        if fits and out == data_names[:-1] + weight_names[1 - at]:
            return F.linear(data, weight if at == 1 else weight.t())
    return flipped_product(
        weight,
        data,
        apply,
        {d: data_names.index(name) for name, d in own.items() if name in data_names},
        {d: out.index(name) for name, d in own.items() if name in out and name not in data_names},
        dim,
        out.index(example),
    )


def _contract_weights(
    op: Callable[..., Tensor], a: Tensor, b: Tensor, lhs: str, rhs: str, out: str
) -> FlipoutTensor:
    executions = []
    for weight, names in ((a, lhs), (b, rhs)):
        if isinstance(weight, FlipoutTensor):
            executions.append(weight.execution)
            summed = [dim for dim, name in enumerate(names) if name not in out]
            try:
                _drop_signs(weight, summed)
            except NoRule:
                if not weight.execution.constants:
                    raise
                raise NotExamples(_no_examples(weight, b if weight is a else a)) from None
    left, right = (
        [(t.delta, t.draws, _rename_factors(t, names, out)) for t in w.terms]
        if isinstance(w, FlipoutTensor)
        else []
        for w, names in ((a, lhs), (b, rhs))
    )
    centers = [w.center if isinstance(w, FlipoutTensor) else w for w in (a, b)]
    terms = [Term(op(delta, centers[1]), draws, codes) for delta, draws, codes in left]
    terms += [Term(op(centers[0], delta), draws, codes) for delta, draws, codes in right]
    terms += [
        Term(op(s[0], t[0]), tuple(dict.fromkeys(s[1] + t[1])), s[2] + t[2])
        for s in left
        for t in right
    ]
    value = op(plain(a), plain(b))
    return FlipoutTensor.build(value, op(*centers), terms, executions[0], common_lead(value, a, b))


def _no_examples(weight: FlipoutTensor, constant: Tensor) -> str:
    count = weight.execution.num_examples
    of_size = "" if count is None else f" of size {count}, the number of examples"
    return (
        f"data of shape {tuple(constant.shape)} have no dimension{of_size}, and with a constant in "
        "their place the sum over the weight would leave it no signs; give each example rows of "
        "its own"
    )


def _drop_signs(weight: FlipoutTensor, dims: Sequence[int]) -> None:
    for term in weight.terms:
        varying = {
            source
            for source, codes in term.factors
            if not source.shared and any(codes.size(dim) > 1 for dim in dims)
        }
        for draw in term.draws:
            draw.drop(varying)


def _rename_factors(term: Term, names: str, out: str) -> tuple[Factor, ...]:
    """Sign factors of a factor of the product, seen from the dimensions of the result."""
    order = [names.index(name) for name in out if name in names]
    order += [dim for dim, name in enumerate(names) if name not in out]
    return tuple(
        (
            source,
            codes.permute(order).reshape(
                [codes.size(names.index(name)) if name in names else 1 for name in out]
            ),
        )
        for source, codes in term.factors
        if not source.dropped
    )


def _uses(weight: FlipoutTensor, own: dict[str, int], name: str, out: str) -> bool:
    # A dimension that the weight repeats for every example (`w.expand(N, ...)`) is free.
    if name not in own:
        return name not in out
    if name not in out:
        return True
    return any(
        codes.size(own[name]) > 1
        for term in weight.terms
        for source, codes in term.factors
        if not source.shared
    )


@implements(
    torch.addmm,
    Tensor.addmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.addmv,
    Tensor.addmv,
    flips=FLIPS + "; a flipped summand as in elementwise arithmetic",
)
def addmm(
    op: Callable[..., Tensor],
    input: Tensor,
    *factors: Tensor,
    beta: Any = 1,
    alpha: Any = 1,
    **named: Tensor,  # mat1 and mat2, batch1 and batch2, mat and vec
) -> Tensor:
    product = torch.matmul(*factors, *(named[name] for name in sorted(named)))
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # not even NaN comes through
        return product
    return product + (input if beta == 1 else input * beta)


@implements(torch.tensordot, flips=FLIPS, limits=LIMITS)
def tensordot(
    op: Callable[..., Tensor], a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None
) -> Tensor:
    if out is not None:
        raise NoRule("the argument 'out' is not covered")
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (range(a.dim() - dims, a.dim()), range(dims))
    left, right = ([dim % t.dim() for dim in ds] for ds, t in zip(dims, (a, b), strict=True))
    lhs = [chr(ord("a") + i) for i in range(a.dim())]
    rhs = [chr(ord("A") + i) for i in range(b.dim())]
    for i, j in zip(left, right, strict=True):
        rhs[j] = lhs[i]
    result = [name for i, name in enumerate(lhs) if i not in left]
    result += [name for j, name in enumerate(rhs) if j not in right]

    def apply(x: Tensor, y: Tensor) -> Tensor:
        return op(x, y, (left, right))

    apply.__name__ = "torch.tensordot"
    return contract(apply, a, b, "".join(lhs), "".join(rhs), "".join(result))


@implements(
    torch.einsum,
    flips=FLIPS,
    limits="an index that only the weight has, or repeats; two flipped weights and data: no rule",
)
def einsum(op: Callable[..., Tensor], equation: str, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise NoRule("only the form with an equation string is covered")
    flipped = [i for i, operand in enumerate(operands) if isinstance(operand, FlipoutTensor)]
    if len(flipped) > 1 and not all(map(is_weight, operands)):
        raise NoRule("two operands are flipped weights; contract them one after the other")
    if len(flipped) > 1 and len(operands) > 2:
        raise NoRule("more than two operands are weights; contract them in pairs")
    names, out = _parse(equation, [operand.dim() for operand in operands])
    which = flipped[0]
    weight = operands[which]
    if len(operands) == 1:
        raise NoRule("the flipped weight is the only operand")
    if any(len(set(name)) < len(name) for name in names):
        raise NoRule(f"an index is repeated within one operand of {equation!r}")
    others = [i for i in range(len(operands)) if i != which]
    data_index = _data_operand(operands, names, others, which)

    def apply(x: Tensor, w: Tensor) -> Tensor:
        replaced = {data_index: x, which: w}
        return op(equation, *(replaced.get(i, operand) for i, operand in enumerate(operands)))

    apply.__name__ = f"torch.einsum({equation!r})"
    factors = operands[data_index], weight, names[data_index], names[which]
    return contract(apply, *factors, out, alone=len(operands) == 2)


def _data_operand(
    operands: Sequence[Any], names: Sequence[str], others: Sequence[int], which: int
) -> int:
    """The operand that carries the examples and most of the weight's indices."""
    dim = operands[which].execution.example_dim
    if all(is_weight(operand) for operand in operands):
        return others[0]
    carrying = [i for i in others if len(names[i]) > dim and not is_weight(operands[i])]
    if not carrying:
        raise NotExamples("no operand has an example dimension")
    return max(carrying, key=lambda i: len(set(names[i]) & set(names[which])))


def _parse(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """Splits an equation into one string an operand and the output, ellipses spelt out."""
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    names = left.split(",")
    if "..." in equation:
        spare = list("0123456789")
        longest = ""
        for i, (name, ndim) in enumerate(zip(names, ndims, strict=True)):
            if "..." in name:
                fill = "".join(spare[: ndim - len(name) + 3])[::-1]
                longest = max(longest, fill, key=len)
                names[i] = name.replace("...", fill)
        out = out.replace("...", longest)
        left = ",".join(names)
        if not arrow:
            out = longest
    if not arrow:
        letters = [c for c in sorted(set(left)) if c.isalpha() and left.count(c) == 1]
        out += "".join(letters)
    return names, out
