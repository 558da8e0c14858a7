"""Several rewards as one: a weighted sum that keeps its parts visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import Reward


def weighted(rewards: Sequence[tuple[Reward, float]]) -> Reward:
    """r = sum_i w_i r_i. All on the device (then differentiable if every part is), or all turned into a host reward.

    A host reward gives its parts as its info. Scorers with the same tower hold its parameters once and run it once a batch.
    ValueError for an empty list, for two rewards of one name, and for a mixture of device and host rewards.
    """
    if not rewards:
        raise ValueError("a list of rewards needs at least one (name, weight)")
    names = [r.name for r, _ in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"rewards are told apart by name; got {', '.join(names)}")
    if len({r.device for r, _ in rewards}) > 1:
        raise ValueError("device and host rewards cannot be summed in one list: "
                         + ", ".join(f"{r.name} ({'device' if r.device else 'host'})" for r, _ in rewards))  # fmt: skip
    if len(rewards) == 1 and rewards[0][1] == 1.0:
        return rewards[0][0]
    low = sum(w * (r.range[0] if w > 0 else r.range[1]) for r, w in rewards)
    high = sum(w * (r.range[1] if w > 0 else r.range[0]) for r, w in rewards)
    common: dict[str, Any] = {
        "name": " + ".join(f"{w:g} {r.name}" for r, w in rewards), "range": (low, high),
        "licence": ", ".join(sorted({r.licence for r, _ in rewards})), "summary": "weighted sum",
        "params": {r.name: r.params["head"] if r.tower else r.params for r, _ in rewards},
    }  # fmt: skip
    if not rewards[0][0].device:

        def host(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
            parts = {r.name: np.asarray(r.score(images, prompts, metadata)[0]) for r, _ in rewards}
            return sum((w * parts[r.name] for r, w in rewards), np.zeros(len(images))), parts

        return Reward(score=host, device=False, differentiable=False, **common)

    towers = {r.tower.name: (r.tower, r.params["tower"]) for r, _ in reversed(rewards) if r.tower}
    common["params"] |= {f"tower {name}": params for name, (_, params) in towers.items()}

    def score(params: Any, observation: Any, condition: Any) -> Any:
        features = {name: tower.features(params[f"tower {name}"], observation) for name, (tower, _) in towers.items()}

        def one(r: Reward) -> Any:
            if r.tower:
                return r.tower.head(params[r.name], features[r.tower.name], condition[r.name])
            return r.score(params[r.name], observation, condition[r.name])

        return sum(w * one(r) for r, w in rewards)

    def encode(prompts: Sequence[str]) -> dict[str, Any]:
        return {r.name: r.encode(prompts) if r.encode else {} for r, _ in rewards}

    augment = next((r.augment for r, _ in rewards if r.augment is not None), None)
    return Reward(score=score, encode=encode, augment=augment, differentiable=all(r.differentiable for r, _ in rewards),
                  **common)  # fmt: skip
