# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Exploration in parameter space: one policy for each environment of a vectorised one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flipout._checks import checked_integer, is_integer
from pyro_flipout.infer._es_base import NOISE, Base
from pyro_flipout.infer._es_calls import count_rows
from pyro_flipout.infer._es_options import check_noise, perturbed
from pyro_flipout.infer._es_population import Population
from pyro_flipout.nn.choice import Pattern
from pyro_flipout.signs import Signs, paired_signs

__all__ = ["Exploration"]

_MAX_NUMBER = 2**30


def _scatter(start: int, count: int) -> Tensor:
    """Policy numbers, all different until ``_MAX_NUMBER``.

    Signs of any two are independent. Successive integers differ in few bits, so that signs of
    three or four of them would depend on each other; multiples of an odd constant do less.
    """
    return torch.arange(start, start + count) * 0x9E3779B1 % _MAX_NUMBER


class Exploration:
    r"""Acts with :math:`W_n = W + \Delta W \circ r_n s_n^\top` in environment n.

    A policy is held, whatever the number of calls, until :meth:`resample` gives its environment
    another: signs are functions of its number, and a resampled environment gets one that no
    other has had. It follows the weights of the module as they are trained. A recurrent
    module takes and returns its state as always; start it anew where an episode ended.

    >>> policy = nn.Linear(3, 2)
    >>> explore = Exploration(policy, sigma=0.1, num_envs=4, seed=0)
    >>> action = explore(torch.randn(4, 3)).argmax(1)  # row n is environment n
    >>> explore.resample(torch.tensor([False, True, False, False]))  # the episode of 1 ended

    :param module: the policy or value network.
    :param sigma: standard deviation of the perturbations, as in
        :class:`~pyro_flipout.infer.FlipES`.
    :param num_envs: the number N of environments.
    :param distribution: ``"normal"`` or ``"rademacher"``.
    :param hide: parameters without perturbation.
    :param expose: the only parameters to consider.
    :param example_dim: dimension of the data that counts the rows.
    :param seed: of everything that is drawn here; from torch's default generator if omitted.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if the options are out of range or contradict each other.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma: float | Mapping[Pattern, float],
        num_envs: int,
        *,
        distribution: str = "normal",
        hide: Iterable[Pattern] | None = None,
        expose: Iterable[Pattern] | None = None,
        example_dim: int = 0,
        seed: int | None = None,
    ) -> None:
        check_noise(module, distribution, example_dim, seed, "Exploration")
        self.num_envs = checked_integer("Exploration", "num_envs", num_envs, 1)
        self.module, self.example_dim = module, example_dim
        self.weights = perturbed(module, sigma, hide, expose, "Exploration")
        self.noise, self._next = NOISE[distribution], 0
        self._seeds = torch.Generator()
        self._seeds.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.resample()

    def resample(self, ended: Tensor | None = None) -> None:
        """Gives new policies to environments.

        Environments share the sizes of their perturbations until all are resampled at once;
        do that from time to time, after each phase of learning for example.

        :param ended: which ones, a boolean tensor ``(N,)``; all if omitted.
        :raises TypeError: if it is no tensor.
        :raises ValueError: if it has another shape or dtype.
        """
        if ended is not None and not isinstance(ended, Tensor):
            raise TypeError(
                f"Exploration.resample: got {ended!r} of type {type(ended).__name__}, expected a "
                "tensor; write torch.as_tensor(ended)"
            )
        if ended is not None and (ended.dtype != torch.bool or ended.shape != (self.num_envs,)):
            raise ValueError(
                f"Exploration.resample: got a {ended.dtype} tensor of shape {tuple(ended.shape)}, "
                f"expected torch.bool of shape ({self.num_envs},)"
            )
        count = self.num_envs if ended is None else int(ended.sum())
        if ended is None or self._next + count > _MAX_NUMBER:
            self._next = self.num_envs
            self._population = _Policies(_scatter(0, self.num_envs), self.example_dim)
            seed = int(torch.randint(2**62, (), generator=self._seeds))
            how = seed, False, True, self.noise
            self._base = Base(self.module, self.weights, self._population, *how)
        elif count:
            self._population.renumber(ended.cpu(), _scatter(self._next, count))
            self._next += count

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns with every environment's own weights, without gradients.

        Data of N * k rows give k rows to each environment: row i belongs to ``i // k``. With
        ``num_envs=1`` all the rows share one policy.

        :raises ValueError: if the rows of the data are no positive multiple of N.
        """
        rows = count_rows(
            (args, kwargs), self.num_envs, self.example_dim, "Exploration", "environment"
        )
        undo = self._base.put(rows)
        try:
            return self.module(*args, **kwargs)
        finally:
            for step in undo:
                step()

    def policy(self, number: int) -> dict[str, Tensor]:
        """The weights that an environment acts with, by name.

        :param number: of the environment, from 0 to N - 1.
        :raises IndexError: if there is no such environment.
        """
        if not is_integer(number, 0) or number >= self.num_envs:
            raise IndexError(
                f"Exploration.policy: got {number!r}, expected an environment from 0 to "
                f"{self.num_envs - 1}"
            )
        return self._base.member(int(self._population.own[number]))


class _Policies(Population):
    """Members with numbers of their own."""

    def __init__(self, own: Tensor, example_dim: int) -> None:
        super().__init__(len(own), example_dim)
        self.own = own  # (N,)

    def renumber(self, which: Tensor, numbers: Tensor) -> None:
        self.own = self.own.masked_scatter(which, numbers)
        self._signs.clear()

    def numbers(self, rows: Tensor) -> Tensor:
        return self.own.to(rows.device)[super().numbers(rows)]

    def signs(self, codes: Tensor, dtype: torch.dtype, num_examples: int | None = None) -> Tensor:
        own = self.own.to(codes.device).reshape(-1, *(1,) * codes.dim())
        return paired_signs(codes, own, dtype).repeat_interleave(self.group_size, 0)

    def _new_signs(self, codes: Tensor, dtype: torch.dtype) -> Signs:
        own = self.own.to(codes.device).unsqueeze(1)
        return _PolicySigns(paired_signs(codes, own, dtype), self.group_size)


class _PolicySigns(Signs):
    """Dense signs ``(N, d)``, of which each row is that of k rows of the data."""

    def __init__(self, dense: Tensor, rows: int) -> None:
        self.num_examples, self.group_size, self.block = len(dense) * rows, rows, rows
        self.low, self.high = dense.new_ones(1, dense.size(1)), dense
        self.codes, self.count, self.dtype = None, dense.size(1), dense.dtype
