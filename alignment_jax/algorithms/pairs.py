"""From rewards to preference pairs: which samples of a prompt are compared, and what is said of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .advantages import finite

Array = jax.Array
KINDS = ("best_worst", "all", "random")


class Pairs(NamedTuple):
    """M pairs: rows of the winners and losers [M], preference p(winner is better) [M], counts [M] (0: cannot be judged)."""

    winner: Array
    loser: Array
    preference: Array
    counts: Array


def check(kind: str, group: int, temperature: float, sure: float, tie: float) -> None:
    """Raises ValueError for settings with which `choose` cannot work."""
    if kind not in KINDS:
        raise ValueError(f"pairs {kind!r} is not known; choose one of {', '.join(KINDS)}")
    if group < 2:
        raise ValueError(f"pairs compare the samples of a prompt: batch.group must be 2 or more; got {group}")
    if temperature <= 0 or not 0.5 <= sure <= 1 or tie < 0:
        raise ValueError("temperature must be above 0, sure in [.5, 1] and tie not below 0; "
                         f"got temperature={temperature}, sure={sure}, tie={tie}")  # fmt: skip


def choose(key: Array, rewards: Array, group: int, *, kind: str = "best_worst", temperature: float = 1.0, sure: float = 0.5,
           tie: float = 0.0, drawn: bool = False) -> Pairs:  # fmt: skip
    """Pairs within groups of neighbours of rewards [B]: the best against the worst, all, or two at random.

    p = sigma((r_w - r_l) / temperature) (Bradley-Terry). drawn: one answer of an annotator with this law, so that the worse one
    may win; else p, taken for 1 where it is above `sure` (.5: hard labels, 1: soft ones). Rewards that differ by no more than
    `tie` are a tie, 1/2. Pairs with a reward that is not finite count nowhere.
    """
    r = finite(rewards).reshape(-1, group)
    n = len(r)
    if kind == "best_worst":
        a = jnp.argmax(jnp.where(jnp.isnan(r), -jnp.inf, r), 1)[:, None]
        b = jnp.argmin(jnp.where(jnp.isnan(r), jnp.inf, r), 1)[:, None]
    elif kind == "all":
        a, b = (jnp.broadcast_to(jnp.asarray(side), (n, len(side))) for side in np.triu_indices(group, 1))
    else:
        order = jax.vmap(lambda k: jax.random.permutation(k, group))(jax.random.split(jax.random.fold_in(key, 0), n))
        a, b = order[:, :1], order[:, 1:2]
    a, b = ((side + group * jnp.arange(n)[:, None]).reshape(-1) for side in (a, b))
    r = r.reshape(-1)
    gap = r[a] - r[b]
    counts = jnp.isfinite(gap) & (a != b)
    gap = jnp.where(counts, gap, 0.0)
    p = jax.nn.sigmoid(gap / temperature)
    if drawn:
        p = (jax.random.uniform(jax.random.fold_in(key, 1), p.shape) < p).astype(jnp.float32)
    p = jnp.where(jnp.abs(gap) <= tie, 0.5, p)
    first = p >= 0.5
    p = jnp.maximum(p, 1 - p)
    return Pairs(jnp.where(first, a, b), jnp.where(first, b, a), jnp.where(p > sure, 1.0, p), counts.astype(jnp.float32))


def shares(counts: Array) -> Array:
    """Weights [N] of items that count (1) or do not (0), so that their mean over all is the mean over those that do."""
    return counts * len(counts) / jnp.maximum(counts.sum(), 1.0)
