"""The weights of a population of particles: resampling, effective sample size, tempering, evidence; log space and float32 throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .base import Info, Tree, grouped, known, take

Array = jax.Array
Resampler = Callable[[Array, Array], Array]
Temper = Callable[[Array, "Weights", Array, Array], Array]
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
CHOICES = ("draw", "best")
KEPT = 0.08  # the share of particles that adaptive tempering would leave effective over a chain; .95 a step of 50


def normalised(log_w: Array) -> Array:
    """Weights [B, n] that sum to 1; of a population without one possible particle all are equal."""
    return jax.nn.softmax(jnp.where(jnp.isneginf(log_w).all(1, keepdims=True), 0.0, log_w), axis=1)


def log_mean(log_w: Array) -> Array:
    """log (1/n) sum_j w_j [B]: of the final weights, with a resampled population's mean weight kept, the estimate of log Z."""
    return jax.nn.logsumexp(log_w, axis=1) - jnp.log(log_w.shape[1])


def ess(log_w: Array) -> Array:
    """Effective sample size (sum w)^2 / sum w^2 [B], from 1 to n (Kong et al., 1994)."""
    return 1 / jnp.square(normalised(log_w)).sum(1)


def multinomial(keys: Array, log_w: Array) -> Array:
    """Ancestors [B, n], drawn independently of each other (arXiv cs/0507025 compares the first three)."""
    return _invert(_uniform(keys, log_w.shape[1]), normalised(log_w))


def stratified(keys: Array, log_w: Array) -> Array:
    """Ancestors [B, n]: one point in each of n equal parts of [0, 1)."""
    n = log_w.shape[1]
    return _invert((jnp.arange(n) + _uniform(keys, n)) / n, normalised(log_w))


def systematic(keys: Array, log_w: Array) -> Array:
    """Ancestors [B, n]: the same point in each of n equal parts; a particle's offspring is within 1 of n W."""
    n = log_w.shape[1]
    return _invert((jnp.arange(n) + _uniform(keys, 1)) / n, normalised(log_w))


