"""Backwards along the chain, to noisier states: by the model's own ODE, or with fresh noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .guidance import Denoise
from .parameterization import predict
from .sample import fold_in, normal
from .schedule import expand
from .transition import Sampler

Array = jax.Array
Level = tuple[Array, Array]  # (alpha, sigma), scalars or [B]


def invert(denoise: Denoise, x0: Array, t: Array, cond: Any, sampler: Sampler, *, steps: int = 10, renoise: int = 0,
           eta: float = 0.0, keys: Array | None = None) -> Array:  # fmt: skip
    """x_t [B, ...] at the times t [B]: DDIM's steps walked backwards from the clean x0 [B, ...], `steps` network calls.

    x' = (alpha' / alpha)(x - sigma eps) + sigma' eps with eps of the network at (x, t'), on a grid of times common to all;
    a sample whose t lies inside a step ends it at t and stays there, so one scan serves every t. renoise: as often, eps is
    the mean of it and of the predictions at the x' found so far (ReNoise, arXiv 2403.14602), at as many more calls.
    eta: the share of each step's noise that is drawn anew, sqrt(1 - eta^2) eps + eta z, from keys [B].
    """
    schedule, shape = sampler.schedule, x0.shape
    if eta and keys is None:
        raise ValueError(f"noise that is drawn anew, eta={eta}, needs keys [B]")
    grid = jnp.linspace(schedule.t_min, schedule.t_max, steps + 1)[1:]
    grid = jnp.round(grid) if schedule.discrete else grid

    def step(carry: tuple[Array, Level, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Level, Array], None]:
        x, here, open_ = carry
        i, until = inputs
        to = jnp.minimum(until, t)
        there = schedule.alpha(to), schedule.sigma(to)
        z = normal(fold_in(keys, i), shape) if eta and keys is not None else 0.0

        def moved(eps: Array) -> Array:
            return _moved(x, eps, jnp.sqrt(1 - eta**2) * eps + eta * z, here, there)

        found = predict(sampler.prediction, denoise(x, to, cond), x, *there)[1]
        eps = found
        for n in range(renoise):
            guess = moved(eps)
            found = found + predict(sampler.prediction, denoise(guess, to, cond), guess, *there)[1]
            eps = found / (n + 2)
        now = jax.tree.map(lambda new, old: jnp.where(open_, new, old), there, here)
        return (jnp.where(expand(open_, x), moved(eps), x), now, open_ & (until < t)), None

    one = jnp.ones_like(t, jnp.float32)
    start = (jnp.asarray(x0, jnp.float32), (one, 0 * one), one > 0)
    return jax.lax.scan(step, start, (jnp.arange(steps), grid))[0][0]


def inverse(sampler: Sampler, i: Array | int, x: Array, output: Array) -> Array:
    """Step i backwards: the state at grid index i [B, ...] of x at index i + 1 and the network's output at (x, t_i).

    x_i = (alpha_i / alpha_{i+1})(x - sigma_{i+1} eps) + sigma_i eps; on a flow x_i = x + (sigma_i - sigma_{i+1}) v. It undoes
    the step without noise to O(dt^2), and exactly where eps (v) does not depend on x. i may be traced.
    """
    alpha, sigma = (jnp.asarray(a) for a in sampler.grid[1:])
    here, there = (alpha[i + 1], sigma[i + 1]), (alpha[i], sigma[i])
    x = jnp.asarray(x, jnp.float32)
    # v is the output at x's own level; so is eps where alpha_i = 0 leaves nothing of x0 to be read
    own = (there[0] == 0) | sampler.schedule.flow
    eps = predict(sampler.prediction, output, x, *(jnp.where(own, a, b) for a, b in zip(here, there, strict=True)))[1]
    return _moved(x, eps, eps, here, there)


def inverted(denoise: Denoise, x0: Array, cond: Any, sampler: Sampler) -> Array:
    """The noise x_T [B, ...] that the sampler's steps without noise lead from to x0 [B, ...]; one network call a step."""
    times = jnp.asarray(sampler.grid.t)

    def step(x: Array, i: Array) -> tuple[Array, None]:
        return inverse(sampler, i, x, denoise(x, jnp.broadcast_to(times[i], x.shape[:1]), cond)), None

    return jax.lax.scan(step, jnp.asarray(x0, jnp.float32), jnp.arange(sampler.num_steps)[::-1])[0]


def renoise(key: Array, sampler: Sampler, x: Array, i: Array | int, to: Array | int) -> Array:
    """Fresh noise on x [B, ...] at grid index i until it is a state of index to <= i, of the same marginals; key: one, or [B].

    x' = r x + sqrt(sigma'^2 - r^2 sigma^2) z with r = alpha' / alpha, variance preserving and flow alike; i and to may be traced.
    """
    alpha, sigma = (jnp.asarray(a) for a in sampler.grid[1:])
    ratio = alpha[to] / alpha[i]
    added = jnp.sqrt(jnp.clip(sigma[to] ** 2 - (ratio * sigma[i]) ** 2, 0.0))
    return ratio * x + added * normal(key, x.shape)


def _moved(x: Array, eps: Array, eps_: Array, here: Level, there: Level) -> Array:
    """x [B, ...] with its noise eps taken out at `here`, and with eps_ in its place at `there`."""
    (alpha, sigma), (alpha_, sigma_) = ((expand(a, x), expand(s, x)) for a, s in (here, there))
    return alpha_ * (x - sigma * eps) / alpha + sigma_ * eps_
