# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# mypy: ignore-errors
# Triton's language looks like Python, but its types are not known to a type checker.

r"""The Triton kernels of signs and flipped products; import this module only if Triton is there.

Row ``m`` of the data belongs to group ``n = m // rows_each % examples // group_size`` of the
examples, which has the odd integer ``2n + 1``. A sign is the parity of the bits that this integer
shares with a code (see :mod:`pyro_flipout.signs`), so it is formed in registers where the data
are, and flips their sign bit.
"""

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,  # for the interpreter's tests
}


@triton.jit
def _flip(x, odd, codes, BITS: tl.constexpr):
    """``x`` (R, C) times the signs of the rows' odd integers (R,) and the columns' codes (C,)."""
    return _flip_by_parity(x, odd[:, None] & codes[None, :], BITS)


@triton.jit
def _flip_by_parity(x, bits, BITS: tl.constexpr):
    """``x`` with the sign changed where the number of ``bits`` is odd; ``bits`` broadcast to it."""
    if BITS > 16:
        bits = bits ^ (bits >> 16)
    if BITS > 8:
        bits = bits ^ (bits >> 8)
    bits = (bits ^ (bits >> 4)) & 15
    # Bit 15 - v of 0x6996 is the parity of the four bits v: it is shifted to the sign's place.
    if x.dtype.primitive_bitwidth == 16:
        signs = ((0x6996 << bits) & 0x8000).to(tl.int16)
        out = (x.to(tl.int16, bitcast=True) ^ signs).to(x.dtype, bitcast=True)
    elif x.dtype.primitive_bitwidth == 32:
        signs = (0x69960000 << bits) & -0x80000000
        out = (x.to(tl.int32, bitcast=True) ^ signs).to(x.dtype, bitcast=True)
    else:
        out = tl.where((0x69960000 << bits) < 0, -x, x)
    return out


