# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of the options of FlipES and Exploration, and the weights that they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from pyro_flipout._checks import checked_integer, is_integer, is_number
from pyro_flipout.infer._es_base import NOISE, Perturbed
from pyro_flipout.infer._es_fitness import SHAPINGS
from pyro_flipout.nn.choice import Chosen, Pattern, choose

__all__ = ["check_noise", "check_options", "perturbed"]


def check_options(num_bases: int, fitness_shaping: str, weight_decay: float) -> None:
    """Checks the options that FlipES alone has.

    :raises ValueError: if one is out of range.
    """
    checked_integer("FlipES", "num_bases", num_bases, 1)
    if fitness_shaping not in SHAPINGS:
        raise ValueError(
            f"FlipES: got fitness_shaping={fitness_shaping!r}, expected one of {list(SHAPINGS)}"
        )
    if not (is_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"FlipES: got weight_decay={weight_decay!r}, expected a number >= 0")


def check_noise(
    module: nn.Module, distribution: str, example_dim: int, seed: int | None, caller: str
) -> None:
    """Checks the options that both have.

    :param caller: the class, for the message.
    :raises TypeError: if the module is none.
    :raises ValueError: if an option is out of range.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{caller}: got module={module!r}, expected a torch.nn.Module")
    if seed is not None and not is_integer(seed, -(2**63)):
        raise ValueError(f"{caller}: got seed={seed!r}, expected an integer")
    if distribution not in NOISE:
        raise ValueError(
            f"{caller}: got distribution={distribution!r}, expected one of {list(NOISE)}"
        )
    checked_integer(caller, "example_dim", example_dim, 0)


def perturbed(
    module: nn.Module,
    sigma: float | Mapping[Pattern, float],
    hide: Iterable[Pattern] | None,
    expose: Iterable[Pattern] | None,
    caller: str,
) -> list[Perturbed]:
    """The chosen parameters, each with the standard deviation of its group.

    :param caller: the class, for the messages.
    :raises ValueError: if a group means no parameter, or a parameter has no group.
    """
    groups = _groups(sigma, caller)
    chosen = _chosen(module, hide, expose, caller)
    for pattern in groups:
        if not any(_means(pattern, each) for each in chosen):
            raise ValueError(
                f"{caller}: sigma has a group {pattern!r}, which means none of the parameters "
                f"{[each.name for each in chosen[:4]]}"
            )
    return [Perturbed.of(each, _sigma(each, groups, caller)) for each in chosen]


def _groups(sigma: float | Mapping[Pattern, float], caller: str) -> Mapping[Pattern, float]:
    groups: Mapping[Pattern, float] = sigma if isinstance(sigma, Mapping) else {"*": sigma}
    for pattern, value in groups.items():
        if not (is_number(value) and value > 0):
            raise ValueError(
                f"{caller}: got sigma={value!r} for {pattern!r}, expected a finite number > 0; "
                "leave weights out with hide"
            )
    return groups


def _sigma(chosen: Chosen, groups: Mapping[Pattern, float], caller: str) -> float:
    """The standard deviation of the first group that means a parameter."""
    for pattern, value in groups.items():
        if _means(pattern, chosen):
            return value
    raise ValueError(
        f"{caller}: no group of sigma means '{chosen.name}'; add a last group '*', or leave it out "
        f"with hide=['{chosen.name}']"
    )


def _means(pattern: Pattern, chosen: Chosen) -> bool:
    return any(use.matches(pattern) for use in chosen.uses)


def _chosen(
    module: nn.Module,
    hide: Iterable[Pattern] | None,
    expose: Iterable[Pattern] | None,
    caller: str,
) -> list[Chosen]:
    chosen = choose(module, hide, expose, caller)
    return [each for each in chosen if each.parameter.requires_grad] or chosen
