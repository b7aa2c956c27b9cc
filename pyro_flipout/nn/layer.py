# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What all Flipout layers have in common: sites for parameters that flip by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pyro.poutine.runtime as runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_flipout.errors import ExampleDimError
from pyro_flipout.nn.bayesian_module import BayesianModule, Sites, make_site_
from pyro_flipout.nn.priors import IIDPrior
from pyro_flipout.nn.site_prior import Prior, prior_of
from pyro_flipout.plan.owner import Planned
from pyro_flipout.poutine.flipout_messenger import (
    FlipoutMessenger,
    contradiction,
)
from pyro_flipout.tensor import Execution

__all__ = ["STANDARD_NORMAL", "FlipoutLayer", "LayerMessenger"]

EXECUTION = "pyro_flipout.execution"
_REMEDY = (
    "two layers, or two calls of one, are no parts of a common PyroModule, which would give them "
    "names and one execution; make the model one, as in PyroModule[nn.Sequential]({}(...), ...), "
    "or with pyro.nn.module.to_pyro_module_(model)"
)


STANDARD_NORMAL = IIDPrior(dist.Normal(0.0, 1.0))
"""The prior of every parameter if none is given."""


class FlipoutLayer(BayesianModule):
    """Mixin that makes a torch layer Bayesian, with flipout and without a handler.

    Its parameters are sample sites. Wherever the program reads one, it gets a
    :class:`~pyro_flipout.FlipoutTensor` under the conditions of
    :func:`~pyro_flipout.flipout`: the same one at every use in one execution, that is in one
    outermost call of the PyroModule that the layer is part of. All layers in it count the
    same examples. Under a ``flipout`` handler, that one decides in the layer's place.

    :param prior: of the weights: a distribution, or a function of name and parameter that
        returns one; standard normal if omitted. See :mod:`pyro_flipout.nn.priors`.
    :param bias_prior: of the biases, ``prior`` if omitted. A function that returns None
        leaves them parameters.
    :param example_dim: dimension of the data that counts the examples. If omitted, it is
        what another layer in the execution says, or 0.
    """

    _pyro_context: Any
    _pyro_name: str

    def __init__(
        self,
        *args: Any,
        prior: Prior | None = None,
        bias_prior: Prior | None = None,
        example_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        FlipoutMessenger(example_dim=example_dim)  # checks it
        self.example_dim = example_dim
        self._sites = Sites()
        self._shown = ", ".join(
            f"{name}={_show(given)}"
            for name, given in (("prior", prior), ("bias_prior", bias_prior))
            if given is not None or name == "prior"
        )
        self._make_sites(STANDARD_NORMAL if prior is None else prior, bias_prior)

    def _make_sites(self, prior: Prior, bias_prior: Prior | None) -> None:
        parameters: dict[str, Any] = {
            k: v for k, v in self.__dict__["_parameters"].items() if v is not None
        }
        self._sites.order += parameters
        for name, parameter in parameters.items():
            given = prior_of(prior, bias_prior, name, parameter)
            if given is not None:
                make_site_(self, name, given)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if issubclass(base, nn.Module) and base.__module__.startswith("torch.nn."):
                cls.__signature__ = _signature(base)  # type: ignore[attr-defined]
                return

    def __getattr__(self, name: str) -> Any:
        read: Callable[[str], Any] = super().__getattr__  # type: ignore[misc]
        if name not in self.__dict__.get("_pyro_samples", ()) or not self._pyro_context.active:
            return read(name)
        if any(isinstance(frame, FlipoutMessenger) for frame in runtime._PYRO_STACK):
            return read(name)
        if self._pyro_context.get(self._pyro_get_fullname(name)) is not None:
            return read(name)
        return _messenger_of(self).draw(self, name, read)

    def _wished_example_dim(self) -> int | None:
        return self.example_dim

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        shown = [super().extra_repr()]
        if self.example_dim is not None:
            shown.append(f"example_dim={self.example_dim}")
        return ", ".join(s for s in (*shown, self._shown) if s)


def _show(prior: Prior | None) -> str:
    if prior is None:
        prior = STANDARD_NORMAL.dist
    return getattr(prior, "__name__", None) or repr(prior)


def _signature(twin: type[nn.Module]) -> inspect.Signature:
    """The twin's, with the keywords of a Flipout layer."""
    # The subclasses of RNNBase say that they take anything.
    init: Any = twin.__init__
    left_out = {"self"}
    if issubclass(twin, nn.RNNBase):
        init, left_out = nn.RNNBase.__init__, {"self", "mode"}
    given = [p for p in inspect.signature(init).parameters.values() if p.name not in left_out]
    if twin is nn.RNN:
        at = [p.name for p in given].index("bias")
        given.insert(at, given[at].replace(name="nonlinearity", default="tanh", annotation=str))
    own = list(inspect.signature(FlipoutLayer.__init__).parameters.values())
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*given, *keywords])


