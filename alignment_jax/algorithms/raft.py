"""RAFT: draw several samples of a prompt, fine-tune on the best, repeat (arXiv 2304.06767)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler
from .base import Algorithm, Info
from .rwr import best, weighted_likelihood

Array = jax.Array


def raft(sampler: Sampler, shape: tuple[int, ...], *, group: int = 8, top: int = 1, draws: int = 1,
         snr_gamma: float | None = 5.0) -> Algorithm:  # fmt: skip
    """Best-of-n fine-tuning: the `top` samples of each group of n by reward, ranked within the prompt, then the SFT loss.

    One round on N(m, s^2) with a linear reward and n = 2 gives m + s / sqrt(pi), s^2 (1 - 1 / pi): the variance shrinks
    geometrically over rounds. draws: re-noised copies of each kept sample. Raises ValueError for top >= n.
    """
    if not 1 <= top < group:
        raise ValueError(f"RAFT keeps the best `top` of each group: 1 <= top < batch.group; got top={top}, group={group}")

    def weigh(r: Array) -> tuple[Array, Array, Info]:
        rows, weights = best(r, group, top)  # a prompt without a scored sample teaches nothing
        return rows, weights, {"reward/best": jnp.nanmax(r.reshape(-1, group), 1).mean()}

    return weighted_likelihood(sampler, shape, weigh, {}, "policy", draws, snr_gamma)
