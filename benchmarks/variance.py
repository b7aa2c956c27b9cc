# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Gradient variance against mini-batch size: Figure 1 of Wen et al. (2018).

A partly trained network is frozen, its weights get Gaussian noise, and the variance of the
gradient of the expected loss (no KL term) with respect to their locations is measured with fresh
mini-batches and fresh noise. Writes PREFIX.csv (every measurement), PREFIX.md (tables) and
PREFIX.png (the figure), PREFIX being OUT/ARCH_NOISE.

    python benchmarks/variance.py --arch fc --data-dir my/mnist --out results
    python benchmarks/variance.py --arch convle vgg lstm --noise multiplicative mean-field
"""

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch

sys.path.insert(0, str(Path(__file__).parent))
from networks import NETWORKS, Classifier, NegativeLogLikelihood, load, train

from pyro_flipout import flipout
from pyro_flipout.infer import decompose_variance, gradient_variance, plot_gradient_variance
from pyro_flipout.infer.estimators import estimators_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--arch", nargs="+", default=["fc"], choices=list(NETWORKS))
PARSER.add_argument(
    "--noise", nargs="+", default=["multiplicative"], choices=["multiplicative", "mean-field"]
)
PARSER.add_argument("--scale", type=float, help="of the noise; default 1, for mean-field 0.5")
PARSER.add_argument("--sizes", type=int, nargs="+", default=[2**k for k in range(14)])
PARSER.add_argument("--repeats", type=int, default=200)
PARSER.add_argument("--estimators", nargs="+", help="default: all that the network allows")
PARSER.add_argument(
    "--group-sizes", type=int, nargs="+", default=[], help="flipout in groups of that size too"
)
PARSER.add_argument("--accuracy", type=float, default=0.85, help="of the partly trained network")
PARSER.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files; default: digits")
PARSER.add_argument("--out", type=Path, default=Path("variance"))
PARSER.add_argument("--seed", type=int, default=0)
PARSER.add_argument("--threads", type=int, default=1)


def measure(args, arch, noise, x, y):
    """The measured Dataset, with a note on how the network was trained."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    net = NETWORKS[arch](x.size(-1))
    accuracy, steps = train(net, x, y, args.accuracy)
    classifier = Classifier(net, len(x))
    scale = args.scale or {"multiplicative": 1.0, "mean-field": 0.5}[noise]
    own = ["shared", "flipout", *(["local_reparameterization"] if arch == "fc" else [])]
    found = gradient_variance(
        classifier.model,
        classifier.guide(noise, scale),
        (x, y),
        estimators=estimators_of(args.estimators or own)
        | {f"groups of {k}": partial(flipout, group_size=k) for k in args.group_sizes},
        batch_sizes=args.sizes,
        num_repeats=args.repeats,
        elbo=NegativeLogLikelihood(),
        divide_by=len(x),  # the model scales its likelihood to the data set
        parameters=["loc_*"],
        seed=args.seed,
    )
    note = f"training accuracy {accuracy:.3f} after {steps} steps of Adam, noise scale {scale:g}"
    return found, note


def slope(sizes, values, errors):
    """Slope of log variance against log N, by weighted least squares, and its error."""
    weights = (values / errors) ** 2
    u = np.log(sizes) - np.average(np.log(sizes), weights=weights)
    total = (weights * u**2).sum()
    return (weights * u * np.log(values)).sum() / total, 1 / np.sqrt(total)


def tables(found):
    """Markdown: variances at each N, slopes, and the decomposition."""
    names, sites = [str(e) for e in found.estimator.values], [str(s) for s in found.site.values]
    sizes = found.batch_size.values
    lines = ["| layer | estimator | " + " | ".join(f"N = {n}" for n in sizes) + " | slope |"]
    lines.append("| --- " * (len(sizes) + 3) + "|")
    for site in sites:
        for name in names:
            at = {"site": site, "estimator": name}
            v, e = (found[k].sel(at).values for k in ("site_variance", "site_variance_se"))
            cells = [f"{a:.2e} ± {100 * b / a:.0f} %" for a, b in zip(v, e, strict=True)]
            fitted = "{:.3f} ± {:.3f}".format(*slope(sizes, v, e)) if len(sizes) > 1 else "-"
            lines.append(f"| {site} | {name} | " + " | ".join(cells) + f" | {fitted} |")
    seconds = found.seconds.values
    for name, row in zip(names, seconds, strict=True):
        cells = [f"{1e3 * s:.1f} ms" for s in row]
        lines.append(f"| time of a gradient | {name} | " + " | ".join(cells) + " | |")
    if {"shared", "flipout"} <= set(names) and len(sizes) > 1:
        lines += ["", *parts_table(decompose_variance(found))]
    return "\n".join(lines)


def parts_table(parts):
    yield "| layer | α | β / α | γ / α | helps from N = | until N = | at least until | χ² / dof |"
    yield "| --- " * 8 + "|"
    for site in parts.site.values:
        p = {k: v.item() for k, v in parts.drop_vars("predicted").sel(site=site).items()}
        yield (
            f"| {site} | {p['alpha']:.2e} ± {p['alpha_se']:.0e} | "
            f"{p['beta'] / p['alpha']:.2e} ± {p['beta_se'] / p['alpha']:.0e} | "
            f"{p['gamma'] / p['alpha']:.1e} ± {p['gamma_se'] / p['alpha']:.0e} | "
            f"{p['helps_from']:.0f} ± {p['helps_from_se']:.0f} | {p['helps_until']:.0f} | "
            f"{p['helps_until_lower']:.0f} | "
            f"{p['chi_square']:.1f} / {p['degrees_of_freedom']:.0f} |"
        )


def main():
    args = PARSER.parse_args()
    torch.set_num_threads(args.threads)
    pyro.enable_validation(False)
    warnings.simplefilter("error")  # a FlipoutWarning means that a layer is not flipped
    x, y = load(args.data_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    for arch in args.arch:
        for noise in args.noise:
            start = time.perf_counter()
            found, note = measure(args, arch, noise, x, y)
            minutes = (time.perf_counter() - start) / 60
            prefix = args.out / f"{arch}_{noise}"
            kept = ["site_variance", "site_variance_se", "seconds"]
            found[kept].to_dataframe().to_csv(f"{prefix}.csv")
            text = (
                f"## {arch}, {noise} noise\n\n{len(x)} images of {x.size(-1)}x{x.size(-1)}; "
                f"{note}; {args.repeats} repeats; {minutes:.0f} minutes on {args.threads} "
                f"thread(s). ± is one standard error.\n\n`{' '.join(['python', *sys.argv])}`\n\n"
                f"{tables(found)}\n"
            )
            Path(f"{prefix}.md").write_text(text)
            axes = plot_gradient_variance(found, predicted=len(args.sizes) > 1)
            axes.set_title(f"{arch}, {noise} noise")
            axes.figure.savefig(f"{prefix}.png", dpi=150)
            plt.close(axes.figure)
            print(text)


if __name__ == "__main__":
    main()