# ---------------------------------------------------------------------------- messenger


class LayerMessenger(FlipoutMessenger):
    """Flips the sites of the Flipout layers of one root module, while they are drawn.

    It lives with the root's context, and is on Pyro's stack only while a layer draws a site.
    The execution is kept with the draws, in the cache that Pyro clears when the outermost
    call ends.
    """

    _unowned = Planned("Flipout layers without a handler do not see what is observed")
    _layer: FlipoutLayer | None = None
    _before: tuple[Trace, Execution, dict[str, Tensor]] | None = None
    _to_check = 5  # executions, since a trace is held until the next one

    def __enter__(self) -> LayerMessenger:
        Messenger.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        return Messenger.__exit__(self, *args)

    def draw(self, layer: FlipoutLayer, name: str, read: Callable[[str], Any]) -> Any:
        """Reads a site of a layer."""
        cache = layer._pyro_context.cache
        self._layer = layer
        self._execution, self._flipped = cache.get(EXECUTION, (None, {}))
        try:
            with self:
                return read(name)
        except RuntimeError as why:
            if "Multiple" in str(why) and not layer._pyro_name:
                raise RuntimeError(f"{why}: {_REMEDY.format(type(layer).__name__)}") from why
            raise
        finally:
            if self._execution is not None:
                cache[EXECUTION] = self._execution, self._flipped
            self._layer = None
            self._forget()

    def _execution_of(self, name: str) -> Execution:
        if self._execution is None:
            self._check_before()
            self._execution, self._flipped = self._new_execution(), {}
            recorder = self._stack.recorder
            if recorder is not None and self._to_check:
                self._to_check -= 1
                self._before = recorder.trace, self._execution, self._flipped
        if self._layer is not None and self._layer.example_dim is not None:
            self._execution.example_dim_given = True
        wish = None if self._layer is None else self._layer._wished_example_dim()
        if wish is None or wish == self._execution.example_dim:
            return self._execution
        if self._execution.num_examples is not None:
            raise ExampleDimError(
                f"flipout: {type(self._layer).__name__} with site '{name}' has its examples in "
                f"dimension {wish}, but the layers before it found "
                f"{self._execution.num_examples} examples in dimension "
                f"{self._execution.example_dim}; give those example_dim={wish} too, or this one "
                f"data with the examples in dimension {self._execution.example_dim} "
                "(batch_first=True, for a recurrent layer)"
            )
        self._execution.example_dim = wish
        return self._execution

    def _check_before(self) -> None:
        """Compares what the layers counted in their last execution with the plates of its trace.

        The layers are not on Pyro's stack when data are observed.
        """
        if self._before is None:
            return
        (trace, execution, flipped), self._before = self._before, None
        for node in trace.nodes.values():
            if node["type"] == "sample" and node["is_observed"]:
                reason = contradiction(execution, node, execution.example_dim)
                if reason:
                    self._flipped = flipped
                    self._share_from_now_on(reason)
                    return


def _messenger_of(layer: FlipoutLayer) -> LayerMessenger:
    context = layer._pyro_context
    if "_flipout" not in vars(context):
        context._flipout = LayerMessenger()
    messenger: LayerMessenger = context._flipout
    return messenger
