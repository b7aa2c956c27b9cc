# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

r"""Pseudo-random signs for the examples of a mini-batch, from integer codes.

The variance of a mini-batch gradient depends only on *pairs* of examples, so the
sign vectors of different examples need only be pairwise independent. Example
:math:`n` therefore gets the odd integer :math:`a_n = 2n + 1`, each row or column
:math:`i` of a weight a uniformly random 32-bit integer :math:`B_i` (its *code*), and

.. math::
    \operatorname{sign}(n, i) = (-1)^{\operatorname{popcount}(a_n \mathbin{\&} B_i)}.

Since :math:`a_n`, :math:`a_m` and :math:`a_n \oplus a_m` are all non-zero for
:math:`n \ne m`, ``(sign(n, i), sign(m, i))`` is uniform on
:math:`\{-1, 1\}^2`: the sign vectors of any two examples are exactly independent.
The product of two signs of one example is the sign of the XOR of their codes. The
lowest bit of a code flips all examples at once, which changes nothing for a symmetric
perturbation: :func:`draw_codes` leaves it 0, and example 0 has the sign 1 everywhere.

Memory is O(d) instead of O(N d), and codes do not depend on N.

*Groups.* With a ``group_size`` k the examples n of a group, those with the same ``n // k``, have
their signs in common: n is the number of the group in all of the above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_flipout import kernels
from pyro_flipout._modes import has_own_gradients, transformed

__all__ = [
    "MAX_EXAMPLES",
    "Numbers",
    "Signs",
    "code_bits",
    "dense_signs",
    "draw_codes",
    "flip_signs",
    "paired_signs",
]

MAX_EXAMPLES = 2**31
"""Largest number of examples that 32-bit codes can tell apart."""


def draw_codes(
    shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None
) -> Tensor:
    """Draws one random code for each entry of ``shape``, uniform over the even 32-bit integers.

    The lowest bit flips all examples at once. A symmetric perturbation is the same without it, and
    with it 0 example 0 sees the shared draw itself: one example needs no signs.

    Uses the default generator of ``device``, so ``pyro.set_rng_seed`` makes it
    reproducible on CPU and CUDA.

    :param shape: shape of the codes, usually that of a weight with every
        dimension but one of size 1.
    :param device: device of the weight.
    :returns: ``int32`` tensor of shape ``shape``.

    >>> draw_codes((3, 1)).shape
    torch.Size([3, 1])
    """
    return even_codes(random_bits(shape, device))


def random_bits(
    shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None
) -> Tensor:
    """The random ``int32`` numbers of which :func:`even_codes` makes codes."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def even_codes(bits: Tensor) -> Tensor:
    """The codes of :func:`draw_codes`: without the lowest bit."""
    return bits & -2


def code_bits(num_examples: int) -> int:
    """Number of code bits that ``num_examples`` examples use.

    >>> [code_bits(n) for n in (1, 2, 3, 8192)]
    [1, 2, 3, 14]
    """
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(
            f"signs: got {num_examples} examples, expected 0 to {MAX_EXAMPLES}; "
            "split the mini-batch"
        )
    return max(num_examples - 1, 0).bit_length() + 1


