# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Leaves a weight shared that reaches a call which does not pass ``__torch_function__``.

``Function.apply`` of ``torch.autograd`` is one: its forward and its backward function receive the
weight itself. Torch functions that they call must not follow the flipout rules, since the
backward function returns the gradient of one weight for the whole mini-batch.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyro_flipout._modes import transformed
from pyro_flipout.errors import FlipoutError, FlipoutWarning, MissingRuleError

if TYPE_CHECKING:
    from pyro_flipout.tensor import FlipoutTensor, Term

__all__ = ["differentiating", "refuse_operator", "share_in_functions", "watch_gradient"]

_forward_mode = torch._C._is_fwd_grad_enabled
_graph_task = torch._C._current_graph_task_id


def differentiating() -> bool:
    """Whether the forward or the backward function of a ``Function`` may be running.

    ``Function.apply`` turns forward-mode differentiation off while its forward function runs.
    ``torch.no_grad`` does not, and ``torch.inference_mode``, which does, needs no gradients.
    """
    if _forward_mode():
        return bool(_graph_task() != -1)
    return not torch.is_inference_mode_enabled()


def share_in_functions(call: Callable[..., Any], weights: Sequence[FlipoutTensor]) -> None:
    """Leaves weights shared that are arguments of a running ``torch.autograd.Function``.

    :param call: the torch function that was called on them.
    """
    # Function.apply calls this itself on an argument that the forward function returns.
    returned = call is Tensor.view_as and len(weights) == 2 and weights[0] is weights[1]
    for weight in weights:
        # Without gradients the forward function is all there is, and the rules apply to it.
        if not (weight.plain.requires_grad and weight.has_signs):
            continue
        if _graph_task() != -1 and _in_backward(weight):
            _share_late(weight._terms)
            continue
        name = _forward_of(weight) or ("torch.autograd.Function" if returned else None)
        if name == "CheckpointFunction":
            weight.refuse(
                [weight],
                "torch.utils.checkpoint with use_reentrant=True",
                "an argument is not the same tensor when the backward pass runs the function again",
                "set use_reentrant=False",
            )
        elif name is not None:
            weight.refuse(
                [weight],
                f"{name}.apply",
                "a torch.autograd.Function computes the gradient of one weight, which all "
                "examples share",
                "write it with torch functions that have a flipout rule, or hide the site with "
                "flipout(hide=[...])",
            )


def refuse_operator(weights: Sequence[FlipoutTensor], operator: str) -> None:
    """Leaves weights shared of which an operator was called past ``__torch_function__``."""
    try:
        for kind, first in {type(weight): weight for weight in weights}.items():
            first.refuse(
                [weight for weight in weights if type(weight) is kind],
                operator,
                "TorchScript, torch.func over the weight or an extension called an operator past "
                "the flipout rules",
                "call torch functions of Python on the weight, with torch.func over the data "
                "alone, or hide the site with flipout(hide=[...])",
            )
    except Exception as error:  # TorchScript raises another one, without the message
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(str(error), FlipoutWarning, stacklevel=2)
        raise


def watch_gradient(weight: FlipoutTensor) -> None:
    """Notices a gradient that arrives at a weight, to which the rules never send one.

    They compute with the centre and the perturbation. What arrives comes from code that read the
    memory of the weight and called no operator on it, such as a kernel inside of a ``Function``.
    """
    if not weight.plain.requires_grad or not weight._terms or transformed():
        return
    with torch._C.DisableTorchFunctionSubclass():
        node: Any = weight.grad_fn
        if node is not None:  # gradients are recorded
            # What Tensor.register_hook does, in a third of its time: every weight is watched.
            weight._backward_hooks = {0: partial(_share_late, weight._terms)}
            node._register_hook_dict(weight)


def _share_late(terms: Sequence[Term], gradient: Tensor | None = None) -> None:
    """Leaves the draws of a weight shared that a call has used past the rules, or raises."""
    call = "a call that does not pass __torch_function__, such as a torch.autograd.Function"
    for draw in dict.fromkeys(draw for term in terms for draw in term.draws):
        if draw.shared or draw.execution.is_single:
            continue
        if draw.used:
            raise FlipoutError(
                f"flipout: site '{draw.site}' was used by {call}, with one draw for all examples, "
                "and elsewhere with a draw for each, so that its gradient is that of neither; "
                "hide the site with flipout(hide=[...])"
            )
        message = f"it was used by {call}; hide it with flipout(hide=[...])"
        if draw.execution.on_missing_rule == "error":
            raise MissingRuleError(f"flipout: site '{draw.site}' cannot be flipped: {message}")
        draw.execution.share([draw], message)


def _in_backward(weight: FlipoutTensor) -> bool:
    """Whether autograd runs the backward function of a call that had ``weight`` for an argument."""
    node = torch._C._current_autograd_node()
    with torch._C.DisableTorchFunctionSubclass():
        own = weight.grad_fn
    return bool(node and own and any(edge is own for edge, _ in node.next_functions))


def _forward_of(weight: FlipoutTensor) -> str | None:
    """Name of the ``Function`` whose forward function runs and has ``weight`` for an argument.

    Autograd keeps the arguments to itself until the forward function has returned, so that they
    can be read from its frame alone. A weight that it finds elsewhere, as in a closure, receives
    no gradient from it, with or without flipout: ``torch.utils.checkpoint`` with
    ``use_reentrant=True`` runs a network so.
    """
    frames = list(_frames())
    for frame, name in zip(frames, _names([frame.f_code for frame in frames]), strict=True):
        if name and any(value is weight for value in _arguments(frame)):
            return name
    return None


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _arguments(frame: FrameType) -> Iterator[Any]:
    """Arguments of a function in the frame of its call, those of tuples one by one."""
    names, rest, keywords, values = inspect.getargvalues(frame)
    found = [values.get(name) for name in (*names, rest) if name is not None]
    found += values.get(keywords, {}).values() if keywords else ()
    for value in found:
        yield from value if isinstance(value, tuple) else (value,)


_NAMES: dict[CodeType, str] = {}
"""Name of the ``Function`` of which a code is the forward function, else empty: a cache."""


def _names(codes: list[CodeType]) -> list[str]:
    if any(code not in _NAMES for code in codes):
        forwards: dict[CodeType, str] = {}
        for code, name in _forward_functions():  # a decorator serves several functions
            forwards[code] = name if forwards.get(code, name) == name else Function.__name__
        _NAMES.update((code, forwards.get(code, "")) for code in codes)
    return [_NAMES[code] for code in codes]


def _forward_functions() -> Iterator[tuple[CodeType, str]]:
    """Codes of all forward functions, and of their decorators such as ``custom_fwd``."""
    classes = [Function]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        for attribute in ("forward", "setup_context"):
            function = vars(cls).get(attribute)
            while function is not None:
                code = getattr(function, "__code__", None)
                if code is not None:
                    yield code, cls.__name__
                function = getattr(function, "__wrapped__", None)
