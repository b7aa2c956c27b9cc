"""``check_model`` finds faults that are planted in rules, signs and models."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoNormal, init_to_mean
from pyro.nn import PyroModule
from torch import nn

import pyro_flipout.rules.linear
import pyro_flipout.tensor
from pyro_flipout import flipout
from pyro_flipout.nn import bayesianize
from pyro_flipout.plan.probe import Probe
from pyro_flipout.signs import draw_codes
from pyro_flipout.tensor import RULES, FlipoutTensor, Rule
from pyro_flipout.testing import check_model

N = 12


class Model(PyroModule):
    def __init__(self, net):
        super().__init__()
        self.net = bayesianize(net)

    def forward(self, x, y=None):
        mean = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(mean.dim() - 1), obs=y)


class TwiceUsed(nn.Module):
    """Each weight is used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x * self.scale)) * self.scale)


def report(net, *shape, outputs=3, strict=False, init_scale=0.1, seed=0, **options):
    torch.manual_seed(seed)
    model = net if not isinstance(net, nn.Module) else Model(net)
    x, y = torch.randn(N, *shape), torch.randn(N, outputs)
    guide = AutoNormal(model, init_scale=init_scale, **options)
    guide(x, y)
    return check_model(model, guide, x, y, strict=strict)


def replace_rule(monkeypatch, function, wrong):
    """Puts ``wrong(rule, op, *args)`` in the place of the rule of a torch function."""
    right = RULES[function]

    def apply(op, *args, **kwargs):
        return wrong(right.apply, op, *args, **kwargs)

    monkeypatch.setitem(RULES, function, Rule(apply, right.flips, right.limits, right.per_particle))


def test_the_nets_are_right_without_a_fault():
    assert report(TwiceUsed(), 3).ok
    assert report(Recurrent(), 4, 3).ok
    assert report(nn.Linear(3, 3), 3).ok


# ------------------------------------------------------------------------------ the rules


class Redraws:
    """Signs are drawn anew wherever a weight is used."""

    def __init__(self, monkeypatch):
        def wrong(term):
            return tuple(2 * (draw_codes(c.shape) & 1) for _, c in term.factors)

        monkeypatch.setattr(pyro_flipout.tensor.Term, "codes", property(wrong))


class OtherSigns:
    """Each call of a rule has signs of its own, the same for all of its examples' weights."""

    def __init__(self, monkeypatch):
        def wrong(rule, op, input, weight, bias=None):
            if isinstance(weight, FlipoutTensor):
                codes = weight.draws[0]._codes
                codes.drawn = 2 * (draw_codes(codes.drawn.shape) & 1)
                weight.draws[0]._factors = None
            return rule(op, input, weight, bias)

        replace_rule(monkeypatch, F.linear, wrong)


class WrongDimension:
    """The signs of the outputs are those of neighbours."""

    def __init__(self, monkeypatch):
        def wrong(rule, op, input, weight, bias=None):
            return rule(op, input, weight.transpose(0, 1), bias)

        replace_rule(monkeypatch, F.linear, wrong)


class WrongExamples:
    """Example n is computed with the signs of example n - 1."""

    def __init__(self, monkeypatch):
        def wrong(rule, op, input, weight, bias=None):
            return rule(op, input.roll(1, 0), weight, bias).roll(-1, 0)

        replace_rule(monkeypatch, F.linear, wrong)


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a factor too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


class WrongGradientOfDelta:
    """Values are right, and the gradient on the way to the scale is off by a tenth."""

    def __init__(self, monkeypatch):
        right = FlipoutTensor._split

        def wrong(weight):
            center, terms = right(weight)
            terms = tuple(
                pyro_flipout.tensor.Term(Scaled.apply(t.delta), t.draws, t._factors) for t in terms
            )
            return center, terms

        monkeypatch.setattr(FlipoutTensor, "_split", wrong)