def dense_signs(
    codes: Tensor, num_examples: int, dtype: torch.dtype, group_size: int = 1
) -> Tensor:
    """Builds the matrix of signs that the codes stand for, by doubling.

    :param codes: ``int32`` tensor of any shape ``(*)``.
    :param num_examples: the number N of examples.
    :param dtype: dtype of the signs; any floating dtype holds them exactly.
    :param group_size: how many neighbouring examples have their signs in common.
    :returns: tensor of shape ``(N, *)`` with entries ±1.

    >>> dense_signs(torch.tensor([0, 1, 2, 3], dtype=torch.int32), 3, torch.float)
    tensor([[ 1., -1.,  1., -1.],
            [ 1., -1., -1.,  1.],
            [ 1., -1.,  1., -1.]])
    """
    if group_size > 1:
        groups = dense_signs(codes, -(-num_examples // group_size), dtype)
        return groups.repeat_interleave(group_size, 0)[:num_examples]
    bits = code_bits(num_examples)
    out = torch.empty((num_examples, *codes.shape), dtype=dtype, device=codes.device)
    if num_examples == 0:
        return out
    flips = 1 - 2 * ((codes >> _bit_range(bits, codes)) & 1).to(dtype)  # (bits, *)
    out[0] = flips[0]
    done = 1
    for flip in flips[1:]:
        step = min(done, num_examples - done)
        torch.mul(out[:step], flip, out=out[done : done + step])
        done += step
    return out


class Signs:
    """The signs of N examples for d codes, as a product of two small matrices.

    With the number of a group ``n // k = a * G + g`` and ``G`` a power of two, ``a_n`` is the low
    bits of ``g`` and the high bits of ``a``, so ``sign(n, i) = low[g, i] * high[a, i]``. Data are
    multiplied in blocks of ``G * k`` examples, and no matrix of N x d signs is read or written.

    :param codes: ``int32`` tensor of shape ``(d,)``.
    :param num_examples: the number N of examples.
    :param dtype: dtype of the signs.
    :param group_size: the number k of neighbouring examples that have their signs in common.
    :param numbers: the number of the group that each of the N rows belongs to, where it is not
        ``n // k``.
    """

    def __init__(
        self,
        codes: Tensor,
        num_examples: int,
        dtype: torch.dtype,
        group_size: int = 1,
        numbers: Numbers | None = None,
    ) -> None:
        self.num_examples, self.group_size, self.dtype = num_examples, group_size, dtype
        self.codes: Tensor | None = codes
        self.count = codes.numel()
        if numbers is not None:
            self.codes, self.high, self.block = None, None, num_examples
            self.low = numbers.of_rows(_looked_up(codes, numbers.count, dtype))
            return
        groups = -(-num_examples // group_size)
        # A few examples have all their signs in `low`, which takes fewer calls.
        few = num_examples <= len(_TABLE)
        own_bits = _LOW_BITS if codes.device.type == "cpu" else _LOW_BITS_GPU
        low_bits = code_bits(groups) - 1 if few else own_bits - (group_size - 1).bit_length()
        self._low_bits = max(low_bits, 0)
        self.block = group_size << self._low_bits
        if not kernels.possible(codes):
            self._make(codes)

    low: Tensor
    """Shape ``(B, d)``, or ``(1, d)`` where all examples of a block are of one group."""

    high: Tensor | None
    """Shape ``(ceil(N / B), d)``."""

    def _make(self, codes: Tensor) -> None:
        groups = -(-self.num_examples // self.group_size)
        low = _looked_up(codes, min(1 << self._low_bits, groups), self.dtype)
        if self.group_size > 1 and len(low) > 1:
            low = _repeated(low, self.group_size)[: self.num_examples]
        high = -(-self.num_examples // self.block)
        self.low = low
        self.high = (
            # The lowest bit of every a_n is 1: its flip is in `low` already.
            _looked_up((codes >> self._low_bits) & ~1, high, self.dtype) if high > 1 else None
        )

    def __getattr__(self, name: str) -> Any:
        # Where kernels form signs from the codes, the factors are made when they are asked for.
        if name in ("low", "high") and vars(self).get("codes") is not None:
            self._make(self.codes)  # type: ignore[arg-type]
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def _made(self) -> bool:
        return "low" in vars(self)

    def to(self, dtype: torch.dtype) -> Signs:
        """The same signs in another dtype, which autocast gives to outputs."""
        if self.dtype == dtype:
            return self
        other = self._copy()
        other.dtype = dtype
        if self._made:
            other.low = self.low.to(dtype)
            other.high = None if self.high is None else self.high.to(dtype)
        return other

    def of(self, codes: slice) -> Signs:
        """The signs of some of the codes."""
        other = self._copy()
        if self._made:
            other.low = self.low[:, codes]
            other.high = None if self.high is None else self.high[:, codes]
        other.codes = None if self.codes is None else self.codes[codes]
        other.count = len(range(*codes.indices(self.count)))
        return other

    def _copy(self) -> Signs:
        other = object.__new__(type(self))  # copy.copy takes longer than a small product
        vars(other).update(vars(self))
        return other

    @property
    def of_groups(self) -> Tensor:
        """The signs of each group of examples, shape ``(ceil(N / k), d)``."""
        low = self.low[:: self.group_size]
        if self.high is None:
            return low
        groups = -(-self.num_examples // self.group_size)
        return (self.high.unsqueeze(1) * low).flatten(0, 1)[:groups]

    @property
    def multiple(self) -> int:
        """A slice of the examples for :meth:`cut` starts at a multiple of this number."""
        return 1 if self.high is None else self.block

    def cut(self, which: slice) -> Signs:
        """The signs of the examples ``which.start`` to ``which.stop``."""
        high = self.high  # made from the codes of all examples
        other = self._copy()
        other.codes, other.num_examples = None, which.stop - which.start
        if high is None:
            other.low = self.low if len(self.low) == 1 else self.low[which]
        else:
            first = which.start // self.block
            other.high = high[first : first + -(-other.num_examples // self.block)]
        return other

    def times(self, x: Tensor, example_dim: int, dim: int, out: Tensor | None = None) -> Tensor:
        """``x`` with every example's entries along ``dim`` multiplied by its signs.

        :param x: any shape, of size N in ``example_dim`` and of size d in ``dim``.
        :param out: where to write; may be ``x``.
        """
        if self._in_kernel(x):
            from pyro_flipout.kernels import triton_signs

            self._check(x, dim)
            done = triton_signs.flipped(x, *self._coded(), example_dim, dim, out)
            if done is not None:
                return done
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        low, high = self._place(x, example_dim, dim)
        if high is None:
            return torch.mul(x, low, out=out)
        for part, y, a, b in self._parts(x, out, low, high, example_dim):
            torch.mul(part, b, out=y)
            y.mul_(a)
        return out

    def add_times(
        self, out: Tensor, x: Tensor, example_dim: int, dim: int, bias: SignedBias | None = None
    ) -> Tensor:
        """``out + x * signs``, in place of ``out`` and at the cost of ``x``.

        :param bias: a bias along ``dim`` to add as :meth:`add_vectors` does, in the same pass
            where there is a kernel.
        """
        if self._in_kernel(out, x):
            from pyro_flipout.kernels import triton_signs

            self._check(out, dim)
            together = None
            if bias is not None and bias[2]._in_kernel(out):
                together = bias[0], bias[1], bias[2]._coded()[0]
            if triton_signs.add_flipped(out, x, *self._coded(), example_dim, dim, together):
                done = bias is None or together is not None
                return out if done else _add_bias(out, bias, example_dim, dim)
        self._add_times(out, x, example_dim, dim)
        return _add_bias(out, bias, example_dim, dim)

    def _add_times(self, out: Tensor, x: Tensor, example_dim: int, dim: int) -> Tensor:
        low, high = self._place(x, example_dim, dim)
        if high is None:
            return out.addcmul_(x, low)
        for part, y, a, b in self._parts(x, out, low, high, example_dim):
            y.addcmul_(part.mul_(b), a)
        return out

    def add_vectors(
        self, out: Tensor, center: Tensor, delta: Tensor, example_dim: int, dim: int
    ) -> Tensor:
        """``out + (center + delta * signs)``, in place; the vectors ``(d,)`` lie along ``dim``.

        In that order, so that a sum which is exactly 0 stays so: DropConnect and a ReLU meet there.
        """
        if self._in_kernel(out, center, delta):
            from pyro_flipout.kernels import triton_signs

            codes, flips = self._coded()
            bias = center, delta, codes
            if triton_signs.add_flipped(out, None, None, flips, example_dim, dim, bias):
                return out
        low, high = self._place(out, example_dim, dim)
        along = [1] * low.dim()
        along[dim if high is None else dim + (dim > example_dim)] = -1
        center, low = center.reshape(along), low * delta.reshape(along)
        if high is None:
            return out.add_(low.add_(center))
        for _, y, a, b in self._parts(out, out, low, high, example_dim):
            y.add_(
                torch.addcmul(center if y.dim() > out.dim() else center.squeeze(example_dim), b, a)
            )
        return out

    def sum_times(self, x: Tensor) -> Tensor:
        """The sum over the examples of ``x`` ``(N, d)`` times their signs, shape ``(d,)``."""
        if self._in_kernel(x):
            from pyro_flipout.kernels import triton_signs

            self._check(x, 1)
            return triton_signs.sum_flipped(x, *self._coded())
        low, high = self._place(x, 0, 1)
        if high is None:
            return torch.mul(x, low).sum(0)
        total = x.new_zeros(self.block, self.low.size(1))
        for part, _, a, _b in self._parts(x, x, low, high, 0):
            if part.dim() == 2:  # the examples that are left
                total[: len(part)].addcmul_(part, a)
            else:
                for blocks, signs in zip(part.split(_BLOCKS), a.split(_BLOCKS), strict=True):
                    total += torch.mul(blocks, signs).sum(0)
        return total.mul_(self.low).sum(0)

    def _place(self, x: Tensor, example_dim: int, dim: int) -> tuple[Tensor, Tensor | None]:
        """The factors, broadcastable to ``x`` with its example dimension split in two.

        Without high ones they broadcast to ``x`` as it is.

        :raises ValueError: if ``x`` is smaller than the codes, so that it would have to grow.
        """
        self._check(x, dim)
        if self.high is None:
            if x.dim() == 2 and dim == 1:
                return self.low, None
            shape = [1] * x.dim()
            shape[example_dim], shape[dim] = self.low.shape
            return (self.low.t() if dim < example_dim else self.low).reshape(shape), None

        def place(factor: Tensor, where: int) -> Tensor:
            shape = [1] * (x.dim() + 1)
            shape[where], shape[dim + (dim > example_dim)] = factor.shape
            return (factor.t() if dim < example_dim else factor).reshape(shape)

        return place(self.low, example_dim + 1), place(self.high, example_dim)

    def _check(self, x: Tensor, dim: int) -> None:
        if self.count not in (1, x.size(dim)):
            raise ValueError(
                f"Signs: got data of shape {tuple(x.shape)}, expected size {self.count} in "
                f"dimension {dim}, one for each code; expand them"
            )

    def _in_kernel(self, *tensors: Tensor) -> bool:
        """Whether one kernel should do it."""
        if not kernels.possible(tensors[0]) or self.codes is None:
            return False
        own = all(t.dtype == self.dtype for t in tensors)
        return own and kernels.signs_available(*tensors, self.codes)

    def _coded(self) -> tuple[Tensor, Any]:
        """The codes, and what kernels need to know of the examples."""
        from pyro_flipout.kernels._launch import Flips

        assert self.codes is not None, "asked before"
        return self.codes, Flips(None, None, None, self.num_examples, 1, self.group_size)

    def _parts(self, x: Tensor, y: Tensor, low: Tensor, high: Tensor, dim: int) -> list[Any]:
        """The whole blocks of examples, then the examples that are left."""
        whole = self.num_examples // self.block
        parts, split = [], whole * self.block
        if whole:
            blocks = (t.narrow(dim, 0, split).unflatten(dim, (whole, self.block)) for t in (x, y))
            parts.append((*blocks, high.narrow(dim, 0, whole), low))
        rest = self.num_examples - split
        if rest:
            tails = (t.narrow(dim, split, rest) for t in (x, y))
            last = (low if len(self.low) == 1 else low.narrow(dim + 1, 0, rest)).squeeze(dim)
            parts.append((*tails, high.select(dim, whole), last))
        return parts


SignedBias = tuple[Tensor, Tensor, Signs]
"""Centre and perturbation of a bias, and the signs of the latter."""


def _add_bias(out: Tensor, bias: SignedBias | None, example_dim: int, dim: int) -> Tensor:
    if bias is None:
        return out
    center, delta, signs = bias
    return signs.add_vectors(out, center, delta, example_dim, dim)


_LOW_BITS = 5
_LOW_BITS_GPU = 7  # as many as the table has: few calls count there, not the cache
_BLOCKS = 16
"""Blocks of examples whose products fit in a cache."""


class Numbers:
    """The numbers of the groups that rows of data belong to, in any order.

    :param rows: an integer tensor of shape ``(R,)`` with entries from 0 to ``count - 1``.
    :param count: the number of groups.
    """

    __slots__ = ("count", "rows")

    def __init__(self, rows: Tensor, count: int) -> None:
        self.rows, self.count = rows, count

    def of_rows(self, by_group: Tensor) -> Tensor:
        """The entries ``(R, *)`` of the rows, of those of the groups ``(count, *)``."""
        return by_group.index_select(0, self.rows.to(by_group.device))

    def of(self, rows: Tensor) -> Tensor:
        """The groups of some rows, by their numbers."""
        return self.rows.to(rows.device)[rows]


def _repeated(low: Tensor, times: int) -> Tensor:
    """Every row ``times`` times; ``repeat_interleave`` is several times slower."""
    return low.unsqueeze(1).expand(-1, times, -1).flatten(0, 1)


def _looked_up(codes: Tensor, num_examples: int, dtype: torch.dtype) -> Tensor:
    """:func:`dense_signs` of flat codes, in a tenth of the calls for a few examples."""
    if num_examples > len(_TABLE):
        return dense_signs(codes, num_examples, dtype)
    table = _TABLE if codes.device.type == "cpu" else _table_on(codes.device)
    return table[:num_examples].to(dtype).index_select(1, codes & 255)


class _Flip(torch.autograd.Function):
    """Multiplication by signs, which saves the codes' factors and nothing of the data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Signs, example_dim: int, dim: int) -> Tensor:
        ctx.signs = signs, example_dim, dim
        return signs.times(x, example_dim, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _apply_flip(grad, *ctx.signs), None, None, None


_apply_flip: Callable[..., Any] = _Flip.apply


def flip_signs(x: Tensor, signs: Signs, example_dim: int, dim: int) -> Tensor:
    """``x`` times the signs of its examples along ``dim``, differentiable any number of times.

    :param x: any shape, of size N in ``example_dim`` and d in ``dim``.

    >>> signs = Signs(torch.tensor([0, 1, 2], dtype=torch.int32), 2, torch.float)
    >>> flip_signs(torch.ones(2, 3), signs, 0, 1)
    tensor([[ 1., -1.,  1.],
            [ 1., -1., -1.]])
    """
    if not has_own_gradients():
        sizes = [n if d in (example_dim, dim) else 1 for d, n in enumerate(x.shape)]
        return x * signs.times(torch.ones(sizes, dtype=x.dtype, device=x.device), example_dim, dim)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return signs.times(x, example_dim, dim)
    return _apply_flip(x, signs, example_dim, dim)  # type: ignore[no-any-return]


def paired_signs(codes: Tensor, examples: Tensor, dtype: torch.dtype) -> Tensor:
    """Signs of single pairs of a code and an example, without the matrix of all.

    :param codes: ``int32`` tensor of any shape.
    :param examples: number n of the example for each code, an integer tensor that
        broadcasts with ``codes``.
    :param dtype: dtype of the signs.
    :returns: tensor of the broadcast shape with entries ±1, equal to
        ``dense_signs(codes, N, dtype)[n]``.

    >>> codes = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    >>> paired_signs(codes, torch.tensor([0, 0, 1, 1]), torch.float)
    tensor([ 1., -1., -1.,  1.])
    """
    bits = (2 * examples.to(torch.int32) + 1) & codes
    for shift in (16, 8, 4, 2, 1):  # folds the parity into the lowest bit
        bits = bits ^ (bits >> shift)
    return (1 - 2 * (bits & 1)).to(dtype)


def _bit_range(bits: int, codes: Tensor) -> Tensor:
    positions = torch.arange(bits, dtype=torch.int32, device=codes.device)
    return positions.reshape(bits, *(1,) * codes.dim())


# The signs of 128 examples for all codes of 8 bits. It is made here and not when first needed,
# which may be inside a transform of torch.func, or where tensors are fake.
_TABLE = dense_signs(torch.arange(256, dtype=torch.int32, device="cpu"), 128, torch.float)
_TABLES: dict[torch.device, Tensor] = {}


def _table_on(device: torch.device) -> Tensor:
    """The table on another device, copied there once."""
    table = _TABLES.get(device)
    if table is None:
        table = _TABLE.to(device)
        if type(table) is Tensor and not transformed():  # else of no use outside
            _TABLES[device] = table
    return table
