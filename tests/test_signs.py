"""Codes stand for signs that are pairwise independent between examples."""

import itertools

import pytest
import torch

from pyro_flipout.signs import (
    MAX_EXAMPLES,
    Signs,
    code_bits,
    dense_signs,
    draw_codes,
    flip_signs,
)


def parity(codes, num_examples):
    """The definition: the sign of the parity of popcount(a_n & B_i)."""
    rows = []
    for n in range(num_examples):
        bits = [bin((2 * n + 1) & (int(c) & 0xFFFFFFFF)).count("1") for c in codes.flatten()]
        rows.append(torch.tensor([1.0 - 2.0 * (b % 2) for b in bits]).reshape(codes.shape))
    return torch.stack(rows) if rows else torch.empty(0, *codes.shape)


@pytest.mark.parametrize("num_examples", [0, 1, 2, 3, 4, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("shape", [(7,), (3, 1), (), (2, 1, 3)])
def test_doubling_is_the_definition(num_examples, shape):
    torch.manual_seed(num_examples)
    codes = draw_codes(shape)
    assert codes.dtype == torch.int32
    torch.testing.assert_close(
        dense_signs(codes, num_examples, torch.float), parity(codes, num_examples)
    )


@pytest.mark.parametrize("num_examples", [2, 3, 8])
def test_pairs_of_examples_are_exactly_independent(num_examples):
    """Over all values of the bits in use, each pair of signs is uniform on {-1, 1}^2."""
    every = torch.arange(2 ** code_bits(num_examples), dtype=torch.int32)
    signs = dense_signs(every, num_examples, torch.float64)
    assert torch.equal(signs.sum(1), torch.zeros(num_examples, dtype=torch.float64))
    for n, m in itertools.combinations(range(num_examples), 2):
        assert (signs[n] * signs[m]).sum() == 0


def test_product_of_signs_is_the_xor_of_codes():
    a, b = draw_codes((6, 1)), draw_codes((1, 4))
    torch.testing.assert_close(
        dense_signs(a, 9, torch.float) * dense_signs(b, 9, torch.float),
        dense_signs(a ^ b, 9, torch.float),
    )


def test_codes_do_not_depend_on_the_number_of_examples():
    codes = draw_codes((5,))
    assert torch.equal(dense_signs(codes, 4, torch.float), dense_signs(codes, 9, torch.float)[:4])


def test_codes_follow_the_seed_and_use_every_bit():
    torch.manual_seed(0)
    a = draw_codes((4096,))
    torch.manual_seed(0)
    assert torch.equal(a, draw_codes((4096,)))
    ones = torch.stack([((a >> bit) & 1).sum() for bit in range(32)])
    assert ones[0] == 0  # example 0 has no flips
    assert (ones[1:] - 2048).abs().max() < 6 * 32  # 6 standard deviations of Binomial(4096, 1/2)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 17, 32, 33, 200])
@pytest.mark.parametrize("num_examples", [0, 1, 5, 128, 129, 160, 1061])
def test_groups_have_their_signs_in_common(num_examples, group_size):
    codes = draw_codes((7,))
    count = -(-num_examples // group_size)
    own = dense_signs(codes, count, torch.float)
    dense = own[torch.arange(num_examples) // group_size]
    assert torch.equal(dense_signs(codes, num_examples, torch.float, group_size), dense)
    signs = Signs(codes, num_examples, torch.float, group_size)
    assert torch.equal(signs.of_groups, own)
    assert torch.equal(signs.times(torch.ones(num_examples, 7), 0, 1), dense)
    assert signs.low.numel() + (0 if signs.high is None else signs.high.numel()) <= max(
        128 * 7, (32 + num_examples // 16) * 7
    )


@pytest.mark.parametrize("group_size", [1, 3, 32])
@pytest.mark.parametrize("num_examples", [1, 5, 128, 129, 160, 1000, 1061])
@pytest.mark.parametrize(("example_dim", "dim"), [(0, 1), (1, 0), (0, 2), (1, 2)])
def test_signs_in_factors_are_the_dense_ones(num_examples, example_dim, dim, group_size):
    torch.manual_seed(0)
    shape = [2, 2, 2]
    shape[example_dim], shape[dim] = num_examples, 3
    x, vector = torch.randn(shape, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    codes = draw_codes((3,))
    signs, dense = (f(codes, num_examples, torch.float64, group_size) for f in (Signs, dense_signs))
    placed = (dense.t() if dim < example_dim else dense).reshape(
        [n if d in (example_dim, dim) else 1 for d, n in enumerate(shape)]
    )
    assert torch.equal(signs.times(x, example_dim, dim), x * placed)
    along = vector.reshape([-1 if d == dim else 1 for d in range(3)])
    torch.testing.assert_close(
        signs.add_vectors(x.clone(), 2 * vector, vector, example_dim, dim),
        x + (2 + placed) * along,
    )
    rows = torch.randn(num_examples, 3, dtype=torch.float64)
    torch.testing.assert_close(signs.sum_times(rows), (rows * dense).sum(0))


@pytest.mark.parametrize("group_size", [1, 3, 8, 40, 150])
@pytest.mark.parametrize("stop", [64, 75, 100, 200])
def test_a_cut_has_the_signs_of_its_examples(stop, group_size):
    codes = draw_codes((3,))
    signs = Signs(codes, 200 if stop > 75 else 100, torch.float, group_size)
    start = signs.multiple * (32 // signs.multiple)
    cut = signs.cut(slice(start, stop))
    dense = dense_signs(codes, 200, torch.float, group_size)[start:stop]
    assert torch.equal(cut.times(torch.ones(stop - start, 3), 0, 1), dense)


@pytest.mark.parametrize("count", [-1, MAX_EXAMPLES + 1])
def test_number_of_examples_is_checked(count):
    with pytest.raises(ValueError, match=f"got {count} examples, expected 0 to"):
        code_bits(count)


LAYOUTS = [("N7", 0, 1), ("N47", 0, 2), ("N732", 0, 1), ("5N7", 1, 2), ("7N", 1, 0), ("73N2", 2, 0)]


@pytest.mark.parametrize("num_examples", [0, 1, 2, 31, 32, 33, 64, 100, 256])
@pytest.mark.parametrize(("layout", "example_dim", "dim"), LAYOUTS)
def test_factored_signs_are_the_dense_ones(num_examples, layout, example_dim, dim):
    torch.manual_seed(0)
    shape = [num_examples if c == "N" else int(c) for c in layout]
    x, codes = torch.randn(shape), draw_codes((7,))
    dense = dense_signs(codes, num_examples, x.dtype)
    size = [1] * x.dim()
    size[example_dim], size[dim] = num_examples, 7
    dense = (dense if example_dim < dim else dense.t()).reshape(size)
    signs = Signs(codes, num_examples, x.dtype)
    for data in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(signs.times(data, example_dim, dim), x * dense)
        out = data.clone()
        assert torch.equal(signs.times(out, example_dim, dim, out=out), x * dense)
        total = signs.add_times(torch.ones_like(data), data.clone(), example_dim, dim)
        assert torch.equal(total, 1 + x * dense)


def test_flipping_signs_has_every_derivative():
    signs = Signs(draw_codes((3,)), 40, torch.float64)
    x = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)

    def flip(x):
        return flip_signs(x, signs, 0, 1)

    assert torch.autograd.gradcheck(flip, x)
    assert torch.autograd.gradgradcheck(flip, x)
