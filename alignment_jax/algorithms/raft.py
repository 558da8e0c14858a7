"""RAFT: draw several samples of a prompt, fine-tune on the best, repeat (arXiv 2304.06767)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, initial, sample
from .advantages import finite
from .base import Algorithm, Info, Needs, Networks, Tree, fold
from .losses import denoise_error, noised

Array = jax.Array


def raft(sampler: Sampler, shape: tuple[int, ...], *, group: int = 8, top: int = 1, draws: int = 1,
         snr_gamma: float | None = 5.0) -> Algorithm:  # fmt: skip
    """Best-of-n fine-tuning: the `top` samples of each group of n by reward, ranked within the prompt, then the SFT loss.

    One round on N(m, s^2) with a linear reward and n = 2 gives m + s / sqrt(pi), s^2 (1 - 1 / pi): the variance shrinks
    geometrically over rounds. draws: re-noised copies of each kept sample. Raises ValueError for top >= n.
    """
    if not 1 <= top < group:
        raise ValueError(f"RAFT keeps the best `top` of each group: 1 <= top < batch.group; got top={top}, group={group}")

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x_T = initial(fold(keys, 0), sampler, (len(keys), *shape))
        x0, _ = sample(fold(keys, 1), networks["policy"], data["cond"], sampler, x_T)
        return {**data, "x0": x0}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        r = finite(rewards).reshape(-1, group)
        best = jnp.argsort(jnp.where(jnp.isnan(r), jnp.inf, -r), axis=1)[:, :top]
        rows = (best + group * jnp.arange(len(r))[:, None]).reshape(-1)
        weight = jnp.isfinite(r.reshape(-1)[rows]).astype(jnp.float32)  # a prompt without a scored sample teaches nothing
        items = {"x0": rollout["x0"][rows], "row": rows, "weight": weight}
        return jax.tree.map(lambda x: jnp.repeat(x, draws, 0), items), extra, {"reward/best": jnp.nanmax(r, 1).mean()}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        x_t, t, eps = noised(keys, items["x0"], sampler.schedule)
        output = networks["unguided"](x_t, t, items["cond"])  # guidance is for sampling; the regression is the network's own
        error = denoise_error(output, x_t, t, items["x0"], eps, schedule=sampler.schedule,
                              prediction=sampler.prediction, snr_gamma=snr_gamma)  # fmt: skip
        return items["weight"] * error, {"denoising_error": error}

    return Algorithm(Needs("prompts", "value"), loss, rollout=rollout, prepare=prepare)
