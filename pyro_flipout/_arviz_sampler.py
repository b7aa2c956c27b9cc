# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The loop of :func:`pyro_flipout.to_arviz`: over batches, then over draws."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace

from pyro_flipout._arviz_groups import Variable
from pyro_flipout._arviz_inputs import (
    draw_seeds,
    examples_site,
    inputs_of,
    length_of,
)
from pyro_flipout._arviz_runs import (
    Batch,
    Program,
    Run,
    batch_of,
    batches_of,
    check_not_empty,
    is_loader,
    loader_batches,
    rows_of,
    subsample_batches,
)
from pyro_flipout._arviz_sites import (
    check_guide,
    check_observed,
    data_frame,
    event_dim_of,
    in_plate,
    is_deterministic,
    is_latent,
    is_observation,
    observations,
    sample_sites,
    swapped,
    unscaled_log_prob,
)
from pyro_flipout._arviz_store import Group, Policy

__all__ = ["Sampler"]


@dataclass
class Sampler:
    """Runs the program batch by batch, draw by draw, and gathers the groups."""

    program: Program
    whole: Batch
    num_samples: int
    num_prior: int
    policy: Policy
    dims: dict[str, Sequence[str]]
    batch_size: int | None
    batch_dim: int
    data_plate: str | None
    progress: bool | None
    stores: dict[str, Group] = field(default_factory=dict)
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    prior_seeds: list[int] = field(default_factory=list)
    observed: set[str] = field(default_factory=set)

    # ------------------------------------------------------------------------- runs

    def run(self, rng: np.random.Generator, predictions: Any) -> None:
        """Draws for the data, then for new inputs."""
        self.seeds, self.prior_seeds = (
            draw_seeds(rng, n) for n in (self.num_samples, self.num_prior)
        )
        self.stats = {name: np.zeros(self.num_samples) for name in ("log_p", "log_q")}
        first, batches, total = self._batches()
        for b, batch in enumerate(batches):
            if b > 0:
                self._check_batch(batch)
            noise = draw_seeds(rng, self.num_samples), draw_seeds(rng, self.num_prior)
            for s in self._bar(self.num_samples, "posterior", b, total):
                run = self.program.posterior(first, batch, self.seeds[s], noise[0][s], new=False)
                self._store_posterior(run, batch, b, s, total or 1)
            for s in self._bar(self.num_prior, "prior", b, total):
                run = self.program.prior(first, batch, self.prior_seeds[s], noise[1][s])
                self._store_predicted(run, batch, b, s, total or 1, ("prior", "prior_predictive"))
            self._storeinputs_of("constant_data", batch, b, total or 1, bool(batch.subsample))
            if b == 0 and predictions is None:
                self._check_dims()
        self._predict(first, predictions, rng)
        self._check_dims()
        posterior = self._group("posterior")
        posterior.left_out |= self.stores["constant_data"].left_out
        posterior.tell()

    def _batches(self) -> tuple[Batch, Iterable[Batch], int | None]:
        """The first batch, all batches, and how many there will be if that is known."""
        if is_loader(self.whole.args):
            if self.batch_size is not None:
                raise ValueError("to_arviz: got batch_size and a loader, expected one of them")
            batches = loader_batches(self.whole.args[0], self.whole.kwargs, self.program.model)
            first = next(batches, None)
            if first is None:
                raise ValueError("to_arviz: the loader is empty")
            self._examine(first)
            return first, itertools.chain([first], batches), length_of(self.whole.args[0])
        first = self.whole
        check_not_empty("the arguments", first)
        if self.batch_size is not None:
            first = next(batches_of(self.whole, self.batch_size, self.batch_dim))
        frame = self._examine(first)
        own = frame is not None and frame.full_size not in (None, frame.size)
        if self.batch_size is not None:
            cut = list(batches_of(self.whole, self.batch_size, self.batch_dim))
            return cut[0], cut, len(cut)
        if own and rows_of(first, self.batch_dim) != frame.size:
            cut = list(subsample_batches(first, frame.name, frame.size, frame.full_size))
            return cut[0], cut, len(cut)
        return first, [first], 1

    def _examine(self, batch: Batch) -> Any:
        """Runs once to learn the sites; finds the plate that counts the examples."""
        check_not_empty("the arguments", batch)
        if isinstance(self.program.model, GuideMessenger):
            raise swapped("is a guide")
        with torch.no_grad():
            guide = self.program.guide_trace(batch)
            trace = self.program.trace(self.program.model, batch, guide)
        observed = observations(trace)
        self.observed = set(observed)
        check_observed(observed, observations(guide))
        check_guide(trace, guide)
        frame = data_frame(trace, rows_of(batch, self.batch_dim), self.data_plate)
        self.program.plate = plate = None if frame is None else frame.name
        self._outside = {
            name: site["value"] for name, site in observed.items() if not in_plate(site, plate)
        }
        return frame

    def _check_batch(self, batch: Batch) -> None:
        """All that changes from one batch to the next must lie in the plate of the examples."""
        if self.program.plate is None:
            raise ValueError(
                "to_arviz: got several batches, but the model has no plate that counts the "
                "examples, so that nothing says how batches go together; put what it observes "
                "into pyro.plate('data', len(x)), or give all data at once"
            )
        if not self._outside:
            return
        with torch.no_grad():
            guide = self.program.guide_trace(batch)
            trace = self.program.trace(self.program.model, batch, guide)
        for name, value in self._outside.items():
            now = trace.nodes[name]["value"] if name in trace.nodes else None
            if now is None or now.shape != value.shape or not torch.equal(now, value):
                raise ValueError(
                    f"to_arviz: got several batches, and the observed site '{name}' changes with "
                    f"them, but lies outside of the plate '{self.program.plate}' that counts the "
                    "examples; put it into that plate, or give all data at once"
                )

    def _check_dims(self) -> None:
        """The user's names of dimensions must be of variables that there are."""
        known = {name for store in self.stores.values() for name in store.names}
        unknown = sorted(set(self.dims) - known)
        if unknown:
            raise ValueError(
                f"to_arviz: dims names the dimensions of {unknown}, expected some of the sites and "
                f"tensor arguments {sorted(known)}"
            )

    def _predict(self, first: Batch, inputs: Any, rng: np.random.Generator) -> None:
        if inputs is None:
            return
        batches, total = self._new_batches(inputs)
        for b, batch in enumerate(batches):
            check_not_empty("predictions", batch)
            noise = draw_seeds(rng, self.num_samples)
            for s in self._bar(self.num_samples, "predictions", b, total):
                run = self.program.posterior(first, batch, self.seeds[s], noise[s], new=True)
                self._store_predicted(run, batch, b, s, total or 1, ("", "predictions"))
            self._storeinputs_of("predictions_constant_data", batch, b, total or 1, own=False)
        if "predictions_constant_data" not in self.stores:
            raise ValueError("to_arviz: the loader of predictions is empty")

    def _new_batches(self, inputs: Any) -> tuple[Iterable[Batch], int | None]:
        model = self.program.model
        if is_loader((inputs,)):
            return loader_batches(inputs, {}, model), length_of(inputs)
        batch = batch_of(inputs, {}, model)
        if self.batch_size is None or rows_of(batch, self.batch_dim) == 0:
            return [batch], 1
        cut = list(batches_of(batch, self.batch_size, self.batch_dim))
        return cut, len(cut)

    def _bar(self, num: int, what: str, batch: int, total: int | None) -> Iterable[int]:
        if self.progress is False or num == 0:
            return range(num)
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return range(num)
        label = what if total == 1 else f"{what}, batch {batch + 1} of {total or '?'}"
        bar: Iterable[int] = tqdm(
            range(num), label, disable=None if self.progress is None else False
        )
        return bar

    # ----------------------------------------------------------------------- stores

    def _group(self, name: str) -> Group:
        if name not in self.stores:
            prior = name.startswith("prior")
            policy = self.policy if name in ("posterior", "prior") else None
            num = self.num_prior if prior else self.num_samples
            self.stores[name] = Group(num, self.program.plate, self.dims, policy)
        return self.stores[name]

    def _store_posterior(self, run: Run, batch: Batch, b: int, s: int, total: int) -> None:
        assert run.scored is not None
        assert run.guide is not None
        if not self.program.per_example:
            self.stats["log_p"][s] += self.program.log_density(run.scored, batch, b == 0)
            self.stats["log_q"][s] += self.program.log_density(run.guide, batch, b == 0)
        for name, site in sample_sites(run.scored):
            if is_observation(site):
                log_prob, mask = unscaled_log_prob(site)
                if mask is not None:
                    log_prob = log_prob.masked_fill(~mask, torch.nan)
                event_dim, value = event_dim_of(site), site["value"]
                self._group("log_likelihood").put(
                    name, s, b, log_prob.double(), site, 0, batch.drop, summed=event_dim
                )
                if s == 0:
                    self._observed().put(name, 0, b, value, site, event_dim, batch.drop)
        self._store_values("posterior", run.scored, batch, b, s, total)
        self._store_predicted(run, batch, b, s, total, ("", "posterior_predictive"))

    def _observed(self) -> Group:
        return self.stores.setdefault("observed_data", Group(1, self.program.plate, self.dims))

    def _store_values(
        self, group: str, trace: Trace, batch: Batch, b: int, s: int, total: int
    ) -> None:
        """Latent and deterministic sites."""
        for name, site in sample_sites(trace):
            if name not in self.observed and (is_latent(site) or is_deterministic(site)):
                self._put(group, name, site, batch, b, s, total)

    def _store_predicted(
        self, run: Run, batch: Batch, b: int, s: int, total: int, groups: tuple[str, str]
    ) -> None:
        """What was observed, drawn anew; for new inputs, deterministic sites of theirs too."""
        assert run.predicted is not None
        for name, site in sample_sites(run.predicted):
            theirs = groups[1] == "predictions" and is_deterministic(site)
            if name in self.observed or theirs:
                self._put(groups[1], name, site, batch, b, s, total)
        if groups[0]:
            self._store_values(groups[0], run.predicted, batch, b, s, total)

    def _put(
        self, group: str, name: str, site: Any, batch: Batch, b: int, s: int, total: int
    ) -> None:
        value, event_dim = getattr(site["value"], "plain", site["value"]), event_dim_of(site)
        loose = is_deterministic(site) and not any(f.vectorized for f in site["cond_indep_stack"])
        if loose and self.program.plate is not None:
            site, event_dim = examples_site(self.program.plate, value, batch, self.batch_dim)
        self._group(group).put(name, s, b, value, site, event_dim, batch.drop, total)

    def _storeinputs_of(self, group: str, batch: Batch, b: int, total: int, own: bool) -> None:
        """Tensor arguments; ``own``: the model takes its own mini-batches from them."""
        if group not in self.stores:
            large = "keep" if self.policy.large == "keep" else "drop"
            policy = Policy(None, self.policy.max_size, large)
            self.stores[group] = Group(1, self.program.plate, self.dims, policy)
        for name, value in inputs_of(self.program.model, batch).items():
            if own and b > 0:
                continue
            site, event_dim = examples_site(self.program.plate, value, batch, self.batch_dim)
            self.stores[group].put(name, 0, b, value, site, event_dim, batches=total)

    # ---------------------------------------------------------------------- results

    def groups(self) -> dict[str, dict[str, Variable]]:
        """Group → name → array."""
        found = {name: store.variables() for name, store in self.stores.items()}
        for name in ("observed_data", "constant_data", "predictions_constant_data"):
            if name in found:
                found[name] = {
                    key: Variable(values[0], dims, sampled=False)
                    for key, (values, dims, _) in found[name].items()
                }
        observed = [v.values for v in found["observed_data"].values()]
        found["constant_data"] = {
            key: variable
            for key, variable in found["constant_data"].items()
            if not any(np.array_equal(variable.values, other) for other in observed)
        }
        if not self.program.per_example:
            found["sample_stats"] = {k: Variable(v, ()) for k, v in self.stats.items()}
        found["posterior_summary"] = self.stores["posterior"].summaries()
        return found

    def coords(self) -> dict[str, Any]:
        """Coordinates that are not counts from 0."""
        return {**self._group("posterior").coords, "statistic": ["mean", "sd"]}

    def attrs(self) -> dict[str, dict[str, Any]]:
        """Attributes of the groups."""
        draws = "per example" if self.program.per_example else "coherent"
        left_out = json.dumps(self._group("posterior").left_out)
        return {"posterior": {"draws_of_the_weights": draws, "left_out": left_out}}
