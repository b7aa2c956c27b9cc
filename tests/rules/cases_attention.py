"""Oracle cases of attention: all options of ``nn.MultiheadAttention``."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from pyro_flipout.tensor import Execution, FlipoutTensor
from pyro_flipout.testing import constant, random_weight
from tests.rules import cases
from tests.rules.cases import N, data

CASES = []
case = functools.partial(cases.case, F.multi_head_attention_forward, table=CASES)

E, HEADS, L, S = 4, 2, 3, 6


class Attention:
    """``nn.MultiheadAttention`` as a function of its data and weights."""

    def __init__(self, flipped=None, example_dim=0, call=None, **options):
        self.module = nn.MultiheadAttention(
            E, HEADS, batch_first=example_dim == 0, dtype=torch.float64, **options
        )
        self.example_dim = example_dim
        self.call = {} if call is None else call
        self.execution = Execution(example_dim)
        self.weights = {
            name: random_weight(*p.shape, execution=self.execution, site=name, seed=i)
            if flipped is None or name in flipped
            else constant(p.detach())
            for i, (name, p) in enumerate(self.module.named_parameters())
        }
        assert any(isinstance(w, FlipoutTensor) for w in self.weights.values()), flipped

    def __call__(self, query, key, value, weights, masks):
        key = query if key is None else key
        value = key if value is None else value
        masks = {
            name: mask.flatten(0, 1) if name == "attn_mask" and mask.dim() == 4 else mask
            for name, mask in masks.items()
        }
        out, scores = torch.func.functional_call(
            self.module, weights, (query, key, value), {**self.call, **masks}
        )
        if scores is None:
            return out
        return out, scores.movedim(0, self.example_dim)


def attention(label, key=None, value=None, masks=dict, example_dim=0, **options):
    def shaped(length, features):
        shape = (N, length) if example_dim == 0 else (length, N)
        return data(*shape, features)

    def check():
        torch.manual_seed(1)
        fn = Attention(example_dim=example_dim, **options)
        cases.check_rule(
            fn,
            shaped(L, E),
            None if key is None else shaped(S, key),
            None if value is None else shaped(S, value),
            fn.weights,
            masks(),
            example_dim=example_dim,
        )

    CASES.append((F.multi_head_attention_forward, label, check))


def causal(dtype=torch.bool):
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    if dtype is torch.bool:
        return constant(mask)
    return constant(torch.zeros(L, L, dtype=dtype).masked_fill(mask, -torch.inf))


def padding(length=L):
    return torch.arange(length) > torch.arange(N).clamp(min=1).unsqueeze(-1)  # (N, length)


FUSED = {"need_weights": False}
EACH_HEAD = {"average_attn_weights": False}

for example_dim, (kind, call) in itertools.product(
    (0, 1), {"weights": None, "weights of each head": EACH_HEAD, "fused": FUSED}.items()
):
    layout = "batch first" if example_dim == 0 else "time first"
    on = functools.partial(attention, call=call, example_dim=example_dim)
    on(f"self, {kind}, {layout}")
    on(f"key is value, {kind}, {layout}", key=E)
    on(f"all differ, {kind}, {layout}", key=E, value=E)
    on(f"kdim and vdim, {kind}, {layout}", key=5, value=3, kdim=5, vdim=3)
    on(f"bias_kv, {kind}, {layout}", add_bias_kv=True)
    on(f"zero_attn, {kind}, {layout}", add_zero_attn=True)

for kind, call in {"weights": None, "fused": FUSED}.items():
    on = functools.partial(attention, call=call)
    on(f"no bias, {kind}", bias=False)
    on(f"causal, {kind}", masks=lambda: {"attn_mask": causal()})
    on(f"added mask, {kind}", masks=lambda: {"attn_mask": causal(torch.float64)})
    on(f"causal hint, {kind}", masks=lambda: {"attn_mask": causal(), "is_causal": True})
    on(f"mask of each example, {kind}", masks=lambda: {"attn_mask": data(N, HEADS, L, L)})
    on(
        f"padding, {kind}",
        key=E,
        masks=lambda: {"key_padding_mask": padding(S)},
        add_zero_attn=True,
        add_bias_kv=True,
    )
    on(
        f"padding and causal, {kind}",
        masks=lambda: {"key_padding_mask": padding(), "attn_mask": causal(), "is_causal": True},
        add_zero_attn=True,
        add_bias_kv=True,
    )
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "bias_v"):
        on(f"only {name}, {kind}", flipped=[name], add_bias_kv=True)
    # torch does not look at these three for tensor subclasses.
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        on(f"only {name}, {kind}", flipped=[name], key=5, value=E, kdim=5, vdim=E)


def static(query, k, v, w, b, out):
    # static_k and static_v are (N * heads, S, E / heads)
    return F.multi_head_attention_forward(
        query.transpose(0, 1), query.transpose(0, 1), query.transpose(0, 1),
        E, HEADS, w, b, None, None, False, 0.0, out, None,
        static_k=k.flatten(0, 1), static_v=v.flatten(0, 1), need_weights=False,
    )[0].transpose(0, 1)  # fmt: skip


case(
    "static key and value",
    lambda: (
        data(N, L, E),
        data(N, HEADS, S, E // HEADS),
        data(N, HEADS, S, E // HEADS),
        *cases.weights((3 * E, E), (3 * E,), (E, E)),
    ),
    fn=static,
)
