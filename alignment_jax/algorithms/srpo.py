"""SRPO: a reward's gradient at any time, by noise that is known and removed again (Direct-Align, arXiv 2509.06942).

Departures: written on (alpha, sigma) of any schedule, where the paper has rectified flow; neighbouring times of the
sampler's grid are the two ends of a step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, expand, fold_in, initial, predict, sample
from .base import Algorithm, Info, Needs, Networks, Tree, uniform

Array = jax.Array


def srpo(sampler: Sampler, shape: tuple[int, ...], *, ceiling: float | None = 0.7, ground_truth_ratio: float = 0.9,
         discount: tuple[float, float] = (0.1, 0.25), discount_inversion: tuple[float, float] = (0.3, 0.01)) -> Algorithm:  # fmt: skip
    """L = relu(ceiling - S) at x0_rec, a clean picture recovered after one step between the noisier time s and the cleaner b.

    Denoising: x_s = alpha_s x0 + sigma_s n, n the noise of x0's own rollout; one step to x_b; x0_rec = (x_b - sigma_b n) /
    alpha_b. Inversion: from x_b up to x_s, recovered there. Half of the items each.
    S = (1 + k) r+ - r- when denoising, (1 + k) r- - r+ in inversion, whose gradient points the other way. r+-: the two
    columns of a `relative` reward, the prompt with wanted and with unwanted words; a plain reward is r+, with r- = 0.
    k: linear over the grid, `discount` and `discount_inversion` from noisy to clean. ceiling None: L = -S, which for a reward
    without a lower bound runs away in the inversions.
    ground_truth_ratio: the share of the grid that is used, without its noisiest times, where recovery divides by little.
    """
    steps = sampler.num_steps
    if not 0 < ground_truth_ratio <= 1 or steps < 3:
        raise ValueError(f"ground_truth_ratio is a share in (0, 1] of a chain of 3 steps or more; got {ground_truth_ratio} of {steps}")
    t, alpha, sigma = (jnp.asarray(a) for a in sampler.grid)
    first = min(steps - 2, max(1, int(np.ceil(steps * (1 - ground_truth_ratio)))))

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x_T = initial(fold_in(keys, 0), sampler, (len(keys), *shape))
        x0, _ = sample(fold_in(keys, 1), networks["policy"], data["cond"], sampler, x_T)
        return {"x0": x0, "noise": x_T / sampler.initial_scale, "cond": data["cond"], "condition": data["condition"]}

    def recovered(networks: Networks, items: Tree, start: Array, end: Array) -> Array:
        n = items["noise"]
        x = expand(alpha[start], n) * items["x0"] + expand(sigma[start], n) * n
        output = networks["policy"](x, t[start], items["cond"])
        x0, eps = predict(sampler.prediction, output, x, alpha[start], sigma[start])
        return (expand(alpha[end], n) * x0 + expand(sigma[end], n) * (eps - n)) / expand(alpha[end], n)

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        i = first + jnp.floor(uniform(fold_in(keys, 2)) * (steps - 1 - first)).astype(jnp.int32)
        inversion = uniform(fold_in(keys, 3)) < 0.5
        x0 = recovered(networks, items, jnp.where(inversion, i + 1, i), jnp.where(inversion, i, i + 1))
        reward = networks["reward"](fold_in(keys, 4), x0, items["condition"])
        plus, minus = (reward[:, 0], reward[:, 1]) if reward.ndim == 2 else (reward, jnp.zeros_like(reward))
        share = i / (steps - 1)
        k = [a + (b - a) * share for a, b in (discount, discount_inversion)]
        s = jnp.where(inversion, (1 + k[1]) * minus - plus, (1 + k[0]) * plus - minus)
        return -s if ceiling is None else jax.nn.relu(ceiling - s), {"reward": plus}

    return Algorithm(Needs("prompts", "gradient", columns=("wanted", "unwanted")), loss, rollout=rollout)
