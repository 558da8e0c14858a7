"""A critic V(x_k, k, c): the return that a state promises, as a baseline of policy gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .base import Own, Tree

Array = jax.Array


def critic(shape: tuple[int, ...], num_steps: int, *, width: int = 256, layers: int = 3, learning_rate: float = 1e-4) -> Own:
    """networks["critic"](x [N, *shape], i [N], cond) -> [N]: an MLP whose hidden units have a gain for each step i.

    The size is DPOK's for Stable Diffusion (arXiv 2305.16381). The condition enters as the mean of each of its arrays over
    all axes between the first and the last, at unit mean square. The last layer starts at zero: so does V.
    """

    def init(key: Array, cond: Tree) -> Tree:
        sizes = [int(np.prod(shape)) + sum(pooled(leaf).shape[1] for leaf in jax.tree.leaves(cond))] + [width] * layers
        hidden = [{"w": jax.random.normal(k, (a, b)) * np.sqrt(2 / a), "b": jnp.zeros(b), "gain": jnp.ones((num_steps, b))}
                  for k, a, b in zip(jax.random.split(key, layers), sizes[:-1], sizes[1:], strict=True)]  # fmt: skip
        return {"hidden": hidden, "out": {"w": jnp.zeros(width), "b": jnp.zeros(())}}

    def apply(params: Tree, x: Array, i: Array, cond: Tree) -> Array:
        h = jnp.concatenate([x.reshape(len(x), -1), *(pooled(leaf) for leaf in jax.tree.leaves(cond))], -1)
        for layer in params["hidden"]:
            h = jax.nn.relu(layer["gain"][i] * (h @ layer["w"] + layer["b"]))
        return h @ params["out"]["w"] + params["out"]["b"]

    return Own(init, apply, learning_rate)


def pooled(leaf: Array) -> Array:
    """An array [N, ..., d] as features [N, d]."""
    value = jnp.asarray(leaf, jnp.float32)
    value = value[:, None] if value.ndim == 1 else value.mean(tuple(range(1, value.ndim - 1)))
    return value * jax.lax.rsqrt(jnp.square(value).mean(-1, keepdims=True) + 1e-6)
