"""Flipped weights for a whole ``nn.Module``, and the module example by example."""

from __future__ import annotations

import torch
from torch.func import functional_call

from pyro_flipout.tensor import Execution, FlipoutTensor
from pyro_flipout.testing import random_weight

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def flipped(module, execution=None, only=None):
    """Flipped weights for the parameters of a module, by name.

    :param only: names, or beginnings of names, of the parameters to flip.
    """
    execution = execution or Execution()
    return {
        name: random_weight(*p.shape, execution=execution, site=name, seed=i)
        if only is None or name.startswith(tuple(only))
        else p
        for i, (name, p) in enumerate(module.named_parameters())
    }


def draw_codes(values):
    """Draws the sign codes of weights now, as their first use would."""
    for weight in values.values():
        for draw in weight.draws:
            draw.draw_codes()


def by_example(module, values, *args, example_dim=0, **kwargs):
    """The module on the explicit weights of one example after the other.

    :param args: data, whose ``example_dim`` counts the examples.
    :param kwargs: functions of the number of the example.
    """
    count = args[0].size(example_dim)
    explicit = {
        name: v.materialize(count) if isinstance(v, FlipoutTensor) else v.expand(count, *v.shape)
        for name, v in values.items()
    }
    rows = [
        functional_call(
            module,
            {name: v[n] for name, v in explicit.items()},
            tuple(x.narrow(example_dim, n, 1) for x in args),
            {name: fn(n) for name, fn in kwargs.items()},
        )
        for n in range(count)
    ]
    return torch.cat(rows, example_dim)


def grads(out, values):
    inputs = [
        t
        for v in values.values()
        if isinstance(v, FlipoutTensor)
        for t in (v.center, v.terms[0].delta)
    ]
    return torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape)).sum(), inputs)


def assert_same(actual, expected, values):
    torch.testing.assert_close(actual, expected, **CLOSE)
    for a, b in zip(grads(actual, values), grads(expected, values), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
