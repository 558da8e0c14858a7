"""Goodhart's law, measured: does gold still follow the proxy, and when should training have stopped?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from .statistics import Interval, normal_quantile, standard_error

DIVERSITY_FLOOR = 0.75


def alarm(proxy: Sequence[Interval], gold: Sequence[Interval], diversity: Sequence[Interval] | None = None, *,
          diversity_floor: float = DIVERSITY_FLOOR, level: float = 0.95) -> dict[str, Any]:  # fmt: skip
    """{"fired": bool, "reason": sentences with the numbers}: has the run left the region where proxy means gold?

    proxy, gold, diversity: measured in order, the first being the base and the last the model that is judged; diversity
    may be shorter or None. Fires when
      the proxy's interval lies above the base's, and gold fell significantly from its best (base included): the best of
      k earlier means is lucky, so the test of best - last is at level / k (Bonferroni); or
      diversity's ratio to the base is significantly below diversity_floor.
    Noise alone therefore fires it in at most 1 - level of the runs, whatever their length. NaN intervals prove nothing.
    """
    if len(proxy) != len(gold) or len(gold) < 2:
        raise ValueError(f"proxy and gold need as many points each, the base first; got {len(proxy)} and {len(gold)}")
    rose = proxy[-1]["low"] > proxy[0]["high"]
    best = int(np.argmax([g["mean"] for g in gold[:-1]]))
    tested = 1 - (1 - level) / (len(gold) - 1)
    fell = _z(gold[best], gold[-1], 0.0) > normal_quantile(0.5 + tested / 2)
    ratio, thin = _ratio(diversity, diversity_floor, level)

    said = [_proxy_sentence(proxy, rose)]
    where = "the base's" if best == 0 else "the best of the run,"
    if fell:
        said.append(f"Gold fell to {_show(gold[-1])} from {where} {_show(gold[best])}.")
    else:
        said.append(f"Gold went from {_show(gold[0])} to {_show(gold[-1])}; no significant fall from its best.")
    if ratio is not None:
        said.append(f"Diversity is {ratio:.2f} of the base's; the floor is {diversity_floor:.2f}.")
    elif diversity is not None:
        said.append("Diversity is not known: too few prompts have two samples to compare.")
    fired = bool((rose and fell) or thin)
    if rose and fell:
        opening = "Over-optimised: the proxy rose while gold fell."
    elif thin:
        opening = "Collapsing: diversity is below its floor."
    elif fell:
        opening = "No over-optimisation, but a worse model: gold fell and the proxy did not rise."
    else:
        opening = "No over-optimisation seen."
    return {"fired": fired, "reason": " ".join([opening, *said])}


def early_stop(gold: Sequence[Interval], delta: float = 0.02, level: float = 0.95) -> dict[str, Any]:
    """{"stop": bool, "best": index, "reason"}: stop when gold is more than delta below its best, beyond the noise.

    gold: every measurement so far, the base first. Stops when best - last - delta is above zero by a one-sided test,
    corrected as in `alarm` for the best being the luckiest of all; "best" is the measurement with the highest mean,
    whose checkpoint to go back to.
    """
    if not gold:
        raise ValueError("early_stop needs at least one measurement of gold")
    best = int(np.argmax([g["mean"] for g in gold]))
    stop = bool(_z(gold[best], gold[-1], delta) > normal_quantile(1 - (1 - level) / max(len(gold) - 1, 1)))
    verb = "is more than" if stop else "is not proven to be more than"
    reason = f"Gold {_show(gold[-1])} {verb} {delta:g} below its best {_show(gold[best])}."
    return {"stop": stop, "best": best, "reason": reason}


class GaoFit(NamedTuple):
    """gold = d (alpha - beta f(d)); peak: the d* where gold is highest (inf: none in sight); rmse of the fit."""

    alpha: float
    beta: float
    peak: float
    gold_at_peak: float
    rmse: float
    form: str

    def __call__(self, d: ArrayLike) -> np.ndarray:
        """The fitted gold, relative to the base's, at d = sqrt(KL)."""
        d = np.asarray(d, np.float64)
        return self.alpha * d - self.beta * _penalty(d, self.form)


def gao_fit(d: ArrayLike, gold: ArrayLike, form: str = "rl") -> GaoFit:
    """Fits the law of over-optimisation to gold [N] (minus the base's) at d [N] = sqrt(KL), by least squares.

    form "rl": gold = d (alpha - beta log d), d* = exp(alpha / beta - 1), for trained policies;
    "best_of_n": gold = d (alpha - beta d), d* = alpha / (2 beta)  (Gao et al., arXiv 2210.10760).
    Both are linear in alpha and beta. Raises ValueError for fewer than two different d > 0.
    """
    if form not in ("rl", "best_of_n"):
        raise ValueError(f"form must be 'rl' or 'best_of_n'; got {form!r}")
    x, y = np.asarray(d, np.float64), np.asarray(gold, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x[x > 0])) < 2 or (x < 0).any():
        raise ValueError(f"a fit needs d >= 0 [N], gold [N], two different d > 0; got {x.tolist()} and {y.tolist()}")
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([x, -_penalty(x, form)], 1), y, rcond=None)
    peak = math.inf
    if beta > 0 and alpha > 0:
        peak = math.exp(min(alpha / beta - 1, 700.0)) if form == "rl" else alpha / (2 * beta)
    elif beta > 0:  # falls from the start
        peak = math.exp(max(alpha / beta - 1, -700.0)) if form == "rl" else 0.0
    fit = GaoFit(float(alpha), float(beta), float(peak), math.nan, 0.0, form)
    at_peak = float(fit(peak)) if math.isfinite(peak) else math.inf
    return fit._replace(gold_at_peak=at_peak, rmse=float(np.sqrt(np.mean((fit(x) - y) ** 2))))


def _penalty(d: np.ndarray, form: str) -> np.ndarray:
    return special.xlogy(d, d) if form == "rl" else d**2


def _z(high: Interval, low: Interval, margin: float) -> float:
    error = math.hypot(standard_error(high), standard_error(low))
    gap = high["mean"] - low["mean"] - margin
    return gap / error if error > 0 else (math.inf if gap > 0 and error == 0 else 0.0)


def _ratio(diversity: Sequence[Interval] | None, floor: float, level: float) -> tuple[float | None, bool]:
    if diversity is None or len(diversity) < 2:
        return None, False
    base, last = diversity[0], diversity[-1]
    if not math.isfinite(last["mean"]) or not base["mean"] > 0:
        return None, False
    ratio = last["mean"] / base["mean"]
    # delta method for last - floor * base
    error = math.hypot(standard_error(last), floor * standard_error(base))
    gap = floor * base["mean"] - last["mean"]
    return ratio, bool(gap > normal_quantile(0.5 + level / 2) * error)


def _proxy_sentence(proxy: Sequence[Interval], rose: bool) -> str:
    verb = "rose" if rose else "did not clearly rise"
    return f"The proxy {verb}: {_show(proxy[0])} at the base, {_show(proxy[-1])} now."


def _show(value: Interval) -> str:
    if not math.isfinite(value["low"]) or not math.isfinite(value["high"]):
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
