"""Weight noise in plain training: exact by example, and nothing else moves."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from pyro_flipout import FlipoutTensor, FlipoutWarning, MissingRuleError
from pyro_flipout.nn import FlipoutLinear, remove_weight_noise_, weight_noise_
from pyro_flipout.nn.noise import NOISE
from tests.helpers import FAILURE_RATE, Z, mlp
from tests.nn.networks import NETWORKS, LeNet, N, Sequences, TiedLM, tokens

KINDS = [
    ({"kind": "gaussian", "sigma": 0.3}),
    ({"kind": "multiplicative", "sigma": 0.5}),
    ({"kind": "dropconnect"}),
]


def seen(net, x):
    """Output, and the weights that the network's modules found, by all their names."""
    found = {}
    handles = []
    for path, module in net.named_modules(remove_duplicate=False):
        for attr in module._parameters:

            def look(module, args, name=f"{path}.{attr}" if path else attr, attr=attr):
                found[name] = getattr(module, attr)

            handles.append(
                net.register_forward_pre_hook(lambda _, args, m=module, f=look: f(m, args))
            )
    try:
        return net(x), found
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_example_by_example(network, options, float64):
    make, data = NETWORKS[network]
    net, x = make(), data()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    plain = copy.deepcopy(net)
    weight_noise_(net, on_missing_rule="error", **options)
    out, weights = seen(net, x)
    names = [
        name
        for name, _ in plain.named_parameters()
        if not isinstance(plain.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
    ]
    assert all(isinstance(weights[name], FlipoutTensor) for name in names)
    assert len({id(weights[name].execution) for name in names}) == 1
    # Gradients go to the parameters themselves, through center and delta.
    explicit = {name: weights[name].materialize(N) for name in names}
    rows = []
    for n in range(N):
        own = {name: w[n] for name, w in explicit.items()}
        rows.append(torch.func.functional_call(plain, own, (x[n : n + 1],)))
    expected = torch.cat(rows)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    parameters = [dict(net.named_parameters())[name] for name in names]
    cotangent = torch.randn_like(out)
    actual, wanted = (
        torch.autograd.grad((o * cotangent).sum(), parameters, retain_graph=True)
        for o in (out, expected)
    )
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def check_draws(options):
    net = weight_noise_(nn.Linear(40, 30, bias=False), **options)
    w, noisy = net.weight.detach(), seen(net, torch.randn(3, 40))[1]["weight"]
    torch.testing.assert_close(noisy.center, w)
    torch.testing.assert_close(noisy.plain, noisy.center + noisy.delta)
    if options["kind"] == "dropconnect":
        explicit = noisy.materialize() / w
        assert ((explicit.abs() < 1e-12) | ((explicit - 2).abs() < 1e-12)).all()
        assert ((noisy.plain / w / 2).sum() - 600).abs() < Z * 300**0.5
    else:
        eps = noisy.delta / options["sigma"]
        eps = eps / w if options["kind"] == "multiplicative" else eps
        assert eps.sum().abs() < Z * 1200**0.5
        x = -math.log(FAILURE_RATE / 2)  # Laurent and Massart's bound for chi-squared
        assert (eps.pow(2).sum() - 1200).abs() < 2 * (1200 * x) ** 0.5 + 2 * x


@pytest.mark.parametrize("options", KINDS)
def test_the_draws_are_what_the_kinds_say(options, float64):
    check_draws(options)


@pytest.mark.parametrize("options", KINDS)
def test_the_draws_planted_bug(options, float64, monkeypatch):
    right = NOISE[options["kind"]]
    monkeypatch.setitem(NOISE, options["kind"], lambda w, noise: 1.3 * right(w, noise))
    with pytest.raises(AssertionError):
        check_draws(options)


def test_gradient_through_delta(float64):
    # d(sum of W(1 + sigma eps) x)/dW is (1 + sigma eps) x, not x.
    net, x = nn.Linear(4, 3, bias=False), torch.randn(1, 4)
    weight_noise_(net, "multiplicative", sigma=0.7)
    out, weights = seen(net, x)
    out.sum().backward()
    factor = weights["weight"].materialize()[0] / net.weight
    torch.testing.assert_close(net.weight.grad, (factor * x).detach())


def check_mean(options):
    # Signs of two examples are independent: noise of different examples is uncorrelated.
    net, x = nn.Linear(8, 1, bias=False), 1 + torch.randn(256, 8)
    quiet = net(x).detach()
    weight_noise_(net, **options)
    noise = torch.stack([net(x).detach() - quiet for _ in range(20)])
    assert noise.mean().abs() < Z * noise.std() / noise.numel() ** 0.5


@pytest.mark.parametrize("options", KINDS)
def test_mean_is_the_quiet_output(options, float64):
    check_mean(options)


def test_mean_planted_bug(float64, monkeypatch):
    monkeypatch.setattr("pyro_flipout.nn.noise.flip", lambda value, *args, **kwargs: 1.1 * value)
    with pytest.raises(AssertionError):
        check_mean({"kind": "gaussian", "sigma": 0.01})


def test_shared_noise(float64):
    for options in [*KINDS, {"kind": "dropconnect", "p": 0.2}, {"kind": "dropconnect", "p": 0.0}]:
        net, x = mlp(), torch.randn(N, 4)
        plain = copy.deepcopy(net)
        weight_noise_(net, flipout=False, **options)
        out, weights = seen(net, x)
        assert not any(isinstance(w, FlipoutTensor) for w in weights.values())
        expected = torch.func.functional_call(plain, weights, (x,))
        torch.testing.assert_close(out, expected)
    ratio = weights["0.weight"] / plain[0].weight
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_dropconnect_at_another_p_has_the_right_mean(float64):
    net = weight_noise_(nn.Linear(50, 40, bias=False), "dropconnect", p=0.2, flipout=False)
    weights = seen(net, torch.randn(1, 50))[1]["weight"]
    ratio = weights / net.weight
    kept = (ratio.detach() - 1.25).abs() < 1e-12
    assert (kept | (ratio == 0)).all()
    assert (kept.sum() - 1600).abs() < Z * (2000 * 0.2 * 0.8) ** 0.5


def test_time_major(float64):
    net = nn.LSTM(3, 4)
    weight_noise_(
        net, "multiplicative", example_dim=1, expose=["weight_hh_l0"], on_missing_rule="error"
    )
    x = torch.randn(6, N, 3)
    out, weights = seen(net, x)
    assert isinstance(weights["weight_hh_l0"], FlipoutTensor)
    assert weights["weight_ih_l0"] is net.weight_ih_l0
    plain = nn.LSTM(3, 4)
    for n in range(N):
        own = dict(net.named_parameters()) | {
            "weight_hh_l0": weights["weight_hh_l0"].materialize()[n]
        }
        expected = torch.func.functional_call(plain, own, (x[:, n : n + 1],))[0]
        torch.testing.assert_close(out[0][:, n : n + 1], expected)


# ----------------------------------------------------------------- nothing else moves


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_and_evaluation_stay(network):
    make, data = NETWORKS[network]
    net, x = make().eval(), data()
    before, state, quiet = dict(net.named_parameters()), net.state_dict(), net(x)
    assert weight_noise_(net) is net
    net.train()
    net(x).sum().backward()
    net.eval()
    assert all(p is before[name] for name, p in net.named_parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items() if "running" not in k)
    assert all(
        "weight" not in vars(m) and "_weight_noise_undo" not in vars(m) for m in net.modules()
    )
    state_rng = torch.get_rng_state()
    if network != "lenet":  # whose batch norm has learned
        assert torch.equal(net(x), quiet)
    assert torch.equal(torch.get_rng_state(), state_rng)
    remove_weight_noise_(net).train()
    assert not any(isinstance(w, FlipoutTensor) for w in seen(net, x)[1].values())


def test_a_part_in_evaluation_mode():
    net = weight_noise_(mlp())
    net[0].eval()
    weights = seen(net, torch.randn(N, 4))[1]
    assert weights["0.weight"] is net[0].weight
    assert isinstance(weights["2.weight"], FlipoutTensor)


def test_training_with_an_optimizer():
    net = weight_noise_(Sequences(), "dropconnect", expose=["*weight_hh*"])
    optimizer = torch.optim.AdamW(net.parameters(), fused=False)
    before = net.lstm.weight_hh_l0.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        net(tokens()).pow(2).mean().backward()
        optimizer.step()
    assert not torch.equal(before, net.lstm.weight_hh_l0)
    assert net.lstm._flat_weights[1] is net.lstm.weight_hh_l0


def test_one_draw_for_each_outermost_call():
    net = weight_noise_(TiedLM())
    x = tokens()
    _, first = seen(net, x)
    assert first["embed.weight"] is first["decode.weight"]
    assert first["block.weight"] is first["again.weight"]
    _, second = seen(net, x)
    assert not torch.equal(first["embed.weight"].plain, second["embed.weight"].plain)


def test_calls_within_calls():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.found = []

        def forward(self, x, depth=2):
            self.found.append(self.linear.weight)
            return self(self.linear(x), depth - 1) if depth else x

    net = weight_noise_(Recursive())
    net(torch.randn(3, 4))
    assert len({id(w) for w in net.found}) == 1
    assert "weight" not in vars(net.linear)


def test_an_error_inside_leaves_no_trace():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            self.linear(x)
            raise RuntimeError("inside")

    net = weight_noise_(Fails())
    with pytest.raises(RuntimeError, match="inside"):
        net(torch.randn(3, 4))
    assert "weight" not in vars(net.linear)
    assert "_weight_noise_undo" not in vars(net)


def test_copies():
    net, x = weight_noise_(Sequences()), tokens()
    net(x)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.manual_seed(0)
        out, weights = seen(copied, x)
        assert isinstance(weights["head.weight"], FlipoutTensor)
        torch.manual_seed(0)
        assert torch.equal(out, net(x))
        assert copied.head.weight is not net.head.weight
        remove_weight_noise_(copied)
        assert not isinstance(seen(copied, x)[1]["head.weight"], FlipoutTensor)
        assert isinstance(seen(net, x)[1]["head.weight"], FlipoutTensor)


def test_several_kinds(float64):
    net = weight_noise_(mlp(), "gaussian", sigma=0.1, expose=["0"])
    weight_noise_(net, "dropconnect", expose=["2.weight"])
    weights = seen(net, torch.randn(N, 4))[1]
    torch.testing.assert_close(weights["2.weight"].delta.abs(), net[2].weight.abs())
    assert weights["0.bias"].execution is weights["2.weight"].execution
    assert not isinstance(weights["2.bias"], FlipoutTensor)
    remove_weight_noise_(net)
    assert net._forward_hooks == net._forward_pre_hooks == net._forward_hooks_always_called == {}


def test_a_weight_without_rule_is_shared_with_one_warning():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ torch.matrix_exp(self.weight)

    net, x = weight_noise_(Strange()), torch.randn(3, 4)
    with pytest.warns(FlipoutWarning, match="weight 'weight' keeps its shared noise.*matrix_exp"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = seen(net, x)[1]
    assert not isinstance(weights["weight"], FlipoutTensor)
    assert weights["weight"] is not net.weight
    net = weight_noise_(Strange(), on_missing_rule="error")
    with pytest.raises(MissingRuleError, match="matrix_exp"):
        net(x)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "dropconnect", "p": 0.3}, ValueError, "kept.*dropped.*equally.*flipout=False"),
        ({"kind": "dropconnect", "p": 1.0, "flipout": False}, ValueError, "p=1.0"),
        ({"kind": "dropconnect", "sigma": 1.0}, ValueError, "has p instead"),
        ({"kind": "gaussian"}, ValueError, "say sigma="),
        ({"kind": "gaussian", "sigma": -1.0}, ValueError, "sigma=-1.0"),
        ({"kind": "multiplicative", "p": 0.3}, ValueError, "has sigma instead"),
        ({"kind": "dropout"}, ValueError, "'dropout', expected one of .*dropconnect"),
        ({"hide": ["nowhere"]}, ValueError, "'nowhere'"),
        ({"example_dim": -1}, ValueError, "example_dim=-1"),
        ({"on_missing_rule": "no"}, ValueError, "on_missing_rule='no'"),
    ],
)
def test_options(options, error, words):
    net = LeNet()
    with pytest.raises(error, match=words):
        weight_noise_(net, **options)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_twice():
    net = weight_noise_(mlp(), expose=["0"])
    with pytest.raises(ValueError, match=r"\['0.bias', '0.weight'\] have noise already"):
        weight_noise_(net)
    with pytest.raises(ValueError, match="example_dim=1.*was given 0"):
        weight_noise_(net, expose=["2"], example_dim=1)
    with pytest.raises(ValueError, match="'0' has weight noise of its own"):
        weight_noise_(nn.Sequential(net), expose=["0.2"])
    with pytest.raises(ValueError, match="no weight noise"):
        remove_weight_noise_(nn.Linear(1, 1))


def test_pyro_modules_are_refused():
    with pytest.raises(TypeError, match="'0.bias' belongs to the PyroModule FlipoutLinear"):
        weight_noise_(nn.Sequential(FlipoutLinear(2, 2, bias_prior=lambda name, p: None)))


def test_a_parameter_that_is_gone():
    net = weight_noise_(nn.Linear(2, 2), expose=["weight"])
    del net.weight
    net.weight = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="'weight' is no parameter any more"):
        net(torch.randn(1, 2))
