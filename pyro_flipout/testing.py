# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Oracles of the package, for those who register a rule or a distribution of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_flipout.errors import FlipoutWarning
from pyro_flipout.plan.report import ModelReport, check_model
from pyro_flipout.symmetric import symmetric_center
from pyro_flipout.tensor import Execution, FlipoutTensor, flip

__all__ = [
    "ModelReport",
    "check_model",
    "check_rule",
    "check_symmetric",
    "constant",
    "random_weight",
]

_FAILURE_RATE = 1e-6
_DENSITY_DRAWS = 500
_REMEDY = (
    "correct the registered centre, or remove the registration: flipout would train on another "
    "distribution"
)


# ------------------------------------------------------------------- symmetric


def check_symmetric(
    dist: Distribution, num_samples: int = 5000, *, tolerance: float = 1e-9
) -> None:
    r"""Checks that flipout is exact for a distribution and its registered centre.

    Flipout is exact if the distribution stays what it is when any of its elements are
    reflected about the centre :math:`c`. Two things are tried:

    1. *Density*, where ``log_prob`` is implemented and no value repeats: draws :math:`c + t`
       and random signs :math:`E` have :math:`\log q(c + E \circ t) = \log q(c + t)`.
    2. *Samples*: if the registration is right then, given :math:`|t|`, all signs of
       :math:`t` are independent and fair. So for a fixed frequency the sums over draws of
       :math:`\sin t_i`, :math:`\sin t_i \sin t_j` and :math:`\sin t_i \cos t_j` are Rademacher
       sums with known weights :math:`a`. By Hoeffding's inequality one exceeds
       :math:`z \lVert a \rVert` with probability at most :math:`2 e^{-z^2/2}`, whatever the
       distribution; z is such that all together fail a right registration with probability
       at most 1e-6. This covers masked elements, whose density is hidden, and dependence
       between batch elements.

    :param dist: a small instance, with parameters in float64.
    :param num_samples: number of draws; the second check sees asymmetries of the order of
        ``7 / num_samples ** 0.5``.
    :param tolerance: relative and absolute tolerance of the log-densities.
    :raises AssertionError: if flipout would change the distribution; the message names the
        element and the values.
    :raises NotSymmetricError: if no centre is registered.
    :raises ValueError: if the draws are not in float64.

    >>> import torch, pyro.distributions as dist
    >>> check_symmetric(dist.Laplace(torch.zeros(3).double(), 1.0).to_event(1))
    """
    with torch.no_grad():
        center = symmetric_center(dist)  # (*shape)
        draws = dist.sample((num_samples,))  # (num_samples, *shape)
        _check_shapes(dist, center, draws)
        delta = draws - center
        usable = delta.reshape(num_samples, -1).isfinite().all(1)  # (num_samples,)
        if usable.double().mean() < 0.99:
            raise AssertionError(
                f"check_symmetric: only {int(usable.sum())} of {num_samples} draws of "
                f"{_name(dist)}, less the centre, are finite; choose parameters whose draws are"
            )
        delta = delta[usable]
        _check_density(dist, center, delta[:_DENSITY_DRAWS], tolerance)
        _check_samples(dist, center, delta)


def _check_shapes(dist: Distribution, center: Tensor, draws: Tensor) -> None:
    if draws.shape[1:] != center.shape:
        raise AssertionError(
            f"check_symmetric: a sample of {_name(dist)} has shape {tuple(draws.shape[1:])}, but "
            f"batch_shape + event_shape = {tuple(center.shape)}; correct the distribution"
        )
    if center.numel() == 0 or draws.dtype != torch.float64:
        raise ValueError(
            f"check_symmetric: expected a distribution over at least one element in float64, got "
            f"shape {tuple(center.shape)} in {draws.dtype}; build it from float64 parameters"
        )


def _check_density(dist: Distribution, center: Tensor, delta: Tensor, tolerance: float) -> None:
    # At an atom, a rounding error of c + E∘t decides between the atom and nothing.
    if (delta.sort(0).values.diff(dim=0) == 0).any():
        return
    signs = _random_signs(delta)
    try:
        before = _log_prob(dist, center + delta)  # (draws, *batch_shape)
    except NotImplementedError:
        return
    if before.isnan().any():
        raise AssertionError(
            f"check_symmetric: log_prob of a draw of {_name(dist)} is nan; correct the distribution"
        )
    after = _log_prob(dist, center + signs * delta)
    wrong = ~torch.isclose(after, before, rtol=tolerance, atol=tolerance)
    if wrong.any():
        draw = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])
        raise AssertionError(
            f"check_symmetric: {_culprit(dist, center, delta[draw], signs[draw])}, expected no "
            f"change; {_REMEDY}"
        )


