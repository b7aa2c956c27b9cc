# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Hooks that put noisy weights in for the time of a forward call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flipout.errors import warn
from pyro_flipout.tensor import Execution, flip, why_not_flippable

__all__ = ["NOISE", "Noise", "WeightNoise", "hook_of", "put_weight"]

_UNDO = "_weight_noise_undo"


# ------------------------------------------------------------------------------- kinds


def _gaussian(weight: Tensor, noise: Noise) -> Tensor:
    return noise.sigma * torch.randn_like(weight)


def _multiplicative(weight: Tensor, noise: Noise) -> Tensor:
    return noise.sigma * weight * torch.randn_like(weight)


def _dropconnect(weight: Tensor, noise: Noise) -> Tensor:
    kept = torch.empty_like(weight, requires_grad=False).bernoulli_(1 - noise.p)
    return weight * (kept / (1 - noise.p) - 1)


NOISE: dict[str, Callable[[Tensor, Noise], Tensor]] = {
    "gaussian": _gaussian,
    "multiplicative": _multiplicative,
    "dropconnect": _dropconnect,
}
"""The perturbation of a weight, by kind of noise."""


@dataclass(frozen=True)
class Noise:
    """One choice of noise, and the weights that get it.

    :ivar weights: for each, the paths and names of all its uses.
    """

    kind: str
    sigma: float
    p: float
    flipout: bool
    weights: list[list[tuple[str, str]]]


# ------------------------------------------------------------------------------- hooks


class WeightNoise:
    """Hooks around the forward call of a module, which put noisy weights in and out.

    A noisy weight is an attribute of the module that owns the parameter, where Python finds
    it before torch looks among the parameters. Those are never touched.
    """

    def __init__(self, example_dim: int | None, on_missing_rule: str) -> None:
        if on_missing_rule not in ("warn", "error"):
            raise ValueError(
                f"weight_noise_: got on_missing_rule={on_missing_rule!r}, expected 'warn' or "
                "'error'"
            )
        if example_dim is not None and (
            isinstance(example_dim, bool) or not isinstance(example_dim, int) or example_dim < 0
        ):
            raise ValueError(
                f"weight_noise_: got example_dim={example_dim!r}, expected an integer >= 0"
            )
        self.example_dim = example_dim
        self.on_missing_rule = on_missing_rule
        self.noises: list[Noise] = []
        self._shared: set[str] = set()
        self._told: set[str] = set()

    def begin(self, module: nn.Module, args: Any) -> None:
        """Draws, before the forward call."""
        undo: list[Callable[[], None]] = []
        vars(module).setdefault(_UNDO, []).append(undo)
        execution = Execution(self.example_dim, self.on_missing_rule, self._share)
        for noise in self.noises:
            for uses in noise.weights:
                owners = [(module.get_submodule(path), attr) for path, attr in uses]
                if all(owner.training for owner, _ in owners):
                    self._perturb(noise, owners, ".".join(filter(None, uses[0])), execution, undo)

    def _perturb(
        self,
        noise: Noise,
        owners: list[tuple[nn.Module, str]],
        name: str,
        execution: Execution,
        undo: list[Callable[[], None]],
    ) -> None:
        owner, attr = owners[0]
        weight = owner._parameters.get(attr)
        if weight is None:
            raise RuntimeError(
                f"weight_noise_: '{name}' is no parameter any more; call remove_weight_noise_ "
                "before you replace it (nn.DataParallel does that too: use "
                "DistributedDataParallel)"
            )
        if any(attr in vars(owner) for owner, attr in owners):
            return  # an outer call has done it
        delta = NOISE[noise.kind](weight, noise)
        noisy = weight + delta
        if noise.flipout and name not in self._shared and self._can_flip(noisy):
            noisy = flip(noisy, weight, delta, site=name, execution=execution)
        for owner, attr in owners:
            if attr not in vars(owner):
                put_weight(owner, attr, noisy, undo)

    def _can_flip(self, noisy: Tensor) -> bool:
        reason = why_not_flippable(noisy)
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            warn(f"weights keep their shared noise in this call: {reason}")
        return reason is None

    def _share(self, site: str, reason: str) -> None:
        self._shared.add(site)
        warn(f"weight '{site}' keeps its shared noise from now on: {reason}")

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Puts the parameters back, after the forward call or an error in it."""
        pending = vars(module).get(_UNDO)
        if not pending:
            return
        for step in reversed(pending.pop()):
            step()
        if not pending:
            del vars(module)[_UNDO]


def put_weight(owner: nn.Module, attr: str, noisy: Tensor, undo: list[Callable[[], None]]) -> None:
    """Puts a tensor in the place of a parameter, which itself is left alone.

    :param owner: the module that has the parameter.
    :param attr: its name there.
    :param noisy: the tensor, of the parameter's shape.
    :param undo: gets what takes it out again, to be called last first.
    """
    vars(owner)[attr] = noisy
    undo.append(lambda: vars(owner).pop(attr, None))
    if isinstance(owner, nn.RNNBase):
        # Its forward finds that the weights are others and lists them anew.
        kept = {name: vars(owner)[name] for name in ("_flat_weights", "_flat_weight_refs")}
        undo.append(lambda: vars(owner).update(kept))


def hook_of(module: nn.Module) -> WeightNoise | None:
    """The hooks of a module, None if it has none."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, WeightNoise):
            return owner
    return None
