"""The loss forms: denoise, ppo, quadratic, pair, two-phase, chained. A method is a payload for one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..diffusion import (
    Denoise,
    NoiseSchedule,
    Sampler,
    expand,
    fold_in,
    normal,
    predict,
    recomputed,
    target,
    transition,
)
from .base import mean_square, uniform

Array = jax.Array


def noised(keys: Array, x0: Array, schedule: NoiseSchedule) -> tuple[Array, Array, Array]:
    """(x_t [B,...], t [B], eps [B,...]) at uniform times of the trained range, from one key a sample."""
    u = uniform(fold_in(keys, 0))
    t = jnp.floor(u * (schedule.t_max + 1)) if schedule.discrete else schedule.t_min + u * (schedule.t_max - schedule.t_min)
    eps = normal(fold_in(keys, 1), x0.shape)
    return schedule.add_noise(x0, eps, t), t, eps


def denoise_error(output: Array, x_t: Array, t: Array, x0: Array, eps: Array, *, schedule: NoiseSchedule,
                  prediction: str, snr_gamma: float | None = 5.0) -> Array:  # fmt: skip
    """w(t) |x0 - x0_theta|^2 [B], w = min(SNR, gamma): min-SNR weighting of the noise loss (arXiv 2303.09556).

    gamma None: |output - target|^2, the plain loss of the network's own parameterisation (arXiv 2006.11239).
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if snr_gamma is None:
        return mean_square(output - target(prediction, x0, eps, alpha, sigma))
    weight = jnp.minimum(jnp.square(alpha) / jnp.maximum(jnp.square(sigma), 1e-6), snr_gamma)
    return weight * mean_square(predict(prediction, output, x_t, alpha, sigma)[0] - x0)


def ppo(log_ratio: Array, advantage: Array, clip_range: float) -> Array:
    """max(-A rho, -A clip(rho, 1 - e, 1 + e)) [N], rho = exp(log_ratio) (PPO, arXiv 1707.06347)."""
    rho = jnp.exp(log_ratio)
    return jnp.maximum(-advantage * rho, -advantage * jnp.clip(rho, 1 - clip_range, 1 + clip_range))


def quadratic(output: Array, goal: Array) -> Array:
    """mean |output - sg(goal)|^2 [N]."""
    return mean_square(output - jax.lax.stop_gradient(goal))


def linear(output: Array, cotangent: Array) -> Array:
    """<sg(cotangent), output> [N]: its gradient is that of a function of the output whose gradient is the cotangent."""
    return jnp.sum(jax.lax.stop_gradient(cotangent) * output, axis=tuple(range(1, output.ndim)))


def logistic(u: Array, label_smoothing: float = 0.0) -> Array:
    """-(1 - e) log sigma(u) - e log sigma(-u): DPO, cDPO with e > 0, soft labels with e = 1 - p [N]."""
    return (1 - label_smoothing) * jax.nn.softplus(-u) + label_smoothing * jax.nn.softplus(u)


def ipo(u: Array) -> Array:
    """(2 u - 1)^2 [N]: (h - 1 / (2 beta))^2 times 4 beta^2, so that it is of unit size (arXiv 2310.12036)."""
    return jnp.square(2 * u - 1)


def hinge(u: Array) -> Array:
    """relu(1 - u) [N] (SLiC, arXiv 2305.10425)."""
    return jax.nn.relu(1 - u)


def rdpo(u: Array, label_smoothing: float = 0.1) -> Array:
    """[(1 - e) l(u) - e l(-u)] / (1 - 2e) [N], l = -log sigma: over labels of which e are flipped, the mean is the clean l(u)
    (arXiv 2403.00409). Unbounded below, with slope -e / (1 - 2e): stop early."""
    return ((1 - label_smoothing) * jax.nn.softplus(-u) - label_smoothing * jax.nn.softplus(u)) / (1 - 2 * label_smoothing)


def dmpo(u: Array, label_smoothing: float = 0.01) -> Array:
    """KL(Bernoulli(sigma(u)) | Bernoulli(1 - e)) [N]: cDPO's minimum, approached from the other side (arXiv 2507.07510)."""
    won = jax.nn.log_sigmoid(u) - jnp.log1p(-label_smoothing)
    return jax.nn.sigmoid(u) * won + jax.nn.sigmoid(-u) * (jax.nn.log_sigmoid(-u) - jnp.log(label_smoothing))


LINKS: dict[str, Callable[..., Array]] = {"logistic": logistic, "rdpo": rdpo, "ipo": ipo, "hinge": hinge, "dmpo": dmpo}


def chained(denoise: Denoise, cond: Any, sampler: Sampler, x: Array, noises: Array, start: int, *,
            remat: bool | None = None) -> Array:  # fmt: skip
    """The end [B,...] of the chain walked from x at step `start`, differentiable through every step.

    noises [T - start, B, ...]: the z of each step. remat: of network calls, see `recomputed`.
    """
    times, call = jnp.asarray(sampler.grid.t), recomputed(denoise, remat)

    def step(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        i, z = inputs
        step_ = transition(sampler, i, x, call(x, jnp.broadcast_to(times[i], x.shape[:1]), cond))
        return step_.mean + expand(step_.std, x) * z, None

    return jax.lax.scan(step, x, (jnp.arange(start, sampler.num_steps), noises))[0]
