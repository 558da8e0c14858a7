"""Zero-order search: from one noise to a better one near it, again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, fold_in, initial, sample
from .base import Info, Method, Needs, Networks, Tree, grouped, known, repeat, spread, start, take

Array = jax.Array


def zero_order(sampler: Sampler, shape: tuple[int, ...], *, iterations: int = 4, n: int = 4, strength: float = 0.33) -> Method:
    """Hill climbing on x_T (arXiv 2501.09732): of a pivot z and n noises near it, the best sample's is the next pivot.

    z_j = (z + s u_j) / sqrt(1 + s^2), u_j ~ N(0, I) and s = strength: as likely a noise as z, at cosine 1 / sqrt(1 + s^2), .95
    for .33 (the paper names no distance). The pivot is among its candidates, so s = 0 changes nothing and the reward never
    falls; at s -> infinity this is best-of-n with 1 + n iterations samples. Needs a sampler without noise: a chain with noise of
    its own forgets x_T. Costs (1 + n iterations) T network calls and 1 + n iterations reward calls.
    Raises ValueError for iterations < 0, n < 1 and a negative strength.
    """
    if iterations < 0 or n < 1 or not strength >= 0:
        raise ValueError(f"zero_order needs iterations >= 0, n >= 1 and strength >= 0; got {iterations}, {n} and {strength}")

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        def scored(z: Array, steps: Array, keys: Array, count: int) -> tuple[Array, Array]:
            cond, condition = repeat(data["cond"], count), repeat(data["condition"], count)
            x0, _ = sample(steps, networks["policy"], cond, sampler, z)
            return x0, known(networks["reward"](keys, x0, condition))

        def iteration(best: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
            z, *_ = best
            slots = fold_in(spread(keys, n), (1 << 20) + i)
            near = (repeat(z, n) + strength * initial(slots, sampler, (len(slots), *shape))) / jnp.sqrt(1 + strength**2)
            found = scored(near, repeat(steps, n), fold_in(slots, 1), n)
            # the pivot comes first, and wins where nothing is better
            all_ = tuple(jnp.concatenate([old[:, None], grouped(new, n)], 1) for old, new in zip(best, (near, *found), strict=True))
            return take(all_, jnp.argmax(all_[2], axis=1)), None

        z, steps = start(keys, sampler, shape)
        first = scored(z, steps, fold_in(keys, 2), 1)
        (_, x0, reward), _ = jax.lax.scan(iteration, (z, *first), jnp.arange(iterations))
        return x0, {"reward": reward, "gain": reward - first[1]}

    return Method(Needs("value", still=True), draw)
