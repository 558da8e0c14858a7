"""Weighted likelihood: the denoising loss of own samples, weighed by their rewards.

RWR (reward-weighted regression, the baseline of DDPO, arXiv 2305.13301) and Lee et al. (arXiv 2302.12192); RAFT has a file of
its own. Departures: rounds are as long as `refresh` says, of fresh samples each step; the loss is min-SNR weighted unless
snr_gamma is None, which leaves its optimum where it is.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, draw
from .advantages import finite
from .base import Algorithm, Info, Needs, Networks, Tree
from .losses import denoise_error, noised

Array = jax.Array
Weigh = Callable[[Array], tuple[Array, Array, Info]]


def weighted_likelihood(sampler: Sampler, shape: tuple[int, ...], weigh: Weigh, copies: dict[str, object], source: str,
                        draws: int, snr_gamma: float | None) -> Algorithm:  # fmt: skip
    """L = w |eps - eps_theta|^2 at re-noised samples of the network `source`; weigh(rewards [B]) -> (rows [N], weights [N], info)."""

    def rollout(keys: Array, extra: Tree, networks: Networks, data: Tree) -> Tree:
        x0, _ = draw(keys, networks[source], data["cond"], sampler, shape)
        return {**data, "x0": x0}

    def prepare(key: Array, extra: Tree, rollout: Tree, rewards: Array) -> tuple[Tree, Tree, Info]:
        rows, weights, info = weigh(finite(rewards))
        items = {"x0": rollout["x0"][rows], "row": rows, "weight": weights}
        return jax.tree.map(lambda x: jnp.repeat(x, draws, 0), items), extra, info

    def loss(keys: Array, networks: Networks, items: Tree) -> tuple[Array, Info]:
        x_t, t, eps = noised(keys, items["x0"], sampler.schedule)
        output = networks["unguided"](x_t, t, items["cond"])  # guidance is for sampling; the regression is the network's own
        error = denoise_error(output, x_t, t, items["x0"], eps, schedule=sampler.schedule,
                              prediction=sampler.prediction, snr_gamma=snr_gamma)  # fmt: skip
        return items["weight"] * error, {"denoising_error": error}

    return Algorithm(Needs("prompts", "value", copies), loss, rollout=rollout, prepare=prepare)


def best(rewards: Array, size: int, top: int) -> tuple[Array, Array]:
    """(rows [P top], 1 or 0) of the `top` best of each set of `size` neighbours; 0: nothing there could be scored."""
    r = rewards.reshape(-1, size)
    order = jnp.argsort(jnp.where(jnp.isnan(r), jnp.inf, -r), axis=1)[:, :top]
    rows = (order + size * jnp.arange(len(r))[:, None]).reshape(-1)
    return rows, jnp.isfinite(rewards[rows]).astype(jnp.float32)


def rwr(sampler: Sampler, shape: tuple[int, ...], *, group: int = 1, lam: float = 0.2, percentile: float | None = None,
        per_prompt: bool = False, refresh: int = 100, draws: int = 1, snr_gamma: float | None = 5.0) -> Algorithm:  # fmt: skip
    """RWR: w = N exp(lam r) / sum exp(lam r) over the batch, or over a prompt's group with per_prompt; its mean is 1.

    The minimiser is the tilt p_old exp(lam r). old: the policy that samples, renewed every `refresh` updates (the paper's
    rounds): n rounds tilt by n lam; 0: never, and p_ref exp(lam r) is the end. lam multiplies r: 0.2, which the official code
    calls a temperature. percentile (RWR-sparse, the paper's 90): w = 1 for the samples above it, which alone are kept;
    per prompt this is RAFT. Raises ValueError for what does not go together.
    """
    if per_prompt and group < 2:
        raise ValueError(f"per_prompt compares the samples of a prompt: batch.group must be 2 or more; got {group}")
    if percentile is not None and not 0 < percentile < 100:
        raise ValueError(f"percentile is what a kept reward must exceed, in (0, 100); got {percentile}")
    if refresh < 0:
        raise ValueError(f"refresh is a number of updates, or 0 for samples of the reference only; got {refresh}")

    def weigh(r: Array) -> tuple[Array, Array, Info]:
        size = group if per_prompt else len(r)
        if percentile is not None:
            rows, weights = best(r, size, max(1, round(size * (1 - percentile / 100))))
            return rows, weights, {"reward/best": jnp.nanmean(r[rows])}
        scored, scaled = jnp.isfinite(r).reshape(-1, size), lam * jnp.nan_to_num(r).reshape(-1, size)
        top = jnp.where(scored, scaled, -jnp.inf).max(1, keepdims=True)
        w = jnp.where(scored, jnp.exp(scaled - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
        w = (w * scored.sum(1, keepdims=True) / jnp.maximum(w.sum(1, keepdims=True), 1e-30)).reshape(-1)
        return jnp.arange(len(r)), w, {"weight/effective": effective(w)}

    old = ("every", refresh) if refresh else "frozen"
    return weighted_likelihood(sampler, shape, weigh, {"old": old}, "old", draws, snr_gamma)


def lee(sampler: Sampler, shape: tuple[int, ...], *, beta: float = 1.0, low: float = 0.0, high: float = 1.0, draws: int = 1,
        snr_gamma: float | None = 5.0) -> Algorithm:  # fmt: skip
    """Reward-weighted denoising beside the pre-training loss: L = (r + beta) |eps - eps_theta|^2, r in [0, 1].

    The samples are the reference's own, always, and the pre-training loss is taken on them too: the paper's is on the base
    model's training pictures, another stream. The minimiser is p_ref (r + beta). Rewards are mapped from [low, high] to
    [0, 1] and clipped: a negative weight has no minimum. A sample that could not be scored keeps the weight beta.
    """
    if beta < 0 or high <= low:
        raise ValueError(f"beta must be 0 or more and low below high; got beta={beta}, low={low}, high={high}")

    def weigh(r: Array) -> tuple[Array, Array, Info]:
        share = (r - low) / (high - low)
        w = jnp.where(jnp.isfinite(r), jnp.clip(share, 0.0, 1.0), 0.0) + beta
        outside = jnp.nanmean(jnp.where(jnp.isfinite(r), (share < 0) | (share > 1), jnp.nan))
        return jnp.arange(len(r)), w, {"weight/effective": effective(w), "reward/outside": jnp.nan_to_num(outside)}

    return weighted_likelihood(sampler, shape, weigh, {"reference": "frozen"}, "reference", draws, snr_gamma)


def effective(w: Array) -> Array:
    """(sum w)^2 / (N sum w^2): the effective share of the samples."""
    return jnp.square(w.sum()) / jnp.maximum(len(w) * jnp.square(w).sum(), 1e-30)
