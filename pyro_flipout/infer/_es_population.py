# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Signs of the members of a population, of which each may have several rows of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flipout.errors import FlipoutError
from pyro_flipout.signs import code_bits
from pyro_flipout.tensor import Draw, Execution, Factor, SignFactor

__all__ = ["MemberDraw", "Population", "sign_sums"]


class Population(Execution):
    """The members that one base perturbation serves, over any number of calls.

    Row i of data with N * k rows belongs to member ``i // k``.

    :param num_members: the number N of members.
    :param example_dim: dimension of the data that counts the rows.
    """

    def __init__(self, num_members: int, example_dim: int) -> None:
        super().__init__(example_dim, "error", _refuse)
        self.num_members = num_members

    def begin(self, rows: int) -> None:
        """Starts a call of the module on data of ``rows`` = N * k rows."""
        if rows != self.num_examples:
            self.num_examples = rows
            self._signs.clear()

    @property
    def is_single(self) -> bool:
        """False: a member on its own has signs as any other."""
        return False

    @property
    def group_size(self) -> int:
        """The number k of rows that a member has."""
        assert self.num_examples is not None
        return max(self.num_examples // self.num_members, 1)  # of no rows, too


def _refuse(site: str, reason: str) -> None:
    raise FlipoutError(
        f"weight '{site}' cannot have a perturbation for each member of the population: {reason}; "
        f"or leave it out with hide=['{site}']"
    )


class MemberDraw(Draw):
    """The signs of one weight for the members of a population.

    Antithetic members 2j and 2j + 1 have the signs E and -E: their numbers differ in the
    lowest bit alone, which flips every code of the first factor and none of the others.

    :param site: name of the weight.
    :param shape: shape of the weight.
    :param population: the members.
    :param generator: of the weight's device.
    """

    __slots__ = ()

    def __init__(
        self,
        site: str,
        shape: torch.Size,
        population: Population,
        generator: torch.Generator,
        antithetic: bool,
    ) -> None:
        self.site, self.execution = site, population
        self.shared = self.used = False
        factors: list[Factor] = []
        for dim in range(min(2, len(shape))) if shape else (-1,):
            size = tuple(n if d == dim else 1 for d, n in enumerate(shape))
            codes = torch.randint(
                -(2**31),
                2**31,
                size,
                dtype=torch.int32,
                device=generator.device,
                generator=generator,
            )
            if antithetic:
                codes = codes & ~2 if factors else codes | 2
            factors.append((SignFactor(self), codes))
        self._factors = tuple(factors)

    def draw_codes(self) -> None:
        """They are drawn."""

    @property
    def combined(self) -> Tensor:
        """Codes whose signs are the entries of E, of a shape that broadcasts to the weight's."""
        out, *more = self.codes
        for codes in more:
            out = out ^ codes
        return out


def sign_sums(codes: Tensor, values: Tensor) -> Tensor:
    r"""Sums :math:`\sum_n u_n \operatorname{sign}(n, c)` over the members, for each code c.

    All the sums that there can be are one Walsh-Hadamard transform of the values, in which each
    code is looked up: the cost for a weight does not depend on the number of members. For codes
    ``B ^ C`` of a matrix it is :math:`R^\top \operatorname{diag}(u) S` of Wen et al. (2018), eq. 5.

    :param codes: ``int32`` tensor of any shape ``(*)``.
    :param values: ``u``, shape ``(N,)``.
    :returns: tensor of shape ``(*)``.

    >>> codes = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    >>> sign_sums(codes, torch.tensor([1.0, 10.0, 100.0]))
    tensor([ 111., -111.,   91.,  -91.])
    """
    size = 1 << (code_bits(len(values)) - 1)
    sums = values.new_zeros(size)
    sums[: len(values)] = values
    step = 1
    while step < size:
        pairs = sums.view(-1, 2, step)
        sums = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).flatten()
        step *= 2
    table = torch.stack((sums, -sums), 1).flatten()  # the lowest bit of a code flips all members
    index = codes & (2 * size - 1)
    return table.index_select(0, index.flatten()).view(codes.shape)
