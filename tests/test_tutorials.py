# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The tutorials run, and the sea of one is Deep Sea."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
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
