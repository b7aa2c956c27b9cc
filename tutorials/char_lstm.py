# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Weight noise as a regulariser: a character language model
#
# Flipout is not only for Bayesian networks. Wen et al. (ICLR 2018, section 4.2) train an LSTM to
# predict the next character of a text, and multiply its hidden-to-hidden weights by Gaussian noise
# in every step of training, as Dropout does with activations. No prior and no guide: an
# `nn.Module`, any optimizer, and one line, `weight_noise_(model, ...)`.
#
# We train three times: without noise, with noise that the mini-batch shares, and with flipout's,
# where every sequence has its own. What to expect? The paper's 1000 units, on the five million
# characters of Penn Treebank, gave in bits per character (validation / test)
#
#     no noise  1.468 / 1.423      shared  1.257 / 1.230      flipout  1.256 / 1.227
#
# There the noise is worth a lot, and flipout next to nothing on top of it. And noise helps a
# network that learns its training text by heart. A small one, or a short run, does not get there:
# expect noise to cost something then.
#
#     python tutorials/char_lstm.py                                    # a few minutes
#     python tutorials/char_lstm.py --text my.txt --hidden 1000        # the paper's size, long
#     python tutorials/char_lstm.py --text my.txt --chars 100000 --lr 0.01 --steps 1000
#
# The last, with few characters and many epochs, is where we saw noise help.
# Ctrl-C stops it. Started again with the same options, it goes on where it was.

# %%
from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_flipout.nn import weight_noise_

matplotlib.use("Agg")
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description="A character LSTM with noise on its weights")
parser.add_argument("--text", type=Path, help="text file, UTF-8; default: Python's manual")
parser.add_argument("--chars", type=int, help="how many characters of it; default: all")
parser.add_argument("--hidden", type=int, default=128, help="units of the LSTM; the paper's: 1000")
parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the noise")
parser.add_argument("--lr", type=float, default=0.002, help="learning rate; default: the paper's")
parser.add_argument("--steps", type=int, default=600, help="at most so many, in each run")
parser.add_argument("--every", type=int, default=25, help="steps from one validation to the next")
parser.add_argument("--patience", type=int, default=10, help="validations without a new best")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("char_lstm"), help="folder of the results")
parser.add_argument("--checkpoint-dir", type=Path, help="default: checkpoints, in --out")
parser.add_argument("--smoke", action="store_true", help="every stage in a few seconds, for CI")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
BATCH, LENGTH, EVAL_ROWS = 32, 100, 20  # sequences, and their characters
MIN_CHARS = 20_000  # so that each part of the text has a few windows
if args.smoke:
    args.chars, args.hidden, args.steps, args.every = MIN_CHARS, 16, 10, 5
args.steps = math.ceil(args.steps / args.every) * args.every  # the last step has a validation
args.checkpoint_dir = args.checkpoint_dir or args.out / "checkpoints"
for folder in (args.out, args.checkpoint_dir):
    folder.mkdir(parents=True, exist_ok=True)
if args.hidden <= 256:
    torch.set_num_threads(1)  # the matrices are too small to be worth sharing out


# %% [markdown]
# ## The text
#
# The first 90 % is to train, the next 5 % to validate, the last 5 % to test. The default text is
# what Python's `help()` has on its topics (its length varies with the version).
#
# To train, the text is cut into 32 streams, read side by side in windows of 100 characters. Each
# window starts with the state in which the one before it ended; gradients stop at its edge.


# %%
def read_text() -> str:
    if args.text is None:
        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = args.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"--text {args.text}: expected a text file in UTF-8, got {error}")
    text = text[: args.chars]
    if len(text) < MIN_CHARS:
        sys.exit(f"the text has {len(text)} characters, expected {MIN_CHARS} or more")
    return text


