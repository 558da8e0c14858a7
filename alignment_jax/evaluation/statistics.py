"""Means and rates with their intervals; the prompt is the unit that was drawn, its samples are nested in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

RESAMPLES = 4000


class Interval(TypedDict):
    """A measured mean between low and high, from n samples; NaN where it cannot be known (no pair, one sample)."""

    mean: float
    low: float
    high: float
    n: int


def interval(mean: float, low: float, high: float, n: int) -> Interval:
    """An Interval of plain Python numbers, ready for JSON."""
    return Interval(mean=float(mean), low=float(low), high=float(high), n=int(n))


def wilson(successes: float, n: float, level: float = 0.95) -> Interval:
    """Wilson's score interval for a rate: right also near 0 and 1, where the normal one leaves [0, 1].

    centre (p + z^2/2n) / (1 + z^2/n), half-width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)  (Wilson 1927).
    n may be an effective, fractional number. Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"a rate needs 0 <= successes <= n and n > 0; got successes={successes}, n={n}")
    z = normal_quantile(0.5 + level / 2)
    p, shrink = successes / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / shrink
    low, high = (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)
    return interval(p, low, high, round(n))


def rate(right: ArrayLike, level: float = 0.95) -> Interval:
    """The share of true entries of right [P] or [P, G] (samples of a prompt in a row), with a Wilson interval.

    Samples of one prompt resemble each other, so for G > 1 Wilson's n is the effective one, n / max(1, deff), where
    deff is the variance of the mean over prompts divided by the binomial one (Kish). "n" stays the number of samples.
    """
    x = _finite(right)
    n, p = x.size, x.mean()
    by_prompt = x.reshape(x.shape[0], -1).mean(1)
    between, binomial = _variance_of_mean(by_prompt), p * (1 - p) / n
    nested = n > len(by_prompt) and binomial > 0
    effective = n / max(1.0, between / binomial) if nested else float(n)
    return Interval(**{**wilson(p * effective, effective, level), "n": n})


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean of values [N] or [P, G] with Student's interval; for [P, G] the unit is the prompt's mean.

    NaN entries (samples whose score failed) are left out, and "n" counts the others; infinite ones are refused.
    """
    x = np.asarray(values, np.float64)
    known = ~np.isnan(x)
    if not known.any():
        return interval(math.nan, math.nan, math.nan, 0)
    mean = _finite(x[known]).mean()
    rows = [row[keep].mean() for row, keep in zip(np.atleast_2d(x), np.atleast_2d(known), strict=True) if keep.any()]
    units = np.array(rows) if x.ndim == 2 and x.shape[0] > 1 else x[known]
    if units.size < 2:
        return interval(mean, math.nan, math.nan, int(known.sum()))
    half = float(special.stdtrit(units.size - 1, 0.5 + level / 2)) * math.sqrt(_variance_of_mean(units))
    return interval(mean, mean - half, mean + half, int(known.sum()))


def bootstrap_mean(values: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of values [N] with a percentile bootstrap interval; NaN entries (not defined there) are left out."""
    x = np.asarray(values, np.float64).reshape(-1)
    x = x[np.isfinite(x)]
    if x.size < 2:
        return interval(x.mean() if x.size else math.nan, math.nan, math.nan, x.size)
    low, high = _bootstrap((x,), np.mean, level, seed)
    return interval(x.mean(), low, high, x.size)


def ratio_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """mean(a) / mean(b) for values of the same prompts a, b [P], prompts resampled together; NaN entries left out.

    Each mean is over the prompts where its own value is defined, as the two means themselves are reported.
    """
    x, y = _pair(a, b)
    known = np.isfinite(x) & np.isfinite(y)
    if not np.isfinite(x).any() or not np.isfinite(y).any():
        return interval(math.nan, math.nan, math.nan, 0)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.nanmean(x, axis=axis) / np.nanmean(y, axis=axis)

    low, high = _bootstrap((x, y), statistic, level, seed) if known.sum() > 1 else (math.nan, math.nan)
    return interval(float(statistic(x, y)), low, high, int(known.sum()))


def paired_bootstrap(a: ArrayLike, b: ArrayLike, seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """How much a is above b on the same prompts (and noise): a, b [P] or [P, G], where G is averaged first.

    Returns {"difference", "low", "high"} (percentile bootstrap over prompts), "p" (two-sided sign-flip permutation),
    "effect" (Cohen's d of the paired differences), "n" (prompts).
    """
    from scipy import stats  # a second and a half to import

    x, y = _pair(a, b)
    d = (_finite(x) - _finite(y)).reshape(x.shape[0], -1).mean(1)
    if d.size < 2:
        return {"difference": float(d.mean()), "low": math.nan, "high": math.nan, "p": 1.0, "effect": math.nan, "n": 1}
    low, high = _bootstrap((d,), np.mean, level, seed)
    test = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, batch=500,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    spread = d.std(ddof=1)
    effect = d.mean() / spread if spread > 0 else math.nan
    return {"difference": float(d.mean()), "low": low, "high": high, "p": float(test.pvalue), "effect": float(effect),
            "n": d.size}  # fmt: skip


def flatten(name: str, value: Interval) -> dict[str, float]:
    """An Interval as entries of a metrics row: name, name/low, name/high, name/n; what is not known has no entry."""
    row = {name: value["mean"], f"{name}/low": value["low"], f"{name}/high": value["high"], f"{name}/n": value["n"]}
    return {key: number for key, number in row.items() if math.isfinite(number)}


def unflatten(history: Iterable[Mapping[str, Any]], name: str) -> list[Interval]:
    """The Intervals of `name` in a history's rows, in order; rows without it are left out, missing ends are NaN."""
    rows = [row for row in history if row.get(name) is not None]
    nan = math.nan
    return [interval(row[name], row.get(f"{name}/low", nan), row.get(f"{name}/high", nan), row.get(f"{name}/n", 0))
            for row in rows]  # fmt: skip


def standard_error(value: Interval, level: float = 0.95) -> float:
    """The standard error that a symmetric interval of this level stands for; NaN where the interval is not known."""
    return (value["high"] - value["low"]) / (2 * normal_quantile(0.5 + level / 2))


def normal_quantile(probability: float) -> float:
    """The standard normal's quantile, 1.96 at 0.975."""
    return float(special.ndtri(probability))


def _variance_of_mean(x: np.ndarray) -> float:
    return float(x.var(ddof=1) / x.size) if x.size > 1 else 0.0


def _finite(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim not in (1, 2) or not x.size:
        raise ValueError(f"values must be [N] or [P, G] and not empty; got shape {list(x.shape)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{(~np.isfinite(x)).sum()} of {x.size} values are NaN or infinite; leave these samples out")
    return x


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired values must have one shape; got {list(x.shape)} and {list(y.shape)}")
    return x, y


def _bootstrap(data: tuple[np.ndarray, ...], statistic: Any, level: float, seed: int) -> tuple[float, float]:
    from scipy import stats

    result = stats.bootstrap(
        data, statistic, n_resamples=RESAMPLES, batch=500, vectorized=True, paired=len(data) > 1, method="percentile",
        confidence_level=level, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
