# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""What a recorded graph holds and writes to, and how it is replayed at little cost."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_flipout.errors import FlipoutError
from pyro_flipout.infer._captured_reads import LINE

__all__ = ["call_directly", "check_shapes", "held", "literals", "written"]

aten = torch.ops.aten

_IDLE = {
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.view.default,
}
"""Views that are their argument where they have its shape and strides."""

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.add.out: torch.add,
    aten.addcmul.out: torch.addcmul,
    aten.addmm.default: torch.addmm,
    aten.bitwise_and.Scalar: torch.bitwise_and,
    aten.bmm.default: torch.bmm,
    aten.div.Tensor: torch.div,
    aten.exp.default: torch.exp,
    aten.index_select.default: torch.index_select,
    aten.log.default: torch.log,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul.out: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.sigmoid.default: torch.sigmoid,
    aten.sub.Tensor: torch.sub,
    aten.sum.default: torch.sum,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
}
"""Python's own names of operations, which are called at half the cost: the same kernels."""

_METHODS = {
    aten.add_.Tensor,
    aten.addcdiv_.default,
    aten.addcmul_.default,
    aten.expand.default,
    aten.mul_.Tensor,
    aten.reciprocal_.default,
    aten.split_with_sizes.default,
    aten.sub_.Tensor,
    aten.unsqueeze.default,
    aten.view.default,
}


def call_directly(graph: GraphModule) -> None:
    """Rewrites a graph of torch's operations to one that Python runs faster, in place.

    What it computes stays the same, to the last bit.
    """
    for node in reversed(graph.graph.nodes):
        if not node.users and _is_needless(node):
            graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _IDLE and _layout(node) == _layout(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten.slice.Tensor:
            _narrow(node)
        elif node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
        elif node.target in _METHODS:
            node.op, node.target = "call_method", node.target.overloadpacket.__name__
    graph.recompile()


def _is_needless(node: Node) -> bool:
    """Whether a result that no one uses was all that there was to it."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not (
        node.target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in node.target.tags
        or "batch_norm" in str(node.target)  # writes to buffers without saying so
    )


def _layout(node: Any) -> Any:
    known = node.meta.get("tensor_meta")
    return node if known is None else (known.shape, known.stride)


def _narrow(node: Any) -> None:
    """A slice of step 1 as ``torch.narrow``."""
    given = list(node.args)
    input, dim, start, _, step = given + [None, 0, None, None, 1][len(given) :]
    known = node.meta.get("tensor_meta")
    length = 0 if known is None else known.shape[dim]
    if step == 1 and isinstance(start, int) and start >= 0 and length > 0:
        node.target, node.args = torch.narrow, (input, dim, start, length)


_STATISTICS = "running_mean", "running_var"
"""Arguments that kernels of batch norm write to without saying so."""


def check_shapes(graph: GraphModule) -> None:
    """Adds checks of the shapes that depend on data, in place."""
    for node in list(graph.graph.nodes):
        if _varies(node):
            with graph.graph.inserting_after(node):
                args = node, _shapes(node.meta["val"]), node.meta.get(LINE, "")
                graph.graph.call_function(need_shapes, args)
    graph.recompile()


def _varies(node: Node) -> bool:
    """Whether the shape of a result depends on data."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape not in op.tags:
        return False
    if op is aten.index.Tensor:
        indices = [i for i in node.args[1] if i is not None]  # type: ignore[union-attr]
        return any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices)  # type: ignore[union-attr]
    return op.overloadpacket is not aten._ctc_loss  # whose shapes only its own gradient reads


def _shapes(result: Any) -> tuple[tuple[int, ...], ...]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return tuple(tuple(map(int, t.shape)) for t in results)


def need_shapes(result: Any, shapes: tuple[tuple[int, ...], ...], where: str) -> None:
    """Refuses a result whose shape is not that of the recorded one.

    :raises FlipoutError: if its shape is another.
    """
    got = _shapes(result)
    if got != shapes:
        one = next((g, s) for g, s in zip(got, shapes, strict=True) if g != s)
        raise FlipoutError(
            f"captured: replayed{where}, a result has the shape {one[0]}, but it had "
            f"{one[1]} when the program was recorded. The shapes of nonzero, masked_select, unique "
            "and of an index that is a mask depend on the data: multiply by the mask, or use "
            "torch.where with three arguments, or train this program without captured()"
        )


def held(graph: GraphModule) -> list[Tensor]:
    """The tensors that a graph reads without being given them."""
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return [t for t in (getattr(graph, name) for name in names) if isinstance(t, Tensor)]


def literals(graph: GraphModule) -> set[int]:
    """Ids of the tensors that a graph holds and that the program made of Python's numbers."""
    lifted = {aten.lift_fresh_copy.default, aten.lift_fresh.default}
    nodes = (n for n in graph.graph.nodes if n.op == "get_attr" and n.users)
    made = (n for n in nodes if all(user.target in lifted for user in n.users))
    return {id(getattr(graph, str(node.target))) for node in made}


def written(graph: GraphModule) -> tuple[list[Tensor], list[int]]:
    """Tensors that a graph holds and writes to, and positions of the arguments that it does."""
    roots: dict[Any, Any] = {}
    found: set[Node] = set()
    for node in graph.graph.nodes:
        roots[node] = roots[node.args[0]] if node.target is operator.getitem else node
        schema = getattr(node.target, "_schema", None)
        for i, spec in enumerate(schema.arguments if schema is not None else ()):
            arg = node.args[i] if i < len(node.args) else node.kwargs.get(spec.name)
            if not isinstance(arg, Node):
                continue
            if spec.alias_info is not None:
                roots[node] = roots[arg]
            if (spec.alias_info is not None and spec.alias_info.is_write) or (
                spec.name in _STATISTICS and "batch_norm" in str(node.target)
            ):
                found.add(roots[arg])
    names = {str(node.target) for node in found if node.op == "get_attr"}
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return (
        [getattr(graph, name) for name in names],
        [i for i, node in enumerate(inputs) if node in found],
    )
