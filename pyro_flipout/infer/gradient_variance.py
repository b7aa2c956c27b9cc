# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""How much the gradient of a mini-batch varies, under one estimator and another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import pyro.poutine as poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state

from pyro_flipout._checks import checked_integer, is_integer, is_number
from pyro_flipout.infer._gradients import Sampler, pieces_of
from pyro_flipout.infer._minibatches import Batches, Data
from pyro_flipout.infer._moments import Moments, Spread
from pyro_flipout.infer._variance_table import Table
from pyro_flipout.infer.estimators import Estimator, estimators_of, wrapped_by
from pyro_flipout.poutine.flipout_messenger import Continuation
from pyro_flipout.poutine.symmetric_draw import Message
from pyro_flipout.tensor import FlipoutTensor

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["gradient_variance"]


def gradient_variance(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    estimators: Iterable[str] | Mapping[str, Estimator] = ("shared", "flipout"),
    batch_sizes: Iterable[int] | None = None,
    num_repeats: int = 200,
    batches: str | Batches = "resampled",
    example_dim: int = 0,
    elbo: Any = None,
    divide_by: float | None = None,
    parameters: Iterable[str] | None = None,
    entries: bool = False,
    seed: int | None = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Measures the variance of a mini-batch gradient against the size N of the mini-batch.

    The gradient is that of the objective *per example*, ``loss / N``, with respect to the
    unconstrained parameters of model and guide, as the optimiser sees them. Each entry's variance
    over the repeats is averaged over the entries of a parameter, and over those of all parameters
    of a site (Wen et al. 2018, section 4.1 [1]). Parameters, ``.grad`` and random state are left
    as they were; a guide that was never called is set up.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_flipout.infer import gradient_variance
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    ...     mean = torch.nn.functional.linear(x, w).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> data = torch.randn(256, 3), torch.randn(256)
    >>> found = gradient_variance(model, AutoNormal(model), data, num_repeats=20, progress=False)
    >>> found.site_variance.dims, found.batch_size.values
    (('estimator', 'batch_size', 'site'), array([  1,   4,  16,  64, 256]))
    >>> axes = found.flipout.plot()

    :param model: the bare model.
    :param guide: its guide.
    :param args: a tuple of the model's arguments, with the whole data set in place of a mini-batch.
    :param kwargs: likewise. Every tensor or NumPy array in ``args`` and ``kwargs`` that has as many
        rows as the first one is data, of which mini-batches are taken, also within lists, tuples,
        named tuples, mappings and dataclasses. A list or tuple of as many items is data too,
        such as one of file names. All else is handed over as it is.
    :param estimators: names from :data:`~pyro_flipout.infer.estimators.ESTIMATORS`, or a mapping
        from names to functions that wrap a model.
    :param batch_sizes: values of N; if omitted the powers of 4 up to the size of the data.
    :param num_repeats: gradients for each variance, at least 2; the standard errors need 3.
    :param batches: ``"resampled"``: each repeat has a fresh mini-batch, rows drawn at random with
        replacement, so that the variance is that of data and weights (the paper's);
        ``"fixed"``: the first N rows each time, so that it is that of the weights alone; or a
        function of N that returns the arguments ``args`` of one mini-batch.
    :param example_dim: dimension of the data that counts the examples.
    :param elbo: has ``loss`` and ``loss_and_grads``; ``Trace_ELBO()`` if omitted.
    :param divide_by: what the loss is divided by in place of N. Give the size M of the data set
        if the model scales its likelihood by M / N.
    :param parameters: names of the parameters to look at, with ``*`` for anything
        (``["*locs*"]``); all if omitted.
    :param entries: whether to keep each entry's variance too, in variables named
        ``<parameter>_entries``. The memory is that of two gradients for each estimator and N;
        otherwise of one in all, whatever the repeats.
    :param seed: for :func:`pyro.set_rng_seed`; None to go on from the present random state.
    :param progress: whether to show a progress bar, if tqdm is installed.
    :returns: ``xarray.Dataset`` with ``variance`` and ``variance_se``, its standard error,
        over ``(estimator, batch_size, parameter)``; ``site_variance`` and ``site_variance_se``
        over ``(estimator, batch_size, site)``; ``seconds`` for a gradient, over ``(estimator,
        batch_size)``. See :func:`~pyro_flipout.infer.decompose_variance` and
        :func:`~pyro_flipout.infer.plot_gradient_variance`.
    :raises ValueError: if an argument is out of range or contradicts another, or the model flips
        weights itself.
    :raises TypeError: if an argument has the wrong type, or holds data of which rows cannot be
        taken, such as a data frame or an object with tensors among its attributes.

    .. note:: ``Trace_ELBO`` estimates the KL term from the draw of the weights, noise that
        belongs to no example. A model that does not scale its likelihood then has it at a weight
        of 1/N. Use ``TraceMeanField_ELBO`` with a guide that allows for a closed form, such as
        :class:`~pyro_flipout.infer.AutoMeanField`, to see the examples' noise alone.

    References

    [1] `Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches`,
        Yeming Wen, Paul Vicol, Jimmy Ba, Dustin Tran, Roger Grosse,
        https://arxiv.org/abs/1803.04386
    """
    _check_options(model, guide, num_repeats, elbo, divide_by, seed)
    wrapped = wrapped_by(estimators_of(estimators), model)
    data = Data(args, {} if kwargs is None else kwargs, example_dim, batches)
    sizes = data.check_sizes(batch_sizes)
    with _random_state(seed):
        first = data.batch(sizes[0])
        guide(*first[0], **first[1])
        _check_bare(model, guide, *first)
        elbo = Trace_ELBO() if elbo is None else elbo
        sampler = Sampler(model, guide, elbo, parameters, *first)
        pieces = pieces_of(sampler, *first)
        table = Table(list(wrapped), sizes, sampler, pieces, entries)
        with _bar(len(wrapped) * len(sizes) * num_repeats, progress) as tick:
            for name, program in wrapped.items():
                for size in sizes:
                    moments, seconds = Moments(table.groups, entries), Spread()
                    for _ in range(num_repeats):
                        batch, start = data.batch(size), time.perf_counter()
                        divisor = size if divide_by is None else divide_by
                        moments.add(sampler.draw(program, *batch, divisor))
                        seconds.add(time.perf_counter() - start)
                        tick(f"{name}, N = {size}")
                    table.put(name, size, moments, seconds.mean)
    return table.dataset(num_repeats, data.kind)


def _check_options(
    model: Any, guide: Any, num_repeats: Any, elbo: Any, divide_by: Any, seed: Any
) -> None:
    """What can be checked before anything runs."""
    for name, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise TypeError(
                f"gradient_variance: got {name}={fn!r}, expected a function or module with sample "
                "statements"
            )
    if not is_integer(num_repeats, 2):
        raise ValueError(
            f"gradient_variance: got num_repeats={num_repeats!r}, expected at least 2, an integer"
        )
    if seed is not None:
        checked_integer("gradient_variance", "seed", seed, 0)
    if divide_by is not None and not (is_number(divide_by) and divide_by > 0):
        raise ValueError(
            f"gradient_variance: got divide_by={divide_by!r}, expected a finite number > 0, such "
            "as the size of the data set; omit it to divide by the batch size"
        )
    if elbo is not None and (isinstance(elbo, type) or not hasattr(elbo, "loss_and_grads")):
        raise TypeError(
            f"gradient_variance: got elbo={elbo!r}, expected an object with loss and "
            "loss_and_grads, such as Trace_ELBO()"
        )


class _Sees(Messenger):
    """Learns which sites reach the program as flipped weights."""

    never_sets_values = True

    def __init__(self) -> None:
        super().__init__()
        self.flipped: set[str] = set()

    def _pyro_post_sample(self, msg: Message) -> None:
        msg["continuation"] = Continuation(self._look, msg)

    def _look(self, msg: Message) -> None:
        if isinstance(msg["value"], FlipoutTensor) and msg["value"].terms:
            self.flipped.add(msg["name"])


def _check_bare(model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    """An estimator of the model's own would be compared with itself."""
    sees = _Sees()
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    with sees:
        poutine.replay(model, trace=trace)(*args, **kwargs)
    if sees.flipped:
        raise ValueError(
            f"gradient_variance: the model flips its sites {sorted(sees.flipped)} itself, expected "
            "the bare model: not wrapped in flipout(...), and with the layers of torch.nn under "
            "pyro_flipout.nn.bayesianize in place of Flipout layers"
        )


@contextmanager
def _random_state(seed: int | None) -> Iterator[None]:
    """Seeds everything for the time of the block; None leaves all as it is."""
    if seed is None:
        yield
        return
    state = get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A function that advances the progress bar, or does nothing without tqdm."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        show = False
    if not show:
        yield lambda text: None
        return
    with tqdm(total=total, desc="gradient variance") as bar:

        def tick(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield tick
