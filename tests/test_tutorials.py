# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The tutorials run, and the sea of one is Deep Sea."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pyro
import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def smoke(script, out, *options, warnings="error"):
    """What the script prints in its smoke run, having drawn a figure."""
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            warnings,
            str(TUTORIALS / script),
            "--smoke",
            "--out",
            out,
            *options,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    image = matplotlib.image.imread(out)
    assert image[..., :3].std() > 0.01  # something is drawn
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stagger", [False, True])
def test_rl_exploration(stagger, tmp_path):
    pytest.importorskip("gymnasium")
    options = ["--parts", "dqn", "--stagger"] if stagger else []
    printed = smoke("rl_exploration.py", str(tmp_path / "rl.png"), *options)
    rows = re.findall(r"^\| (.*?) \| (-?\d\.\d\d) ± \d", printed, re.M)
    assert len(rows) == 4
    assert all(-0.01 <= float(mean) <= 1 for _, mean in rows)
    assert len(re.findall(r"^(CartPole|Acrobot)-v1: return", printed, re.M)) == (
        0 if stagger else 2
    )


@pytest.mark.slow
def test_bandit(tmp_path):
    printed = smoke("bandit.py", str(tmp_path / "bandit.png"))
    assert len(re.findall(r"^(ε-greedy|Thompson).* \d\.\d+ ± \d", printed, re.M)) == 3


@pytest.mark.slow
def test_uncertainty(tmp_path):
    printed = smoke(
        "uncertainty.py",
        str(tmp_path / "uncertainty.png"),
        warnings="error:flipout",  # ArviZ and pandas have theirs
    )
    assert "loo" in printed.lower()