@triton.jit
def _odd_integers(rows, rows_each, examples, group_size):
    """The odd integers of the groups of examples to which ``rows`` belong."""
    return 2 * (rows // rows_each % examples // group_size) + 1


@triton.jit
def _product(
    x, center, delta, bias, bias_delta, out, in_codes, out_codes, bias_codes,
    M, K, OUT, bucket, rows_each, examples, group_size,
    x_m, x_k, c_o, c_k, d_o, d_k, out_m,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTA: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out = x centerᵀ + R ∘ ((x ∘ S) deltaᵀ) + bias + T ∘ bias_delta``.

    x (M, K), weights (O, K), biases (O,), out (M, O).
    """
    # Programs that run together share tiles of x and of the weights in the second-level cache.
    pid, across = tl.program_id(0), tl.cdiv(OUT, BO)
    first = pid // (GROUP * across) * GROUP
    group = min(tl.cdiv(M, BM) - first, GROUP)
    m = (first + pid % (GROUP * across) % group) * BM + tl.arange(0, BM)
    o = pid % (GROUP * across) // group * BO + tl.arange(0, BO)
    odd = _odd_integers(m, rows_each, examples, group_size)
    x_rows = x + m.to(tl.int64)[:, None] * x_m
    c_rows, d_rows = center + o.to(tl.int64)[None, :] * c_o, delta + o.to(tl.int64)[None, :] * d_o
    plain, flipped = tl.zeros((BM, BO), ACC), tl.zeros((BM, BO), ACC)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        tile = tl.load(x_rows + k[None, :] * x_k, (m[:, None] < M) & (k[None, :] < K), 0.0)
        inside = (k[:, None] < K) & (o[None, :] < OUT)
        c = tl.load(c_rows + k[:, None] * c_k, inside, 0.0)
        d = tl.load(d_rows + k[:, None] * d_k, inside, 0.0)
        turned = tile
        if HAS_IN:
            turned = _flip(tile, odd, tl.load(in_codes + k, k < K, 0), BITS)
        if UPCAST:
            tile, turned, c, d = tile.to(ACC), turned.to(ACC), c.to(ACC), d.to(ACC)
        plain = tl.dot(tile, c, plain, input_precision=PRECISION, out_dtype=ACC)
        flipped = tl.dot(turned, d, flipped, input_precision=PRECISION, out_dtype=ACC)
    if HAS_OUT:
        flipped = _flip(flipped, odd, tl.load(out_codes + o, o < OUT, 0), BITS)
    plain += flipped
    if HAS_BIAS:
        plain += tl.load(bias + o, o < OUT, 0.0).to(ACC)[None, :]
    if HAS_BIAS_DELTA:
        beta = tl.load(bias_delta + o, o < OUT, 0.0).to(ACC)[None, :]
        own = tl.load(bias_codes + o, o < OUT, 0)
        plain += _flip(tl.broadcast_to(beta, (BM, BO)), odd, own, BITS)
    where = out + m.to(tl.int64)[:, None] * out_m + o[None, :]
    tl.store(where, plain.to(out.dtype.element_ty), (m[:, None] < M) & (o[None, :] < OUT))


@triton.jit
def _weight_grads(
    grad, x, grad_center, grad_delta, in_codes, out_codes,
    M, K, OUT, bucket, rows_each, examples, group_size, rows_per_split,
    g_m, g_o, x_m, x_k,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, CENTER: tl.constexpr, DELTA: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``gradᵀ x`` and ``(R ∘ grad)ᵀ (x ∘ S)``, each (splits, O, K), over the rows of a split."""
    pid, across = tl.program_id(0), tl.cdiv(K, BK)
    o = pid // across * BO + tl.arange(0, BO)
    k = pid % across * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    stop = min((split + 1) * rows_per_split, M)
    if HAS_IN and DELTA:
        codes_in = tl.load(in_codes + k, k < K, 0)
    if HAS_OUT and DELTA:
        codes_out = tl.load(out_codes + o, o < OUT, 0)
    plain, flipped = tl.zeros((BO, BK), ACC), tl.zeros((BO, BK), ACC)
    for start in range(split * rows_per_split, stop, BM):
        m = start + tl.arange(0, BM)
        rows = m.to(tl.int64)[:, None]
        inside = m[:, None] < stop
        g = tl.load(grad + rows * g_m + o[None, :] * g_o, inside & (o[None, :] < OUT), 0.0)
        t = tl.load(x + rows * x_m + k[None, :] * x_k, inside & (k[None, :] < K), 0.0)
        turned_g, turned_t = g, t
        if DELTA:
            odd = _odd_integers(m, rows_each, examples, group_size)
            if HAS_OUT:
                turned_g = _flip(g, odd, codes_out, BITS)
            if HAS_IN:
                turned_t = _flip(t, odd, codes_in, BITS)
        if UPCAST:
            g, t = g.to(ACC), t.to(ACC)
            turned_g, turned_t = turned_g.to(ACC), turned_t.to(ACC)
        if CENTER:
            plain = tl.dot(tl.trans(g), t, plain, input_precision=PRECISION, out_dtype=ACC)
        if DELTA:
            flipped = tl.dot(
                tl.trans(turned_g), turned_t, flipped, input_precision=PRECISION, out_dtype=ACC
            )
    to = (split * OUT + o).to(tl.int64)[:, None] * K + k[None, :]
    inside = (o[:, None] < OUT) & (k[None, :] < K)
    if CENTER:
        tl.store(grad_center + to, plain.to(grad_center.dtype.element_ty), inside)
    if DELTA:
        tl.store(grad_delta + to, flipped.to(grad_delta.dtype.element_ty), inside)


@triton.jit
def flips(
    x, out, codes, center, delta, bias_codes,
    ROWS, COLUMNS, count, rows_each, examples, group_size,
    ALONG_ROWS: tl.constexpr, HAS_X: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``out (+)= S ∘ x + (center + T ∘ delta)``, of contiguous ``x`` and ``out`` (ROWS, COLUMNS).

    Codes and biases (count,) belong to the columns, or ALONG_ROWS to row ``r`` that of
    ``r % count``.
    """
    pid, across = tl.program_id(0), tl.cdiv(COLUMNS, BC)
    r, c = pid // across * BM + tl.arange(0, BM), pid % across * BC + tl.arange(0, BC)
    inside = (r[:, None] < ROWS) & (c[None, :] < COLUMNS)
    where = r.to(tl.int64)[:, None] * COLUMNS + c[None, :]
    odd = _odd_integers(r, rows_each, examples, group_size)
    if ALONG_ROWS:
        own, there = r % count, r < ROWS
    else:
        own, there = c, c < COLUMNS
    total = tl.zeros((BM, BC), ACC)
    if ADD:
        total = tl.load(out + where, inside, 0.0).to(ACC)
    if HAS_X:
        values, code = tl.load(x + where, inside, 0.0), tl.load(codes + own, there, 0)
        if ALONG_ROWS:
            values = _flip_by_parity(values, (odd & code)[:, None], BITS)
        else:
            values = _flip(values, odd, code, BITS)
        total += values.to(ACC)
    if HAS_BIAS:
        bias = tl.load(center + own, there, 0.0).to(ACC)
        beta = tl.load(delta + own, there, 0.0).to(ACC)
        code = tl.load(bias_codes + own, there, 0)
        if ALONG_ROWS:
            total += bias[:, None] + _flip_by_parity(beta[:, None], (odd & code)[:, None], BITS)
        else:
            beta = tl.broadcast_to(beta[None, :], (BM, BC))
            total += bias[None, :] + _flip(beta, odd, code, BITS)
    tl.store(out + where, total.to(out.dtype.element_ty), inside)


@triton.jit
def bias_grads(
    grad, grad_bias, grad_bias_delta, bias_codes,
    M, OUT, rows_each, examples, group_size, rows_per_split, g_m, g_o,
    CENTER: tl.constexpr, DELTA: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The sums of ``grad`` and of ``T ∘ grad``, each (splits, O), over the rows of a split."""
    o, split = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1)
    stop = min((split + 1) * rows_per_split, M)
    if DELTA:
        codes = tl.load(bias_codes + o, o < OUT, 0)
    plain, flipped = tl.zeros((BM, BO), ACC), tl.zeros((BM, BO), ACC)
    for start in range(split * rows_per_split, stop, BM):
        m = start + tl.arange(0, BM)
        inside = (m[:, None] < stop) & (o[None, :] < OUT)
        g = tl.load(grad + m.to(tl.int64)[:, None] * g_m + o[None, :] * g_o, inside, 0.0).to(ACC)
        if CENTER:
            plain += g
        if DELTA:
            flipped += _flip(g, _odd_integers(m, rows_each, examples, group_size), codes, BITS)
    to = split * OUT + o
    if CENTER:
        tl.store(grad_bias + to, tl.sum(plain, 0), o < OUT)
    if DELTA:
        tl.store(grad_bias_delta + to, tl.sum(flipped, 0), o < OUT)


INTERPRETED = not isinstance(_product, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on tensors of the CPU."""

SMALL = {"BM": 16, "BO": 16, "BK": 16}
"""The interpreter's blocks: several of each kind in a small test."""


# (BM, BO, BK, warps, stages): two accumulators take twice the registers of a plain product.
PRODUCT_BLOCKS = [
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 3),
    (128, 64, 32, 4, 3),
    (64, 128, 32, 4, 3),
    (64, 64, 32, 4, 4),
    (32, 64, 64, 4, 3),
]
WEIGHT_GRADS_BLOCKS = [
    (64, 128, 128, 8, 3),
    (32, 128, 128, 8, 3),
    (32, 128, 64, 4, 3),
    (32, 64, 128, 4, 3),
    (32, 64, 64, 4, 4),
]
# Without tensor cores operands live in registers too, and larger blocks spill them.
PRODUCT_FULL_FLOAT32 = [(128, 64, 16, 8, 3), (64, 64, 16, 8, 3), (32, 64, 16, 4, 3)]
WEIGHT_GRADS_FULL_FLOAT32 = [(16, 128, 64, 8, 3), (32, 64, 64, 8, 3), (32, 32, 32, 4, 3)]


def _configs(blocks, **fixed):
    return [
        triton.Config({"BM": m, "BO": o, "BK": k, **fixed}, num_warps=warps, num_stages=stages)
        for m, o, k, warps, stages in blocks
    ]


def _tuned(kernel, blocks, full_float32, **fixed):
    """Measures a few block shapes on a GPU when it first meets a size, and keeps the best."""
    usual, full = _configs(blocks, **fixed), _configs(full_float32, **fixed)

    def fitting(configs, named, **arguments):
        arguments = {**named, **arguments}
        ordinary = arguments["x"].dtype == torch.float32 and arguments["PRECISION"] == "ieee"
        return full if ordinary else usual

    return triton.autotune(
        usual + full,
        key=["bucket", "K", "OUT", "PRECISION"],
        prune_configs_by={"early_config_prune": fitting},
    )(kernel)


product, weight_grads = _product, _weight_grads
if not INTERPRETED:
    product = _tuned(_product, PRODUCT_BLOCKS, PRODUCT_FULL_FLOAT32, GROUP=8)
    weight_grads = _tuned(_weight_grads, WEIGHT_GRADS_BLOCKS, WEIGHT_GRADS_FULL_FLOAT32)
