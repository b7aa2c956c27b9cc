# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Loss and gradient of a Pyro program as a graph of torch's operations, recorded once."""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from pyro_flipout._modes import recording
from pyro_flipout.errors import FlipoutError
from pyro_flipout.infer._captured_check import (
    CHANGED,
    COMPILED,
    Result,
    Rewind,
    equal,
    need_close,
    need_equal,
)
from pyro_flipout.infer._captured_graph import call_directly, check_shapes, held, literals, written
from pyro_flipout.infer._captured_reads import reads_watched, users_line
from pyro_flipout.infer._captured_watch import Opaque, Watch

__all__ = ["CapturedProgram", "Result", "capture", "is_recorder"]


FIRST_AGAIN = 8
"""Replays after which a program is compared again; from then on whenever they have doubled."""


def capture(
    loss: Callable[..., Any], tensors: Sequence[Tensor], watch: Watch, compiled: bool
) -> tuple[CapturedProgram, Result]:
    """Records a loss and its gradient while they are computed.

    :param loss: computes the loss from tensors, shape ``()``.
    :param tensors: its arguments. What else the loss depends on is a constant, but for the
        entries of tensors and what torch draws.
    :param watch: state of Python objects of which the program is made.
    :param compiled: whether ``torch.compile`` gets it when it is first replayed.
    :returns: the program, and loss and gradient of this execution.
    :raises FlipoutError: if a number is read off a tensor, or a tensor is not on the CPU.
    """
    parameters: list[Tensor] = []
    result: list[Result] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        value = loss(*tensors)
        parameters.extend(leaves(value))
        result.append(gradients(value, parameters))
        return [result[0][0], *(g for g in result[0][1] if g is not None)]

    modules: list[torch.nn.Module] = []
    # Objects of their own: a tensor that a closure holds too is no argument there.
    tensors = [t.detach() for t in tensors]
    with poutine.trace(param_only=True) as found, _modules(modules), _as_recorded(compiled):
        graph = _record(run, tensors, watch)
    _need_cpu([*tensors, *parameters, *held(graph)])
    for module in modules:
        watch.add_module(module)
    made = literals(graph)
    watch.add_leaves([*parameters, *(t for t in held(graph) if id(t) not in made)])
    nodes: dict[str, Any] = found.trace.nodes
    sites = {name: site["value"].unconstrained() for name, site in nodes.items()}
    buffers = [b for m in modules for b in m.buffers(recurse=False)]
    program = CapturedProgram(
        graph, tensors, parameters, result[0][1], sites, buffers, watch, compiled
    )
    return program, program.owned(result[0])


class CapturedProgram(Opaque):
    """A loss and its gradient, recorded.

    :param graph: what was recorded.
    :param tensors: the arguments.
    :param parameters: the leaves that the loss has a gradient for.
    :param grads: their gradients.
    :param sites: unconstrained parameters of Pyro by name.
    :param buffers: tensors that operations may write to without saying so.
    :param watch: state of Python objects of which the program is made.
    :param compiled: whether ``torch.compile`` gets it.

    :ivar parameters: as given.
    """

    def __init__(
        self,
        graph: GraphModule,
        tensors: Sequence[Tensor],
        parameters: list[Tensor],
        grads: list[Tensor | None],
        sites: dict[str, Tensor],
        buffers: list[Tensor],
        watch: Watch,
        compiled: bool,
    ) -> None:
        self.parameters = parameters
        self._sites, self._watch, self._compiled = sites, watch, compiled
        self._replays, self._next_check = 0, 1
        stored = pyro.get_param_store().named_parameters()
        self._stored = {name: value for name, value in stored if sites.get(name) is value}
        self._given = [g is not None for g in grads]
        self._copied = _shared(parameters, grads, [*tensors, *held(graph)])
        own, self._changed_arguments = written(graph)
        self._state = own + buffers
        check_shapes(graph)
        if not compiled:
            call_directly(graph)
        self._recorded = self._run = graph.forward
        if compiled:
            # Its own generator would give other draws than the program's.
            self._run = torch.compile(graph, dynamic=False, options={"fallback_random": True})

    def fits(self) -> bool:
        """Whether the program is still made of these parameters, in this state."""
        return self.lives() and self._watch.holds()

    def due(self) -> bool:
        """Whether the next replay is to be compared with the program."""
        self._replays += 1
        return self._replays >= self._next_check

    def lives(self) -> bool:
        """Whether its parameters are still those of the parameter store."""
        stored = dict(pyro.get_param_store().named_parameters())
        return all(stored.get(name) is value for name, value in self._stored.items())

    def __call__(self, *tensors: Tensor) -> Result:
        """Replays the program, with new noise."""
        return self._replay(self._run, tensors)

    def _replay(self, run: Callable[..., Any], tensors: Sequence[Tensor]) -> Result:
        with torch.no_grad(), _without_autocast():
            loss, *found = run(*tensors)
        rest = iter(found)
        return self.owned((loss, [next(rest) if given else None for given in self._given]))

    def owned(self, result: Result) -> Result:
        """A result whose gradients may be written to."""
        loss, grads = result
        for i in self._copied:
            grads[i] = grads[i].clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
        return loss, grads

    def check(self, loss: Callable[..., Any], tensors: Sequence[Tensor]) -> Result:
        """Replays the program and runs it, from the same state of everything.

        What is recorded must give the loss and gradients of the program to the last bits. Where
        torch takes other kernels while it records (those of ``nn.TransformerEncoderLayer`` in
        evaluation mode), it must give those of the program with the same kernels.

        :param loss: the program itself.
        :returns: loss and gradient of the run.
        :raises FlipoutError: if they differ.
        """
        rewind = Rewind([*self._state, *(tensors[i] for i in self._changed_arguments)])
        names = self._names()
        recorded = self._replay(self._recorded, tensors)
        if self._compiled:
            rewind()
            need_close(names, self(*tensors), recorded, COMPILED)
        rewind()
        result = self.owned(gradients(loss(*tensors), self.parameters))
        need_close(names, recorded, result, CHANGED)
        if not equal(recorded, result):
            rewind()
            with _as_recorded(self._compiled), _Unchanged():
                again = gradients(loss(*tensors), self.parameters)
            need_equal(names, recorded, again, CHANGED)
        self._next_check = max(FIRST_AGAIN, 2 * self._replays)
        return result

    def _names(self) -> list[str]:
        """What loss and gradients are called."""
        known = {id(value): name for name, value in self._sites.items()}
        names = (
            known.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in self.parameters
        )
        return ["the loss", *(f"the gradient of {name}" for name in names)]

    def tell_parameters(self) -> None:
        """Lets Pyro's handlers know the parameters, as the program does.

        ``SVI`` looks for them with a handler of its own, and asks for the unconstrained ones.
        Computing a constrained value that no one reads would take a pass over each.
        """
        outer = [h for h in pyro.poutine.runtime._PYRO_STACK if not is_recorder(h)]
        for name, value in self._sites.items():
            if outer and name in self._stored:
                pyro.param(name)
            else:
                _parameter(value, name=name)


