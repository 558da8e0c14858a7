"""The linear-Gaussian chain: x0 ~ N(m, s^2), the exact noise prediction, and one trainable shift a step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from alignment_jax.diffusion import Sampler, sampling_grid, scaled_linear, transition

M, S2 = 0.5, 0.25


def chain(steps: int = 10, eta: float = 1.0) -> Sampler:
    """The chain of the tests: Stable Diffusion's betas, leading spacing, ending at alpha = 1."""
    schedule = scaled_linear()
    return Sampler(schedule, sampling_grid(schedule, steps, "leading", steps_offset=1), "eps", eta=eta)


def exact(x, alpha, sigma, m=M, s2=S2):
    """E[eps | x_t] of x0 ~ N(m, s2)."""
    return sigma * (x - alpha * m) / (alpha**2 * s2 + sigma**2)


def policy(theta, sampler: Sampler):
    """denoise(x, t, cond): the exact network plus theta [T] at each step."""
    times = jnp.asarray(sampler.grid.t[:-1])

    def denoise(x, t, cond):
        alpha, sigma = sampler.schedule.alpha(t)[:, None], sampler.schedule.sigma(t)[:, None]
        step = jnp.argmin(jnp.abs(times[None] - t[:, None]), 1)
        return exact(x, alpha, sigma) + theta[step][:, None]

    return denoise


def recursion(sampler: Sampler):
    """float64 coefficients of x_{k-1} = A x_k + B + c theta + s z from noise to sample, as arrays [T]."""
    a, s = (np.asarray(v, np.float64) for v in (sampler.grid.alpha, sampler.grid.sigma))
    A, B, C, std = [], [], [], []
    for i in range(sampler.num_steps):
        sd = sampler.eta * s[i + 1] / s[i] * np.sqrt(max(0.0, 1 - (a[i] / a[i + 1]) ** 2))
        c = np.sqrt(max(0.0, s[i + 1] ** 2 - sd**2)) - a[i + 1] / a[i] * s[i]
        e1 = s[i] / (a[i] ** 2 * S2 + s[i] ** 2)
        A.append(a[i + 1] / a[i] + c * e1)
        B.append(-c * e1 * a[i] * M)
        C.append(c)
        std.append(sd)
    return tuple(np.array(v) for v in (A, B, C, std))


def law(sampler: Sampler, theta=None):
    """(mean, variance) of the chain's end from x_T ~ N(0, 1), by the recursion in float64."""
    A, B, C, std = recursion(sampler)
    theta = np.zeros(len(A)) if theta is None else np.asarray(theta, np.float64)
    mean, var = 0.0, 1.0
    for i in range(len(A)):
        mean, var = A[i] * mean + B[i] + C[i] * theta[i], A[i] ** 2 * var + std[i] ** 2
    return mean, var


def downstream(sampler: Sampler):
    """prod_{j after i} A_j [T]: how much of a change after step i arrives at the end."""
    A = recursion(sampler)[0]
    return np.array([np.prod(A[i + 1 :]) for i in range(len(A))])


__all__ = ["M", "S2", "chain", "downstream", "exact", "law", "policy", "recursion", "transition"]
