# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What :func:`pyro_flipout.to_arviz` runs: model and guide, draw by draw, batch by batch.

No draw of the weights is kept. Draw s is made anew for every batch, from its own seed and
the first batch's arguments, so that all batches see the same weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from pyro_flipout._arviz_sites import (
    Coherent,
    SetSubsample,
    Unobserve,
    in_plate,
    is_deterministic,
    is_latent,
    sample_sites,
    unscaled_log_prob,
)
from pyro_flipout.infer._minibatches import example_dim_of
from pyro_flipout.poutine import flipout

__all__ = [
    "Batch",
    "Program",
    "Run",
    "batch_of",
    "batches_of",
    "check_not_empty",
    "is_loader",
    "loader_batches",
    "rows_of",
    "signature_of",
    "subsample_batches",
]


class Batch(NamedTuple):
    """Arguments of one call of model and guide.

    :ivar subsample: plate → its indices, where the model takes its own mini-batches.
    :ivar drop: how many of the first examples an earlier batch has had.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    subsample: Mapping[str, Tensor] = MappingProxyType({})
    drop: int = 0


def rows_of(batch: Batch, batch_dim: int = 0) -> int | None:
    """Number of examples: the length of the first tensor argument."""
    for leaf in tree_leaves((batch.args, batch.kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > batch_dim:
            return int(leaf.shape[batch_dim])
    return None


def check_not_empty(what: str, batch: Batch) -> None:
    """Arguments must have a tensor with elements, if they have tensors."""
    tensors = [t for t in tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
    if tensors and all(t.numel() == 0 for t in tensors):
        raise ValueError(
            f"to_arviz: {what} hold no data: tensors of shape "
            f"{[tuple(t.shape) for t in tensors]}; expected at least one example"
        )


def is_loader(args: tuple[Any, ...]) -> bool:
    """Whether the arguments are one loader of batches."""
    return len(args) == 1 and isinstance(args[0], (DataLoader, Iterator))


def loader_batches(
    loader: Iterable[Any], kwargs: dict[str, Any], model: Callable[..., Any]
) -> Iterator[Batch]:
    """The arguments that each batch of a loader stands for."""
    for item in loader:
        yield batch_of(item, kwargs, model)


def batch_of(item: Any, kwargs: dict[str, Any], model: Callable[..., Any]) -> Batch:
    """The arguments that one batch stands for, as the model's signature takes them.

    A dict holds keyword arguments, a tuple or list positional ones, unless the model cannot be
    called with these but with ``item`` itself, as its one positional argument.
    """
    whole = Batch((item,), kwargs)
    if isinstance(item, Mapping):
        named = all(isinstance(key, str) for key in item)
        spread = Batch((), {**kwargs, **item}) if named else whole
    elif isinstance(item, (tuple, list)):
        spread = Batch(tuple(item), kwargs)
    else:
        return whole
    signature = signature_of(model)
    return whole if not _accepts(signature, spread) and _accepts(signature, whole) else spread


def signature_of(model: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a model, or of a module's ``forward``, if Python knows it."""
    try:
        return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    except (TypeError, ValueError):
        return None


def _accepts(signature: inspect.Signature | None, batch: Batch) -> bool:
    if signature is None:
        return False
    try:
        signature.bind(*batch.args, **batch.kwargs)
    except TypeError:
        return False
    return True


def batches_of(whole: Batch, batch_size: int, batch_dim: int = 0) -> Iterator[Batch]:
    """Cuts every tensor argument that counts the examples."""
    rows = rows_of(whole, batch_dim)
    if rows is None:
        raise ValueError(
            f"to_arviz: got batch_size={batch_size} but no tensor argument to cut in dimension "
            f"{batch_dim}; omit batch_size"
        )

    def cut(leaf: Any, start: int) -> Any:
        dim = example_dim_of(leaf, batch_dim, rows)
        return leaf if dim is None else leaf.narrow(dim, start, min(batch_size, rows - start))

    for start in range(0, rows, batch_size):
        yield Batch(*tree_map(lambda leaf: cut(leaf, start), (whole.args, whole.kwargs)))  # noqa: B023


