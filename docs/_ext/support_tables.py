# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Fills ``{{rules}}`` and ``{{symmetric}}`` in a page with tables of the registries."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from sphinx.application import Sphinx

from pyro_flipout import symmetric
from pyro_flipout.tensor import RULES, Rule, describe

Op = Callable[..., Any]

OPERATORS = {
    "matmul": "@",
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "div": "/",
    "neg": "-w",
    "getitem": "w[...]",
    "iter": "iter(w)",
}


def public_name(op: Op) -> str:
    """Short name of a torch function: ``F.linear``, ``torch.mm``, ``Tensor.view``, ``@``."""
    name = describe(op).rpartition(".")[2]
    if name == "__get__":  # an attribute such as `w.T`
        return f"Tensor.{op.__self__.__name__}"  # type: ignore[attr-defined]
    if name.startswith("__"):
        return operator_sign(name.strip("_"))
    for short, owner in (("F", F), ("torch", torch), ("torch.linalg", torch.linalg)):
        if getattr(owner, name, None) is op:
            return f"{short}.{name}"
    return f"Tensor.{name}"


def operator_sign(name: str) -> str:
    """``matmul`` and ``rmatmul`` give ``@``, ``iadd`` gives ``+=``."""
    if name in OPERATORS:
        return OPERATORS[name]
    sign = OPERATORS.get(name[1:], name)
    return sign + "=" if name[0] == "i" else sign


def fold(ops: Iterable[Op]) -> list[str]:
    """Names of ``ops``, a method left out where the function of its name is there."""
    names = list(dict.fromkeys(public_name(op) for op in ops))
    functions = {name.rpartition(".")[2] for name in names if not name.startswith("Tensor.")}
    return [
        name
        for name in names
        if not (name.startswith("Tensor.") and name.removeprefix("Tensor.") in functions)
    ]


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def code(name: str) -> str:
    return f"`{name}`"


def first_paragraph(obj: Any) -> str:
    """First paragraph of a docstring, on one line."""
    doc = inspect.getdoc(obj) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def rules_markdown() -> str:
    """One section for each family of rules, one row for each rule."""

    def family(item: tuple[Op, Rule]) -> str:
        return item[1].apply.__module__

    sections = []
    for module, group in groupby(sorted(RULES.items(), key=family), key=family):
        ops_of: dict[Rule, list[Op]] = {}
        for op, rule in group:
            ops_of.setdefault(rule, []).append(op)
        rows = [
            (", ".join(map(code, fold(ops))), rule.flips, rule.limits)
            for rule, ops in ops_of.items()
        ]
        title = module.rpartition(".")[2].replace("_", " ").capitalize()
        sections += [
            f"### {title}",
            first_paragraph(sys.modules[module]),
            table(("torch function", "what is flipped", "what is not"), rows),
        ]
    return "\n\n".join(sections)


def symmetric_markdown() -> str:
    """One row for each function that gives a centre, then the classes refused by name."""
    centers: dict[Op, list[str]] = {}
    for cls, center in symmetric.SYMMETRIC.items():
        centers.setdefault(center, []).append(code(cls.__name__))
    refused: dict[str, list[str]] = {}
    for cls, reason in symmetric._REFUSED.items():
        refused.setdefault(reason, []).append(code(cls.__name__))
    return "\n\n".join(
        (
            table(
                ("distribution", "centre"),
                ((", ".join(names), first_paragraph(fn)) for fn, names in centers.items()),
            ),
            table(
                ("never", "why"),
                ((", ".join(names), reason) for reason, names in refused.items()),
            ),
        )
    )


TABLES = {"{{rules}}": rules_markdown, "{{symmetric}}": symmetric_markdown}


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces the placeholders of one page."""
    for placeholder, markdown in TABLES.items():
        if placeholder in source[0]:
            source[0] = source[0].replace(placeholder, markdown())
            for module in registering_modules():
                app.env.note_dependency(str(module.__file__))


def registering_modules() -> list[ModuleType]:
    """The modules that a page with tables is made from."""
    families = {sys.modules[rule.apply.__module__] for rule in RULES.values()}
    return [symmetric, *families]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
