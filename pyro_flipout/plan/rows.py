# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Which rows of the data of a call belong to which example.

The number N of examples is that of the model's data plate. Where a dimension of the data has that
size it counts the examples; where one has a multiple of it, rows may be folded; where none has,
the data are constants. What is ambiguous (N equal to another size) is decided by the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_flipout.tensor import FlipoutTensor, Rows

__all__ = ["Choice", "Key", "RowsRouter"]


class Choice(NamedTuple):
    """A layout of rows, see :class:`~pyro_flipout.tensor.Rows`, and the dimension they are in."""

    layout: str
    dim: int


class Key(NamedTuple):
    """Calls for which one choice is made.

    :ivar function: the torch function's name.
    :ivar sizes: of the data, in multiples of N; 0 where they are none.
    :ivar sites: of the weights.
    """

    function: str
    sizes: tuple[int, ...]
    sites: tuple[str, ...] = ()


class RowsRouter:
    """Decides the rows of every call, and remembers what it was asked.

    :param num_examples: the number N of examples.
    :param example_dim: dimension of the data that usually counts them.
    :param choices: what an audit has chosen.
    :param other_sizes: whether that audit was of other sizes, so that keys may be new: then the
        choices are those of calls of the same function with as many dimensions.

    :ivar options: for every key that came up, the choices there are, the likeliest first.
    :ivar low_precision: whether a call was in half precision, or under autocast.
    """

    def __init__(
        self,
        num_examples: int,
        example_dim: int,
        choices: Mapping[Key, Choice],
        other_sizes: bool = False,
    ) -> None:
        self.num_examples, self.example_dim = num_examples, example_dim
        self.choices, self.other_sizes = choices, other_sizes
        self.options: dict[Key, list[Choice]] = {}
        self.low_precision = False

    def route(
        self, func: Callable[..., Any], args: Any, kwargs: Any, weights: Sequence[FlipoutTensor]
    ) -> Rows | None:
        """The rows of a call, ``None`` for one row an example in the usual dimension."""
        if any(weight.lead_dims for weight in weights):
            return None
        data = data_of(args, kwargs)
        if data is None:
            return None
        if data.dtype.itemsize < 4 or torch.is_autocast_enabled(data.device.type):
            self.low_precision |= data.is_floating_point()
        key = self.key(func, data, weights)
        if key not in self.options:
            self.options[key] = self._options(key)
        choice = self.choices.get(key) or self.options[key][0]
        if choice == ("examples", self.example_dim):
            return None
        if choice.layout == "constant":
            return Rows("constant")
        count = data.size(choice.dim)
        return Rows(choice.layout, choice.dim, count, device=data.device)

    def key(self, func: Callable[..., Any], data: Tensor, weights: Sequence[FlipoutTensor]) -> Key:
        """The key of a call."""
        count = self.num_examples
        sizes = [n // count if count and n % count == 0 else 0 for n in data.shape]
        sites = tuple(draw.site for weight in weights for draw in weight.draws)
        return Key(getattr(func, "__name__", str(func)), tuple(sizes), sites)

    def _options(self, key: Key) -> list[Choice]:
        usual = Choice("examples", self.example_dim)
        exact = [Choice("examples", dim) for dim, times in enumerate(key.sizes) if times == 1]
        if usual in exact:
            exact.remove(usual)
            exact.insert(0, usual)
        found = exact
        if not (key.function in _RECURRENT and len(key.sizes) < 3):  # packed rows
            found = found + [
                Choice(layout, dim)
                for dim, times in enumerate(key.sizes[:2])
                for layout in ("blocks", "interleaved")
                if times > 1
            ]
            found.append(Choice("constant", 0))
        if usual not in found:
            # Where the sizes say nothing, what the rule says of the data is the better reason.
            says_nothing = not found or found[0].layout == "constant"
            found = [usual, *found] if says_nothing else [*found, usual]
        if not self.other_sizes:
            return found
        alike = {
            choice
            for known, choice in self.choices.items()
            if known.function == key.function
            and known.sites == key.sites
            and len(known.sizes) == len(key.sizes)
        }
        return [choice for choice in found if choice in alike] or found


_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def data_of(args: Any, kwargs: Any) -> Tensor | None:
    """The data among the arguments of a call: the first tensor with the most dimensions.

    Parameters of torch are not data, and neither is a number.
    """
    best: Tensor | None = None
    todo = [*args, *kwargs.values()]
    while todo:
        obj = todo.pop(0)
        if isinstance(obj, Tensor):
            plain = not isinstance(obj, (FlipoutTensor, torch.nn.Parameter))
            if plain and obj.dim() > (0 if best is None else best.dim()) and not obj.is_nested:
                best = obj
        elif isinstance(obj, (list, tuple)):
            todo = [*obj, *todo]
    return best
