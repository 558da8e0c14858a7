"""Rewards are tried on a probe batch before anything long compiles, and host rewards are called with care."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .base import Reward
from .combine import columns


def probe(reward: Reward, image_shape: tuple[int, ...], prompts: Sequence[str]) -> str | None:
    """Scores random pictures, in turn of noise and of one colour, for the prompts [B]; returns a warning, or None.

    Raises ValueError when the scores have a wrong shape, are not numbers, lie outside the declared range or when the
    reward fails; the message names the reward, and the prompt where one is to blame. Constant scores are a warning.
    """
    n = len(prompts)
    images = np.random.default_rng(0).integers(0, 256, (n, *image_shape), np.uint8)
    images[1::2] = images[1::2, :1, :1]  # a clipped score may be at its floor for any noise
    if reward.device:
        condition = reward.encode(prompts) if reward.encode else {}
        try:
            scores = np.asarray(reward.score(reward.params, jnp.asarray(images, jnp.float32) / 255.0, condition))
        except Exception as error:
            raise ValueError(f"reward {reward.name!r} failed on a probe batch of {n} pictures {image_shape}: "
                             f"{type(error).__name__}: {error}") from error  # fmt: skip
    else:
        scores, _ = score_host(reward, images, prompts, {}, batch_index=0)
    _validate(reward, scores, n)
    bad = np.flatnonzero(~np.isfinite(scores).reshape(n, -1).all(1))
    if len(bad):
        raise ValueError(f"reward {reward.name!r} gave {scores[bad[0]]} on a probe batch, for example for the prompt "
                         f"{prompts[bad[0]]!r}; it must be a finite number for any picture")  # fmt: skip
    low, high = reward.range
    if scores.min() < low - 1e-4 or scores.max() > high + 1e-4:
        raise ValueError(f"reward {reward.name!r} declares the range [{low:g}, {high:g}] and gave "
                         f"[{scores.min():g}, {scores.max():g}] on a probe batch")  # fmt: skip
    if n > 1 and np.ptp(scores) == 0:
        return f"reward {reward.name!r} gave the same score {scores[0]:g} to {n} random pictures: nothing can be learned from a constant"
    return None


def score_host(reward: Reward, images: np.ndarray, prompts: Sequence[str], metadata: Any, *, batch_index: int,
               on_error: str = "raise") -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
    """(scores [B], info) of a host reward.

    on_error "raise": a failure is a ValueError that names the batch and the prompt; "mask": the pictures that fail,
    found one by one, get NaN, which every algorithm leaves out.
    """
    if on_error not in ("raise", "mask"):
        raise ValueError(f"on_error must be 'raise' or 'mask'; got {on_error!r}")
    try:
        scores, info = reward.score(images, prompts, metadata)
        scores = np.asarray(scores, np.float32)
        _validate(reward, scores, len(images))
        return scores, info
    except Exception as error:
        failure = error
    if not isinstance(failure, ValueError) or "must return" not in str(failure):
        scores = np.full((len(images), *_columns(reward)), np.nan, np.float32)
        for i in range(len(images)):
            try:
                scores[i] = np.asarray(reward.score(images[i : i + 1], prompts[i : i + 1], metadata)[0])[0]
            except Exception as error:
                if on_error == "raise":
                    raise ValueError(f"reward {reward.name!r} failed on batch {batch_index}, picture {i}, prompt "
                                     f"{prompts[i]!r}: {type(error).__name__}: {error}. To go on without such "
                                     "pictures set config.reward_errors = 'mask'") from error  # fmt: skip
        if on_error == "mask":
            return scores, {}
    raise ValueError(f"reward {reward.name!r} failed on batch {batch_index} (first prompt {prompts[0]!r}): {failure}") from failure


def _validate(reward: Reward, scores: Any, n: int) -> None:
    wanted = (n, *_columns(reward))
    if np.shape(scores) != wanted:
        raise ValueError(f"reward {reward.name!r} must return one score a picture{' and column' if columns(reward) else ''}, shape "
                         f"{wanted}; got {np.shape(scores)}")  # fmt: skip


def _columns(reward: Reward) -> tuple[int, ...]:
    """() of a reward with one score, (M,) of one with several."""
    return (len(columns(reward)),) if columns(reward) else ()


def to_uint8(observation: jax.Array | np.ndarray) -> np.ndarray:
    """Pictures [B,H,W,C] in [0, 1] as the uint8 that host rewards and files take."""
    return np.asarray(jnp.round(255.0 * jnp.clip(observation, 0.0, 1.0))).astype(np.uint8)