def _random_signs(like: Tensor) -> Tensor:
    return torch.randint_like(like, 2) * 2 - 1


def _log_prob(dist: Distribution, value: Tensor) -> Tensor:
    # `value` has one leading dimension. Values outside the support fail validation.
    try:
        return dist.log_prob(value)
    except ValueError:
        if len(value) == 1:
            return value.new_full((1, *dist.batch_shape), -math.inf)
        return torch.cat([_log_prob(dist, row) for row in value.split(1)])


def _culprit(dist: Distribution, center: Tensor, delta: Tensor, signs: Tensor) -> str:
    # Reflects one element after the other: the changes do not cancel, so one is not 0.
    worst, text = -1.0, ""
    delta = delta.clone()
    before = _log_prob(dist, (center + delta)[None]).flatten()
    for position in (signs < 0).nonzero().tolist():
        index = tuple(position)
        old = (center + delta)[index].item()
        delta[index] *= -1
        after = _log_prob(dist, (center + delta)[None]).flatten()
        change = torch.where(after == before, 0.0, (after - before).abs().nan_to_num(math.inf))
        batch = int(change.argmax())
        if change[batch] > worst:
            worst = change[batch].item()
            text = (
                f"element {index} of {_name(dist)}, reflected from {old:.9g} to "
                f"{(center + delta)[index].item():.9g} about its centre "
                f"{center[index].item():.9g}, changes log_prob from {before[batch].item():.9g} to "
                f"{after[batch].item():.9g}"
            )
        before = after
    return text


def _check_samples(dist: Distribution, center: Tensor, delta: Tensor) -> None:
    delta = delta.reshape(len(delta), -1)  # (draws, elements)
    scale = delta.abs().median(0).values
    scale = torch.where(scale > 0, scale, 1.0)
    tests = list(_odd_functions(delta / scale))
    count = sum(odd.shape[1] for odd, _, _ in tests)
    z = math.sqrt(2 * math.log(2 * count / _FAILURE_RATE))
    for odd, name, elements in tests:
        excess = odd.sum(0).abs() - z * odd.square().sum(0).sqrt()  # (tests,)
        if not (excess <= 0).all():
            worst = int(excess.argmax())
            where = [_index(int(e[worst]), center.shape) for e in elements]
            raise AssertionError(
                f"check_symmetric: {_name(dist)} is not symmetric about its centre "
                f"{_at(center, where)} and factorised: with t = (x - centre) / "
                f"{_at(scale.view(center.shape), where)}, the mean of "
                f"{name} at element {' and '.join(map(str, where))} is "
                f"{odd[:, worst].mean().item():.4g} over {len(odd)} draws, expected 0 ± "
                f"{(z * odd[:, worst].square().sum().sqrt() / len(odd)).item():.4g}; {_REMEDY}"
            )


def _odd_functions(t: Tensor) -> Iterator[tuple[Tensor, str, Sequence[Tensor]]]:
    # Values (draws, tests), what they are, and the elements each test looks at.
    elements = torch.arange(t.shape[1])
    for k in (0.5, 1.0, 2.0):
        sin, cos = (k * t).sin(), (k * t).cos()
        yield sin, f"sin({k} t)", [elements]
        for _ in range(4 if t.shape[1] > 1 else 0):
            i = torch.randperm(t.shape[1])
            j = i.roll(1)  # pairs every element with another one
            yield sin[:, i] * sin[:, j], f"sin({k} t_i) sin({k} t_j)", [i, j]
            yield sin[:, i] * cos[:, j], f"sin({k} t_i) cos({k} t_j)", [i, j]


def _name(dist: Distribution) -> str:
    return type(dist).__name__  # repr fails on some that declare no arg_constraints


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def _at(tensor: Tensor, where: list[tuple[int, ...]]) -> str:
    return " and ".join(f"{tensor[index].item():.6g}" for index in where)


# ------------------------------------------------------------------------- rules


