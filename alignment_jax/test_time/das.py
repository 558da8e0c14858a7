"""DAS: sequential Monte Carlo whose particles move along the reward's gradient and are weighted for having done so."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, expand, fold_in, gaussian_noise, normal, transition
from . import resampling
from .base import Info, Method, Needs, Networks, Tree, ascent, clean, grouped, repeat, spread, start

Array = jax.Array


def das(sampler: Sampler, shape: tuple[int, ...], *, particles: int = 4, alpha: float = 0.1, strength: float = 1.0, ess: float = 0.5,
        resampler: str = "ssp", tempering: str = "adaptive", gamma: float | None = None, choose: str = "draw") -> Method:  # fmt: skip
    """Tempered sequential Monte Carlo with a guided proposal, towards p(x0) exp(r(x0) / alpha) (DAS, arXiv 2501.05803).

    psi_k = exp(lam_k r(x0_hat(x_k)) / alpha), proposal q = N(mu + s^2 lam_k grad_x r(x0_hat(x)) / alpha, s^2), weights
    w <- w (p / q) psi_k / psi_{k+1}, the densities summed over entries; at the end psi_0 = exp(r(x0) / alpha). Resampled when the
    effective sample size is below `ess` n. Costs n T network calls with their backward, and as many of the reward.

    strength: of the proposal's gradient; the weights make up for any, at 0 this is Feynman-Kac steering (`fk`, diff) without gradients.
    tempering, gamma: lam_k, see `resampling.tempering`. choose: "draw" one particle by its weight, or the "best" by its reward.
    Departures: all that a particle carries follows its ancestors; lam_k where the paper's proposal has lam_{k-1}; the reward's random
    augmentation, if any, is the same for a prompt's particles at a step. info: reward, log_z (log E exp(r / alpha)), ess.
    """
    ancestors = resampling.check(particles, alpha, ess, resampler, choose)
    if strength < 0:
        raise ValueError(f"strength must be 0 or more; got {strength}")
    temper = resampling.tempering(tempering, sampler.num_steps, sampler.num_steps, gamma=gamma)
    steer = partial(population, sampler=sampler, shape=shape, n=particles, alpha=alpha, strength=strength, threshold=ess,
                    ancestors=ancestors, temper=temper)  # fmt: skip

    def draw(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        return resampling.choose(fold_in(keys, 2), *steer(keys, networks, data), choose)

    return Method(Needs("gradient", noise=True), draw)


def population(keys: Array, networks: Networks, data: Tree, *, sampler: Sampler, shape: tuple[int, ...], n: int, alpha: float,
               strength: float, threshold: float, ancestors: resampling.Resampler,
               temper: resampling.Temper) -> tuple[Array, Array, Array]:  # fmt: skip
    """All particles (x0 [B n, ...], reward [B, n], log_w [B, n]) of prompts keys [B]."""
    batch = len(keys)
    cond, condition = repeat(data["cond"], n), repeat(data["condition"], n)
    x, keys = start(spread(keys, n), sampler, shape)

    def step(state: Tree, i: Array) -> tuple[Tree, None]:
        x, previous, weights = state
        own = fold_in(keys[::n], 2 * i + 1)

        def value(x: Array) -> tuple[Array, Array]:
            x0, output = clean(sampler, i, networks["policy"], x, cond)
            return networks["augmented"](repeat(own, n), x0, condition) / alpha, output

        if strength:
            promise, pull, output = ascent(value, x)
        else:
            (promise, output), pull = value(x), jnp.zeros_like(x)
        weights, _ = resampling.reweigh(weights, i, grouped(resampling.possible(promise, 1.0), n), temper)
        carried = (x, previous, output, pull, weights.log_g.reshape(-1))
        log_w, (x, previous, output, pull, log_g) = resampling.resample(own, weights.log_w, carried, ancestors, threshold)
        move = transition(sampler, i, x, output, previous=previous)
        x = gaussian_noise(fold_in(keys, 2 * i), i, move)
        if strength:
            pull = strength * expand(jnp.repeat(weights.lam, n), pull) * pull
            std = expand(move.std, x)
            log_q = (std * pull * normal(fold_in(keys, 2 * i), x.shape) + jnp.square(std * pull) / 2).sum(range(1, x.ndim))
            x, log_w = x + jnp.square(std) * pull, log_w - grouped(log_q, n)
        return (x, move.x0, resampling.Weights(log_w, log_g.reshape(batch, n), weights.lam)), None

    begin = (x, x, resampling.equal(batch, n))
    (x, _, weights), _ = jax.lax.scan(step, begin, jnp.arange(sampler.num_steps))
    reward = grouped(networks["reward"](fold_in(keys, 2 * sampler.num_steps + 1), x, condition), n)
    return x, reward, resampling.final(weights, resampling.possible(reward, alpha))