class WrongGradientOfCenter:
    """The same on the way to the centre."""

    def __init__(self, monkeypatch):
        right = FlipoutTensor._split

        def wrong(weight):
            center, terms = right(weight)
            return Scaled.apply(center), terms

        monkeypatch.setattr(FlipoutTensor, "_split", wrong)


class ForgetsTheBias:
    """Every example sees the shared draw of the bias."""

    def __init__(self, monkeypatch):
        def wrong(rule, op, input, weight, bias=None):
            plain = bias.plain if isinstance(bias, FlipoutTensor) else bias
            return rule(op, input, weight, plain)

        replace_rule(monkeypatch, F.linear, wrong)


class LeavesTheBiasOut:
    """The bias is not added."""

    def __init__(self, monkeypatch):
        def wrong(rule, op, input, weight, bias=None):
            return rule(op, input, weight)

        replace_rule(monkeypatch, F.linear, wrong)


class TheSignsOfOneSite:
    """All sites have the signs of the first: its pattern is not theirs."""

    def __init__(self, monkeypatch):
        right = Probe.weight
        first = []

        def wrong(probe, *args, **kwargs):
            weight = right(probe, *args, **kwargs)
            if isinstance(weight, FlipoutTensor) and weight.terms:
                own = weight.draws[0]._codes
                first[:] = first or [own.drawn.clone()]
                shared = first[0].repeat(own.size)[: own.size]
                own.drawn = shared
            return weight

        def patterns(probe):
            return {
                site: pyro_flipout.plan.probe.pattern_of(
                    pyro_flipout.tensor.Draw(
                        site, probe.drawn[site].delta, draw.execution, 0, probe.drawn[site].codes
                    ),
                    probe.drawn[site].delta,
                )
                for site, draw in probe.draws.items()
            }

        monkeypatch.setattr(Probe, "weight", wrong)
        monkeypatch.setattr(Probe, "patterns", patterns)


RULE_FAULTS = [
    Redraws,
    OtherSigns,
    WrongDimension,
    WrongExamples,
    WrongGradientOfDelta,
    WrongGradientOfCenter,
    ForgetsTheBias,
    LeavesTheBiasOut,
    TheSignsOfOneSite,
]


@pytest.mark.parametrize("fault", RULE_FAULTS)
def test_faults_of_rules_are_found(fault, monkeypatch):
    fault(monkeypatch)
    found = report(TwiceUsed(), 3)
    assert not found.ok
    wrong = "net.layer.bias" if fault in (ForgetsTheBias, LeavesTheBiasOut) else "net.layer.weight"
    finding = found.sites[wrong]
    assert not (finding.flipped and finding.verified)
    with pytest.raises(AssertionError, match="check_model"):
        report(TwiceUsed(), 3, strict=True)


def test_a_rule_that_forgets_the_bias_is_found_by_the_bias(monkeypatch):
    ForgetsTheBias(monkeypatch)
    found = report(nn.Linear(3, 3), 3)
    assert not found.sites["net.bias"].flipped
    assert found.sites["net.weight"].flipped
    assert found.sites["net.weight"].verified


# ------------------------------------------------------------------------------ recurrence


class Recurrent(nn.Module):
    """An LSTM of 4 steps."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class ByHand(nn.Module):
    """The same with a cell."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTMCell(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.rnn(step, state)
        return self.out(state[0])


def new_signs(weights):
    """Draws the signs of some weights anew, from those that the audit uses."""
    for weight in pyro_flipout.tensor._weights(weights):
        own = weight.draws[0]
        own._codes.drawn = 2 * (draw_codes(own._codes.drawn.shape) & 1)
        own._factors = None
        weight.execution._signs.clear()


def cell(rule, op, input, *args):
    """A step with signs of its own."""
    new_signs(args)
    return rule(op, input, *args)


def lstm(rule, op, input, hidden, weights, *args):
    """A loop over steps with signs of their own."""
    outputs = []
    for step in input.split(1, dim=1):
        new_signs(weights)
        output, *hidden = rule(op, step, hidden, weights, *args)
        outputs.append(output)
    return torch.cat(outputs, 1), *hidden


