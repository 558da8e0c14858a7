"""A reward as the judge of a run that optimises another: gold is then its score, not a share of right samples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .base import Reward
from .check import score_host, to_uint8
from .critters import Judge

CHUNK = 32


def by_reward(reward: Reward) -> Judge:
    """A judge whose verdict on pictures [N,H,W,C] in [0, 1] is the reward's score [N], float32."""
    score = jax.jit(reward.score) if reward.device else None

    def look(images: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
        texts, scores = list(prompts), []
        for i in range(0, len(images), CHUNK):
            part, said = images[i : i + CHUNK], texts[i : i + CHUNK]
            if score is None:
                scores.append(score_host(reward, to_uint8(jnp.asarray(part)), said, {}, batch_index=i // CHUNK)[0])
            else:
                scores.append(np.asarray(score(reward.params, part, reward.encode(said) if reward.encode else {})))
        return {"right": np.concatenate(scores).astype(np.float32), "attributes": np.zeros((len(images), 0), bool),
                "features": None, "nuisances": {}}  # fmt: skip

    return Judge(lambda prompts: np.asarray(prompts, object), look, (), {}, {})
