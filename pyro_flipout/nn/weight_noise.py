# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Noise on the weights as a regulariser, in plain training.

Every forward call in training mode draws :math:`W + \Delta W`; with flipout, example n sees
:math:`W + \Delta W \circ r_n s_n^\top`:

==================== ===========================================================
``gaussian``         :math:`\Delta W = \sigma \varepsilon`
``multiplicative``   :math:`\Delta W = \sigma W \circ \varepsilon`
``dropconnect``      :math:`\Delta W = \pm W`, that is, weights are 0 or doubled
==================== ===========================================================

Gradients go through both parts. References

[1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
    Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
    https://arxiv.org/abs/1803.04386
[2] `Regularization of Neural Networks using DropConnect`, Li Wan et al.,
    https://proceedings.mlr.press/v28/wan13.html
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from pyro.nn import PyroModule
from torch import nn

from pyro_flipout.nn.choice import Pattern, choose
from pyro_flipout.nn.noise import NOISE, Noise, WeightNoise, hook_of

__all__ = ["remove_weight_noise_", "weight_noise_"]

M = TypeVar("M", bound=nn.Module)


def weight_noise_(
    module: M,
    kind: str = "multiplicative",
    sigma: float | None = None,
    p: float = 0.5,
    *,
    hide: Iterable[Pattern] | None = None,
    expose: Iterable[Pattern] | None = None,
    example_dim: int | None = None,
    flipout: bool = True,
    on_missing_rule: str = "warn",
) -> M:
    """Adds noise to the weights of a network whenever it is called in training mode, in place.

    For plain training with any optimizer. Parameters, their names, ``state_dict`` and results
    in evaluation mode stay what they are. One call of ``module`` has one draw of every weight,
    for all its uses. Can be called again for other weights.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> _ = weight_noise_(net, "multiplicative", sigma=0.5, expose=["*.weight"])
    >>> net(torch.randn(10, 4)).shape
    torch.Size([10, 1])

    :param module: the network, of which the whole is called.
    :param kind: ``"gaussian"``, ``"multiplicative"`` or ``"dropconnect"``.
    :param sigma: standard deviation of the noise, for the first in units of the weights and
        for the second of each weight's size; there 1 if omitted.
    :param p: probability that DropConnect drops a weight.
    :param hide: weights without noise: names of parameters or modules, in which ``*`` stands
        for anything, or module classes.
    :param expose: the only weights to consider, likewise.
    :param example_dim: dimension of the data that counts the examples, 0 by default.
    :param flipout: False for one draw that the mini-batch shares.
    :param on_missing_rule: what to do where flipout has no rule: ``"warn"`` and share the draw
        of that weight from then on, or ``"error"``.
    :returns: ``module`` itself.
    :raises ValueError: if the options contradict each other, or a weight has noise already.

    .. note:: Activation checkpointing inside of ``module`` is not supported: its second forward
        pass would not see the noise.
    """
    sigma = _checked(kind, sigma, p, flipout)
    chosen = choose(module, hide, expose, "weight_noise_")
    for each in chosen:
        for use in each.uses:
            if isinstance(use.owner, PyroModule):
                raise TypeError(
                    f"weight_noise_: '{use.name}' belongs to the PyroModule "
                    f"{type(use.owner).__name__}, whose parameters Pyro reads; use a prior and "
                    "flipout(model), or hide it"
                )
    hook = hook_of(module) or WeightNoise(example_dim, on_missing_rule)
    if (hook.example_dim or 0, hook.on_missing_rule) != (example_dim or 0, on_missing_rule):
        raise ValueError(
            f"weight_noise_: got example_dim={example_dim}, on_missing_rule={on_missing_rule!r}, "
            f"but the noise that {type(module).__name__} has was given {hook.example_dim or 0} and "
            f"{hook.on_missing_rule!r}; one call has one of each"
        )
    if hook.example_dim is None:
        hook.example_dim = example_dim
    _refuse_twice(module, {use.name for each in chosen for use in each.uses})
    weights = [[(use.path, use.attr) for use in each.uses] for each in chosen]
    if not hook.noises:
        module.register_forward_pre_hook(hook.begin)
        module.register_forward_hook(hook.end, always_call=True)
    hook.noises.append(Noise(kind, sigma, p, flipout, weights))
    return module


def remove_weight_noise_(module: M) -> M:
    """Takes away what :func:`weight_noise_` added, in place.

    :raises ValueError: if there is nothing.
    """
    hook = hook_of(module)
    if hook is None:
        raise ValueError(
            f"remove_weight_noise_: {type(module).__name__} has no weight noise; give the module "
            "that weight_noise_ was called on"
        )
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, each in list(hooks.items()):
            if getattr(each, "__self__", None) is hook:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    return module


# ------------------------------------------------------------------------------ checks


def _checked(kind: str, sigma: float | None, p: float, flipout: bool) -> float:
    """Checks the options of the kinds of noise, and gives sigma."""
    if kind not in NOISE:
        raise ValueError(f"weight_noise_: got kind={kind!r}, expected one of {list(NOISE)}")
    if kind != "dropconnect":
        if p != 0.5:
            raise ValueError(
                f"weight_noise_: got p={p} with kind={kind!r}, which has sigma instead"
            )
        if sigma is None and kind == "gaussian":
            raise ValueError(
                "weight_noise_: additive noise needs a standard deviation in the units of the "
                "weights; say sigma=0.05, for example"
            )
        sigma = 1.0 if sigma is None else sigma
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"weight_noise_: got sigma={sigma}, expected a finite number >= 0")
        return sigma
    if sigma is not None:
        raise ValueError(f"weight_noise_: got sigma={sigma} with DropConnect, which has p instead")
    if not 0 <= p < 1:
        raise ValueError(f"weight_noise_: got p={p}, expected a probability in [0, 1)")
    if flipout and p != 0.5:
        raise ValueError(
            f"weight_noise_: got p={p} with flipout: a sign flip turns a kept weight into a "
            "dropped one, so that both must be equally likely; say p=0.5, or flipout=False, which "
            "is DropConnect at any p with a mask that the mini-batch shares"
        )
    return 0.0


def _refuse_twice(module: nn.Module, names: set[str]) -> None:
    for path, part in module.named_modules():
        hook = hook_of(part)
        if hook is None:
            continue
        if part is not module:
            raise ValueError(
                f"weight_noise_: '{path}' has weight noise of its own, drawn at each of its calls; "
                f"remove it with remove_weight_noise_(module.{path}) and choose its weights with "
                "expose"
            )
        twice = names & {
            f"{where}.{attr}" if where else attr
            for noise in hook.noises
            for uses in noise.weights
            for where, attr in uses
        }
        if twice:
            raise ValueError(
                f"weight_noise_: {sorted(twice)} have noise already; hide them, or call "
                "remove_weight_noise_ first"
            )