@pytest.mark.parametrize(
    ("net", "function", "fault"), [(Recurrent, torch.lstm, lstm), (ByHand, torch.lstm_cell, cell)]
)
def test_signs_that_are_new_at_each_step_are_found(net, function, fault, monkeypatch):
    assert report(net(), 4, 3).ok
    replace_rule(monkeypatch, function, fault)
    found = report(net(), 4, 3)
    assert not found.ok
    finding = next(found.sites[name] for name in found.sites if "weight_hh" in name)
    assert not (finding.flipped and finding.verified)


# ------------------------------------------------------------------- calls outside of the rules


class Product(torch.autograd.Function):
    """A product of which the handler sees nothing: functions of autograd are not dispatched."""

    @staticmethod
    def forward(ctx, x, weight):
        weight = getattr(weight, "plain", weight)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class Bypass(nn.Module):
    """One of two uses of a weight is not seen."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3), how

    def forward(self, x):
        weight = self.layer.weight
        h = torch.tanh(self.layer(x))
        if self.how == "function":
            return Product.apply(h, weight)
        if self.how == "plain":
            return h @ getattr(weight, "plain", weight).T
        if self.how == "data":
            return h @ weight.data.T
        if self.how == "subclass":
            return h @ weight.as_subclass(torch.Tensor).T
        if self.how == "center":
            return h @ getattr(weight, "center", weight).T
        if self.how == "detach":
            return F.linear(h, torch.Tensor.detach(weight))
        return torch.from_numpy(h.detach().numpy() @ weight.detach().numpy().T) + h


@pytest.mark.parametrize(
    "how", ["function", "plain", "data", "subclass", "center", "detach", "numpy"]
)
def test_calls_that_bypass_the_rules_are_found(how):
    found = report(Bypass(how), 3)
    assert not found.ok
    finding = found.sites["net.layer.weight"]
    assert not (finding.flipped and finding.verified)


# ----------------------------------------------------------------- what two draws cannot tell


class Odd(nn.Module):
    """Odd in its weights, an even number of times: mirrored draws give the same outputs."""

    def __init__(self, mixes=False):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)
        self.mixes = mixes

    def forward(self, x):
        mean = self.second(torch.tanh(self.first(x)))
        return mean - mean.mean(0) if self.mixes else mean


class TiedProduct(nn.Module):
    """A weight of one number, that is squared: its two draws are equal if the centre is zero."""

    def __init__(self, mixes=False):
        super().__init__()
        self.weight, self.mixes = nn.Parameter(torch.ones(1)), mixes

    def forward(self, x):
        mean = x * self.weight * self.weight
        return mean - mean.mean(0) if self.mixes else mean


class Absolute(nn.Module):
    """Even in its one weight."""

    def __init__(self, mixes=False):
        super().__init__()
        self.weight, self.mixes = nn.Parameter(torch.ones(3)), mixes

    def forward(self, x):
        mean = (x * self.weight).abs()
        return mean - mean.mean(0) if self.mixes else mean


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("init_scale", [0.5, 1e-3])
def test_odd_nets_with_zero_centres(mixes, init_scale):
    found = report(Odd(mixes), 3, init_scale=init_scale, init_loc_fn=init_to_mean)
    assert found.ok == (not mixes)
    assert all(finding.flipped != mixes for finding in found.sites.values())


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("net", [TiedProduct, Absolute])
def test_even_functions_of_a_weight_are_not_verified_blindly(net, mixes):
    found = report(net(mixes), 3, init_loc_fn=init_to_mean)
    assert not found.ok
    finding = found.sites["net.weight"]
    assert not finding.verified or not finding.flipped


class Dead(nn.Module):
    """Rectifiers that nothing passes, in front of a weight whose examples mix."""

    def __init__(self, mixes=False):
        super().__init__()
        self.before, self.after, self.mixes = nn.Linear(3, 4), nn.Linear(4, 3), mixes

    def forward(self, x):
        h = torch.relu(torch.tanh(self.before(x)) - 2)
        mean = self.after(h)
        return mean - mean.mean(0) if self.mixes else mean


@pytest.mark.parametrize("mixes", [False, True])
def test_dead_units_verify_nothing(mixes):
    found = report(Dead(mixes), 3)
    assert not found.ok
    for name in ("before.weight", "before.bias", "after.weight"):
        finding = found.sites[f"net.{name}"]
        assert not (finding.flipped and finding.verified)
        assert finding.flipped or mixes
    bias = found.sites["net.after.bias"]
    assert (bias.flipped and bias.verified) or mixes


class OneAlive(nn.Module):
    """One unit of eight is alive: half of all patterns make no difference to what is behind it."""

    def __init__(self):
        super().__init__()
        self.after = nn.Linear(8, 1, bias=False)
        self.other = nn.Linear(8, 1, bias=False)

    def forward(self, x):
        alive = torch.zeros(8)
        alive[int(x[0, 0] * 1000) % 8] = 1
        h = x.abs().mean(1, keepdim=True) * alive
        return self.after(h) * torch.ones(3) + self.other(h.roll(1, 1)) * torch.arange(3)


@pytest.mark.parametrize("seed", range(6))
def test_patterns_are_tried_until_one_makes_a_difference(seed):
    found = report(OneAlive(), 3, seed=seed)
    assert found.ok


class Unused(nn.Module):
    """A weight that is drawn and not used."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layer(x) + 0 * self.other


