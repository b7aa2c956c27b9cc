# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of SVI without Python: the program is recorded once and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro.poutine.runtime as runtime
import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
)
from pyro.util import warn_if_nan
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_flipout._modes import recorded
from pyro_flipout.errors import FlipoutError
from pyro_flipout.infer._captured_program import (
    CapturedProgram,
    Result,
    capture,
    is_recorder,
)
from pyro_flipout.infer._captured_watch import Opaque, Same, Watch
from pyro_flipout.infer._elbo_mixin import ElboMixin, mixed
from pyro_flipout.infer._tensor_loss import compared_loss, is_stock, tensor_loss
from pyro_flipout.infer.mean_field_elbo import MeanFieldELBO

__all__ = ["captured"]

E = TypeVar("E")

MOST = 32
"""Programs that one ELBO keeps: past that the calls differ more than replaying is good for."""

_COMPILED = JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO


def captured(elbo: E, *, compile: bool = False) -> E:
    r"""An ELBO that records model, guide and gradient once and replays them, on a CPU.

    For networks and mini-batches that are small a good part of a step is Python's: Pyro's
    handlers, distributions, autograd. A replayed step calls only torch's operations that compute
    something, the same ones in the same order: the gradient is that of ``elbo`` to the last bit
    (of one particle), and so is the loss but for the rounding of its sum. Model, guide, optimiser
    and ``SVI`` stay as they are.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer import SVI
    >>> from pyro_flipout import flipout
    >>> from pyro_flipout.infer import AutoMeanField, MeanFieldELBO, captured
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> optim = pyro.optim.Adam({"lr": 0.01})
    >>> svi = SVI(flipout(model), AutoMeanField(model), optim, captured(MeanFieldELBO()))
    >>> x, y = torch.randn(8, 3), torch.randn(8)
    >>> for _ in range(20):
    ...     loss = svi.step(x, y)

    What is fixed when a program is recorded, and what is not:

    - *Tensors* are read anew at each call: arguments, parameters, buffers, and whatever the
      program reaches by a closure or an attribute, if it is changed in place.
    - Whatever torch draws is drawn anew: weights, signs, dropout, subsamples.
    - Shapes, dtypes, arguments that are no tensors, autocast, the handlers around the call, the
      modes of modules (``train``, ``eval``), ``requires_grad`` of parameters and the options of
      handlers are looked at before each replay; where they are new, the program is recorded anew.
      Modules and handlers are found by following attributes, containers, closures and the global
      variables that model and guide name. A smaller last batch costs one more program. The factor
      of :func:`tempered` may be annealed.
    - Numbers must not be read off tensors that the program computes or is given (``.item()``,
      ``.tolist()``, ``.numpy()``, ``np.asarray``). Off a small tensor that it holds they may:
      where its entries are new, the program is recorded anew.
    - The shapes of results must not change with the data (``nonzero``, a mask as an index).
    - Everything else that Python computes is a constant from then on.

    The first call with new arguments runs the program as it is, the second records it (a second
    or two for each thousand operations), the third replays it *and* runs it, and compares loss and
    gradients to the last bits. From the fourth on it is replayed, and compared again after 8, 16,
    32, ... replays, so that a number which changes later or slowly is an error too. Pyro's
    validation is in the calls that run the program.

    With ``compile=True`` the recorded program goes to ``torch.compile``, which fuses what is
    computed for every weight: draws, log-densities, their gradients. It gains most where there is
    most of that, as with ``AutoNormal`` and ``Trace_ELBO``; results are the same up to rounding.
    What is recorded is compared with the program to the last bits, and what is compiled with what
    is recorded to half of the digits, since fused kernels round and sum otherwise.
    The third call then takes half a minute, and needs a C++ compiler.

    Works with ``Trace_ELBO``, ``TraceMeanField_ELBO``, :class:`MeanFieldELBO`, these under
    :func:`tempered`, and an ELBO of your own that has a ``differentiable_loss`` which reads no
    number off a tensor. ``loss`` is not captured.

    :param ELBO elbo: the ELBO; it is left as it is.
    :param bool compile: whether to compile what is recorded.
    :returns: an ELBO of the same class.
    :raises TypeError: if it is no ELBO that can be captured.
    :raises FlipoutError: when run, if the program reads a number off a tensor or has tensors that
        are not on the CPU, if a replay does not give what the program gives or has a result of
        another shape, or if there are more than 32 programs.
    """
    if isinstance(elbo, _Captured):
        raise ValueError("captured: got an ELBO that is captured already; capture it once")
    if not isinstance(elbo, ELBO):
        raise TypeError(
            f"captured: got {elbo!r} of type {type(elbo).__name__}, expected an ELBO such as "
            "MeanFieldELBO(); model and guide stay as they are"
        )
    if isinstance(elbo, _COMPILED):
        raise TypeError(
            f"captured: got {type(elbo).__name__}, which torch.jit compiles; give the ELBO that "
            "is not compiled, such as Trace_ELBO()"
        )
    stock = is_stock(elbo, MeanFieldELBO)
    if not (stock or hasattr(elbo, "differentiable_loss")):
        raise TypeError(
            f"captured: got {type(elbo).__name__}, which has no differentiable_loss; use "
            "Trace_ELBO, TraceMeanField_ELBO or MeanFieldELBO"
        )
    captured_elbo: E = mixed(elbo, _Captured, _Programs(stock, compile))
    return captured_elbo


