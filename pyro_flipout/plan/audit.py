# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""The proof that every example sees one weight of its own, on the user's model and data.

For each flipped site there are two draws of the weight, :math:`W` and :math:`W^*` (see
:mod:`pyro_flipout.plan.probe`). The bare model is run on each of them, and the flipped model with
examples of both kinds. Every element of every log-density must then be *exactly* what one of the
two bare runs gives, and the gradients with respect to centre and perturbation must be the sums of
the gradients of the bare runs over the elements of their kind. If that holds, no element depends on
the weights of two examples, every use of a site sees the same one, no call slipped past the rules,
and every sign is where it belongs. A log-density that is one number for several examples is right
if it is a sum of terms of one example each: then the numbers of a run and of the run with all kinds
exchanged add up to those of the bare runs.

Sites for which it fails are left out one after the other, after other layouts of the rows
(:mod:`pyro_flipout.plan.rows`) have been tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flipout.errors import FlipoutError
from pyro_flipout.plan.densities import Density, log_densities, plate_sizes
from pyro_flipout.plan.isolation import Isolated
from pyro_flipout.plan.probe import Drawn, Probe, kinds_of, mirrored_codes
from pyro_flipout.plan.rows import Choice, Key, RowsRouter

__all__ = ["Audit", "Finding", "Verdict"]

ROUNDS = 3
"""With other kinds of the examples each: two that are alike in one are not in another."""
PATTERNS = 4
"""Of signs, to be tried until one makes a difference: where one unit is alive, half of them do."""
_FEW_CODES = 8
"""Of a weight, so that a random pattern may well leave a given part of it as it is."""
MOST_RUNS = 150
"""Runs of the model in search of layouts and of the sites that are at fault."""

RunModel = Callable[[Probe], Trace]
Densities: TypeAlias = Mapping[str, Density]


@dataclass(frozen=True)
class Finding:
    """What an audit found of one site.

    :ivar flipped: whether it may be flipped.
    :ivar verified: whether that, or that it may not, was proved.
    :ivar reason: why it is not flipped, or not verified.
    :ivar mixed: whether it was proved to mix examples, or that its signs are wrong.
    :ivar tell: whether to warn that it is not verified.
    """

    flipped: bool
    verified: bool
    reason: str = ""
    mixed: bool = False
    tell: bool = False


@dataclass
class Verdict:
    """The result of an audit.

    :ivar num_examples: the number of examples, ``None`` if nothing says it.
    :ivar findings: by site.
    :ivar choices: the layout of every kind of call that came up.
    :ivar largest: for each observed site, the largest difference that was found in the end,
        relative to that of the two draws.
    :ivar elements: for each observed site, how many elements see W*, of how many that could.
    :ivar runs: how often the model was run.
    :ivar others: what holds for sites that the audit did not meet.
    :ivar of_integers: whether the layouts may depend on integers among the arguments.
    :ivar shuffled: whether they were seen not to, with those integers in another order.
    """

    num_examples: int | None
    findings: dict[str, Finding]
    choices: dict[Key, Choice] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    elements: dict[str, tuple[int, int]] = field(default_factory=dict)
    runs: int = 0
    others: Finding | None = None
    of_integers: bool = False
    shuffled: bool = False

    def of(self, site: str) -> Finding | None:
        """What was found of a site, or of all that were not met."""
        return self.findings.get(site, self.others)


class _Failed(Exception):
    """A run that the bare model survives raised an error or gave no comparable densities."""


@dataclass
class _Run:
    densities: Densities
    probe: Probe


@dataclass
class _Attempt:
    """One hypothesis: which sites are flipped, with which layouts.

    :ivar excluded: sites that are not, and why.
    :ivar wrong: descriptions of what differs, by observed site; empty if the proof holds.
    """

    sites: frozenset[str]
    choices: dict[Key, Choice]
    excluded: dict[str, str]
    wrong: dict[str, str]
    options: dict[Key, list[Choice]]
    error: Exception | None = None
    of_integers: bool = False
    shuffled: bool = False
    blind: frozenset[str] = frozenset()
    largest: dict[str, float] = field(default_factory=dict)
    elements: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not self.wrong

    @property
    def seen(self) -> frozenset[str]:
        """Sites that are flipped, and seen to be."""
        return self.sites - self.blind if self.holds else frozenset()


