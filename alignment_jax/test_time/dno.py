"""DNO: all noises of a chain climb the reward, as long as they still look like noise (arXiv 2405.18881)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from ..diffusion import Sampler, Transition, expand, fold_in, gaussian_noise, normal
from .base import Info, Method, Needs, Networks, Tree, climb, walk

Array = jax.Array


def dno(sampler: Sampler, shape: tuple[int, ...], *, iterations: int = 100, learning_rate: float = 0.01, clip: float = 1.0,
        weight_decay: float = 0.01, alpha: float = 1.0, block: int = 4, permutations: int = 100) -> Method:  # fmt: skip
    """Gradient ascent on r(x0(z)) + alpha log P(z), z = (x_T, the noise of every step), or x_T alone without step noise.

    log P: see `log_probability`; 0 where z passes for noise. AdamW, each sample's gradient clipped to the norm `clip`; its decay is
    torch's default. An iteration costs T network calls with their backward; one more walk comes at the end. Each of its `permutations`
    sorts all of z: little beside a large network, but on CPU and with small ones take 4. The paper: 50 steps, eta 1, guidance 5, 100
    iterations; its estimates of the gradient for rewards without one are left out. Departure: the best iterate by
    reward is returned, the start among them. info: reward, gain, iteration, log_p (log P(z)).
    Raises ValueError for negative settings and for a block that does not fit.
    """
    noises = 1 if sampler.deterministic else 1 + sampler.num_steps
    size = noises * math.prod(shape)
    if iterations < 0 or min(learning_rate, weight_decay, alpha) < 0 or clip <= 0:
        raise ValueError("dno needs iterations, learning_rate, weight_decay, alpha >= 0 and clip > 0; got "
                         f"{iterations}, {learning_rate}, {weight_decay}, {alpha} and {clip}")  # fmt: skip
    if not 1 <= block <= size or permutations < 0:
        raise ValueError(f"block must lie in 1..{size}, the numbers in the noise, and permutations be at least 0; "
                         f"got {block} and {permutations}")  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(learning_rate, weight_decay=weight_decay))

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        steps, fresh = fold_in(keys, 1), (len(keys), *shape)
        drawn = [normal(fold_in(keys, 0), fresh)] + [normal(fold_in(steps, 2 * i), fresh) for i in range(noises - 1)]
        of_reward, of_order = fold_in(keys, 2), fold_in(keys, 3)

        def value(i: Array | int, z: Array) -> tuple[Array, tuple[Array, Info]]:
            def noise(key: Array, j: Array, step: Transition) -> Array:
                return step.mean + expand(step.std, step.mean) * z[:, 1 + j]

            x0 = walk(steps, networks["policy"], data["cond"], sampler, sampler.initial_scale * z[:, 0],
                      noise=gaussian_noise if noises == 1 else noise)  # fmt: skip
            reward = networks["augmented"](fold_in(of_reward, i), x0, data["condition"])
            log_p = log_probability(fold_in(of_order, i), z.reshape(len(z), -1), block, permutations)
            seen = jax.lax.stop_gradient(x0)
            return reward + alpha * log_p, (x0, {"reward": networks["reward"](keys, seen, data["condition"]), "log_p": log_p})

        return climb(value, jnp.stack(drawn, 1), optimizer, iterations)

    return Method(Needs("gradient"), draw)


def log_probability(keys: Array, z: Array, block: int, permutations: int) -> Array:
    """log P(z) [B] of vectors z [B, D]: the mean over z and random permutations of it of log p1 + log p2, each at most 0.

    Cut into n blocks z_i of k numbers, Gaussian z has mean and covariance (1/n) sum z_i z_i^T near 0 and I:
      p1 = min(2 exp(-n |mean|^2 / 2k), 1),  p2 = min(2 exp(-n max(sqrt(1 + |cov - I|_2) - 1 - sqrt(k / n), 0)^2 / 2), 1).
    """

    @jax.checkpoint
    def one(total: Array, j: Array) -> tuple[Array, None]:
        order = jnp.argsort(jax.vmap(lambda key: jax.random.bits(key, z.shape[1:]))(fold_in(keys, j)), axis=1)
        return total + likely(jnp.take_along_axis(z, order, 1), block), None

    total, _ = jax.lax.scan(one, likely(z, block), jnp.arange(permutations))
    return total / (1 + permutations)


def likely(z: Array, k: int) -> Array:
    """log p1 + log p2 [B] of z [B, D] in the order it has; numbers that fill no block are left out."""
    n = z.shape[1] // k
    blocks = z[:, : n * k].reshape(len(z), n, k)
    log_p1 = jnp.log(2.0) - n * jnp.square(blocks.mean(1)).sum(-1) / (2 * k)
    excess = jnp.einsum("bni,bnj->bij", blocks, blocks, precision="highest") / n - jnp.eye(k)
    # the gradient of an eigenvalue v^T A v needs that of A alone; eigenvectors' own is infinite where two are equal
    _, v = jnp.linalg.eigh(jax.lax.stop_gradient(excess))
    norm = jnp.abs(jnp.einsum("bij,bil,blj->bj", v, excess, v, precision="highest")).max(-1)
    log_p2 = jnp.log(2.0) - 0.5 * n * jnp.square(jnp.maximum(jnp.sqrt(1 + norm) - 1 - (k / n) ** 0.5, 0.0))
    return jnp.minimum(log_p1, 0.0) + jnp.minimum(log_p2, 0.0)
