"""Every rule against explicit weights, example by example, with all gradients."""

import dataclasses
import importlib
import pkgutil

import pytest
from torch import Tensor

from pyro_flipout.rules import _explicit, _product
from pyro_flipout.tensor import RULES, Execution, describe
from tests import rules

# Every module cases*.py of this directory exports a list CASES.
CASES = [
    case
    for module in pkgutil.iter_modules(rules.__path__)
    if module.name.startswith("cases")
    for case in importlib.import_module(f"tests.rules.{module.name}").CASES
]

# Moves between devices need one; the others copy as `cpu` does.
NEEDS_DEVICE = {Tensor.cuda}
# Those with products that explicit weights may compute.
PRODUCTS = ("linear", "conv", "contraction", "attention")


def params(cases):
    return [pytest.param(check, id=f"{describe(op)}-{label}") for op, label, check in cases]


def groups_of(size, monkeypatch):
    *others, _ = Execution.__init__.__defaults__
    monkeypatch.setattr(Execution.__init__, "__defaults__", (*others, size))


def always_explicit(monkeypatch, plans):
    """Makes every product that can be by explicit weights be so; ``plans`` gets their plans."""
    right = _explicit.plan_explicit

    def plan(kernel, *args):
        plans.append(right(dataclasses.replace(kernel, min_uses=0), *args))
        return plans[-1]

    monkeypatch.setattr(_product, "plan_explicit", plan)


@pytest.mark.parametrize("check", params(CASES))
def test_rule(check):
    check()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", params(CASES))
def test_rule_in_groups(check, size, monkeypatch):
    groups_of(size, monkeypatch)
    check()


@pytest.mark.parametrize(("size", "buffer"), [(1, 2**18), (1, 1), (2, 2**18), (3, 1)])
@pytest.mark.parametrize(
    "check",
    params(c for c in CASES if RULES[c[0]].apply.__module__.rpartition(".")[2] in PRODUCTS),
)
def test_rule_by_explicit_weights(check, size, buffer, monkeypatch):
    groups_of(size, monkeypatch)
    always_explicit(monkeypatch, [])
    monkeypatch.setattr(_explicit, "_BUFFER", buffer)
    check()


def test_every_rule_has_a_case():
    without = set(RULES) - {op for op, _, _ in CASES} - NEEDS_DEVICE
    assert not without, sorted(map(describe, without))