def ssp(keys: Array, log_w: Array) -> Array:
    """Ancestors [B, n] by the Srinivasan sampling process: floor(n W) or one more, whatever the order (arXiv 1708.02867).

    The fractions of n W meet two by two: one of them becomes 0 or 1, the other keeps the rest, with the odds that leave both
    expectations as they were.
    """
    n = log_w.shape[1]
    wanted = n * normalised(log_w)
    whole = jnp.floor(wanted)
    rows = jnp.arange(len(log_w))

    def meet(state: tuple[Array, Array, Array], given: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        count, holder, a = state
        j, b, u = given
        over = a + b >= 1
        odds = jnp.where(over, 1 - b, a) / jnp.maximum(jnp.where(over, 2 - a - b, a + b), 1e-30)
        first = u < odds  # the holder is rounded up (over) or takes what both have
        count = count.at[rows, jnp.where(first, holder, j)].add(over.astype(count.dtype))
        return (count, jnp.where(first ^ over, holder, j), jnp.where(over, a + b - 1, a + b)), None

    part = (wanted - whole).T
    state = (whole, jnp.zeros(len(log_w), jnp.int32), part[0])
    given = (jnp.arange(1, n, dtype=jnp.int32), part[1:], _uniform(keys, n)[:, 1:].T)
    (count, holder, _), _ = jax.lax.scan(meet, state, given)
    count = count.at[rows, holder].add(n - count.sum(1))  # what is left is 0 or 1, but for rounding
    edges = jnp.cumsum(count, 1)
    return jax.vmap(lambda e: jnp.searchsorted(e, jnp.arange(n, dtype=e.dtype), side="right"))(edges)


RESAMPLERS: dict[str, Resampler] = {"multinomial": multinomial, "stratified": stratified, "systematic": systematic, "ssp": ssp}


def resample(keys: Array, log_w: Array, tree: Tree, ancestors: Resampler, threshold: float) -> tuple[Array, Tree]:
    """(log_w [B, n], tree of [B n, ...]) with the populations drawn anew whose effective sample size is below threshold n.

    Each then has its population's mean weight; the others keep their weights. `tree`: everything that is carried per particle.
    """
    n = log_w.shape[1]
    need = ess(log_w) < threshold * n
    index = jnp.where(need[:, None], ancestors(keys, log_w), jnp.arange(n))
    log_w = jnp.where(need[:, None], log_mean(log_w)[:, None], log_w)
    return log_w, jax.tree.map(lambda x: take(grouped(x, n), index).reshape(x.shape), tree)


class Weights(NamedTuple):
    """log_w [B, n]; log_g [B, n], the potentials that are in it and that the end takes out again; lam [B], the temperature's share."""

    log_w: Array
    log_g: Array
    lam: Array


def equal(batch: int, n: int) -> Weights:
    """Weights before any potential."""
    return Weights(jnp.zeros((batch, n)), jnp.zeros((batch, n)), jnp.zeros(batch))


def reweigh(weights: Weights, i: Array, level: Array, temper: Temper, *, replaces: bool = True) -> tuple[Weights, Array]:
    """(Weights after the potential lam level [B, n], whether it was used [B]); it replaces the potentials before, or adds to them.

    A particle with level -inf is impossible from then on. A population of none but such tells nothing: its weights stay.
    """
    log_w, log_g, lam = weights
    bare, before = (log_w - log_g, 0.0) if replaces else (log_w, log_g)
    raised = temper(i, weights, bare, level)
    new = scaled(bare, level, raised)
    used = (new > -jnp.inf).any(1)
    log_g_new = jnp.where(new > -jnp.inf, before + raised[:, None] * level, 0.0)
    rows = used[:, None]
    return Weights(jnp.where(rows, new, log_w), jnp.where(rows, log_g_new, log_g), jnp.where(used, raised, lam)), used


def scaled(bare: Array, level: Array, lam: Array) -> Array:
    """bare + lam level [B, n], where level may be -inf and lam [B] 0."""
    return jnp.where(jnp.isneginf(level), -jnp.inf, bare + lam[:, None] * jnp.where(jnp.isneginf(level), 0.0, level))


def final(weights: Weights, value: Array) -> Array:
    """log_w [B, n] once the potentials on the way are replaced by exp(value [B, n]): all of them target p(x0) exp(value)."""
    return jnp.where(jnp.isneginf(value), -jnp.inf, weights.log_w - weights.log_g + value)


def conditional_ess(log_w: Array, new: Array) -> Array:
    """Share (sum W u)^2 / sum W u^2 [B] of a population that stays effective when its weights [B, n] become new = log_w + log u.

    Unlike the effective sample size it does not count what was lost before (arXiv 1303.3123, eq. 7, without its factor n).
    """
    w, new_w = normalised(log_w), normalised(new)
    return 1 / jnp.maximum(jnp.where(w > 0, jnp.square(new_w) / jnp.maximum(w, 1e-30), 0.0).sum(1), 1.0)


def tempering(name: str, num_steps: int, times: int, *, gamma: float | None = None) -> Temper:
    """temper(i, weights, bare [B, n], level [B, n]) -> lam [B], the share of the reward that counts at step i of num_steps.

    none: 1. exp: min((1 + gamma)^i - 1, 1) (DAS, arXiv 2501.05803); gamma None reaches 1 at .87 of the chain, as its 0.008 of
    100 steps does. adaptive: the largest lam up to 1, never less than before, that keeps the conditional effective sample size at
    KEPT^(1 / times) at each of the `times` that it is asked; found by bisection. The end always counts in full.
    Measured on Gaussians (50 steps): against none, adaptive takes most of the error off a concave reward with a small alpha,
    whose plug-in value is too sharp early, and leaves milder ones alone; exp costs a linear reward much of its gain.
    Raises ValueError for an unknown name, or a gamma that never reaches 1.
    """
    if name == "none":
        return lambda i, weights, bare, level: jnp.ones_like(weights.lam)
    if name == "exp":
        gamma = 2 ** (1 / (0.87 * num_steps)) - 1 if gamma is None else gamma
        if (1 + gamma) ** num_steps < 2:
            raise ValueError(f"gamma={gamma} does not bring the whole reward within {num_steps} steps; it must be at least "
                             f"{2 ** (1 / num_steps) - 1:.4f}, or None")  # fmt: skip
        return lambda i, weights, bare, level: jnp.broadcast_to(jnp.minimum((1 + gamma) ** i - 1.0, 1.0), weights.lam.shape)
    if name != "adaptive":
        raise ValueError(f"tempering {name!r} is not known; choose one of none, exp, adaptive")
    keep = KEPT ** (1 / max(times, 1))

    def adaptive(i: Array, weights: Weights, bare: Array, level: Array) -> Array:
        def gentle(lam: Array) -> Array:
            return conditional_ess(weights.log_w, scaled(bare, level, lam)) >= keep

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            fine = gentle(middle)
            return jnp.where(fine, middle, ends[0]), jnp.where(fine, ends[1], middle)

        one = jnp.ones_like(weights.lam)
        return jnp.where(gentle(one), one, jax.lax.fori_loop(0, 20, halve, (weights.lam, one))[0])

    return adaptive


def choose(keys: Array, x: Array, reward: Array, log_w: Array, how: str) -> tuple[Array, Info]:
    """One particle of each population: (x [B, ...], info) of x [B n, ...], reward [B, n], final log_w [B, n].

    draw: by the weights, a sample of p(x0) exp(r / alpha) as n grows. best: the highest reward, best-of-n on top of it.
    """
    if how == "draw":
        index = jax.vmap(jax.random.categorical)(keys, log_w)
    else:
        index = jnp.argmax(known(reward), axis=1)
    picked, of_picked = take((grouped(x, log_w.shape[1]), reward), index)
    return picked, {"reward": of_picked, "log_z": log_mean(log_w), "ess": ess(log_w)}


def possible(reward: Array, alpha: float) -> Array:
    """r / alpha, float32; a score that is no finite number counts as impossible, -inf."""
    reward = jnp.asarray(reward, jnp.float32)
    return jnp.where(jnp.isfinite(reward), reward / alpha, -jnp.inf)


def check(particles: int, alpha: float, ess: float, resampler: str, choose: str) -> Resampler:
    """The resampler by name. Raises ValueError for what no population can be drawn with."""
    if particles < 1:
        raise ValueError(f"particles must be at least 1; got {particles}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha, the temperature in units of the reward, must be above 0 and finite; got {alpha}")
    if not 0 <= ess <= 1:
        raise ValueError(f"ess, the share of effective particles below which they are resampled, must lie in [0, 1]; got {ess}")
    if resampler not in RESAMPLERS:
        raise ValueError(f"resampler {resampler!r} is not known; choose one of {', '.join(RESAMPLERS)}")
    if choose not in CHOICES:
        raise ValueError(f"choose {choose!r} is not known; choose one of {', '.join(CHOICES)}")
    return RESAMPLERS[resampler]


def _uniform(keys: Array, m: int) -> Array:
    return jax.vmap(lambda key: jax.random.uniform(key, (m,)))(keys)


def _invert(points: Array, w: Array) -> Array:
    """For points [B, n] in [0, 1) the particles whose parts of the interval hold them; one of weight 0 has no part."""
    edges = jax.lax.cummax(jnp.where(w > 0, jnp.cumsum(w, 1), 0.0), axis=1)
    find = jax.vmap(lambda e, p: jnp.searchsorted(e, p, side="right"))
    return find(edges / edges[:, -1:], jnp.minimum(points, BELOW_ONE))