def streams(ids: Tensor, rows: int) -> Tensor:
    return ids[: len(ids) // rows * rows].view(rows, -1)  # (rows, characters)


text = read_text()
alphabet = sorted(set(text))
number = {char: i for i, char in enumerate(alphabet)}
ids = torch.tensor([number[char] for char in text])
ends = [int(share * len(ids)) for share in (0.9, 0.95)]
train_ids, valid_ids, test_ids = ids.tensor_split(ends)
train_rows = streams(train_ids, BATCH)
windows = (train_rows.size(1) - 1) // LENGTH
print(f"{len(ids):,} characters, {len(alphabet)} different ones; {windows} steps are an epoch")


# %% [markdown]
# ## The network
#
# Characters go in one-hot, through one LSTM, to a linear layer. Weights start orthogonal, gate by
# gate, and biases at zero.


# %%
class CharLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(len(alphabet), args.hidden, batch_first=True)
        self.output = nn.Linear(args.hidden, len(alphabet))
        for name, parameter in self.lstm.named_parameters():
            for gate in parameter.data.chunk(4):
                nn.init.zeros_(gate) if "bias" in name else nn.init.orthogonal_(gate)

    def forward(self, chars: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x = F.one_hot(chars, len(alphabet)).float()  # (N, T, alphabet)
        hidden, state = self.lstm(x, state)
        return self.output(hidden), state  # (N, T, alphabet)


# %% [markdown]
# ## The noise
#
# `multiplicative` replaces each weight w by w (1 + σ ε), with ε ~ N(0, 1) and the paper's σ = 1:
# the noise is as large as the weight. `expose` names the only weights that get it. Each call of
# the model draws once, for all of its 100 time steps. The network is otherwise what it was, with
# the same parameters and `state_dict`, and in `eval()` mode there is no noise.


# %%
NOISE: dict[str, dict[str, bool] | None] = {
    "no noise": None,
    "shared": {"flipout": False},
    "flipout": {"flipout": True},
}


def new_model(name: str) -> CharLSTM:
    torch.manual_seed(args.seed)
    model, noise = CharLSTM(), NOISE[name]
    if noise is not None:
        chosen = ["lstm.weight_hh_l0"]
        weight_noise_(model, "multiplicative", sigma=args.sigma, expose=chosen, **noise)
    return model


# %% [markdown]
# ## A run that can be stopped
#
# To go on *exactly* where it was, a run has to keep everything that the next step depends on: the
# weights, the optimizer's averages, the state of the random numbers, the position in the text (the
# number of steps tells) and the LSTM's state there. Besides those, the curves and the best weights.
#
# A file is written under another name first, so that a crash while writing leaves the old one.
# Its name has a digest of the text and of the options that matter: other options, other file.


# %%
class Run:
    def __init__(self, name: str) -> None:
        self.model = new_model(name)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, amsgrad=True)
        self.state: Any = None  # of the LSTM, each (1, BATCH, hidden)
        self.losses: list[float] = []  # bits per character, one for each step so far
        self.curve: list[float] = []  # validation bits, after every `args.every` steps
        self.best: dict[str, Tensor] = {}  # the weights where the curve was lowest
        self.seconds = 0.0  # in training steps
        options = (args.hidden, args.sigma, args.lr, args.every, args.seed, BATCH, LENGTH)
        digest = hashlib.sha256(f"{options}{text}".encode()).hexdigest()[:12]
        self.file = args.checkpoint_dir / f"{name.replace(' ', '_')}-{digest}.pt"
        if self.file.exists():
            self.load()

    KEPT = ("state", "losses", "curve", "best", "seconds")

    def save(self) -> None:
        content = {name: getattr(self, name) for name in self.KEPT}
        content |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.file.with_suffix(".partial")
        torch.save({**content, "rng": torch.get_rng_state()}, partial)
        os.replace(partial, self.file)

    def load(self) -> None:
        content = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"])
        for name in self.KEPT:
            setattr(self, name, content[name])

    def finished(self) -> bool:
        no_better = len(self.curve) - 1 - int(np.argmin(self.curve)) if self.curve else 0
        return len(self.losses) >= args.steps or no_better >= args.patience

    def step(self) -> None:
        start = time.perf_counter()
        self.model.train()
        window = len(self.losses) % windows
        self.state = None if window == 0 else self.state
        part = train_rows[:, window * LENGTH :][:, : LENGTH + 1]
        logits, state = self.model(part[:, :-1], self.state)
        loss = F.cross_entropy(logits.transpose(1, 2), part[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = tuple(s.detach() for s in state)
        self.losses.append(loss.item() / math.log(2))
        self.seconds += time.perf_counter() - start

    def validate(self) -> None:
        self.curve.append(bits_per_character(self.model, valid_ids))
        if self.curve[-1] == min(self.curve):
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}


@torch.no_grad()
def bits_per_character(model: CharLSTM, ids: Tensor) -> float:
    """Without noise, in streams whose first characters are predicted from little."""
    model.eval()
    rows, state, total = streams(ids, EVAL_ROWS), None, 0.0
    for chars, targets in zip(rows[:, :-1].split(500, 1), rows[:, 1:].split(500, 1), strict=True):
        logits, state = model(chars, state)
        total += F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum").item()
    return total / rows[:, 1:].numel() / math.log(2)


# %% [markdown]
# ## Training, three times
#
# The seed, the first weights, the windows, AMSGrad and its learning rate, the clipped gradient: all
# equal. A run ends early when validation has found nothing better for a while.
#
# Ctrl-C in the middle of a step would leave half of it done. So it only leaves a note, which is
# read between steps. (A second Ctrl-C stops at once; the last validation's checkpoint is there.)


# %%
def train(name: str) -> Run:
    asked_to_stop = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask_to_stop)
    run = Run(name)
    with tqdm(desc=name, initial=len(run.losses), total=args.steps) as progress:
        while not (run.finished() or asked_to_stop):
            run.step()
            if len(run.losses) % args.every == 0:
                run.validate()
                run.save()
                progress.set_postfix(bits=f"{run.curve[-1]:.3f}", best=f"{min(run.curve):.3f}")
            progress.update()
    if asked_to_stop:
        run.save()
        sys.exit(f"stopped; the same command goes on after step {len(run.losses)} of '{name}'")
    signal.signal(signal.SIGINT, before)
    run.model.load_state_dict(run.best)
    return run


runs = {name: train(name) for name in NOISE}


# %% [markdown]
# ## What was measured
#
# Bits per character without noise, at the weights that were best on the validation text: on the
# last part of the training text, and on the validation and test text. The less a network has learnt
# by heart, the closer the first is to the others.
#
# Each number is from a single run. A few hundredths of a bit between two of them are no evidence
# until other seeds say the same (`--seed 1`); the shorter the text, the more so.
#
# On the default run all three are still getting better on the validation text when they stop, and
# noise has nothing to gain. The shared draw slows learning down; with flipout it is as fast as
# without noise, but for the beginning. That agrees with the theory: a shared draw is the same for
# all 32 sequences of a mini-batch, and its noise does not average out in the gradient.

# %%
print(f"\n{'bits per character':20}" + "".join(f"{name:>12}" for name in runs))
parts = {"training": train_ids[-len(test_ids) :], "validation": valid_ids, "test": test_ids}
scores = {
    part: {name: bits_per_character(run.model, ids) for name, run in runs.items()}
    for part, ids in parts.items()
}
for part, row in scores.items():
    print(f"{part:20}" + "".join(f"{value:12.3f}" for value in row.values()))
lowest = {name: (int(np.argmin(run.curve)) + 1) * args.every for name, run in runs.items()}
print(f"{'best after steps':20}" + "".join(f"{step:12}" for step in lowest.values()))
print(f"{'of':20}" + "".join(f"{len(run.losses):12}" for run in runs.values()))
per_step = [1e3 * run.seconds / len(run.losses) for run in runs.values()]
print(f"{'milliseconds a step':20}" + "".join(f"{value:12.0f}" for value in per_step))


# %% [markdown]
# ## The figure
#
# **Left:** the loss in training, with the noise that the run has: its running mean. **Right:** the
# validation text, without noise. A dot is the best, which the table is about.

# %%
COLORS = {"no noise": "0.4", "shared": "#c8553d", "flipout": "#2f6690"}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
for name, run in runs.items():
    width = min(args.every, len(run.losses))
    smooth = np.convolve(run.losses, np.ones(width) / width, mode="valid")
    left.plot(np.arange(width, len(run.losses) + 1), smooth, color=COLORS[name], label=name)
    steps = args.every * (1 + np.arange(len(run.curve)))
    right.plot(steps, run.curve, color=COLORS[name], label=f"{name}, best {min(run.curve):.3f}")
    right.plot(lowest[name], min(run.curve), "o", color=COLORS[name])
left.set(xlabel="step", ylabel="bits per character", title="Training, with the run's noise")
right.set(xlabel="step", title="Validation, without noise")
for axes in (left, right):
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(args.out / "char_lstm.png", dpi=150)
print(f"\nfigure: {args.out / 'char_lstm.png'}")


# %% [markdown]
# ## A passage
#
# The network reads 200 characters of the test text, then writes on by itself, each character drawn
# from its prediction given those before.


# %%
@torch.no_grad()
def write(model: CharLSTM, prompt: Tensor, length: int = 400) -> str:
    torch.manual_seed(args.seed)
    model.eval()
    logits, state = model(prompt[None])
    written = []
    for _ in range(length):
        char = torch.multinomial(logits[0, -1].softmax(-1), 1)
        written.append(alphabet[char])
        logits, state = model(char[None], state)
    return "".join(written)


name = min(runs, key=lambda name: scores["validation"][name])
print(f"\na passage by the network with the lowest validation loss, {name}:\n")
print(write(runs[name].model, test_ids[:200]))