def subsample_batches(whole: Batch, plate: str, size: int, full_size: int) -> Iterator[Batch]:
    """Walks a plate that takes its own mini-batches through all its indices."""
    for start in range(0, full_size, size):
        first = min(start, full_size - size)  # the last batch overlaps with the one before
        index = torch.arange(first, first + size)
        yield Batch(whole.args, whole.kwargs, {plate: index}, start - first)


class Run(NamedTuple):
    """What one draw gives on one batch; ``guide`` is None for draws from the prior."""

    guide: Trace | None
    scored: Trace | None
    predicted: Trace | None


@dataclass
class Program:
    """Model and guide, and how to run them for one draw.

    :ivar plate: the plate that counts the examples, if any.
    :ivar per_example: whether each example sees its own flipped draw.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    per_example: bool
    plate: str | None = None

    def trace(self, fn: Callable[..., Any], batch: Batch, replay: Trace | None = None) -> Trace:
        """Runs ``fn`` on a batch, on the values of ``replay``."""
        fn = fn if replay is None else poutine.replay(fn, trace=replay)
        with poutine.trace() as tracer, SetSubsample(batch.subsample):
            if self.per_example:
                fn(*batch.args, **batch.kwargs)
            else:
                with Coherent():
                    fn(*batch.args, **batch.kwargs)
        return tracer.trace

    def guide_trace(self, batch: Batch, replay: Trace | None = None) -> Trace:
        """Runs the guide; one that runs the model itself is asked for its part of the trace."""
        trace = self.trace(self.guide, batch, replay)
        return self.guide.get_traces()[1] if isinstance(self.guide, GuideMessenger) else trace

    def globals_of(self, trace: Trace) -> Trace:
        """The draws that do not belong to single examples."""
        kept = Trace()
        for name, site in sample_sites(trace):
            if is_latent(site) and not in_plate(site, self.plate):
                kept.add_node(name, **{k: v for k, v in site.items() if k != "name"})
        return kept

    def posterior(self, first: Batch, batch: Batch, seed: int, noise: int, new: bool) -> Run:
        """One draw of the posterior on one batch.

        :param seed: of the draw of the weights.
        :param noise: seed of what is drawn given the weights.
        :param new: the batch is new data: not scored, its local variables from the model.
        """
        torch.manual_seed(seed)
        with torch.set_grad_enabled(self.per_example):  # flipout reads the guide's history
            guide = self.guide_trace(first)
            torch.manual_seed(noise)
            if batch is not first:
                draws = self.globals_of(guide)
                local = any(in_plate(s, self.plate) for _, s in sample_sites(guide))
                guide = self.guide_trace(batch, draws) if local and not new else draws
            program = flipout(self.model) if self.per_example else self.model
            scored = None if new else self.trace(program, batch, guide)
            predicted = self.trace(Unobserve()(program), batch, guide)
        return Run(guide, scored, predicted)

    def prior(self, first: Batch, batch: Batch, seed: int, noise: int) -> Run:
        """One draw of the prior on one batch."""
        torch.manual_seed(seed)
        model = Unobserve()(self.model)
        with torch.no_grad():
            trace = self.trace(model, first)
            if batch is not first:
                torch.manual_seed(noise)
                trace = self.trace(model, batch, self.globals_of(trace))
        return Run(None, None, trace)

    def log_density(self, trace: Trace, batch: Batch, first: bool) -> float:
        """Sum of a trace's unscaled log densities, of examples not seen in earlier batches."""
        total = 0.0
        for _, site in sample_sites(trace):
            local = in_plate(site, self.plate)
            if not (local or first) or is_deterministic(site):
                continue
            log_prob, mask = unscaled_log_prob(site)
            log_prob = log_prob if mask is None else log_prob.masked_fill(~mask, 0.0)
            if local and batch.drop:
                dim = next(f.dim for f in site["cond_indep_stack"] if f.name == self.plate)
                log_prob = log_prob.narrow(dim, batch.drop, log_prob.shape[dim] - batch.drop)
            total += log_prob.sum(dtype=torch.float64).item()
        return total
