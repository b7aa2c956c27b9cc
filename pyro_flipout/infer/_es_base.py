# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""One base perturbation of the weights of a module, and the members that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_flipout.infer._es_population import MemberDraw, Population, sign_sums
from pyro_flipout.nn.choice import Chosen
from pyro_flipout.nn.noise import put_weight
from pyro_flipout.signs import paired_signs
from pyro_flipout.tensor import FlipoutTensor, Term

__all__ = ["NOISE", "Base", "Perturbed"]


@dataclass(frozen=True)
class Perturbed:
    """A parameter with the standard deviation of its perturbation.

    :ivar uses: path and name of each place that finds it.
    """

    name: str
    sigma: float
    uses: list[tuple[str, str]]

    @staticmethod
    def of(chosen: Chosen, sigma: float) -> Perturbed:
        """The chosen parameter, with all its uses."""
        return Perturbed(chosen.name, sigma, [(use.path, use.attr) for use in chosen.uses])

    def find(self, module: nn.Module) -> nn.Parameter:
        """The parameter, as the module has it now."""
        return module.get_parameter(self.name)


Noise = Callable[[Tensor, torch.Generator], Tensor]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like, requires_grad=False).normal_(generator=generator)


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.empty_like(like, requires_grad=False)
    return noise.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


NOISE: dict[str, Noise] = {"normal": _normal, "rademacher": _rademacher}
"""Symmetric noise of standard deviation 1 for a weight, by name."""


class Base:
    r"""A draw :math:`\Delta W` for all weights, and signs for its members.

    :param module: whose weights are perturbed.
    :param weights: these.
    :param population: its members.
    :param seed: all that is drawn is a function of it.
    :param keep: whether to keep :math:`\Delta W`, or to draw it again at each use.
    :param noise: of standard deviation 1, one of :data:`NOISE`.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Sequence[Perturbed],
        population: Population,
        seed: int,
        antithetic: bool,
        keep: bool,
        noise: Noise,
    ) -> None:
        self.module, self.weights, self.seed, self.noise = module, weights, seed, noise
        self.population = population
        generators = self._generators(0)
        self.draws = [
            MemberDraw(w.name, p.shape, self.population, generators[p.device], antithetic)
            for w, p in self._parameters()
        ]
        self._kept = list(self._draw()) if keep else None

    def _parameters(self) -> list[tuple[Perturbed, nn.Parameter]]:
        return [(weight, weight.find(self.module)) for weight in self.weights]

    def _generators(self, stream: int) -> dict[torch.device, torch.Generator]:
        devices = {p.device for _, p in self._parameters()}
        return {d: torch.Generator(d).manual_seed((self.seed + stream) % 2**63) for d in devices}

    def _draw(self) -> Iterator[Tensor]:
        generators = self._generators(1)
        for weight, p in self._parameters():
            yield self.noise(p, generators[p.device]).mul_(weight.sigma)

    def deltas(self) -> Iterator[Tensor]:
        """The perturbation of each weight."""
        return iter(self._kept) if self._kept is not None else self._draw()

    def put(self, rows: int) -> list[Callable[[], None]]:
        """Puts the flipped weights in the place of the parameters.

        :param rows: number of rows of the data of the coming call.
        :returns: how to undo it, in this order.
        """
        self.population.begin(rows)
        undo: list[Callable[[], None]] = []
        for (weight, p), draw, delta in zip(
            self._parameters(), self.draws, self.deltas(), strict=True
        ):
            center = p.detach()
            flipped = FlipoutTensor.build(
                center + delta, center, (Term(delta, (draw,)),), self.population
            )
            for path, attr in weight.uses:
                put_weight(self.module.get_submodule(path), attr, flipped, undo)
        return undo[::-1]

    def member(self, number: int) -> dict[str, Tensor]:
        """The weights that a member sees."""
        out = {}
        number_ = torch.tensor(number)
        for (weight, p), draw, delta in zip(
            self._parameters(), self.draws, self.deltas(), strict=True
        ):
            signs = paired_signs(draw.combined, number_.to(p.device), p.dtype)
            out[weight.name] = p.detach() + delta * signs
        return out

    def gradients(self, values: Tensor) -> Iterator[Tensor]:
        r"""Of each weight :math:`\sum_n u_n \Delta W \circ E_n / \sigma^2`, shape as the weight.

        :param values: the shaped fitness u, shape ``(N,)``.
        """
        for (weight, p), draw, delta in zip(
            self._parameters(), self.draws, self.deltas(), strict=True
        ):
            sums = sign_sums(draw.combined, values.to(p.device, _summed(p.dtype)))
            yield delta * sums.div_(weight.sigma**2).to(p.dtype)


def _summed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
