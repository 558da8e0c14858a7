"""A reward read twice: with wanted and with unwanted words beside the prompt (SRPO, arXiv 2509.06942)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .base import Reward
from .combine import Columns


def relative(reward: Reward, positive: str, negative: str) -> Reward:
    """[B, 2]: r(x, positive + prompt) and r(x, negative + prompt); what both like, such as a hack of the scorer, cancels.

    Raises ValueError for a reward on the host, and for one that does not read prompts: both columns would be the same.
    """
    if not reward.device or reward.encode is None:
        why = "runs on the host" if not reward.device else "does not read the prompt"
        raise ValueError(f"a relative reward compares two prompts on the device, and {reward.name} {why}; "
                         "try clip_score, pick_score or hps")  # fmt: skip
    encode_one = reward.encode

    def encode(prompts: Sequence[str]) -> dict[str, Any]:
        return {side: encode_one([f"{words} {p}".strip() for p in prompts]) for side, words in (("+", positive), ("-", negative))}

    def score(params: Any, observation: Any, condition: Any) -> Any:
        if reward.tower:  # the picture is looked at once
            features = reward.tower.features(params["tower"], observation)
            return jnp.stack([reward.tower.head(params["head"], features, condition[side]) for side in "+-"], -1)
        return jnp.stack([reward.score(params, observation, condition[side]) for side in "+-"], -1)

    return reward._replace(name=f"{reward.name} ({positive} - {negative})", score=Columns(("wanted", "unwanted"), score),
                           encode=encode, tower=None)  # fmt: skip