@pytest.mark.slow
def test_uci_regression(tmp_path):
    """Draws no figure; writes the scores of every split."""
    out = tmp_path / "scores.json"
    run = subprocess.run(
        [sys.executable, str(TUTORIALS / "uci_regression.py"), "--smoke", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    scores = json.loads(out.read_text())
    assert {name.split("/")[2] for name in scores} == {"shared", "flipout"}
    assert all(math.isfinite(value) for row in scores.values() for value in row["LL"])


def uci_set(folder, rows=40, features=3, splits=2):
    """Files of one data set, as they are published."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.savetxt(folder / "data.txt", rng.normal(size=(rows, features + 1)))
    np.savetxt(folder / "index_features.txt", np.arange(features), fmt="%d")
    np.savetxt(folder / "index_target.txt", [features], fmt="%d")
    np.savetxt(folder / "n_splits.txt", [splits], fmt="%d")
    for i in range(splits):
        order = rng.permutation(rows)
        np.savetxt(folder / f"index_train_{i}.txt", order[4:])  # floats, as Gal's
        np.savetxt(folder / f"index_test_{i}.txt", order[:4])


@pytest.fixture
def uci(monkeypatch, capsys):
    """Runs the tutorial in this process; gives its variables and what it prints."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["uci_regression.py", *map(str, options)])
        space = runpy.run_path(str(TUTORIALS / "uci_regression.py"))
        return space, capsys.readouterr().out

    yield run
    pyro.enable_validation(True)


QUICK = "--noise", "homo", "--methods", "shared", "--draws", 2, "--members", 1


def test_uci_reads_both_layouts(uci, tmp_path):
    """A folder of sets with or without a folder data in each, and results beside it."""
    uci_set(tmp_path / "flat" / "wine-quality-red")
    uci_set(tmp_path / "published" / "wine-quality-red" / "data")
    (tmp_path / "published" / "wine-quality-red" / "results").mkdir()
    printed = [
        uci("--data-dir", tmp_path / kind, "--steps", 2, *QUICK)[1].rpartition(" ")[0]  # seconds
        for kind in ("flat", "published")
    ]
    assert printed[0] == printed[1]
    assert "wine-quality-red: 40 rows, 2 splits, 2 steps for 36 rows" in printed[0]
    assert "published, MC dropout: LL -0.93 ± 0.01" in printed[0]


def test_uci_steps_follow_the_epochs(uci, tmp_path):
    for name, rows in (("small", 40), ("large", 104)):
        uci_set(tmp_path / name, rows)
    options = "--data-dir", tmp_path, "--splits", 1, "--batch-size", 10, *QUICK
    space, printed = uci("--epochs", 2, *options)
    assert "small: 40 rows, 1 splits, 8 steps for 36 rows to train on" in printed
    assert "large: 104 rows, 1 splits, 20 steps for 100 rows to train on" in printed
    assert space["num_steps"](7) == 2  # a batch is all rows at most
    _, printed = uci("--steps", 3, "--sets", "small", *options)
    assert "3 steps for 36 rows" in printed
    assert "large" not in printed


def test_uci_default_length(uci, tmp_path):
    """500 rows take about as many steps as every set was given before."""
    uci_set(tmp_path / "small")
    space, _ = uci("--data-dir", tmp_path, "--splits", 1, *QUICK)
    assert space["num_steps"](455) == 1422
    assert space["num_steps"](8611) == 26910


def test_uci_published_row(uci):
    space, _ = uci("--smoke", *QUICK)
    rows = {
        ("boston", "bostonHousing"): "-2.40",
        ("concrete",): "-2.93",
        ("energy",): "-1.21",
        ("kin8nm",): "1.14",
        ("power", "power-plant"): "-2.81",
        ("wine", "wine-quality-red"): "-0.93",
        ("yacht",): "-1.25",
    }
    for names, value in rows.items():
        assert all(space["published"](name).split()[0] == value for name in names)
    assert space["published"]("diabetes") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "hetro"], "argument --noise: invalid choice: 'hetro'"),
        (["--methods", "flip-out"], "argument --methods: invalid choice: 'flip-out'"),
        (["--methods"], "argument --methods: expected at least one argument"),
        (["--sets", "concrete"], r"--sets: got \['concrete'\], expected --data-dir with it"),
        (["--data-dir", "{}", "--sets", "one", "tow"], r"got \['tow'\], but .* has \['one'\]"),
        (["--data-dir", "{}/one"], "no folder in .*one has a data.txt or data/data.txt"),
        (["--data-dir", "{}/none"], "no folder in .*none has a data.txt"),
        (["--steps", "0"], "argument --steps: got 0, expected at least 1"),
        (["--steps", "9", "--epochs", "9"], "argument --epochs: not allowed with argument --steps"),
        (["--out", "{}/none/x.json"], "argument --out: there is no folder"),
    ],
)
def test_uci_refuses(uci, tmp_path, capsys, options, message):
    uci_set(tmp_path / "one")
    with pytest.raises(SystemExit) as stopped:
        uci(*[option.format(tmp_path) for option in options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_uci_incomplete_sets(uci, tmp_path):
    uci_set(tmp_path / "one")
    (tmp_path / "one" / "index_test_1.txt").unlink()
    with pytest.raises(SystemExit, match="one: index_test_1.txt is missing"):
        uci("--data-dir", tmp_path)
    np.savetxt(tmp_path / "one" / "index_test_1.txt", [1, 2, 3])
    with pytest.raises(SystemExit, match="one: the splits have different sizes"):
        uci("--data-dir", tmp_path)


def deep_sea(num_envs, depth):
    """The environment of the tutorial, from the cell that defines it."""
    vector = pytest.importorskip("gymnasium.vector")
    import gymnasium
    from gymnasium.vector.utils import batch_space

    text = (TUTORIALS / "rl_exploration.py").read_text()
    (cell,) = [c for c in re.split(r"^# %%.*\n", text, flags=re.M) if c.startswith("class DeepSea")]
    space = {
        "VectorEnv": vector.VectorEnv,
        "AutoresetMode": vector.AutoresetMode,
        "gymnasium": gymnasium,
        "batch_space": batch_space,
        "np": np,
    }
    exec("from __future__ import annotations\n" + cell, space)
    return space["DeepSea"](num_envs, depth)


def total(policy, depth):
    """The return of one episode of a policy, a function of the step."""
    sea, reward = deep_sea(3, depth), 0.0
    sea.reset()
    for step in range(depth):
        x, gained, ended, cut, _ = sea.step(np.full(3, policy(step)))
        assert x in sea.observation_space
        assert (ended == (step == depth - 1)).all()
        assert not cut.any()
        reward = reward + gained
    assert (x == sea.reset()[0]).all()  # the next episode has begun
    return reward


@pytest.mark.parametrize("depth", [1, 4, 10])
def test_deep_sea(depth):
    np.testing.assert_allclose(total(lambda step: 1, depth), 0.99)
    np.testing.assert_allclose(total(lambda step: 0, depth), 0.0)
    for turn in range(depth if depth > 1 else 0):  # one wrong step forfeits the treasure
        reward = total(lambda step, turn=turn: int(step != turn), depth)
        np.testing.assert_allclose(reward, -0.01 * (depth - 1) / depth)


def test_deep_sea_staggers():
    sea = deep_sea(5, 3)
    sea.reset(options={"stagger": True})
    ends = np.stack([sea.step(np.ones(5))[2] for _ in range(6)])
    np.testing.assert_array_equal(ends.sum(0), [2] * 5)
    np.testing.assert_array_equal(ends[0], [False, False, True, False, False])
