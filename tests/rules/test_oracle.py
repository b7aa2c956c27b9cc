"""Every rule against explicit weights, example by example, with all gradients."""

import importlib
import pkgutil

import pytest
from torch import Tensor

from pyro_flipout.tensor import RULES, describe
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


@pytest.mark.parametrize(
    "check", [pytest.param(c, id=f"{describe(op)}-{label}") for op, label, c in CASES]
)
def test_rule(check):
    check()


def test_every_rule_has_a_case():
    without = set(RULES) - {op for op, _, _ in CASES} - NEEDS_DEVICE
    assert not without, sorted(map(describe, without))
