# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Arguments of programs: tensors within lists, tuples, named tuples, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["holds_rows", "is_container", "leaves", "map_leaves", "select"]

_PLAIN = (
    *(type(None), str, bytes, numbers.Number, torch.Size, torch.dtype, torch.device),
    *(type, FunctionType, MethodType, ModuleType, nn.Module, torch.Generator),
)
"""Types whose values have no rows of data, or, as a module, none to be cut."""

_DEPTH = 3  # how many objects within objects are searched for tensors


def is_container(obj: Any) -> bool:
    """Whether its items are looked at one by one."""
    if isinstance(obj, (list, tuple, dict)):
        return not isinstance(obj, (PackedSequence, torch.Size))
    if isinstance(obj, (Tensor, *_PLAIN)):
        return False
    return isinstance(obj, Mapping) or dataclasses.is_dataclass(obj)


def _items(obj: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Key, value and path of each item of a container."""
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        for i, name in enumerate(obj._fields):
            yield i, obj[i], f"{path}.{name}"
    elif isinstance(obj, (list, tuple)):
        for i, item in enumerate(obj):
            yield i, item, f"{path}[{i}]"
    elif dataclasses.is_dataclass(obj):
        for field in dataclasses.fields(obj):
            if hasattr(obj, field.name):
                yield field.name, getattr(obj, field.name), f"{path}.{field.name}"
    else:
        for key, value in obj.items():
            yield key, value, f"{path}[{key!r}]"


def leaves(obj: Any) -> Iterator[Any]:
    """All that is in nested containers and is no container."""
    if not is_container(obj):
        yield obj
    else:
        for item in _values(obj):
            yield from leaves(item)


def _values(obj: Any) -> Iterable[Any]:
    if isinstance(obj, (list, tuple)):
        return obj
    return obj.values() if type(obj) is dict else (value for _, value, _ in _items(obj, ""))


def map_leaves(
    obj: Any,
    function: Callable[[Any, str], Any],
    path: str,
    caller: str,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Replaces the leaves of nested containers.

    A container of which no leaf changes is given back itself.

    :param function: of a leaf and its path; gives the leaf itself to leave it as it is.
    :param path: of ``obj``, as in ``args[0]``.
    :param caller: the public function, for messages.
    :param is_leaf: whether a container counts as a leaf.
    :raises TypeError: if a container with a leaf that changes cannot be made anew.
    """
    if not is_container(obj) or (is_leaf is not None and is_leaf(obj)):
        return function(obj, path)
    old = list(_items(obj, path))
    new = {key: map_leaves(v, function, at, caller, is_leaf) for key, v, at in old}
    changed = {key: new[key] for key, value, _ in old if new[key] is not value}
    return _rebuilt(obj, new, changed, path, caller) if changed else obj


def _rebuilt(obj: Any, new: dict[Any, Any], changed: dict[Any, Any], path: str, caller: str) -> Any:
    if dataclasses.is_dataclass(obj):
        return _replaced(obj, changed, path, caller)
    if isinstance(obj, (MutableMapping, list)):
        result: Any = copy.copy(obj)
        for key, value in changed.items():
            result[key] = value
        return result
    if isinstance(obj, MappingProxyType):
        return MappingProxyType(new)
    if hasattr(obj, "_make"):  # a named tuple
        return obj._make(new.values())
    if type(obj) is tuple or hasattr(obj, "n_fields"):  # or what torch.max returns
        return type(obj)(new.values())
    raise TypeError(
        f"{caller}: cannot make {path}, a {type(obj).__name__}, anew with other tensors in it; "
        "use a list, tuple, named tuple, dict or dataclass"
    )


def _replaced(obj: Any, changed: dict[str, Any], path: str, caller: str) -> Any:
    """A dataclass made anew, so that what its ``__post_init__`` computes fits its fields."""
    computed = {field.name for field in dataclasses.fields(obj) if not field.init}
    stale = computed.intersection(changed)
    if stale and not hasattr(obj, "__post_init__"):
        raise TypeError(
            f"{caller}: {path}, a {type(obj).__name__}, has rows of data in {sorted(stale)}, which "
            "are not among the arguments of its __init__, so that it cannot be made anew with "
            "other rows; remove init=False"
        )
    try:
        kept = {name: value for name, value in changed.items() if name not in computed}
        return dataclasses.replace(obj, **kept)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{caller}: cannot make {path}, a {type(obj).__name__}, anew with dataclasses.replace: "
            f"{error}"
        ) from error


def holds_rows(obj: Any, rows: int, dim: int) -> bool:
    """Whether an object that is no container seems to hold data of ``rows`` examples.

    It does if its length is ``rows``, or its first dimension or dimension ``dim``, or that of a
    tensor among its attributes or those of its attributes: so do a data frame, a packed sequence,
    a distribution or a data set.
    """
    return _holds(obj, (rows, dim), _DEPTH, set())


def _holds(obj: Any, of: tuple[int, int], depth: int, seen: set[int]) -> bool:
    if isinstance(obj, _PLAIN) or id(obj) in seen:
        return False
    seen.add(id(obj))
    if isinstance(obj, Tensor) and obj.is_nested:
        return obj.size(0) == of[0]
    if isinstance(obj, PackedSequence):
        return int(obj.batch_sizes[0]) == of[0]
    if is_container(obj):
        return any(_holds(leaf, of, depth, seen) for leaf in leaves(obj))
    shape, (rows, dim) = _shape(obj), of
    if any(size == rows for size in (*shape[:1], *shape[dim : dim + 1])):
        return True
    return depth > 0 and any(_holds(value, of, depth - 1, seen) for value in _attributes(obj))


def _attributes(obj: Any) -> list[Any]:
    """The values of its attributes, without those that a property would compute."""
    slots = [name for base in type(obj).__mro__ for name in _names(vars(base).get("__slots__", ()))]
    found = [getattr(obj, name) for name in slots if hasattr(obj, name)]
    return [*found, *getattr(obj, "__dict__", {}).values()]


def _names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _shape(obj: Any) -> Sequence[Any]:
    """Its shape, or its length as one of one dimension; empty without either."""
    shape = getattr(obj, "shape", None)
    if isinstance(shape, tuple):
        return shape
    try:
        return (len(obj),) if isinstance(obj, Sized) else ()
    except (TypeError, NotImplementedError):  # of a loader over an iterable data set
        return ()


def select(obj: Tensor | np.ndarray, dim: int, index: Tensor) -> Any:
    """Some rows of a tensor, dense or sparse, or of an array.

    :param dim: the dimension that counts the rows.
    :param index: ``int64`` tensor of shape ``(N,)`` on the CPU.
    """
    if isinstance(obj, np.ndarray):
        return obj.take(index.numpy(), axis=dim)
    index = index.to(obj.device)
    if obj.layout in (torch.sparse_csr, torch.sparse_csc):
        return obj.to_sparse_coo().index_select(dim, index).to_sparse(layout=obj.layout)
    return obj.index_select(dim, index)