def _shared(
    parameters: list[Tensor], grads: list[Tensor | None], others: list[Tensor]
) -> list[int]:
    """Which of the gradients have memory in common with something, or gaps."""
    everything = {id(t): t for t in (*others, *parameters)}.values()
    found = (*everything, *(g for g in grads if g is not None))
    uses = Counter(t.untyped_storage().data_ptr() for t in found)
    return [
        i
        for i, (p, g) in enumerate(zip(parameters, grads, strict=True))
        if g is not None and (uses[g.untyped_storage().data_ptr()] > 1 or g.stride() != p.stride())
    ]


def is_recorder(handler: Any) -> bool:
    """Whether a handler only records parameters, as those of ``SVI`` do."""
    return type(handler) is poutine.trace_messenger.TraceMessenger and bool(handler.param_only)


@effectful(type="param")
def _parameter(value: Any) -> Any:
    value.unconstrained = weakref.ref(value)
    return value


def gradients(loss: Any, parameters: list[Tensor]) -> Result:
    """The loss and its gradients, as ``backward`` would take them."""
    if not parameters:
        return torch.as_tensor(loss).detach(), []
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), list(grads)


def leaves(loss: Any) -> list[Tensor]:
    """The leaves that a loss has a gradient for, in an order of their own."""
    found: dict[int, Tensor] = {}
    root = getattr(loss, "grad_fn", None)
    todo, seen = [root] if root is not None else [], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        todo += [next_ for next_, _ in node.next_functions if next_ is not None]
    return list(found.values())


def _record(program: Callable[..., Any], tensors: Sequence[Tensor], watch: Watch) -> GraphModule:
    def watched(*tensors: Tensor) -> Any:
        with reads_watched(watch):
            return program(*tensors)

    try:
        return make_fx(watched)(*tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(" - erroring out")[0]
        raise FlipoutError(
            f"captured: the program cannot be recorded{_where(error)}: {reason}. It must not read "
            "a number off a tensor (.item(), float(), `if tensor:`, .tolist(), .numpy()) nor "
            "change its course by one; compute with the tensor, or train this program without "
            "captured()"
        ) from error


def _where(error: BaseException) -> str:
    """The user's line of code that an error came from."""
    return users_line(reversed(list(traceback.walk_tb(error.__traceback__))))


@contextlib.contextmanager
def _as_recorded(compiled: bool) -> Iterator[None]:
    """While a program runs as it is recorded: nothing but what it computes."""
    with recording(compiled), pyro.validation_enabled(False), _Unvalidated():
        yield


class _Unchanged(TorchFunctionMode):
    """Lets torch take the kernels that it takes while it records."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Unvalidated(Messenger):
    """Distributions made before do not validate meanwhile: that reads numbers."""

    only_watches = True  # a call that is recorded has the structure of one that is not

    def __enter__(self) -> Any:
        self._changed: list[dict[str, Any]] = []
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        for state in self._changed:
            state["_validate_args"] = True
        super().__exit__(*args)

    def _pyro_sample(self, msg: Any) -> None:
        todo = [msg["fn"]]
        while todo:
            state = vars(todo.pop())
            todo += [part for part in state.values() if isinstance(part, Distribution)]
            if state.get("_validate_args"):
                state["_validate_args"] = False
                self._changed.append(state)


@contextlib.contextmanager
def _modules(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Notes the modules that run."""

    def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        modules.append(module)
        if any(isinstance(arg, PackedSequence) for arg in args):
            raise FlipoutError(
                f"captured: {type(module).__name__} got a packed sequence, whose lengths are "
                "numbers that a replay could not follow; pad the sequences and mask the loss, or "
                "train this program without captured()"
            )

    hook = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _need_cpu(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise FlipoutError(
                f"captured: got a tensor on {tensor.device}, expected all on the CPU; on a GPU "
                "capture the step as a CUDA graph, as the documentation shows under Performance"
            )


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """What is recorded has been cast."""
    if not torch.is_autocast_enabled("cpu"):
        yield
        return
    with torch.autocast("cpu", enabled=False):
        yield
