"""ReFL: stop sampling at a late random step and ascend the reward of the clean picture predicted there (arXiv 2304.05977)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, draw, fold_in, transition
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square, uniform

Array = jax.Array


def refl(sampler: Sampler, shape: tuple[int, ...], *, window: float = 0.25, weight: float = 1.0, ceiling: float | None = None,
         anchor_weight: float = 0.0) -> Algorithm:  # fmt: skip
    """L = -weight phi(r(x0_theta(sg x_k))) + anchor_weight |x0_theta - x0_ref|^2, k uniform over the last `window` of the chain.

    phi(r) = min(r, ceiling): the paper's relu(2 - r) is ceiling = 2 with r standardised, where reward stops counting.
    No guidance is taken in the paper; here it is the sampler's, in rollout and loss alike.
    """
    steps = sampler.num_steps
    first = min(steps - 1, int(np.ceil(steps * (1 - window))))
    if not 0 < window <= 1:
        raise ValueError(f"window is a share of the chain, in (0, 1]; got {window}")

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        _, trajectory = draw(keys, networks["policy"], data["cond"], sampler, shape, keep=True)
        i = first + jnp.floor(uniform(fold_in(keys, 2)) * (steps - first)).astype(jnp.int32)
        x = jax.vmap(lambda path, j: path[j], (1, 0))(trajectory.x, i)
        return {"x": x, "i": i, "cond": data["cond"], "condition": data["condition"]}

    def clean(name: str, networks: Networks, items: Tree) -> Array:
        t = jnp.asarray(sampler.grid.t)[items["i"]]
        return transition(sampler, items["i"], items["x"], networks[name](items["x"], t, items["cond"])).x0

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        return {**items, "ref": clean("reference", networks, items)} if anchor_weight else items

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        x0 = clean("policy", networks, items)
        reward = networks["reward"](fold_in(keys, 3), x0, items["condition"])
        value = -weight * (reward if ceiling is None else jnp.minimum(reward, ceiling))
        distance = mean_square(x0 - items["ref"]) if anchor_weight else jnp.zeros(len(keys))
        return value + anchor_weight * distance, {"reward": reward, "anchor": distance}

    copies = {"reference": "frozen"} if anchor_weight else {}
    return Algorithm(Needs("prompts", "gradient", copies), loss, rollout=rollout, anchor=anchor)
