"""RankDPO: ranked lists of pictures, every pair of a list weighed by what its order is worth (arXiv 2410.18013)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler
from .base import Algorithm, Info, Needs, Networks, Tree, mean_square
from .dpo import PLAIN, accuracy, check, residual
from .losses import logistic, noised

Array = jax.Array


def win_rate(score: Array) -> Array:
    """psi [B, K]: the share of the other pictures that one beats, ties half, mean over the M rewards of score [B, K, M].

    A score that is not a number is no comparison; psi is NaN for a picture without any.
    """
    a, b = score[:, :, None], score[:, None]
    other = jnp.isfinite(a) & jnp.isfinite(b) & ~jnp.eye(score.shape[1], dtype=bool)[None, :, :, None]
    won = jnp.where(other, jnp.where(a == b, 0.5, (a > b).astype(jnp.float32)), 0.0).sum(2)
    count = other.sum(2)
    return jnp.nanmean(jnp.where(count > 0, won / jnp.maximum(count, 1), jnp.nan), -1)


def worth(psi: Array) -> Array:
    """Delta [B, K, K] where i beats j, else 0: |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)|, G = 2^psi - 1, D(tau) = log(1 + tau).

    tau: the rank from 1 by psi; equal ones share their mean rank, so that the order in the list does not count.
    """
    a, b = psi[:, :, None], psi[:, None]
    eye = jnp.eye(psi.shape[1], dtype=bool)
    rank = 1 + (b > a).sum(2) + 0.5 * ((a == b) & ~eye).sum(2)
    discount = 1 / jnp.log1p(rank)
    gain = jnp.abs(2**a - 2**b) * jnp.abs(discount[:, :, None] - discount[:, None])
    return jnp.where(a > b, gain, 0.0)


def rank_dpo(sampler: Sampler, *, beta: float = 2500.0, weight_space: str = "native") -> Algorithm:
    """L = sum_{i beats j} Delta_ij softplus(beta (s_i - s_j)), s = m_theta - m_ref, m = mean |output - target|^2.

    Data: lists of K pictures and their scores [K], or [K, M] of M rewards; only the order of scores counts (`win_rate`,
    `worth`). beta has no 1/2: 2500 is Diffusion-DPO's 5000, whose loss times Delta = .532 this is at K = 2. Lists of equals
    have loss 0. Departure: the paper gives each picture its own noise; here a list shares (t, eps), as a pair does in
    Diffusion-DPO, where independent noise moves the optimum.
    """
    check(beta, weight_space)

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: None) -> tuple[Tree, Tree, Info]:
        score = rollout["score"].astype(jnp.float32)
        delta = worth(win_rate(score if score.ndim == 3 else score[:, :, None]))
        items = {k: v for k, v in rollout.items() if k != "score"}
        return {**items, "worth": delta}, extra, {"ranked": (delta > 0).any((1, 2)).mean()}

    def errors(name: str, keys: Array, networks: Networks, items: Tree) -> Array:
        pictures = [items["list"][:, k] for k in range(items["list"].shape[1])]
        return jnp.stack([mean_square(residual(networks[name], *noised(keys, x0, sampler.schedule), x0, items["cond"], sampler,
                                               weight_space)) for x0 in pictures], 1)  # fmt: skip

    def anchor(keys: Array, networks: Networks, items: Tree) -> Tree:
        return {**items, "reference_error": errors("reference", keys, networks, items)}

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        s, delta = errors("policy", keys, networks, items) - items["reference_error"], items["worth"]
        u = -beta * (s[:, :, None] - s[:, None])
        pair = (delta > 0).astype(jnp.float32)
        count = jnp.maximum(pair.sum((1, 2)), 1.0)
        right = jnp.where(pair.any((1, 2)), (pair * accuracy(u)).sum((1, 2)) / count, 0.5)
        drifts = [jnp.take_along_axis(s, jnp.argmax(wins, 1)[:, None], 1)[:, 0] for wins in (pair.sum(2), pair.sum(1))]
        return (delta * logistic(u)).sum((1, 2)), {"implicit_accuracy": right, "margin": (pair * u).sum((1, 2)) / count,
                                                   "winner_drift": drifts[0], "loser_drift": drifts[1]}  # fmt: skip

    return Algorithm(Needs("lists", copies={"reference": "frozen"}, guidance=PLAIN), loss, prepare=prepare, anchor=anchor)