def test_a_weight_that_makes_no_difference_is_not_verified():
    found = report(Unused(), 3)
    assert found.sites["net.layer.weight"].verified
    assert found.sites["net.layer.bias"].verified
    other = found.sites["net.other"]
    assert not other.verified
    assert "no difference" in other.reason
    with pytest.raises(AssertionError, match=r"net.other.*not verified"):
        report(Unused(), 3, strict=True)


def test_a_wrapped_model_with_options_is_checked_with_them():
    torch.manual_seed(0)
    model = Model(Unused())
    x, y = torch.randn(N, 3), torch.randn(N, 3)
    guide = AutoNormal(model)
    guide(x, y)
    assert check_model(flipout(model, hide=["net.other"]), guide, x, y).ok


# ----------------------------------------------------------------- one weight, and not its own


class SharpAttention(nn.Module):
    """Attention over the examples, so sharp that all look at one of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        sharp = torch.softmax(1e6 * x.norm(dim=1), -1)
        return (sharp.unsqueeze(0) @ h).expand(len(x), -1)


def test_examples_that_all_see_the_weight_of_one_mix():
    found = report(SharpAttention(), 3, outputs=4)
    assert not any(finding.flipped for finding in found.sites.values())
    assert all("than theirs" in finding.reason for finding in found.sites.values())


@pytest.mark.parametrize("init_scale", [0.3, 1e-2])
def test_independent_dimensions_over_data_are_compared_by_element(init_scale):
    """Without a plate too: to first order a centred batch is a sum over its examples."""

    class Centred(Model):
        def forward(self, x, y=None):
            mean = self.net(x)
            pyro.sample("y", dist.Normal(mean - mean.mean(0), 1.0).to_event(2), obs=y)

    torch.manual_seed(0)
    model = Centred(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    x, y = torch.randn(N, 3), torch.randn(N, 2)
    guide = AutoNormal(model, init_scale=init_scale)
    guide(x, y)
    found = check_model(model, guide, x, y, strict=False)
    assert not any(finding.flipped for finding in found.sites.values())


class FoldedAsWide(nn.Module):
    """Steps that are folded into rows, with as many features as there are examples."""

    def __init__(self):
        super().__init__()
        self.step, self.out = nn.Linear(N, 4), nn.Linear(4, 3)

    def forward(self, x):
        steps = self.step(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.out(torch.tanh(steps).sum(1))


def test_rows_of_steps_with_as_many_features_as_examples():
    assert report(FoldedAsWide(), 5, N).ok
