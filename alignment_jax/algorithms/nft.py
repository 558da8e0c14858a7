"""DiffusionNFT: online reinforcement learning on the forward process, without likelihoods (arXiv 2509.16117).

Departure: written on x0 predictions of any parameterisation; the adaptive weight is the official code's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, draw, expand, predict
from . import advantages
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square
from .losses import noised

Array = jax.Array


def diffusion_nft(sampler: Sampler, shape: tuple[int, ...], *, group: int = 8, beta: float = 1.0, adv_clip: float = 5.0,
                  reference_weight: float = 1e-4, old_decay: float = 0.5, draws: int = 1, adaptive: bool = True,
                  advantage: str = "group_batch_std") -> Algorithm:  # fmt: skip
    """L = r |x0+ - x0|^2 + (1 - r) |x0- - x0|^2 + reference_weight |x0_theta - x0_ref|^2 at re-noised own samples.

    x0+ = (1 - b) x0_old + b x0_theta, x0- = (1 + b) x0_old - b x0_theta, r = clip(A / adv_clip, -1, 1) / 2 + 1/2 in [0, 1].
    old: the policy that sampled, a moving average (never the reference). At theta = old the gradient is
    b (2 r - 1) times that of the denoising loss; for rewards linear in x0 the optimum is an exponential tilt.
    draws: re-noised copies of each sample. adaptive: divide by sg(mean |x0+- - x0|), which evens out the times.
    """
    rule, memory = advantages.rule(advantage, group, 0, 0, 0)

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x0, _ = draw(keys, networks["old"], data["cond"], sampler, shape)
        return {**data, "x0": x0}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        a, extra = rule(rewards, rollout.get("prompt_id"), extra)
        r = jnp.clip(a / adv_clip, -1, 1) / 2 + 0.5
        items = {"x0": rollout["x0"], "row": jnp.arange(len(r)), "r": r}
        return jax.tree.map(lambda x: jnp.repeat(x, draws, 0), items), extra, {"advantage/std": a.std()}

    def clean(name: str, keys: Array, networks: Networks, items: Tree) -> Array:
        x_t, t, _ = noised(keys, items["x0"], sampler.schedule)
        output = networks[name](x_t, t, items["cond"])
        return predict(sampler.prediction, output, x_t, sampler.schedule.alpha(t), sampler.schedule.sigma(t))[0]

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        items = {**items, "old": clean("old", keys, networks, items)}
        return {**items, "ref": clean("reference", keys, networks, items)} if reference_weight else items

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        x0, old, theta, r = items["x0"], items["old"], clean("policy", keys, networks, items), items["r"]
        positive, negative = ((1 - b) * old + b * theta for b in (beta, -beta))
        value = (r * error(positive, x0) + (1 - r) * error(negative, x0)) / beta
        drift = mean_square(theta - old)
        if reference_weight:
            value = value + reference_weight * mean_square(theta - items["ref"])
        return value, {"drift/old": drift}

    def error(x: Array, x0: Array) -> Array:
        if not adaptive:
            return mean_square(x - x0)
        scale = jnp.abs(x - x0).mean(tuple(range(1, x.ndim)))
        return mean_square((x - x0) / expand(jnp.sqrt(jax.lax.stop_gradient(jnp.maximum(scale, 1e-5))), x))

    copies = {"old": ("ema", old_decay)} | ({"reference": "frozen"} if reference_weight else {})
    return Algorithm(Needs("prompts", "value", copies), loss, lambda key: memory(), rollout, prepare, anchor)
