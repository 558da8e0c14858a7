"""ReNO: the first noise climbs the reward, kept at the length that noise has (arXiv 2406.04312)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from ..diffusion import Sampler, fold_in, normal
from .base import Info, Method, Needs, Networks, Tree, climb, walk

Array = jax.Array


def reno(sampler: Sampler, shape: tuple[int, ...], *, iterations: int = 50, learning_rate: float = 5.0, clip: float = 0.1,
         momentum: float = 0.9, alpha: float = 0.01) -> Method:  # fmt: skip
    """Gradient ascent on r(x0(z)) + alpha K(z), K = (D - 1) log|z| - |z|^2 / 2: the log-density of a Gaussian's length.

    x_T = z; K is largest on the shell |z| = sqrt(D - 1). Nesterov's momentum, the gradient of each sample clipped to the norm `clip`:
    far from an optimum a step is about learning_rate clip / (1 - momentum) long. The paper: one-step models, 50 iterations, rate 5
    (HyperSDXL 10), weighted sums of rewards (a reward of several parts here). Longer chains work too: each iteration costs T
    network calls with their backward, and one more walk at the end. Noises of a stochastic sampler stay as they are drawn.
    The best iterate by reward is returned, the start among them. info: reward, gain, iteration, norm (|z| / sqrt(D - 1)).
    Raises ValueError for negative settings, and where a sample is a single number.
    """
    size = math.prod(shape)
    if iterations < 0 or min(learning_rate, momentum, alpha) < 0 or clip <= 0 or momentum >= 1:
        raise ValueError("reno needs iterations, learning_rate, alpha >= 0, clip > 0 and momentum in [0, 1); got "
                         f"{iterations}, {learning_rate}, {alpha}, {clip} and {momentum}")  # fmt: skip
    if size < 2:
        raise ValueError(f"reno keeps the length of the noise, and noise of shape {list(shape)} is one number")
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(learning_rate, momentum or None, nesterov=True))

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        z = normal(fold_in(keys, 0), (len(keys), *shape))
        augmented = fold_in(keys, 2)

        def value(i: Array | int, z: Array) -> tuple[Array, tuple[Array, Info]]:
            x0 = walk(fold_in(keys, 1), networks["policy"], data["cond"], sampler, sampler.initial_scale * z)
            reward = networks["augmented"](fold_in(augmented, i), x0, data["condition"])
            square = jnp.square(z).reshape(len(z), -1).sum(1)
            shell = 0.5 * (size - 1) * jnp.log(square) - 0.5 * square
            seen = jax.lax.stop_gradient(x0)
            info = {"reward": networks["reward"](keys, seen, data["condition"]), "norm": jnp.sqrt(square / (size - 1))}
            return reward + alpha * shell, (x0, info)

        return climb(value, z, optimizer, iterations)

    return Method(Needs("gradient"), draw)