class _Programs(Opaque):
    """What an ELBO has recorded.

    :param stock: whether its loss is that of an ELBO of Pyro.
    :param compiled: whether programs are compiled.
    """

    def __init__(self, stock: bool, compiled: bool) -> None:
        self.stock, self.compiled = stock, compiled
        self.seen: set[Hashable] = set()
        self.recorded: dict[Hashable, list[CapturedProgram]] = {}

    @contextlib.contextmanager
    def first(self, call: _Call | None) -> Iterator[None]:
        """While a call runs as it is; from then on it is known, if it succeeds."""
        if call is None:
            yield
            return
        self.make_room(call.key)
        yield
        self.seen.add(call.key)

    def find(self, key: Hashable) -> CapturedProgram | None:
        return next((p for p in self.recorded.get(key, ()) if p.fits()), None)

    def add(self, key: Hashable, program: CapturedProgram) -> None:
        for programs in self.recorded.values():
            programs[:] = [p for p in programs if p.lives()]
        self.recorded.setdefault(key, []).append(program)

    def make_room(self, key: Hashable) -> None:
        """:raises FlipoutError: if there are too many programs, or calls that would need one."""
        calls, programs = len(self.seen | {key}), sum(map(len, self.recorded.values()))
        if calls > MOST or (key in self.seen and programs >= MOST):
            raise FlipoutError(
                f"captured: this call would be program number {MOST + 1}; a program is recorded "
                "for every new shape of the arguments, for every new value of arguments that are "
                "no tensors, for new handlers around the call and new options of a handler. Give "
                "batches one size (DataLoader's drop_last=True), numbers as tensors, and make "
                "handlers once"
            )


@dataclass
class _Call:
    """A call of an ELBO.

    :param key: all that a program is recorded for.
    :param leaves: the arguments.
    :param tree: how they go together.
    """

    key: Hashable
    leaves: list[Any]
    tree: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the arguments that may change."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def given(self, tensors: Iterable[Tensor]) -> Any:
        """The arguments, positional and by keyword, with these tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.tree)


class _Captured(ElboMixin):
    """Takes loss and gradients from recorded programs."""

    own = "_programs"
    _programs: _Programs

    @staticmethod
    def for_copy(own: _Programs) -> _Programs:
        return _Programs(own.stock, own.compiled)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss; the gradients are added to those of the parameters."""
        call = self._call(model, guide, args, kwargs)
        if call is None or call.key not in self._programs.seen:
            with self._programs.first(call):
                return super().loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[misc]
        parameters, (loss, grads) = self._replay(model, guide, call)
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        warn_if_nan(loss, "loss")
        return loss.item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss as a tensor with a gradient, that of the parameters alone and once."""
        call = self._call(model, guide, args, kwargs)
        if call is None or call.key not in self._programs.seen:
            with self._programs.first(call):
                return super().differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[misc]
        parameters, (loss, grads) = self._replay(model, guide, call)
        return _Known.apply(loss, grads, *parameters)  # type: ignore[no-untyped-call]

    def _call(self, model: Any, guide: Any, args: Any, kwargs: Any) -> _Call | None:
        """This call; None if it has to run as it is."""
        if recorded() or not torch.is_grad_enabled():
            return None
        leaves, tree = tree_flatten((args, kwargs))
        return _Call(self._key(model, guide, leaves, tree), leaves, tree)

    def _replay(self, model: Any, guide: Any, call: _Call) -> tuple[list[Tensor], Result]:
        """Parameters, loss and gradients, of a program that has run before."""
        programs = self._programs

        def run(*tensors: Tensor) -> Any:
            args, kwargs = call.given(tensors)
            if programs.stock:
                loss = tensor_loss if recorded() else compared_loss
                return loss(self, model, guide, args, kwargs)
            return super(_Captured, self).differentiable_loss(model, guide, *args, **kwargs)  # type: ignore[misc]

        program = programs.find(call.key)
        if program is None:
            programs.make_room(call.key)
            watch = Watch([model, guide, self, *_outer()])
            program, result = capture(run, call.tensors, watch, programs.compiled)
            programs.add(call.key, program)
        elif program.due():
            result = program.check(run, call.tensors)
        else:
            program.tell_parameters()
            result = program(*call.tensors)
        return program.parameters, result

    def _key(self, model: Any, guide: Any, leaves: list[Any], tree: Any) -> Hashable:
        """All that a program is recorded for."""
        outer = tuple(map(Same, _outer()))
        modes = (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
        )
        options = (self.num_particles, self.vectorize_particles)  # type: ignore[attr-defined]
        # Tempering a captured ELBO copies it with its programs, which are not those of the copy.
        own = Same(self), options
        return own, model, guide, repr(tree), tuple(map(_kind, leaves)), modes, outer


def _outer() -> list[Any]:
    """The handlers around a call, without those that only record its parameters."""
    return [h for h in runtime._PYRO_STACK if not is_recorder(h)]


def _kind(leaf: Any) -> Hashable:
    """What a program depends on of an argument.

    :raises FlipoutError: if it is a tensor that wants a gradient, or is not plain.
    :raises TypeError: if it is no tensor and cannot be compared.
    """
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise FlipoutError(
                f"captured: got an argument of shape {tuple(leaf.shape)} that requires a gradient, "
                "expected data; make it a pyro.param of the program"
            )
        if type(leaf) is not Tensor or leaf.layout != torch.strided:
            raise FlipoutError(
                f"captured: got an argument of type {type(leaf).__name__}, layout {leaf.layout}, "
                "expected a plain tensor"
            )
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"captured: got an argument of type {type(leaf).__name__}, of which cannot be told "
            "whether it has changed; give tensors, numbers, strings, and lists, tuples and "
            "dictionaries of these"
        ) from None
    return type(leaf), leaf


class _Known(torch.autograd.Function):
    """A loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *(None if g is None else grad * g for g in ctx.grads)