class Audit:
    """An audit of one model, guide and data.

    :param run_model: runs the model with the weights of a probe and gives its trace.
    :param isolated: puts back what a run changes.
    :param example_dim: dimension of the data that usually counts the examples.
    :param group_size: how many neighbouring examples have their signs in common.
    :param particles: names of plates that are no data.
    :param grad_mode: whether gradients are on where the audit is asked for.
    :param strict: whether what cannot be flipped is an error, as for ``on_missing_rule="error"``.
    """

    def __init__(
        self,
        run_model: RunModel,
        isolated: Isolated,
        example_dim: int = 0,
        group_size: int = 1,
        particles: frozenset[str] = frozenset(),
        grad_mode: bool = True,
        strict: bool = False,
    ) -> None:
        self._run_model, self._isolated = run_model, isolated
        self.example_dim, self.group_size = example_dim, group_size
        self.particles, self.grad_mode = particles, grad_mode
        self._strict = strict
        self.runs = 0
        self._enlarge = True
        self._start()

    def _start(self, round: int = 0) -> None:
        self._drawn: dict[str, Drawn] = {}
        self._round = round
        self._bare: dict[Any, _Run] = {}

    # ------------------------------------------------------------------------- verdict

    def verdict(self) -> Verdict:
        """Runs the audit.

        :raises Exception: whatever the bare model raises.
        """
        try:
            return self._verdict()
        except _Again:
            return self._verdict()

    def _verdict(self) -> Verdict:
        self._isolated.watch = True  # of what the first run writes to
        trace, probe = self._traced(Probe({}, grad_mode=self.grad_mode))
        self._isolated.watch = False
        sites = list(dict.fromkeys(probe.sites))
        if not sites:
            return Verdict(None, {}, runs=self.runs)
        log_densities(trace, sites)
        sizes = plate_sizes(trace, self.particles)
        observed = any(n["type"] == "sample" and n["is_observed"] for n in trace.nodes.values())
        if not observed:
            return self._unverified(sites, None, "nothing is observed")
        if sizes and max(sizes) <= 1:
            return Verdict(None, {s: Finding(True, True) for s in sites}, runs=self.runs)
        candidates = [size for size in sizes if size > 1]
        try:
            return self._search_sizes(sites, candidates)
        except _Repeats as why:
            return self._unverified(sites, None, str(why), tell=True)
        except _Failed as why:
            return self._unverified(sites, candidates[0] if candidates else None, str(why))

    def _unverified(
        self, sites: Iterable[str], count: int | None, reason: str, tell: bool = False
    ) -> Verdict:
        found = Finding(True, False, reason, tell=tell)
        return Verdict(count, dict.fromkeys(sites, found), runs=self.runs)

    def _search_sizes(self, sites: Sequence[str], candidates: list[int]) -> Verdict:
        best: tuple[int, _Attempt] | None = None
        for count in candidates:
            attempt = self._search(sites, count)
            if best is None or len(attempt.seen) > len(best[1].seen):
                best = count, attempt
            if len(attempt.seen) == len(sites):
                break
        if best is None or not best[1].seen:
            counted = self._counted(sites)
            if counted is not None and counted > 1 and counted not in candidates:
                attempt = self._search(sites, counted)
                if best is None or attempt.seen:
                    best = counted, attempt
        if best is None:
            return self._unverified(sites, None, _NO_PLATE)
        verdict = self._conclude(sites, *best)
        if not candidates:  # what a rule has counted may be rows of something else
            guessed = Finding(True, False, _NO_PLATE)
            found = verdict.findings.items()
            verdict.findings = {s: guessed if f.flipped else f for s, f in found}
        return verdict

    def _counted(self, sites: Iterable[str]) -> int | None:
        """The number of examples that the first rule with data counts."""
        probe = Probe(self._drawn, flipped=frozenset(sites), grad_mode=self.grad_mode)
        with contextlib.suppress(Exception):
            self._traced(probe)
        counts = [e.num_examples for e in probe.executions if e.num_examples]
        return counts[0] if counts else None

    def _conclude(self, sites: Sequence[str], count: int, attempt: _Attempt) -> Verdict:
        findings = {}
        for site in sites:
            if site not in attempt.sites:
                reason = attempt.excluded[site]
                findings[site] = Finding(False, True, reason, reason.startswith(_MIXED))
            elif site in attempt.blind:
                findings[site] = Finding(True, False, _BLIND)
            else:
                findings[site] = Finding(True, True)
        return Verdict(
            count,
            findings,
            attempt.choices,
            attempt.largest,
            attempt.elements,
            self.runs,
            of_integers=attempt.of_integers,
            shuffled=attempt.shuffled,
        )

    # -------------------------------------------------------------------------- search

    def _search(self, sites: Sequence[str], count: int) -> _Attempt:
        """The largest set of sites that can be flipped, with the layouts that it takes."""
        first = self._attempt(sites, count, {})
        if first.holds and not _could_gain(first):
            return first
        if first.wrong:
            self._check_repeats()
        best, options = first, dict(first.options)
        base: dict[Key, Choice] = {}
        while True:  # from the best layouts on, as long as others flip more sites
            before = len(best.seen)
            for layouts in _alternatives(options):
                if self.runs > MOST_RUNS // 3:
                    break
                attempt = self._attempt(sites, count, {**base, **layouts})
                options.update({k: v for k, v in attempt.options.items() if k not in options})
                if len(attempt.seen) > len(best.seen):
                    best = attempt
                if len(best.seen) == len(sites):
                    return best
            if len(best.seen) == before or self.runs > MOST_RUNS // 3:
                break
            base = best.choices
        if first.error is not None and (self._strict or isinstance(first.error, FlipoutError)):
            raise first.error
        if best.holds and len(best.seen) + len(first.excluded) >= len(sites):
            return best
        alone = self._one_by_one(sites, count, options, first)
        # Of two that flip as many, the one whose reasons are those of the likeliest layout.
        return alone if len(alone.seen) >= len(best.seen) or not best.holds else best

    def _one_by_one(
        self,
        sites: Sequence[str],
        count: int,
        options: Mapping[Key, list[Choice]],
        first: _Attempt,
    ) -> _Attempt:
        """Finds the sites that are right by themselves, then those that are right together.

        Halves of those that are wrong together are tried in turn.
        """
        right: list[str] = []
        choices: dict[Key, Choice] = {}
        excluded = dict(first.excluded)
        joint = "; ".join(first.wrong.values())
        half = len(sites) // 2
        groups = [list(sites)] if len(sites) < 2 else [list(sites[:half]), list(sites[half:])]
        while groups:
            group = groups.pop(0)
            attempt = self._attempt(group, count, choices)
            if not attempt.holds and len(group) > 1 and self.runs < MOST_RUNS:
                middle = len(group) // 2
                groups[:0] = [group[:middle], group[middle:]]
                continue
            right += [site for site in group if site in attempt.seen]
            if attempt.seen:
                choices = {**attempt.choices, **choices}
            for site in group:
                if site in attempt.seen:
                    excluded.pop(site, None)
                    continue
                found = self._by_other_layouts(site, count, choices, options)
                if found is None:
                    excluded[site] = _why(attempt, site) or joint
                    continue
                excluded.pop(site, None)
                right.append(site)
                choices = {**found.choices, **choices}
        return self._together(right, count, choices, excluded, first)

    def _by_other_layouts(
        self,
        site: str,
        count: int,
        choices: Mapping[Key, Choice],
        options: Mapping[Key, list[Choice]],
    ) -> _Attempt | None:
        """An attempt with other layouts in which one site is right, if there is one."""
        for layouts in _alternatives(options):
            if self.runs > MOST_RUNS // 2:
                return None
            attempt = self._attempt([site], count, {**choices, **layouts})
            if site in attempt.seen:
                return attempt
        return None

    def _together(
        self,
        right: list[str],
        count: int,
        choices: dict[Key, Choice],
        excluded: dict[str, str],
        first: _Attempt,
    ) -> _Attempt:
        if not right:
            return _Attempt(frozenset(), {}, excluded, {}, first.options)
        attempt = self._attempt(right, count, choices)
        if attempt.holds:
            attempt.excluded = {**excluded, **attempt.excluded}
            return attempt
        kept: list[str] = []
        last = _Attempt(frozenset(), {}, {}, {}, first.options)
        for site in right:
            attempt = self._attempt([*kept, site], count, choices)
            if site in attempt.seen:
                kept.append(site)
                last = attempt
            else:
                excluded[site] = _why(attempt, site)
        last.excluded = {**excluded, **last.excluded}
        return last

    # ------------------------------------------------------------------------- attempts

    def _attempt(self, sites: Sequence[str], count: int, choices: dict[Key, Choice]) -> _Attempt:
        """Tests one hypothesis; sites that a rule leaves shared are left out first."""
        excluded: dict[str, str] = {}
        options: dict[Key, list[Choice]] = {}
        while True:
            flipped = frozenset(sites) - set(excluded)
            router = RowsRouter(count, self.example_dim, choices)
            if not flipped:
                return _Attempt(flipped, {}, excluded, {}, options)
            try:
                run = self._flipped_run(flipped, count, 0, router)
            except Exception as why:
                wrong = {"": f"{type(why).__name__}: {why}"}
                every = {**options, **router.options}
                return _Attempt(flipped, choices, excluded, wrong, every, why)
            options.update(router.options)  # also those of calls that a rule left shared
            newly = {s: why for s, why in run.probe.shared.items() if s in flipped}
            if not newly:
                break
            excluded.update(newly)
        attempt = _Attempt(flipped, _used(choices, router.options), excluded, {}, options)
        self._prove(attempt, run, count)
        return attempt

    def _prove(self, attempt: _Attempt, first: _Run, count: int) -> None:
        blind = attempt.sites
        for pattern in range(PATTERNS):
            star = self._bare_run(first.probe.patterns())
            comparison = self._comparison(first, star, count)
            unseen: frozenset[str] = frozenset(attempt.sites)
            for round in range(_rounds(count, self.group_size)):
                run = first if round == 0 else self._again(attempt, count, round)
                wrong = comparison.check(run.densities, run.probe.kinds)
                other = None
                if wrong:
                    other = self._again(attempt, count, round, exchanged=True)
                    wrong = comparison.check_sum(run.densities, other.densities, wrong)
                if wrong:
                    attempt.wrong = wrong
                    return
                if round == 0:
                    wrong, unseen = self._gradients(attempt, comparison, run, other)
                    if wrong:
                        attempt.wrong = wrong
                        return
            attempt.wrong = self._mirrored(attempt, first, count) or self._of_integers(
                attempt, count
            )
            if attempt.wrong:
                return
            attempt.largest, attempt.elements = comparison.largest, comparison.elements
            blind = attempt.blind = blind & unseen
            if not blind or pattern == PATTERNS - 1:
                return
            # Another pattern: with this one the two draws gave equal densities.
            self._start(self._round + 1)
            first = self._again(attempt, count, 0)

    def _of_integers(self, attempt: _Attempt, count: int) -> dict[str, str]:
        """What differs with other integers in the arguments, where rows are folded.

        The owners of rows may be such integers, and happen to be in blocks: layouts are kept for
        calls with the same shapes.
        """
        if not any(c.layout in ("blocks", "interleaved") for c in attempt.choices.values()):
            return {}
        attempt.of_integers = True
        try:
            run = self._again(attempt, count, 0, shuffled=True)
            bare = self._run(Probe(self._drawn, grad_mode=self.grad_mode, shuffled=True))
            star = self._run(
                Probe(
                    self._drawn,
                    second=run.probe.patterns(),
                    grad_mode=self.grad_mode,
                    shuffled=True,
                )
            )
        except Exception:  # these integers cannot be others: nobody knows
            return {}
        comparison = _Comparison(bare.densities, star.densities, count)
        wrong = comparison.check(run.densities)
        attempt.shuffled = not wrong
        return dict.fromkeys(wrong, _OWNERS)

    def _comparison(self, run: _Run, star: _Run, count: int) -> _Comparison:
        router = run.probe.router
        low = router is not None and router.low_precision
        return _Comparison(self._bare_run({}).densities, star.densities, count, low)

    def _mirrored(self, attempt: _Attempt, first: _Run, count: int) -> dict[str, str]:
        """What differs if the second draw is the first one mirrored.

        A random pattern leaves some elements of a small weight as they are. A density that has
        these of one example, and the others of another, looks like one of the two draws then.
        """
        if all(len(self._drawn[site].codes) > _FEW_CODES for site in attempt.sites):
            return {}
        drawn, bare = self._drawn, self._bare
        codes = {site: mirrored_codes(draw) for site, draw in first.probe.draws.items()}
        self._drawn = drawn | {s: replace(drawn[s], codes=of_site) for s, of_site in codes.items()}
        self._bare = {key: run for key, run in bare.items() if not key}
        try:
            for round in range(_rounds(count, self.group_size)):
                run = self._again(attempt, count, round)
                star = self._bare_run(run.probe.patterns())
                comparison = self._comparison(run, star, count)
                wrong = comparison.check(run.densities)
                if wrong:
                    other = self._again(attempt, count, round, exchanged=True)
                    wrong = comparison.check_sum(run.densities, other.densities, wrong)
                if wrong:
                    return wrong
        finally:
            self._drawn, self._bare = drawn, bare
        return {}

    def _gradients(
        self, attempt: _Attempt, comparison: _Comparison, run: _Run, other: _Run | None
    ) -> tuple[dict[str, str], frozenset[str]]:
        """Compares gradients; also says of which sites the patterns made no difference."""
        names = sorted(attempt.sites)
        leaves = [t for s in names for t in (self._drawn[s].center, self._drawn[s].delta)]
        expected, found = comparison.totals(
            run.densities, None if other is None else other.densities
        )
        try:
            want = _grad(expected, leaves)
        except RuntimeError as why:
            if "inplace operation" not in str(why):
                raise
            raise _Failed(
                "the model writes to a tensor that its gradient needs, so that the gradients of "
                "several runs cannot be compared"
            ) from why
        try:
            got = _grad(found, leaves)
        except FlipoutError as why:  # a gradient came where the rules send none
            return {"": str(why)}, frozenset()
        wrong, unseen = {}, set()
        largest = max((float(g.abs().max()) for g in want if g.numel()), default=0.0)
        floor = comparison.noise(largest)
        for i, name in enumerate(names):
            (of_center, of_delta), pair = want[2 * i : 2 * i + 2], got[2 * i : 2 * i + 2]
            if not of_center.numel():
                continue
            size = max(float(of_center.abs().max()), float(of_delta.abs().max()))
            tolerance = comparison.relative * size + floor
            if not float((of_delta - of_center).abs().max()) > tolerance:
                unseen.add(name)
            for what, a, b in zip(("center", "delta"), (of_center, of_delta), pair, strict=True):
                difference = float((a - b).abs().max())
                if not difference <= 5 * tolerance:
                    wrong[name] = (
                        f"the gradient with respect to the {what} of '{name}' is not the sum of "
                        f"those of the examples (off by {difference:.3g}, of {size:.3g}): a call "
                        "computes its gradient outside of the rules"
                    )
        return wrong, frozenset(unseen)

    # ----------------------------------------------------------------------------- runs

    def _bare_run(self, second: Mapping[str, Tensor]) -> _Run:
        # Without what a rule did without, one site has few patterns.
        key = frozenset((site, tuple(pattern.shape)) for site, pattern in second.items())
        if key not in self._bare:
            probe = Probe(self._drawn, second=second, grad_mode=self.grad_mode)
            try:
                self._bare[key] = self._run(probe)
            except Exception as why:
                if not second:
                    raise _Failed(f"its log-densities raised {type(why).__name__}: {why}") from why
                if self._enlarge:
                    self._enlarge = False
                    self._start(self._round)
                    raise _Again from why
                raise _Failed(
                    f"with another draw of the weights the model raised {type(why).__name__}: {why}"
                ) from why
        return self._bare[key]

    def _check_repeats(self) -> None:
        """Tells what mixes examples from what cannot be run twice."""
        before = self._bare_run({})
        again = self._run(Probe(self._drawn, grad_mode=self.grad_mode))
        if _Comparison(before.densities, before.densities, 1).check(again.densities):
            raise _Repeats(
                "the model gives other numbers when it is run again from the same state, since it "
                "changes something that is not torch's; say flipout(audit=False) if its examples "
                "are apart"
            )

    def _flipped_run(
        self,
        flipped: frozenset[str],
        count: int,
        round: int,
        router: RowsRouter,
        exchanged: bool = False,
        shuffled: bool = False,
    ) -> _Run:
        groups = -(-count // self.group_size)
        kinds = kinds_of(groups, round + ROUNDS * self._round)
        kinds = kinds.repeat_interleave(self.group_size)[:count]
        probe = Probe(
            self._drawn,
            flipped=flipped,
            kinds=1 - kinds if exchanged else kinds,
            router=router,
            grad_mode=self.grad_mode,
            shuffled=shuffled,
        )
        return self._run(probe)

    def _again(
        self,
        attempt: _Attempt,
        count: int,
        round: int,
        exchanged: bool = False,
        shuffled: bool = False,
    ) -> _Run:
        router = RowsRouter(count, self.example_dim, attempt.choices)
        return self._flipped_run(attempt.sites, count, round, router, exchanged, shuffled)

    def _run(self, probe: Probe) -> _Run:
        probe.round, probe.enlarge = self._round, self._enlarge

        def run() -> _Run:
            trace = self._call(probe)
            return _Run(log_densities(trace, set(probe.sites)), probe)

        return self._isolated.run(run)

    def _traced(self, probe: Probe) -> tuple[Trace, Probe]:
        probe.enlarge = self._enlarge
        return self._isolated.run(lambda: self._call(probe)), probe

    def _call(self, probe: Probe) -> Trace:
        self.runs += 1
        return self._run_model(probe)


class _Repeats(_Failed):
    """The model gives other numbers when it is run again from the same state."""


class _Again(Exception):
    """The audit starts again, with other draws."""


_MIXED = "examples mix"
_OWNERS = (
    "which example a row belongs to depends on integers among the arguments; name the owner of "
    "each row, as in `with pyro_flipout.examples(owner): h = net(rows)`"
)
_NO_PLATE = "no plate says what the examples are; write one over the data"
_BLIND = "its signs make no difference to what is observed"


def _why(attempt: _Attempt, site: str) -> str:
    """Why a site is not flipped under a hypothesis."""
    wrong = "; ".join(attempt.wrong.values())
    return wrong or attempt.excluded.get(site, _BLIND if site in attempt.blind else "")


def _rounds(count: int, group_size: int) -> int:
    groups = -(-count // group_size)
    return max(groups - 1, 1).bit_length() if groups <= 16 else ROUNDS


def _could_gain(attempt: _Attempt) -> bool:
    """Whether other layouts might flip sites that a rule has left shared."""
    return bool(attempt.excluded) and any(len(o) > 1 for o in attempt.options.values())


def _used(choices: Mapping[Key, Choice], options: Mapping[Key, list[Choice]]) -> dict[Key, Choice]:
    """The choice of every key that came up."""
    return {key: choices.get(key) or found[0] for key, found in options.items()}


def _alternatives(options: Mapping[Key, list[Choice]]) -> list[dict[Key, Choice]]:
    """Other choices to try: each layout wherever it is possible, then each by itself."""
    found: list[dict[Key, Choice]] = []
    every = dict.fromkeys(c for choices in options.values() for c in choices[1:])
    for choice in every:
        found.append({k: choice for k, choices in options.items() if choice in choices[1:]})
    for key, choices in options.items():
        found += [{key: choice} for choice in choices[1:]]
    unique: list[dict[Key, Choice]] = []
    for layouts in found:
        if layouts and layouts not in unique:
            unique.append(layouts)
    return unique[:24]


def _grad(total: Tensor | None, leaves: Sequence[Tensor]) -> list[Tensor]:
    if total is None or not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(total, list(leaves), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


class _Comparison:
    """Compares the densities of flipped runs with those of the bare runs."""

    def __init__(
        self, bare: Densities, star: Densities, num_examples: int, low_precision: bool = False
    ) -> None:
        self.bare, self.star, self.num_examples = bare, star, num_examples
        self.largest: dict[str, float] = {}
        self.elements: dict[str, tuple[int, int]] = {}
        dtypes = [d.value.dtype for d in bare.values() if d.value.is_floating_point()]
        self._eps = max(torch.finfo(dtype).eps for dtype in dtypes or [torch.float32])
        self._roundings = 300
        #: Relative tolerance of what is not rounding alone.
        self.relative = max(2e-3 * (self._eps / 1.2e-7) ** 0.5, 1e-7)
        if low_precision:
            self._eps, self._roundings, self.relative = 2.0**-8, 4, 0.1

    def noise(self, size: float) -> float:
        """What rounding alone may change in sums of numbers of a size."""
        return self._roundings * self._eps * size

    def check(self, found: Densities, example_kinds: Tensor | None = None) -> dict[str, str]:
        """What differs, by observed site.

        :param example_kinds: kinds of the examples, shape ``(N,)``.
        """
        wrong = {name: f"'{name}' is not met" for name in self.bare if name not in found}
        for name, density in self.bare.items():
            if name not in self.star or self.star[name].value.shape != density.value.shape:
                wrong[name] = f"'{name}' has another shape with another draw of the weights"
        of_plates: dict[str, Tensor] = {}
        for name, a, b, c in self._each(found):
            if c.shape != a.shape:
                wrong[name] = f"its log-density has shape {tuple(c.shape)}, not {tuple(a.shape)}"
                continue
            tolerance = self._tolerance(a, b)
            error = torch.minimum(_distance(c, a), _distance(c, b))
            bad = ~(error <= tolerance)
            apart = _distance(a, b) > 4 * tolerance
            second = apart & (_distance(c, b) < _distance(c, a))
            if apart.any():
                ratio = (error / _distance(a, b).clamp_min(1e-300))[apart]
                self.largest[name] = max(self.largest.get(name, 0.0), float(ratio.max()))
                self.elements[name] = int(second.sum()), int(apart.sum())
            if bad.any():
                wrong[name] = _describe(name, bad)
            elif self.bare[name].states:
                states = self._check_states(name, second, apart, of_plates)
                if states:
                    wrong[name] = states
            if name not in wrong and example_kinds is not None:
                owners = self._check_owners(name, second, apart, example_kinds)
                if owners:
                    wrong[name] = owners
        return wrong

    def _check_owners(self, name: str, second: Tensor, apart: Tensor, kinds: Tensor) -> str:
        """Along one dimension, whose elements see as many weights of each kind as there are.

        Where attention is so sharp that it looks at one example alone, all see the weight of that.
        """
        dims = [dim for dim in range(second.dim()) if second.size(dim) == len(kinds)]
        num_second = int(kinds.sum())
        for dim in dims:
            rest = [d for d in range(second.dim()) if d != dim]
            first_seen, second_seen = (
                part.amax(rest) if rest else part for part in (apart & ~second, second)
            )
            if not (first_seen & second_seen).any():
                few_first = int(first_seen.sum()) <= len(kinds) - num_second
                if few_first and int(second_seen.sum()) <= num_second:
                    return ""
        if not dims:
            return ""
        return f"{_MIXED}: elements of '{name}' depend on the weights of other examples than theirs"

    def _check_states(
        self, name: str, second: Tensor, apart: Tensor, of_plates: dict[str, Tensor]
    ) -> str:
        """All states of an enumerated variable, and all that they are summed with, see one draw."""
        density = self.bare[name]
        others = [dim for dim in range(second.dim()) if dim not in density.plates.values()]
        first = (apart & ~second).amax(others, keepdim=True)
        any_second = second.amax(others, keepdim=True)
        if (first & any_second).any():
            return (
                f"{_MIXED}: the states of an enumerated variable see different weights in '{name}'"
            )
        for plate, dim in density.plates.items():
            rest = [d for d in range(second.dim()) if d != dim]
            kinds = torch.stack([t.amax(rest) if rest else t for t in (first, any_second)])
            before = of_plates.setdefault(plate, kinds)
            if before.shape != kinds.shape or kinds.all(0).any():
                continue
            if ((before[0] & kinds[1]) | (before[1] & kinds[0])).any():
                return (
                    f"{_MIXED}: '{name}' and another site of the plate '{plate}' see different "
                    "weights in one state of an enumerated variable"
                )
        return ""

    def check_sum(
        self, found: Densities, other: Densities, wrong: dict[str, str]
    ) -> dict[str, str]:
        """Keeps of ``wrong`` what is no sum of terms of one example each."""
        still = {}
        for name, why in wrong.items():
            parts = [d[name].value for d in (self.bare, self.star, found, other) if name in d]
            if len({p.shape for p in parts}) != 1 or len(parts) < 4 or self._has_elements(name):
                still[name] = why
                continue
            a, b, c, d = parts
            # Exact but for rounding. A tolerance relative to the difference of the draws would hide
            # what is a sum to first order only, as the square of a mean over the examples.
            bad = ~(((c + d) - (a + b)).abs() <= self._rounding(a, b))
            if bad.any():
                still[name] = _describe(name, bad)
            else:
                self.largest[name] = 0.0
        return still

    def _has_elements(self, name: str) -> bool:
        """Whether the examples have elements of their own in a density, or it has states."""
        density = self.bare[name]
        return bool(density.states) or self.num_examples in density.value.shape

    def totals(
        self, found: Densities, other: Densities | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Random sums of densities, as they should be and as they are."""
        generator = torch.Generator().manual_seed(31)
        expected: Tensor | None = None
        actual: Tensor | None = None
        for name, a, b, c in self._each(found):
            usable = a.isfinite() & b.isfinite() & c.isfinite()
            cotangent = torch.rand(a.shape, generator=generator, dtype=torch.float64) + 0.5
            cotangent = cotangent.to(a).where(usable, 0)
            if other is not None and name in other:
                want, have = a + b, c + other[name].value
            else:
                # Where both draws have one density, nobody knows which gradient is right.
                usable = usable & (_distance(a, b) > 4 * self._tolerance(a, b))
                want, have = torch.where(_distance(c, b) < _distance(c, a), b, a), c
            want = (want.where(usable, 0) * cotangent).sum()
            have = (have.where(usable, 0) * cotangent).sum()
            expected = want if expected is None else expected + want
            actual = have if actual is None else actual + have
        return expected, actual

    def _each(self, found: Densities) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
        for name, density in self.bare.items():
            star = self.star.get(name)
            if star is not None and name in found and star.value.shape == density.value.shape:
                yield name, density.value, star.value, found[name].value

    def _tolerance(self, a: Tensor, b: Tensor) -> Tensor:
        tolerance: Tensor = self.relative * _distance(a, b) + self._rounding(a, b)
        return tolerance

    def _rounding(self, a: Tensor, b: Tensor) -> float:
        a, b = a.detach(), b.detach()
        finite = torch.cat([t[t.isfinite()].abs().flatten() for t in (a, b)])
        return self.noise(float(finite.max()) if finite.numel() else 0.0)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.detach(), b.detach()
    same = (a == b) | (a.isnan() & b.isnan())
    distance: Tensor = (a - b).abs()
    return distance.masked_fill(same, 0.0)


def _describe(name: str, bad: Tensor) -> str:
    rows = bad.nonzero().tolist()
    if bad.dim() == 0:
        return f"{_MIXED}: '{name}' has one log-density for all of them, which is no sum over them"
    which = sorted({row[0] if bad.dim() == 1 else tuple(row) for row in rows})
    shown = ", ".join(map(str, which[:4])) + (", ..." if len(which) > 4 else "")
    return (
        f"{_MIXED}: {len(which)} of {bad.numel()} elements of '{name}' ({shown}) depend on the "
        "weights of several examples"
    )
