"""How well a scorer predicts preferences: accuracy by the published conventions, and whether its odds can be believed.

gap [N]: score of a minus score of b, in log-odds. p [N]: the label, how likely a is the better one; 1/2 is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from . import figures
from .statistics import Interval, interval, wilson

PROTOCOLS = ("half", "strict", "inversions", "three_way")
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def accuracy(gap: ArrayLike, p: ArrayLike, prompts: ArrayLike, protocol: str = "half", threshold: float = 0.0) -> Interval:
    """The share of preferences predicted, with a 95 % interval whose unit is the prompt; conventions do not compare.

    "half": pairs with a preference; equal scores are half right. "strict": the same, equal scores are wrong (ImageReward,
    arXiv 2304.05977). "inversions": 1 - the share of pairs in the wrong order, mean over prompts; ties, people's or the
    scorer's, are in no wrong order, so they flatter (HPDv2, arXiv 2306.09341). "three_way": a tie is an answer, given
    where |2 sigma(gap) - 1| <= threshold; half right where exactly one of the two says so (Pick-a-Pic, arXiv 2305.01569).
    """
    g, label = np.asarray(gap, np.float64), np.asarray(p, np.float64)
    truth, said = np.sign(label - 0.5), np.sign(g)
    if protocol == "three_way":
        said = np.where(np.abs(np.tanh(g / 2)) <= threshold, 0.0, said)
        credit = np.where(said == truth, 1.0, np.where(said * truth == 0, 0.5, 0.0))
        return clustered(credit, prompts)
    if protocol == "inversions":
        _, cluster = np.unique(np.asarray(prompts), return_inverse=True)
        right = (said * truth >= 0).astype(np.float64)
        by_prompt = np.bincount(cluster, right) / np.bincount(cluster)
        return clustered(by_prompt, np.arange(len(by_prompt)))
    if protocol not in ("half", "strict"):
        raise ValueError(f"protocol {protocol!r} is not known; choose one of {', '.join(PROTOCOLS)}")
    known = truth != 0
    credit = (said == truth).astype(np.float64) + (0.5 * (said == 0) if protocol == "half" else 0.0)
    return clustered(credit[known], np.asarray(prompts)[known])


def clustered(credit: ArrayLike, clusters: ArrayLike) -> Interval:
    """The mean of credit [N] in [0, 1] with Wilson's interval, which knows that the members of a cluster [N] resemble each other.

    Its n is the effective one, N over how much more the clustered mean varies than one of N independent answers.
    """
    x = np.asarray(credit, np.float64)
    if not x.size:
        return interval(math.nan, math.nan, math.nan, 0)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count, mean = int(np.max(index)) + 1, x.mean()
    if count < 2:
        return interval(mean, math.nan, math.nan, x.size)
    variance = count / (count - 1) * np.square(np.bincount(index, x - mean)).sum() / x.size**2
    independent = mean * (1 - mean) / x.size
    effective = x.size / max(1.0, variance / independent) if independent > 0 else float(count)
    return Interval(**{**wilson(mean * effective, effective), "n": x.size})


def best_threshold(gap: ArrayLike, p: ArrayLike, prompts: ArrayLike) -> float:
    """The threshold of {0, .1, ..., 1} by which "three_way" is best; to be chosen on other pairs than are reported."""
    choices = [i / 10 for i in range(11)]
    return max(choices, key=lambda t: accuracy(gap, p, prompts, "three_way", t)["mean"])


def by_confidence(gap: ArrayLike, p: ArrayLike, prompts: ArrayLike) -> list[dict[str, Any]]:
    """The "half" accuracy of pairs whose label's confidence max(p, 1 - p) lies in each of BINS; empty ones are left out."""
    g, label = np.asarray(gap, np.float64), np.asarray(p, np.float64)
    sure = np.maximum(label, 1 - label)
    rows = []
    for low, high in zip(BINS[:-1], BINS[1:], strict=True):
        chosen = (sure > low) & (sure <= high)
        if chosen.any():
            rows.append({"low": low, "high": high, "accuracy": accuracy(g[chosen], label[chosen], np.asarray(prompts)[chosen])})
    return rows


def calibration(gap: ArrayLike, p: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Are the odds right? {"ece", "temperature", "nll", "nll_even", "bins": [{"predicted", "observed", "n"}]}.

    Each pair is turned so that the scorer's choice is first: predicted sigma(|gap|), observed the label of that side, so that
    pairs stored winner first give nothing away. ece: the mean of |predicted - observed| over `bins` equal parts of [1/2, 1],
    weighted by their pairs (arXiv 1706.04599). temperature: by which dividing gaps would suit these labels best; above 1:
    overconfident. nll: nats a pair; nll_even: of answering 1/2 always, log 2.
    """
    g, label = np.asarray(gap, np.float64), np.asarray(p, np.float64)
    predicted, observed = special.expit(np.abs(g)), np.where(g >= 0, label, 1 - label)
    part = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [{"predicted": float(predicted[part == i].mean()), "observed": float(observed[part == i].mean()), "n": int((part == i).sum())}
            for i in range(bins) if (part == i).any()]  # fmt: skip
    ece = sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in rows) / len(g)

    def nll(log_temperature: float) -> float:
        u = g * math.exp(-log_temperature)
        return float((label * np.logaddexp(0, -u) + (1 - label) * np.logaddexp(0, u)).mean())

    best = optimize.minimize_scalar(nll, bounds=(-4.0, 4.0), method="bounded")
    return {"ece": float(ece), "temperature": float(math.exp(best.x)), "nll": nll(0.0), "nll_even": math.log(2), "bins": rows}


def reliability(rows: Sequence[dict[str, Any]], *, dark: bool = False) -> bytes:
    """The bins of `calibration` as a PNG: predicted against observed, on the diagonal where odds can be believed."""
    with figures._style(dark) as Figure:
        figure = Figure(figsize=(3.6, 3.3), layout="constrained")
        axes = figure.add_subplot()
        colour = (figures.DARK if dark else figures.COLOURS)["proxy"]
        axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8, linestyle="--")
        area = 12 + 200 * np.array([row["n"] for row in rows]) / max(sum(row["n"] for row in rows), 1)
        axes.scatter([row["predicted"] for row in rows], [row["observed"] for row in rows], s=area, color=colour, alpha=0.8)
        axes.set(xlim=(0.48, 1.02), xlabel="predicted probability of the chosen picture", ylabel="share that people chose")
        return figures._png(figure)
