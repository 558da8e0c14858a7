"""DRaFT: reward gradients through the end of the sampling chain (arXiv 2309.17400); AlignProp (arXiv 2310.03739).

Departures: an optional anchor keeps the tail close to the frozen model's tail from the same state, which is what keeps
diversity; K-step chains are scanned, with rematerialisation except on CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, expand, fold_in, initial, normal, sample
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square, uniform
from .losses import chained

Array = jax.Array


def draft(sampler: Sampler, shape: tuple[int, ...], *, k: int = 1, lv: int = 1, anchor_weight: float = 0.0,
          remat: bool | None = None) -> Algorithm:  # fmt: skip
    """DRaFT-K: ascend E r(x_0), x_0 = the last K steps of the sampler from sg(x_K).

    L = -r(x_0) + anchor_weight |x_0 - x_0_ref|^2, x_0_ref the frozen model's end from the same x_K and noise.
    lv > 1 (DRaFT-LV, K = 1): x_0 is re-noised to the last time lv times and the gradients are averaged.
    remat: a step keeps its state alone and its network call is made again in the backward pass; None: except on CPU.
    Raises ValueError for a K outside 1..T and for lv > 1 with K > 1.
    """
    steps = sampler.num_steps
    if not 1 <= k <= steps:
        raise ValueError(f"k is the number of differentiated steps, 1 to {steps}; got {k}")
    if lv < 1 or (lv > 1 and k > 1):
        raise ValueError(f"DRaFT-LV repeats the last step: lv={lv} needs k=1; got k={k}")
    start = steps - k

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x = initial(fold_in(keys, 0), sampler, (len(keys), *shape))
        if start or lv > 1:  # up to x_K; for LV to the end, which is then re-noised
            x, _ = sample(fold_in(keys, 1), networks["policy"], data["cond"], sampler, x, stop=steps if lv > 1 else start)
        return {"x": jax.lax.stop_gradient(x), "cond": data["cond"], "condition": data["condition"]}

    def begin(keys: Array, items: Tree, n: int) -> tuple[Array, Array]:
        """The state at step `start` and the noise [K, B, ...] of the steps after it; n counts the LV repetitions."""
        noises = jnp.stack([normal(fold_in(keys, 2 + n * steps + i), items["x"].shape) for i in range(start, steps)])
        if lv == 1:
            return items["x"], noises
        alpha, sigma = sampler.grid.alpha[start], sampler.grid.sigma[start]
        return alpha * items["x"] + sigma * normal(fold_in(keys, 1000 + n), items["x"].shape), noises

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        if not anchor_weight:
            return items
        ends = [chained(networks["reference"], items["cond"], sampler, *begin(keys, items, n), start) for n in range(lv)]
        return {**items, "end": jnp.stack(ends, 1)}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        total, distance, rewards = jnp.zeros(len(keys)), jnp.zeros(len(keys)), []
        for n in range(lv):
            end = chained(networks["policy"], items["cond"], sampler, *begin(keys, items, n), start, remat=remat)
            reward = networks["reward"](fold_in(keys, 5000 + n), end, items["condition"])
            rewards.append(reward)
            total = total - reward / lv
            if anchor_weight:
                distance = distance + mean_square(end - items["end"][:, n]) / lv
        return total + anchor_weight * distance, {"reward": jnp.stack(rewards).mean(0), "anchor": distance}

    copies = {"reference": "frozen"} if anchor_weight else {}
    return Algorithm(Needs("prompts", "gradient", copies), loss, rollout=rollout, anchor=anchor)


def alignprop(sampler: Sampler, shape: tuple[int, ...], *, mean_k: float = 8.0, std_k: float = 5.0,
              remat: bool | None = None) -> Algorithm:  # fmt: skip
    """AlignProp: the whole chain, with the gradient cut at a random step of each sample, K ~ N(mean_k, std_k) in 1..T.

    As in the official code the network's output is cut before that step, not x. Costs the memory and time of K = T:
    where that matters use draft with a fixed k. remat: as in `draft`.
    """
    steps = sampler.num_steps

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        return {"x": initial(fold_in(keys, 0), sampler, (len(keys), *shape)), "cond": data["cond"], "condition": data["condition"]}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        z = jax.scipy.special.ndtri(jnp.clip(uniform(fold_in(keys, 1)), 1e-6, 1 - 1e-6))
        kept = jnp.clip(jnp.round(mean_k + std_k * z), 1, steps)

        def policy(x: Array, t: Array, cond: Tree) -> Array:
            i = jnp.searchsorted(-jnp.asarray(sampler.grid.t[:-1]), -t)  # the step whose time is t
            output = networks["policy"](x, t, cond)
            live = expand((i >= steps - kept).astype(output.dtype), output)
            return live * output + (1 - live) * jax.lax.stop_gradient(output)

        noises = jnp.stack([normal(fold_in(keys, 2 + i), items["x"].shape) for i in range(steps)])
        end = chained(policy, items["cond"], sampler, items["x"], noises, 0, remat=remat)
        reward = networks["reward"](fold_in(keys, 5000), end, items["condition"])
        return -reward, {"reward": reward, "k": kept}

    return Algorithm(Needs("prompts", "gradient"), loss, rollout=rollout)
