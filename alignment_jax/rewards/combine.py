"""Several rewards as one: a weighted sum, a careful ensemble, or all of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from .base import Reward


@dataclass(frozen=True)
class Columns:
    """A score of several columns with their names: called like any score, it returns [B, M]."""

    names: tuple[str, ...]
    score: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.score(*args)


def columns(reward: Reward) -> tuple[str, ...]:
    """The names of the M columns of a reward whose scores are [B, M]; empty where they are [B]."""
    return reward.score.names if isinstance(reward.score, Columns) else ()


def weighted(rewards: Sequence[tuple[Reward, float]]) -> Reward:
    """r = sum_i w_i r_i. All on the device (then differentiable if every part is), or all turned into a host reward.

    A host reward gives its parts as its info. Scorers with the same tower hold its parameters once and run it once a batch.
    ValueError for an empty list, for two rewards of one name, and for a mixture of device and host rewards.
    """
    if not rewards:
        raise ValueError("a list of rewards needs at least one (name, weight)")
    if len(rewards) == 1 and rewards[0][1] == 1.0:
        return rewards[0][0]
    low = sum(w * (r.range[0] if w > 0 else r.range[1]) for r, w in rewards)
    high = sum(w * (r.range[1] if w > 0 else r.range[0]) for r, w in rewards)
    name = " + ".join(f"{w:g} {r.name}" for r, w in rewards)
    return _joined([r for r, _ in rewards], lambda parts: sum(w * x for (_, w), x in zip(rewards, parts, strict=True)), name,
                   "weighted sum", (low, high))  # fmt: skip


def ensemble(rewards: Sequence[Reward], *, how: str = "lcb", k: float = 1.0) -> Reward:
    """What several scorers of one thing can agree on, so that none can be hacked alone (arXiv 2310.02743).

    how "lcb": mean - k std over the members, where the paper takes the variance, which is on another scale than scores;
    k = 0 is the mean. "min": the worst of them. They should differ in seed or data. Errors as in `weighted`.
    """
    if how not in ("lcb", "min"):
        raise ValueError(f"an ensemble's how must be 'lcb' (mean - k std) or 'min'; got {how!r}")
    if len(rewards) < 2 or k < 0:
        raise ValueError(f"an ensemble needs at least two rewards and k of 0 or more; got {len(rewards)} and k={k:g}")
    low, high = min(r.range[0] for r in rewards), max(r.range[1] for r in rewards)
    name = ", ".join(r.name for r in rewards)
    if how == "min":
        return _joined(rewards, lambda parts: _numpy(parts).stack(parts).min(0), f"min of {name}", "the worst of several", (low, high))

    def lower(parts: Sequence[Any]) -> Any:
        np_ = _numpy(parts)
        x = np_.stack(parts)
        mean = x.mean(0)
        variance = np_.square(x - mean).mean(0)
        spread = variance > 1e-12 * np_.maximum(np_.square(mean), 1e-12)
        # where members agree the root has an infinite slope
        return mean - k * np_.where(spread, np_.sqrt(np_.where(spread, variance, 1.0)), 0.0)

    reach = (low - k * (high - low) / 2, high) if k else (low, high)
    return _joined(rewards, lower, f"lower bound of {name}", f"mean - {k:g} std of several", reach)


def several(rewards: Sequence[Reward]) -> Reward:
    """All rewards side by side, [B, M], never summed before a method's aggregation; a column may itself have several.

    The range is that of all. Errors as in `weighted`.
    """
    names = tuple(name for r in rewards for name in (columns(r) or (r.name,)))
    both = (min(r.range[0] for r in rewards), max(r.range[1] for r in rewards)) if rewards else (0.0, 0.0)

    def side_by_side(parts: Sequence[Any]) -> Any:
        return _numpy(parts).concatenate([x if x.ndim == 2 else x[:, None] for x in parts], 1)

    made = _joined(rewards, side_by_side, " | ".join(names), f"{len(names)} rewards side by side", both)
    return made._replace(score=Columns(names, made.score))


def _joined(rewards: Sequence[Reward], join: Callable[[Sequence[Any]], Any], name: str, summary: str,
            range_: tuple[float, float]) -> Reward:  # fmt: skip
    """join(the parts' scores) as a reward."""
    if not rewards:
        raise ValueError("a list of rewards needs at least one")
    names = [r.name for r in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"rewards are told apart by name; got {', '.join(names)}")
    if len({r.device for r in rewards}) > 1:
        raise ValueError("device and host rewards cannot be summed in one list: "
                         + ", ".join(f"{r.name} ({'device' if r.device else 'host'})" for r in rewards))  # fmt: skip
    if any(r.noisy for r in rewards):
        raise ValueError(f"rewards that read noisy states stand alone; got {', '.join(r.name for r in rewards if r.noisy)} in a list")
    common: dict[str, Any] = {
        "name": name, "range": range_, "licence": ", ".join(sorted({r.licence for r in rewards})), "summary": summary,
        "params": {r.name: r.params["head"] if r.tower else r.params for r in rewards},
    }  # fmt: skip
    if not rewards[0].device:

        def host(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
            parts = {r.name: np.asarray(r.score(images, prompts, metadata)[0]) for r in rewards}
            return join(list(parts.values())), parts

        return Reward(score=host, device=False, differentiable=False, **common)

    towers = {r.tower.name: (r.tower, r.params["tower"]) for r in reversed(rewards) if r.tower}
    common["params"] |= {f"tower {name}": params for name, (_, params) in towers.items()}

    def score(params: Any, observation: Any, condition: Any) -> Any:
        features = {name: tower.features(params[f"tower {name}"], observation) for name, (tower, _) in towers.items()}

        def one(r: Reward) -> Any:
            if r.tower:
                return r.tower.head(params[r.name], features[r.tower.name], condition[r.name])
            return r.score(params[r.name], observation, condition[r.name])

        return join([one(r) for r in rewards])

    def encode(prompts: Sequence[str]) -> dict[str, Any]:
        return {r.name: r.encode(prompts) if r.encode else {} for r in rewards}

    augment = next((r.augment for r in rewards if r.augment is not None), None)
    return Reward(score=score, encode=encode, augment=augment, differentiable=all(r.differentiable for r in rewards),
                  **common)  # fmt: skip


def _numpy(parts: Sequence[Any]) -> Any:
    """numpy for host rewards, jax.numpy otherwise."""
    return np if isinstance(parts[0], np.ndarray) else jnp
