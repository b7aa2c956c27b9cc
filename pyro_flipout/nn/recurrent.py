# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Recurrent layers and cells: one set of weights for each sequence, at all its steps."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroModule
from torch import nn

from pyro_flipout.nn.bayesian_module import mixin
from pyro_flipout.nn.layer import FlipoutLayer

__all__ = [
    "FlatWeights",
    "FlipoutGRU",
    "FlipoutGRUCell",
    "FlipoutLSTM",
    "FlipoutLSTMCell",
    "FlipoutRNN",
    "FlipoutRNNCell",
]


def _gone() -> None:
    """A reference to weights that have changed, so that torch looks again."""


@mixin(nn.RNNBase)
class FlatWeights:
    """Lets ``torch.nn.RNNBase`` find sites where it keeps a list of its parameters.

    Outside of a call it finds nothing, and so draws nothing.
    """

    _flat_weights_names: list[str]
    _flat_weight_refs: list[Any]
    _pyro_context: Any

    @property
    def _flat_weights(self) -> list[Any]:
        if not self._pyro_context.active:
            return [None] * len(self._flat_weights_names)
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass

    def _init_flat_weights(self) -> None:
        if self._pyro_context.active:
            super()._init_flat_weights()  # type: ignore[misc]
        else:
            self._flat_weight_refs = [_gone] * len(self._flat_weights_names)

    def _weights_have_changed(self) -> bool:
        return bool(self._pyro_context.active) and super()._weights_have_changed()  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._init_flat_weights()


class _Recurrent(FlatWeights, FlipoutLayer):
    batch_first: bool

    def _wished_example_dim(self) -> int | None:
        if self.example_dim is None and not self.batch_first:
            return 1
        return self.example_dim


class FlipoutRNN(_Recurrent, nn.RNN, PyroModule):  # type: ignore[misc]
    """An Elman network, as ``torch.nn.RNN``.

    With ``batch_first=False`` the examples are in dimension 1 of the data, for all layers of
    the execution. Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutLSTM(_Recurrent, nn.LSTM, PyroModule):  # type: ignore[misc]
    """Long short-term memory, as ``torch.nn.LSTM``.

    With ``batch_first=False`` the examples are in dimension 1 of the data, for all layers of
    the execution. Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutGRU(_Recurrent, nn.GRU, PyroModule):  # type: ignore[misc]
    """Gated recurrent units, as ``torch.nn.GRU``.

    With ``batch_first=False`` the examples are in dimension 1 of the data, for all layers of
    the execution. Takes the arguments of its twin, and those of
    :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutRNNCell(FlipoutLayer, nn.RNNCell, PyroModule):  # type: ignore[misc]
    """One step of an Elman network, as ``torch.nn.RNNCell``.

    All steps in one execution see the same weights. Takes the arguments of its twin, and those
    of :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutLSTMCell(FlipoutLayer, nn.LSTMCell, PyroModule):  # type: ignore[misc]
    """One step of long short-term memory, as ``torch.nn.LSTMCell``.

    All steps in one execution see the same weights. Takes the arguments of its twin, and those
    of :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """


class FlipoutGRUCell(FlipoutLayer, nn.GRUCell, PyroModule):  # type: ignore[misc]
    """One step of gated recurrent units, as ``torch.nn.GRUCell``.

    All steps in one execution see the same weights. Takes the arguments of its twin, and those
    of :class:`~pyro_flipout.nn.layer.FlipoutLayer`.
    """
