"""From measured arrays to the numbers of summary.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .diversity import feature_diversity, nuisance_recall, pixel_diversity, vendi_diversity
from .statistics import Interval, interval, mean_interval, rate


def measurement(*, right: ArrayLike, attributes: Mapping[str, ArrayLike], proxy: ArrayLike,
                images: ArrayLike | None = None, features: ArrayLike | None = None,
                nuisances: Mapping[str, ArrayLike] | None = None, nuisance_classes: Mapping[str, int] | None = None,
                real_nuisances: Mapping[str, ArrayLike] | None = None,
                columns: Mapping[str, ArrayLike] | None = None) -> dict[str, Any]:  # fmt: skip
    """One model's M = {"gold", "attribute", "proxy", "diversity"} from its samples of P prompts, G each.

    right [P, G] bool: gold finds all attributes right, or float: gold is a score; attributes: name -> [P, G] bool; proxy
    [P, G]. images
    [P, G, H, W, C], features [P, G, F] of the gold judge and nuisances name -> [P, G] fill "diversity", as far as they
    are given: the declared measure (`pixel_diversity` among right samples) as mean, low, high and n, the same as
    "pixel_right", and "pixel", "feature", "vendi",
    "nuisance_recall": {name: float, "mean"} beside it. columns: name -> [P, G], the scores of groups of people or of aspects
    that the proxy is made of; they fill "columns" and "worst", the one with the lowest mean.
    """
    diversity: dict[str, Any] = dict(interval(math.nan, math.nan, math.nan, 0))
    if images is not None:
        diversity["pixel_right"] = pixel_diversity(images, counted(right))
        diversity |= diversity["pixel_right"]
        diversity["pixel"] = pixel_diversity(images)
    if features is not None:
        diversity["feature"] = feature_diversity(features)
        diversity["vendi"] = vendi_diversity(features)
    if nuisances is not None and nuisance_classes is not None:
        diversity["nuisance_recall"] = nuisance_recall(nuisances, nuisance_classes, real_nuisances)
    return {"gold": gold(right), "attribute": {name: rate(value) for name, value in attributes.items()},
            "proxy": mean_interval(proxy), "diversity": diversity, **(worst(columns) if columns else {})}  # fmt: skip


def worst(columns: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """{"columns": {name: Interval}, "worst": the Interval and the name of the column with the lowest mean}.

    Scores whose units differ do not compare; a mean over people can rise while one of them is worse off.
    """
    each = {name: mean_interval(value) for name, value in columns.items()}
    known = [name for name in each if not math.isnan(each[name]["mean"])]
    least = min(known, key=lambda name: each[name]["mean"], default="")
    return {"columns": each, "worst": {"name": least, **(each[least] if least else interval(math.nan, math.nan, math.nan, 0))}}


def gold(right: ArrayLike) -> Interval:
    """The gold of verdicts bool [P] or [P, G], their rate, or of scores, their mean; with its interval."""
    return rate(right) if np.asarray(right).dtype == bool else mean_interval(right)


def counted(right: ArrayLike) -> np.ndarray | None:
    """The samples among which diversity is declared: the right ones, or (None) all where gold is a score."""
    x = np.asarray(right)
    return x if x.dtype == bool else None


def summary(*, config: str, method: str, seed: int, wall_seconds: Mapping[str, float], trained_parameters: int,
            base: Mapping[str, Any], aligned: Mapping[str, Any], best_of_n: Mapping[str, Any], kl: float,
            alarm: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """The object of summary.json, of plain JSON types; what cannot be known (NaN) becomes null.

    base, aligned, best_of_n: see `measurement`; alarm: see `over_optimisation.alarm`. ValueError for a missing part.
    """
    models = {"base": base, "aligned": aligned, "best_of_n": best_of_n}
    for name, model in models.items():
        _need(name, model, ("gold", "attribute", "proxy", "diversity"))
    _need("wall_seconds", wall_seconds, ("train", "evaluate", "total"))
    _need("alarm", alarm, ("fired", "reason"))
    return plain({"config": config, "method": method, "seed": int(seed), "wall_seconds": dict(wall_seconds),
                  "trained_parameters": int(trained_parameters), **models, "kl": kl, "alarm": dict(alarm)})  # fmt: skip


def plain(value: Any) -> Any:
    """The same tree in plain JSON types: numpy and jax scalars and arrays to Python's, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _need(name: str, value: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{name} lacks {missing}; got {sorted(value)}")
