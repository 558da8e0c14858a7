"""How different the samples of one prompt are: among those that are right, since errors are no variety."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import pdist

from .statistics import Interval, bootstrap_mean, ratio_interval


def prompt_distances(samples: ArrayLike, right: ArrayLike | None = None, metric: str = "euclidean") -> np.ndarray:
    """The mean distance of two samples of a prompt [P], NaN for prompts with no valid pair.

    samples [P, G, ...]; right [P, G] keeps the samples that count (None: all). metric: "euclidean" is the root mean
    square difference of entries (a pixel distance in the pictures' unit), others are those of scipy's `pdist` ("cosine"
    is 1 - cos).
    """
    x = np.asarray(samples)
    if x.ndim < 3:
        raise ValueError(f"samples must be [P prompts, G samples, ...]; got shape {list(x.shape)}")
    keep = _right(right, x.shape[:2])
    x = x.reshape(*x.shape[:2], -1)
    scale = np.sqrt(x.shape[-1]) if metric == "euclidean" else 1.0
    groups = [group[k].astype(np.float64) for group, k in zip(x, keep, strict=True)]
    return np.array([pdist(group, metric).mean() / scale if len(group) > 1 else np.nan for group in groups])


def pixel_diversity(images: ArrayLike, right: ArrayLike | None = None, seed: int = 0) -> Interval:
    """The declared measure: mean pixel distance within a prompt among the samples that gold calls right.

    images [P, G, H, W, C]; right [P, G] bool or None (all samples: the measure beside it). Distance of a pair = root
    mean square over H, W, C; averaged over a prompt's pairs, then over the prompts that have a pair ("n" counts them),
    so that easy prompts with many right samples weigh no more than others. Interval: percentile bootstrap over prompts.
    """
    return bootstrap_mean(prompt_distances(images, right), seed=seed)


def pixel_diversity_ratio(images: ArrayLike, right: ArrayLike | None, base_images: ArrayLike,
                          base_right: ArrayLike | None, seed: int = 0) -> Interval:  # fmt: skip
    """pixel_diversity(images) / pixel_diversity(base_images) on the same prompts, prompts resampled together."""
    return ratio_interval(prompt_distances(images, right), prompt_distances(base_images, base_right), seed=seed)


def feature_diversity(features: ArrayLike, right: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Mean cosine distance (1 - cos) of two samples of a prompt in features [P, G, F], averaged as pixel_diversity.

    A judge's features see mostly what it judges, so errors count as diversity here: read it beside real data's value.
    """
    return bootstrap_mean(prompt_distances(features, right, "cosine"), seed=seed)


def vendi_score(features: ArrayLike) -> float:
    """The effective number of different samples among features [N, F]: 1 if all are parallel, N if orthogonal.

    exp of the entropy of the eigenvalues of K / N, K the cosine kernel (arXiv 2210.02410).
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"features must be [N, F] with N > 0; got shape {list(x.shape)}")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    eigenvalues = np.linalg.svd(x, compute_uv=False) ** 2 / len(x)
    eigenvalues = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def vendi_diversity(features: ArrayLike, seed: int = 0) -> Interval:
    """The mean over prompts of the Vendi score of their samples' features [P, G, F]."""
    return bootstrap_mean([vendi_score(group) for group in np.asarray(features)], seed=seed)


def nuisance_recall(predictions: Mapping[str, ArrayLike], classes: Mapping[str, int],
                    real: Mapping[str, ArrayLike] | None = None,
                    right: ArrayLike | None = None) -> dict[str, float]:  # fmt: skip
    """How much of the variety that no prompt names (accent, pattern, ...) is kept: 1 as in real data, 0 none.

    predictions: nuisance name -> value index [P, G], of a recogniser; classes: name -> number of values; real: the same
    recogniser's predictions on real pictures [P', G'] (None: values equally likely); right [P, G]: samples that count.
    For each nuisance the chance that two samples of a prompt differ in it, divided by that of real data, and the "mean"
    of these. The chance is the quadratic entropy 1 - sum p_v^2 of the prompt's distribution, estimated from pairs:
    unlike Shannon's plug-in entropy it is unbiased for few samples, so groups of unequal size can be compared. Above 1:
    more even than real data.
    """
    recall = {}
    for name, count in classes.items():
        drawn = _differ(name, predictions, count, right)
        reference = 1 - 1 / count if real is None else _differ(name, real, count, None)
        recall[name] = float(drawn / reference) if reference > 0 else float("nan")
    return {**recall, "mean": float(np.mean(list(recall.values()))) if recall else float("nan")}


def _differ(name: str, predictions: Mapping[str, ArrayLike], count: int, right: ArrayLike | None) -> float:
    if name not in predictions:
        raise ValueError(f"no predictions for the nuisance {name!r}; got {sorted(predictions)}")
    values = np.asarray(predictions[name])
    if values.ndim != 2 or values.min() < 0 or values.max() >= count:
        raise ValueError(f"{name}: values must be [P, G] in 0..{count - 1}; got shape {list(values.shape)}, "
                         f"{values.min()}..{values.max()}")  # fmt: skip
    distances = prompt_distances(values[..., None], right, "hamming")
    return float(np.nanmean(distances)) if np.isfinite(distances).any() else float("nan")


def _right(right: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    keep = np.ones(shape, bool) if right is None else np.asarray(right, bool)
    if keep.shape != shape:
        raise ValueError(f"right must be [P, G] = {list(shape)} like the samples; got {list(keep.shape)}")
    return keep
