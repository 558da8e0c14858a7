"""DDPO: denoising as a decision process, trained by PPO on the likelihood of its steps (arXiv 2305.13301).

Departures: the ratio is formed from the difference of means, so that it is exactly 1 before the first update; steps
whose std is at its floor have no likelihood and are left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, expand, initial, log_ratio, reduce_entries, sample, transition
from . import advantages
from .base import Algorithm, Info, Needs, Networks, Tree, fold
from .losses import ppo

Array = jax.Array


def ddpo(sampler: Sampler, shape: tuple[int, ...], *, group: int = 1, clip_range: float = 1e-4, adv_clip: float = 5.0,
         advantage: str = "batch", num_prompts: int = 0, buffer: int = 32, min_count: int = 16, kl_weight: float = 0.0,
         timestep_fraction: float = 1.0, reduce: str = "mean") -> Algorithm:  # fmt: skip
    """DDPO-IS: L = E_k max(-A rho_k, -A clip(rho_k, 1 - e, 1 + e)), rho_k = p_theta(x_{k-1} | x_k, c) / p_old.

    + kl_weight |mu_theta - mu_ref|^2 / (2 s_k^2), the exact KL of a step (DPOK's penalty, arXiv 2305.16381, with its
    weight). clip_range belongs to the log-ratio's `reduce`: 1e-4 of a mean over entries is the papers' choice.
    advantage: prompt (running statistics a prompt), batch, group, group_batch_std, rloo. timestep_fraction: a random
    subset of the steps. Raises ValueError for a sampler without noise.
    """
    steps = np.flatnonzero(sampler.stochastic())
    if not len(steps):
        raise ValueError(f"DDPO needs a sampler with noise, and this one has none (eta={sampler.eta}); set sampling.eta=1")
    kept = max(1, round(timestep_fraction * len(steps)))
    rule, memory = advantages.rule(advantage, group, num_prompts, buffer, min_count)

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x_T = initial(fold(keys, 0), sampler, (len(keys), *shape))
        x0, trajectory = sample(fold(keys, 1), networks["policy"], data["cond"], sampler, x_T, keep=True)
        return {**data, "x0": x0, "x": trajectory.x.swapaxes(0, 1)}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        a, extra = rule(rewards, rollout.get("prompt_id"), extra)
        b = len(a)
        order = jax.vmap(lambda k: jax.random.permutation(k, jnp.asarray(steps))[:kept])(jax.random.split(key, b))
        row, i = jnp.repeat(jnp.arange(b), kept), order.reshape(-1)
        items = {"x": rollout["x"][row, i], "x_prev": rollout["x"][row, i + 1], "i": i,
                 "advantage": jnp.clip(a, -adv_clip, adv_clip)[row], "row": row}  # fmt: skip
        return items, extra, {"advantage/std": a.std()}

    def mean(network: str, networks: Networks, items: Tree) -> tuple[Array, Array]:
        t = jnp.asarray(sampler.grid.t)[items["i"]]
        step = transition(sampler, items["i"], items["x"], networks[network](items["x"], t, items["cond"]))
        return step.mean, step.std

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        items = {**items, "mean_old": mean("policy", networks, items)[0]}
        return {**items, "mean_ref": mean("reference", networks, items)[0]} if kl_weight else items

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        mu, std = mean("policy", networks, items)
        # two compiled programs may round bfloat16 differently; before the first update the old mean is this very mean
        old = jnp.where(expand(items["first"], mu), jax.lax.stop_gradient(mu), items["mean_old"])
        ratio = log_ratio(mu, old, std, items["x_prev"], reduce=reduce)
        value = ppo(ratio, items["advantage"], clip_range)
        deviation = jnp.abs(jnp.exp(ratio) - 1)
        info = {"ratio/deviation_max": deviation, "ratio/clip_fraction": (deviation > clip_range).astype(jnp.float32)}
        if kl_weight:
            kl = reduce_entries(jnp.square((mu - items["mean_ref"]) / expand(std, mu)) / 2, reduce)
            value, info = value + kl_weight * kl, {**info, "kl/step": kl}
        return value, info

    copies = {"reference": "frozen"} if kl_weight else {}
    return Algorithm(Needs("prompts", "value", copies), loss, lambda key: memory(), rollout, prepare, anchor)
