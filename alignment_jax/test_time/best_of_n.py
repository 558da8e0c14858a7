"""Best-of-n: draw n samples of a prompt and keep the one the reward likes most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..diffusion import Denoise, Sampler, fold_in, initial, sample

Array = jax.Array


def best_of_n(key: Array, denoise: Denoise, cond: Any, sampler: Sampler, shape: tuple[int, ...],
              reward: Callable[[Array, Any], Array], condition: Any, *, n: int) -> tuple[Array, Array]:  # fmt: skip
    """(x0 [B,...], reward [B]) of the best of n samples for each of the B conditions.

    KL from the base: log n - (n - 1) / n (arXiv 2112.00861, appendix). Costs n T network calls and n reward calls a sample.
    cond, condition: trees with leading axis B. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    b = jax.tree.leaves(cond)[0].shape[0]
    keys = jax.random.split(key, b * n)
    repeat = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), tree)  # noqa: E731
    x_T = initial(fold_in(keys, 1 << 20), sampler, (b * n, *shape))
    x0, _ = sample(keys, denoise, repeat(cond), sampler, x_T)
    scores = reward(x0, repeat(condition)).reshape(b, n)
    return pick(x0.reshape(b, n, *shape), scores)


def pick(samples: Array, scores: Array) -> tuple[Array, Array]:
    """The best of samples [B, n, ...] by scores [B, n], NaN counted as worst: ([B, ...], [B])."""
    best = jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores), axis=1)
    take = lambda x: jax.vmap(lambda row, i: row[i])(x, best)  # noqa: E731
    return take(samples), take(scores)
