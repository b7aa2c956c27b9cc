"""Gradient variance with the KL term in closed form and estimated, with and without flipout.

Digits (8x8, from scikit-learn), FC 64-100-10, one fixed mini-batch of N examples that stands for
the whole training set. AutoNormal and AutoMeanField are compared at the same locations and
scales: at initialisation and after training, under a standard normal prior and one of variance
1 / fan-in. Variances over draws of the weights, of the ELBO per training example: of its
gradient, summed over the locations and over the (unconstrained) scales, and of its value.

    python benchmarks/kl.py
    python benchmarks/kl.py --examples 64 --repeats 400 --steps 500
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from sklearn.datasets import load_digits

from pyro_flipout import flipout
from pyro_flipout.infer import AutoMeanField

SIZES = (64, 100, 10)


def plain_net():
    first, last = torch.nn.Linear(*SIZES[:2]), torch.nn.Linear(*SIZES[1:])
    return torch.nn.Sequential(first, torch.nn.ReLU(), last)


class Classifier(PyroModule):
    def __init__(self, train_size, fan_in=False):
        super().__init__()
        self.train_size = train_size
        self.net = plain_net()
        to_pyro_module_(self.net)
        for module in self.net.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                scale = module.in_features**-0.5 if fan_in else 1.0
                prior = dist.Normal(0.0, scale).expand(value.shape).to_event(value.dim())
                setattr(module, name, PyroSample(prior))

    def forward(self, x, y):
        logits = self.net(x)
        with pyro.plate("data", self.train_size, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def stock_twin(guide, model, x, y):
    """An AutoNormal at the same locations and scales."""
    twin = AutoNormal(model)
    twin(x, y)
    with torch.no_grad():
        for name in guide.median():
            loc, scale = guide.loc_and_scale(name)
            dict(twin.locs.named_parameters())[f"{name}_unconstrained"].copy_(loc)
            raw = torch.distributions.transform_to(twin.scale_constraint).inv(scale)
            dict(twin.scales.named_parameters())[f"{name}_unconstrained"].copy_(raw)
    return twin


def variances(fn, guide, elbo, x, y, repeats):
    """Summed gradient variance for locations and for scales, and the variance of the loss."""
    kinds = ["scale" if name.startswith("scale") else "loc" for name, _ in guide.named_parameters()]
    rows = {"loc": [], "scale": [], "loss": []}
    for _ in range(repeats):
        guide.zero_grad()
        rows["loss"].append(torch.tensor([elbo.loss_and_grads(fn, guide, x, y)]))
        for kind in ("loc", "scale"):
            pairs = zip(kinds, guide.parameters(), strict=True)
            rows[kind].append(torch.cat([p.grad.flatten() for k, p in pairs if k == kind]))
    return [torch.stack(r).double().var(0).sum().item() for r in rows.values()]


def table(title, model, guide, x, y, repeats):
    twin = stock_twin(guide, model, x, y)
    cases = [
        ("AutoNormal", twin, Trace_ELBO()),
        ("AutoNormal", twin, TraceMeanField_ELBO()),
        ("AutoMeanField", guide, Trace_ELBO()),
        ("AutoMeanField", guide, TraceMeanField_ELBO()),
    ]
    print(f"\n{title}\n")
    print("| guide | ELBO | KL | flipout | locations | scales | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, one, elbo in cases:
        closed = one is guide and isinstance(elbo, TraceMeanField_ELBO)
        for fn, flips in ((model, "no"), (flipout(model), "yes")):
            values = variances(fn, one, elbo, x, y, repeats)
            cells = " | ".join(f"{v / model.train_size**2:.2g}" for v in values)
            kl = "closed form" if closed else "sampled"
            print(f"| {name} | {type(elbo).__name__} | {kl} | {flips} | {cells} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=256, help="mini-batch size N")
    parser.add_argument("--repeats", type=int, default=400, help="gradients for one variance")
    parser.add_argument("--steps", type=int, default=2000, help="training steps before a table")
    parser.add_argument("--init-scale", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)

    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float)
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(targets))
    x, y = images[order[: args.examples]], targets[order[: args.examples]]
    start = {f"net.{n}": p.detach() for n, p in plain_net().named_parameters()}
    print(f"N = {args.examples} of {len(targets)} examples, {args.repeats} gradients each")

    for fan_in in (False, True):
        pyro.clear_param_store()
        prior = "scaled by fan-in" if fan_in else "standard normal"
        model = Classifier(len(targets), fan_in)
        guide = AutoMeanField(
            model, init_loc_fn=lambda site: start[site["name"]], init_scale=args.init_scale
        )
        guide(x, y)
        table(f"Prior {prior}, at initialisation", model, guide, x, y, args.repeats)
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = SVI(flipout(model), guide, optim, TraceMeanField_ELBO())
        for _ in range(args.steps):
            batch = torch.randint(len(targets), (args.examples,))
            svi.step(images[batch], targets[batch])
        scale = guide.scale.median().item()
        title = f"Prior {prior}, after {args.steps} steps (median scale {scale:.2f})"
        table(title, model, guide, x, y, args.repeats)


if __name__ == "__main__":
    main()
