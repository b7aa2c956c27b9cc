# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The estimators that can be compared, by name: what each does to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from pyro_flipout.poutine.handlers import flipout, independent, local_reparameterization

__all__ = ["ESTIMATORS", "estimators_of", "wrapped_by"]

Estimator: TypeAlias = Callable[[Any], Any]


def _shared(model: Any) -> Any:
    """No handler: one draw of the weights for the whole mini-batch."""
    return model


def wrapped_by(estimators: Mapping[str, Estimator], model: Any) -> dict[str, Any]:
    """The model of each estimator.

    :raises TypeError: if an estimator returns no model.
    """
    wrapped = {name: wrap(model) for name, wrap in estimators.items()}
    for name, result in wrapped.items():
        if not callable(result):
            raise TypeError(
                f"gradient_variance: estimator {name!r} turned the model into {result!r}, expected "
                "a function that takes a model and returns it wrapped"
            )
    return wrapped


ESTIMATORS: dict[str, Estimator] = {
    "shared": _shared,
    "flipout": flipout,
    "independent": independent,
    "local_reparameterization": local_reparameterization,
}
"""Each wraps a model, as :func:`~pyro_flipout.flipout` does."""


def estimators_of(wanted: Iterable[str] | Mapping[str, Estimator]) -> dict[str, Estimator]:
    """Looks up estimators by name.

    :param wanted: names, or a mapping from names of your own to functions that wrap a model.
    :raises ValueError: if a name is unknown, or there is none.
    :raises TypeError: if a mapping has values that are no functions.
    """
    if isinstance(wanted, Mapping) and wanted:
        for name, wrap in wanted.items():
            if not callable(wrap):
                raise TypeError(
                    f"gradient_variance: estimator {name!r} is {wrap!r}, expected a function that "
                    "takes the model and returns it wrapped, such as flipout(group_size=32)"
                )
        return dict(wanted)
    names = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else [*wanted]
    unknown = [name for name in names if not isinstance(name, str) or name not in ESTIMATORS]
    if unknown or not names:
        raise ValueError(
            f"gradient_variance: got estimators={names}, expected some of {list(ESTIMATORS)}, or "
            "a dict from names to functions of the model"
        )
    return {name: ESTIMATORS[name] for name in names}
