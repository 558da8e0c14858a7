"""Feynman-Kac steering: particles that are resampled by what their clean predictions promise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Sampler, fold_in, gaussian_noise, transition
from . import resampling
from .base import Info, Method, Needs, Networks, Tree, clean, grouped, repeat, spread, start

Array = jax.Array
POTENTIALS = ("max", "diff", "sum")


def fk(sampler: Sampler, shape: tuple[int, ...], *, particles: int = 4, alpha: float = 0.1, potential: str = "diff",
       every: int | None = None, window: Sequence[float] = (0.2, 0.8), ess: float = 1.0, resampler: str = "systematic",
       tempering: str = "adaptive", gamma: float | None = None, choose: str = "draw") -> Method:  # fmt: skip
    """Feynman-Kac steering towards p(x0) exp(r(x0) / alpha), without gradients (arXiv 2501.06848).

    With r_k = r(x0_hat(x_k)) at the steps k where it is asked, G_k = exp((r_k - r_before) / alpha) (diff),
    exp(max_{j <= k} r_j / alpha) (max), exp(sum_{j <= k} r_j / alpha) (sum); at the end G_0 = exp(r(x0) / alpha) / prod_k G_k, so
    that all three have the same target. Costs n T network calls and n reward calls at each of these steps and at the end.

    Args:
      every, window: the potentials act on every `every`-th step (None: a fifth of the chain) of this part of the chain; the
        defaults are the paper's 20, 40, 60, 80 of 100.
      ess: resampled when the effective sample size is below this share of the particles; 1: always, as in the paper.
      tempering, gamma: how much of r counts on the way; see `resampling.tempering`.
      choose: "draw" one particle by its weight, or take the "best" by its reward as in the paper's tables.
    Departures: log-weights, kept where nothing is resampled; the maximum starts at -inf, not at 0; at the end potentials of max and sum
    are taken out too; particles are resampled before a step's noise, not after. info: reward, log_z (log E exp(r / alpha)), ess.
    """
    ancestors = resampling.check(particles, alpha, ess, resampler, choose)
    if potential not in POTENTIALS:
        raise ValueError(f"potential {potential!r} is not known; choose one of {', '.join(POTENTIALS)}")
    if every is not None and every < 1:
        raise ValueError(f"every, the steps between potentials, must be at least 1; got {every}")
    if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
        raise ValueError(f"window must be two shares of the chain, 0 <= first <= last <= 1; got {window}")
    steps = sampler.num_steps
    first, last = (round(share * steps) for share in window)
    acts = np.isin(np.arange(steps), np.arange(first, last + 1, every or max(1, steps // 5)))
    temper = resampling.tempering(tempering, steps, int(acts.sum()), gamma=gamma)
    steer = partial(population, sampler=sampler, shape=shape, n=particles, alpha=alpha, potential=potential, acts=acts,
                    threshold=ess, ancestors=ancestors, temper=temper)  # fmt: skip

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        return resampling.choose(fold_in(keys, 2), *steer(keys, networks, data), choose)

    return Method(Needs("value", noise=True), draw)


def population(keys: Array, networks: Networks, data: Tree, *, sampler: Sampler, shape: tuple[int, ...], n: int, alpha: float,
               potential: str, acts: np.ndarray, threshold: float, ancestors: resampling.Resampler,
               temper: resampling.Temper) -> tuple[Array, Array, Array]:  # fmt: skip
    """All particles (x0 [B n, ...], reward [B, n], log_w [B, n]) of prompts keys [B]; acts [T]: where the potentials act."""
    batch, policy = len(keys), networks["policy"]
    cond, condition = repeat(data["cond"], n), repeat(data["condition"], n)
    x, keys = start(spread(keys, n), sampler, shape)

    def values(i: Array | int, x0: Array) -> tuple[Array, Array]:
        reward = grouped(networks["reward"](fold_in(keys, 2 * i + 1), x0, condition), n)
        return reward, resampling.possible(reward, alpha)

    def steer(i: Array, x0: Array, tree: Tree, weights: resampling.Weights, seen: Array) -> Any:
        value = values(i, x0)[1]
        level = {"diff": value, "max": jnp.maximum(seen, value), "sum": seen + value}[potential]
        weights, used = resampling.reweigh(weights, i, level, temper, replaces=potential == "diff")
        seen = jnp.where(used[:, None], level, seen)
        carried = (tree, weights.log_g.reshape(-1), seen.reshape(-1))
        log_w, (tree, log_g, seen) = resampling.resample(fold_in(keys[::n], 2 * i + 1), weights.log_w, carried, ancestors, threshold)
        return tree, weights._replace(log_w=log_w, log_g=log_g.reshape(batch, n)), seen.reshape(batch, n)

    def step(state: Tree, i: Array) -> tuple[Tree, None]:
        x, previous, weights, seen = state
        x0, output = clean(sampler, i, policy, x, cond)
        (x, previous, output), weights, seen = jax.lax.cond(
            jnp.asarray(acts)[i], steer, lambda i, x0, *rest: rest, i, x0, (x, previous, output), weights, seen)  # fmt: skip
        move = transition(sampler, i, x, output, previous=previous)
        return (gaussian_noise(fold_in(keys, 2 * i), i, move), move.x0, weights, seen), None

    seen = jnp.full((batch, n), -jnp.inf if potential == "max" else 0.0)
    (x, _, weights, _), _ = jax.lax.scan(step, (x, x, resampling.equal(batch, n), seen), jnp.arange(sampler.num_steps))
    reward, value = values(sampler.num_steps, x)
    return x, reward, resampling.final(weights, value)
