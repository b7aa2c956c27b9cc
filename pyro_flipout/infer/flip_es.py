# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Evolution strategies that evaluate a population as one mini-batch.

Member n of a population sees :math:`W_n = W + \Delta W \circ r_n s_n^\top` with
:math:`\Delta W \sim N(0, \sigma^2)`, and with its fitness :math:`F_n`

.. math::
    \nabla_W \operatorname{E} F \approx \frac{1}{M N \sigma^2}
        \sum_{m=1}^M \sum_{n=1}^N F_{mn} \, \Delta W_m \circ r_{mn} s_{mn}^\top

is unbiased for the gradient of the fitness expected under the perturbation (Wen et al. 2018,
eq. 5). No weights of a member are ever stored.

References

[1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
    Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
    https://arxiv.org/abs/1803.04386
[2] `Evolution Strategies as a Scalable Alternative to Reinforcement Learning`,
    Tim Salimans, Jonathan Ho, Xi Chen, Szymon Sidor, Ilya Sutskever,
    https://arxiv.org/abs/1703.03864
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flipout._checks import is_integer
from pyro_flipout.infer._es_base import NOISE, Base
from pyro_flipout.infer._es_calls import block_of, count_rows, join
from pyro_flipout.infer._es_fitness import SHAPINGS, checked_fitness
from pyro_flipout.infer._es_options import check_noise, check_options, perturbed
from pyro_flipout.infer._es_population import Population
from pyro_flipout.nn.choice import Pattern

__all__ = ["FlipES"]


class FlipES:
    r"""Perturbs a network for every row of a mini-batch, and estimates gradients from fitness.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> es = FlipES(net, sigma=0.1)
    >>> with es.perturb(num_members=64):
    ...     out = net(torch.ones(64, 3))  # row n is member n
    >>> es.backward(-(out[:, 0] - 2) ** 2)  # higher is better
    >>> optimizer.step()

    :param module: any network; every torch function with a flipout rule can be in it.
    :param sigma: standard deviation of the perturbations, in units of the weights. A dict gives
        one for each group of parameters, ``{"*.bias": 0.01, "*": 0.05}``, in which keys are
        patterns as in ``hide`` and the first that means a parameter counts.
    :param num_bases: the number M of base perturbations, among which the members are divided in
        equal blocks of consecutive ones. See the note.
    :param distribution: of the perturbations, ``"normal"`` or ``"rademacher"``, which is ±sigma.
    :param antithetic: members 2j and 2j + 1 have opposite perturbations.
    :param fitness_shaping: ``"center"`` subtracts the mean fitness of all other members, which
        keeps the estimate unbiased; ``"none"`` is the equation as it stands; ``"normalize"``
        divides by the standard deviation of the fitness as well; ``"rank"`` replaces the fitness
        by ranks from -1/2 to 1/2 [2].
    :param weight_decay: factor of the perturbed weights that is added to their gradient.
    :param hide: parameters without perturbation: names of parameters or modules, in which ``*``
        stands for anything, or module classes. Where some parameters require gradients and
        others do not, those that do not have none either.
    :param expose: the only parameters to consider, likewise.
    :param example_dim: dimension of the data that counts the rows.
    :param keep_draws: False to draw the bases again whenever they are used: memory then does not
        grow with ``num_bases``, for one normal number more a weight and call.
    :param seed: of everything that is drawn here; from torch's default generator if omitted.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if the options are out of range or contradict each other.

    .. note:: Members of one base share the sizes of its perturbations. For a fitness linear in
        the weights with gradient g this adds :math:`2 g_i^2 / M` to the variance of entry i of
        the estimate under normal noise, however many members there are. Under Rademacher noise
        sizes do not vary and it adds nothing: one base is then as good as independent members.
        That estimates central differences over :math:`\pm\sigma` of the expected fitness, which
        are its gradient if it is quadratic.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma: float | Mapping[Pattern, float],
        *,
        num_bases: int = 1,
        distribution: str = "normal",
        antithetic: bool = False,
        fitness_shaping: str = "center",
        weight_decay: float = 0.0,
        hide: Iterable[Pattern] | None = None,
        expose: Iterable[Pattern] | None = None,
        example_dim: int = 0,
        keep_draws: bool = True,
        seed: int | None = None,
    ) -> None:
        check_options(num_bases, fitness_shaping, weight_decay)
        check_noise(module, distribution, example_dim, seed, "FlipES")
        self.module = module
        self.weights = perturbed(module, sigma, hide, expose, "FlipES")
        self.num_bases, self.noise = num_bases, NOISE[distribution]
        self.antithetic, self.keep_draws = antithetic, keep_draws
        self.fitness_shaping, self.weight_decay = fitness_shaping, weight_decay
        self.example_dim = example_dim
        self._seeds = torch.Generator()
        self._seeds.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self._bases: list[Base] = []
        self._called = self._inside = False

    # ---------------------------------------------------------------------- evaluation

    @contextmanager
    def perturb(self, num_members: int) -> Iterator[FlipES]:
        """Draws a population; within, calls of the module evaluate it, without gradients.

        Data of N * k rows give k rows to each of the N members: row i belongs to member i // k.
        A member keeps its weights for all calls within.

        :param num_members: the number N of members, over all bases.
        :raises RuntimeError: if a population is active already.
        :raises ValueError: if it is no positive integer, if ``num_bases`` does not divide it, or
            leaves odd blocks for antithetic members. A call raises if its rows are no multiple
            of it.
        """
        size = self._block_size(num_members)
        if self._inside:
            raise RuntimeError("FlipES.perturb: it is active already; leave the outer one first")
        seeds = torch.randint(2**62, (self.num_bases,), generator=self._seeds).tolist()
        how = self.antithetic, self.keep_draws, self.noise
        self._bases = [
            Base(self.module, self.weights, Population(size, self.example_dim), seed, *how)
            for seed in seeds
        ]
        self._called, self._inside = False, True
        own = vars(self.module)
        previous = own.get("forward")
        own["forward"] = self._evaluate(self.module.forward)
        try:
            yield self
        except BaseException:
            self._bases = []
            raise
        finally:
            self._inside = False
            del own["forward"]
            if previous is not None:
                own["forward"] = previous

    def _evaluate(self, forward: Any) -> Any:
        """The forward function of the whole population."""
        busy = False

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:  # the module calls itself
                return forward(*args, **kwargs)
            busy = True
            try:
                with torch.no_grad():
                    out = self._blocks(forward, args, kwargs)
            finally:
                busy = False
            self._called = True
            return out

        return evaluate

    def _blocks(self, forward: Any, args: Any, kwargs: Any) -> Any:
        rows = count_rows(
            (args, kwargs), self.num_members, self.example_dim, "FlipES.perturb", "member"
        )
        size, outs = rows // len(self._bases), []
        for m, base in enumerate(self._bases):
            part = args, kwargs
            if len(self._bases) > 1:
                part = block_of(part, m * size, size, rows, self.example_dim)
            undo = base.put(size)
            try:
                outs.append(forward(*part[0], **part[1]))
            finally:
                for step in undo:
                    step()
        return join(outs, size, self.example_dim)

    def _block_size(self, num_members: int) -> int:
        if not is_integer(num_members, 1) or num_members % self.num_bases:
            raise ValueError(
                f"FlipES.perturb: got num_members={num_members!r}, expected a positive multiple of "
                f"num_bases={self.num_bases}"
            )
        size = int(num_members) // self.num_bases
        if self.antithetic and size % 2:
            raise ValueError(
                f"FlipES.perturb: got num_members={num_members}, which is {size} for each base; "
                "antithetic members come in pairs: make that even"
            )
        return size

    @property
    def num_members(self) -> int:
        """The number N of members of the population, 0 without one."""
        return sum(base.population.num_members for base in self._bases)

    def member(self, number: int) -> dict[str, Tensor]:
        """The weights of one member of the population, to keep the best for example.

        :param number: n, from 0 to N - 1.
        :returns: by name, for ``module.load_state_dict(..., strict=False)`` or
            ``torch.func.functional_call``.
        :raises IndexError: if there is no such member.
        """
        if not is_integer(number, 0) or number >= self.num_members:
            raise IndexError(
                f"FlipES.member: got {number!r}, but the population has {self.num_members} "
                "members; it exists from perturb to the next backward"
            )
        base, own = divmod(number, self._bases[0].population.num_members)
        return self._bases[base].member(own)

    # ------------------------------------------------------------------------ gradient

    @torch.no_grad()
    def backward(self, fitness: Tensor) -> None:
        """Adds the estimated gradient of minus the expected fitness to ``.grad``.

        An optimizer that minimises then climbs. The population is gone afterwards.

        :param fitness: of every member, higher is better, shape ``(N,)``.
        :raises RuntimeError: if no population was evaluated since the last time, or one still is.
        :raises ValueError: if the fitness has another shape, or is not finite.
        """
        self._check_evaluated()
        values = checked_fitness(fitness, self.num_members)
        values = SHAPINGS[self.fitness_shaping](values, self.antithetic)
        values = values / -len(values)
        for m, (base, part) in enumerate(
            zip(self._bases, values.chunk(len(self._bases)), strict=True)
        ):
            for weight, grad in zip(self.weights, base.gradients(part), strict=True):
                parameter = weight.find(self.module)
                if m == 0 and self.weight_decay:
                    grad.add_(parameter, alpha=self.weight_decay)
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._bases = []

    def _check_evaluated(self) -> None:
        if not self._bases:
            raise RuntimeError(
                "FlipES.backward: there is no population; evaluate one first: "
                "with es.perturb(num_members=N): out = module(x)"
            )
        if self._inside:
            raise RuntimeError("FlipES.backward: leave perturb first, in which calls go on")
        if not self._called:
            raise RuntimeError(
                f"FlipES.backward: {type(self.module).__name__} was not called within perturb, so "
                "no member was evaluated; call the module that FlipES was given"
            )
