"""Precision: dtypes, cancellation, autocast, devices."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from pyro_flipout import flip, flipout
from tests.helpers import Recording, Regression, mlp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def model(x):
    return F.linear(x, pyro.sample("w", dist.Normal(0.0, 1.0).expand([64, 32]).to_event(2)))


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
def test_no_cancellation_in_float32(guide_class):
    """With scale / |loc| = 1e-4 the perturbation keeps its value to a few per mille."""
    guide = guide_class(model, init_loc_fn=lambda s: torch.full((64, 32), 3.0), init_scale=3e-4)
    x = torch.randn(16, 32)
    guide(x)
    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace(x)
    handler = Recording()
    poutine.replay(handler(model), trace=trace)(x)
    delta = handler.seen["w"].delta
    pyro.set_rng_seed(0)
    eps = torch.randn(64 * 32).reshape(64, 32)
    # A float32 value near 3 is spaced by 2.4e-7, against a scale of 3e-4.
    torch.testing.assert_close(delta, 3e-4 * eps, atol=3e-7, rtol=1e-3)
    assert torch.equal(handler.seen["w"].center, torch.full((64, 32), 3.0))


def test_perturbation_survives_bf16_autocast():
    """Centre and perturbation are rounded apart; rounding their sum would lose it."""
    torch.manual_seed(0)
    center, delta = torch.full((8, 32), 3.0), 3e-4 * torch.randn(8, 32)
    x = torch.randn(4, 32)
    w = flip(center + delta, center, delta)
    exact = torch.einsum("ni,noi->no", x.double(), w.materialize(4).double() - center)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.linear(x, w)
        base = F.linear(x, center)
        lost = F.linear(x, center + delta) - base
    noise = (out - base).double() - exact
    # What bf16 does to the sum itself is the only error: 2**-8 of the output's size.
    assert noise.abs().max() <= base.abs().max() * 2**-7
    assert torch.equal(lost, torch.zeros_like(lost))  # what a single rounding does


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    torch.manual_seed(0)
    center, delta = torch.randn(8, 4), torch.randn(8, 4)
    x = torch.randn(5, 4, dtype=dtype)
    w = flip((center + delta).to(dtype), center.to(dtype), delta.to(dtype))
    out = F.linear(x, w) + flip(
        torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype), execution=w.execution
    )
    assert out.dtype == dtype
    assert w.materialize().dtype == dtype
    out = F.linear(x, w)
    expected = torch.einsum("ni,noi->no", x.double(), w.materialize().double())
    tol = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=tol, rtol=tol)


def test_autocast_training_step_is_close_to_float32():
    torch.manual_seed(0)
    net = Regression(mlp((16, 32, 3)), scale=1.0)
    x, y = torch.randn(64, 16), torch.randn(64, 3)
    guide = AutoNormal(net)
    guide(x, y)
    grads = []
    for enabled in (False, True):
        pyro.set_rng_seed(1)
        guide.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Trace_ELBO().loss_and_grads(flipout(net), guide, x, y)
        grads.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_do_not_depend_on_the_dtype(dtype):
    from pyro_flipout.signs import dense_signs, draw_codes

    codes = draw_codes((50,))
    signs = dense_signs(codes, 37, dtype)
    assert torch.equal(signs.double(), dense_signs(codes, 37, torch.float64))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_training_step():
    def run():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with torch.device("cuda"):  # the priors too
            net = Regression(mlp((16, 32, 3)), scale=1.0)
            x, y = torch.randn(64, 16), torch.randn(64, 3)
            guide = AutoNormal(net)
            guide(x, y)
        svi = SVI(flipout(net), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        return [svi.step(x, y) for _ in range(3)]

    assert run() == run()
