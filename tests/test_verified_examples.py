# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The models of the tutorials and of the documentation pass `check_model`."""

import argparse
import ast
import re
import types
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flipout.nn as fnn
from pyro_flipout import FlipoutWarning, flipout
from pyro_flipout.infer import AutoMeanField, captured
from pyro_flipout.testing import check_model

ROOT = Path(__file__).parents[1]


def tutorial(script, *names, **values):
    """The classes and functions of a script by their names; the rest of it does not run.

    :param values: the global variables that they need.
    """
    tree = ast.parse((ROOT / "tutorials" / script).read_text())
    space = {}
    imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    defined = [n for n in tree.body if getattr(n, "name", None) in names]
    assert {n.name for n in defined} == set(names)
    exec(compile(ast.Module(imports, []), script, "exec"), space)
    space.update(values)
    exec(compile(ast.Module(defined, []), script, "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def all_flipped(report):
    """Every site is flipped and verified, on more than one example, and examples were compared."""
    assert report.ok, str(report)
    assert report.num_examples > 1
    assert any(0 < second < both for second, both in report.observed.values()), str(report)


def test_digits_bnn():
    sizes = {"num_pixels": 16, "num_classes": 3, "num_train": 40}
    model = tutorial("digits_bnn.py", "BayesianMLP", **sizes).BayesianMLP(num_hidden=5)
    report = check_model(model, AutoNormal(model), torch.randn(8, 16), torch.randint(3, (8,)))
    all_flipped(report)
    assert len(report.sites) == 4


@pytest.mark.parametrize("num_hidden", [0, 5])
def test_uncertainty(num_hidden):
    found = tutorial("uncertainty.py", "Classifier", NUM_CLASSES=3, num_train=40)
    model = found.Classifier(num_hidden)
    report = check_model(model, AutoNormal(model), torch.randn(8, 64), torch.randint(3, (8,)))
    all_flipped(report)
    assert len(report.sites) == (4 if num_hidden else 2)


def test_bandit():
    model = tutorial("bandit.py", "Rewards", NUM_ACTIONS=5, NOISE=0.3).Rewards()
    data = torch.randn(8, 2), torch.randint(5, (8,)), torch.randn(8), 20
    report = check_model(model, AutoMeanField(model), *data)
    all_flipped(report)
    assert len(report.sites) == 6


@pytest.mark.parametrize("hetero", [False, True])
@pytest.mark.parametrize("num_fits", [2, 8])  # other than the number of examples, and equal to it
def test_uci_regression(hetero, num_fits):
    found = tutorial("uci_regression.py", "Model", "with_one", NUM_HIDDEN=5)
    model = found.Model(3, 40, torch.full((num_fits,), 0.1), hetero)
    data = torch.randn(num_fits, 8, 3), torch.randn(num_fits, 8)
    report = check_model(flipout(model, example_dim=1), AutoMeanField(model), *data)
    all_flipped(report)
    assert report.sites.keys() == {"hidden", "out"}


def bayesian_classifier(net, prior=0.5, **which):
    """A likelihood for a network without one: its outputs are logits of the last dimension."""
    bayesian = fnn.bayesianize(net, prior=dist.Normal(0.0, prior), **which)

    def model(x, y):
        logits = bayesian(x)
        logits = logits[0] if isinstance(logits, tuple) else logits  # (N, ..., classes)
        with pyro.plate("data", len(x)):
            likelihood = dist.Categorical(logits=logits).to_event(logits.dim() - 2)
            pyro.sample("y", likelihood, obs=y)

    return model


def test_char_lstm():
    """Noise on the hidden-to-hidden weights is the same computation with another draw."""
    options = argparse.Namespace(hidden=6)
    net = tutorial("char_lstm.py", "CharLSTM", alphabet="abcde", args=options).CharLSTM()
    model = bayesian_classifier(net, expose=["lstm.weight_hh_l0"])
    windows = torch.randint(5, (8, 7))  # (N, T)
    report = check_model(model, AutoNormal(model), windows[:, :-1], windows[:, 1:])
    all_flipped(report)
    assert list(report.sites) == ["lstm.weight_hh_l0"]


def test_rl_exploration():
    """The networks that FlipES and Exploration perturb, one policy for each environment."""
    found = tutorial("rl_exploration.py", "policy", "q_network")
    space = types.SimpleNamespace
    env = space(single_observation_space=space(shape=(4,)), single_action_space=space(n=3))
    for net in (found.policy(env), found.q_network(4)):
        pyro.clear_param_store()
        model = bayesian_classifier(net)
        report = check_model(model, AutoNormal(model), torch.randn(8, 4), torch.randint(2, (8,)))
        all_flipped(report)
        assert len(report.sites) == len(list(net.parameters()))


def page(name):
    """The variables that the examples of a page leave behind."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.M | re.S)
    space = {"__name__": name}
    exec(compile("\n".join(blocks), name, "exec"), space)
    return types.SimpleNamespace(**space)


def test_pages_that_fit_models():
    start = page("start.md")
    all_flipped(check_model(start.model, start.guide, start.x[:8], start.y[:8]))
    data = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1]), torch.randn(8)
    effects = AutoNormal(start.hierarchical)
    all_flipped(check_model(start.hierarchical, effects, *data))


def test_page_of_the_guides():
    guides = page("guides.md")
    all_flipped(check_model(guides.model, guides.guide, guides.x[:8], guides.y[:8]))


def test_page_of_arviz():
    arviz = page("arviz.md")
    report = check_model(arviz.model, arviz.guide, arviz.x[:8], arviz.y[:8])
    all_flipped(report)
    assert list(report.sites) == ["w"]


def test_page_of_the_layers():
    """Both networks of the page: of layers, and converted."""
    text = (ROOT / "docs" / "layers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    space = {"__name__": "layers.md"}
    for block, sites in zip(blocks, (4, 2), strict=False):
        exec(compile(block, "layers.md", "exec"), space)
        report = check_model(space["model"], space["guide"], space["x"][:8], space["y"][:8])
        all_flipped(report)
        assert len(report.sites) == sites


def mixture(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    means = torch.nn.functional.linear(x, w)
    with pyro.plate("data", len(x)):
        states = dist.Categorical(torch.ones(2) / 2)
        z = pyro.sample("z", states, infer={"enumerate": "parallel"})
        if z.shape != (8,):  # enumerated, and not drawn as for the guide
            assert z.shape == (2, 1)
        pyro.sample("y", dist.Normal(means[torch.arange(len(x)), z], 1.0), obs=y)


def test_runs_of_the_audit_allocate_no_dimensions():
    """The states of an enumerated variable are in the same dimension in every run."""
    handler, guide = flipout(), AutoNormal(poutine.block(mixture, expose=["w"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(handler(mixture), guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step(torch.randn(8, 3), torch.randn(8))
    assert handler.decisions["w"] == "flipped (verified)"


def test_a_recorded_call_uses_what_the_first_call_found():
    def centred(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        mean = torch.nn.functional.linear(x, w).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean - mean.mean(), 1.0), obs=y)

    handler = flipout()
    elbo, optim = captured(Trace_ELBO()), pyro.optim.Adam({"lr": 0.01})
    svi = SVI(handler(centred), AutoMeanField(centred), optim, elbo)
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FlipoutWarning)
        for _ in range(4):  # as it is, recorded, compared, replayed
            svi.step(torch.randn(8, 3), torch.randn(8))
            assert handler.decisions["w"].startswith("shared: examples mix")


def test_a_density_of_another_shape_in_each_run_is_not_passed_over():
    runs = []

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        mean = torch.nn.functional.linear(x, w).squeeze(-1)
        runs.append(mean)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        mixed = (mean - mean.mean()).expand(len(runs), len(x))
        pyro.sample("z", dist.Normal(mixed, 1.0).to_event(2), obs=torch.zeros_like(mixed))

    data = torch.randn(8, 3), torch.randn(8)
    report = check_model(model, AutoNormal(model), *data, strict=False)
    assert not report.ok
    assert not report.sites["w"].verified
    assert "other numbers when it is run again" in report.sites["w"].reason