class constant:
    """Marks a tensor argument of :func:`check_rule` that is no data.

    A constant (a mask, a running statistic) is the same for every example.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value


def random_weight(
    *shape: int,
    execution: Execution | None = None,
    dtype: torch.dtype = torch.float64,
    site: str = "weight",
    seed: int = 0,
) -> FlipoutTensor:
    """A flipped weight with random centre and perturbation, both requiring gradients.

    :param shape: shape of the weight.
    :param execution: weights that meet the same examples share one.
    """
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape) + len(site))
    center, delta = (
        torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
        .to(torch.get_default_device())
        .requires_grad_()
        for _ in range(2)
    )
    return flip(center + delta, center, delta, site=site, execution=execution)


def check_rule(
    fn: Callable[..., Any],
    *args: Any,
    num_examples: int | None = None,
    example_dim: int = 0,
    out_example_dim: int | None = None,
    tol: float = 1e-10,
    **kwargs: Any,
) -> None:
    """Checks a flipout rule against the explicit weights, example by example.

    Runs ``fn`` once on flipped weights, and once for every example ``n`` on its slice of
    the data and its explicit weights ``materialize()[n]``. The outputs, and the gradients
    of a random linear functional of them with respect to the data and every centre and
    perturbation, must agree.

    >>> x, w = torch.randn(5, 3, dtype=torch.float64), random_weight(2, 3)
    >>> check_rule(torch.nn.functional.linear, x, w)

    :param fn: function of tensors; a result that is a flipped weight is materialised.
    :param args: its arguments: flipped weights (see :func:`random_weight`), data, whose
        ``example_dim`` counts the examples, and :class:`constant` tensors.
    :param num_examples: number of examples; by default that of the first data argument.
    :param out_example_dim: dimension of the output that counts the examples.
    :param tol: absolute and relative tolerance; use float64.
    :raises AssertionError: if they differ, or a weight was left shared.
    """
    weights = [a for a in _leaves((args, kwargs)) if isinstance(a, FlipoutTensor)]
    data = [a for a in _leaves((args, kwargs)) if type(a) is Tensor]
    assert weights, "check_rule: no argument is a flipped weight; make one with random_weight"
    if num_examples is None:
        assert data, "check_rule: no argument is data; pass num_examples"
        num_examples = data[0].size(example_dim)
    inputs = [t for t in data if t.requires_grad]
    for weight in weights:
        inputs += [t for t in (weight._center, weight._terms[0].delta) if t.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlipoutWarning)
        out = fn(*_map(args, _unmark), **_map(kwargs, _unmark))
    flipped = [_explicit(part, num_examples) for part in _leaves(out) if isinstance(part, Tensor)]
    where = example_dim if out_example_dim is None else out_example_dim

    def reference(n: int) -> Any:
        def pick(arg: Any) -> Any:
            if isinstance(arg, FlipoutTensor):
                return arg.materialize(num_examples)[n]
            if isinstance(arg, constant):
                return arg.value
            return arg.narrow(example_dim, n, 1) if type(arg) is Tensor else arg

        return _leaves(fn(*_map(args, pick), **_map(kwargs, pick)))

    if num_examples == 0:  # nothing to compare but the shape
        assert all(0 in part.shape for part in flipped), [part.shape for part in flipped]
        return
    rows = [reference(n) for n in range(num_examples)]
    outs = [part for part in _leaves(out) if isinstance(part, Tensor)]
    expected = [
        torch.stack([row[i] for row in rows])
        if isinstance(part, FlipoutTensor)
        else torch.cat([row[i] for row in rows], where)
        for i, part in enumerate(outs)
    ]
    _compare(flipped, expected, inputs, tol)


def _compare(
    actual: list[Tensor], expected: list[Tensor], inputs: list[Tensor], tol: float
) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=tol, msg=lambda m: f"output: {m}")
    if not inputs:
        return
    cotangents = [torch.randn_like(a) for a in actual]
    grads = []
    for parts in (actual, expected):
        loss = sum(torch.real((p * v).sum()) for p, v in zip(parts, cotangents, strict=True))
        assert isinstance(loss, Tensor)
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True))
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        if a is None or b is None:  # unused is zero
            a, b = (torch.zeros_like(inputs[i]) if g is None else g for g in (a, b))
        label = f"gradient of input {i}: "
        torch.testing.assert_close(a, b, atol=tol, rtol=tol, msg=label.__add__)


def _explicit(out: Tensor, num_examples: int) -> Tensor:
    return out.materialize(num_examples) if isinstance(out, FlipoutTensor) else out


def _unmark(arg: Any) -> Any:
    return arg.value if isinstance(arg, constant) else arg


def _map(obj: Any, fn: Callable[[Any], Any]) -> Any:
    if type(obj) in (list, tuple):
        return type(obj)(_map(item, fn) for item in obj)
    if type(obj) is dict:
        return {key: _map(item, fn) for key, item in obj.items()}
    return fn(obj)


def _leaves(obj: Any) -> list[Any]:
    if isinstance(obj, (list, tuple)):
        return [leaf for item in obj for leaf in _leaves(item)]
    if isinstance(obj, dict):
        return [leaf for item in obj.values() for leaf in _leaves(item)]
    return [obj]
