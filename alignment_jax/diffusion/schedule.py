"""Noise schedules x_t = alpha(t) x0 + sigma(t) eps, and the grids of times on which a sampler walks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise is mixed in: x_t = alpha(t) x0 + sigma(t) eps, with t what the network is told.

    alpha, sigma: functions of t [...] -> [...], float32. t_max: the noisiest time. t_min: the cleanest time that is
    trained. discrete: times are the integers 0..t_max (diffusers' convention), not a continuum.
    flow: rectified flow, alpha = 1 - t and sigma = t (Lipman et al., arXiv 2210.02747), else variance preserving.
    """

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    t_min: float
    t_max: float
    discrete: bool = False
    flow: bool = False

    def snr(self, t: Array) -> Array:
        """Signal-to-noise ratio alpha^2 / sigma^2 [...]."""
        return jnp.square(self.alpha(t) / self.sigma(t))

    def add_noise(self, x0: Array, eps: Array, t: Array) -> Array:
        """x_t [B, ...] of x0 [B, ...] and eps [B, ...] at the times t [B]."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def sample_t(self, key: Array, n: int) -> Array:
        """Times [n], stratified and uniform over the trained range: one per stratum, so that a batch covers it."""
        u = (jax.random.permutation(jax.random.fold_in(key, 1), n) + jax.random.uniform(key, (n,))) / n
        if self.discrete:
            return jnp.floor(u * (self.t_max + 1))
        return self.t_min + u * (self.t_max - self.t_min)


def expand(scalar: Array, like: Array) -> Array:
    """Appends axes to scalar [B] until it broadcasts against like [B, ...]; a 0-d scalar is returned as it is."""
    scalar = jnp.asarray(scalar)
    return scalar if scalar.ndim == 0 else scalar.reshape(scalar.shape + (1,) * (like.ndim - scalar.ndim))


def from_alphas_cumprod(alphas_cumprod: np.ndarray) -> NoiseSchedule:
    """Schedule of a table abar [N] over the integer times 0..N-1, linear in between. Raises: a table not in [0, 1]."""
    table = np.asarray(alphas_cumprod, np.float64)
    if table.ndim != 1 or table.min() < 0 or table.max() > 1 or np.any(np.diff(table) > 0):
        raise ValueError("alphas_cumprod must be a falling table [N] in [0, 1]; got shape "
                         f"{table.shape}, range [{table.min():g}, {table.max():g}]")  # fmt: skip
    alpha, sigma = np.sqrt(table).astype(np.float32), np.sqrt(1 - table).astype(np.float32)
    times = np.arange(len(table), dtype=np.float32)

    def interpolated(values: np.ndarray) -> Callable[[Array], Array]:
        return lambda t: jnp.interp(jnp.asarray(t, jnp.float32), times, values)

    return NoiseSchedule(interpolated(alpha), interpolated(sigma), 0.0, len(table) - 1.0, discrete=True)


def linear(num_train_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Betas linear in time (DDPM, arXiv 2006.11239)."""
    return from_alphas_cumprod(np.cumprod(1 - np.linspace(beta_start, beta_end, num_train_steps)))


def scaled_linear(num_train_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Square roots of betas linear in time (Stable Diffusion)."""
    return from_alphas_cumprod(np.cumprod(1 - np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps) ** 2))


def cosine(t_min: float = 0.0, t_max: float = 1.0) -> NoiseSchedule:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1] (arXiv 2102.09672 without its offset)."""
    half_pi = np.float32(np.pi / 2)
    return NoiseSchedule(lambda t: jnp.cos(half_pi * t), lambda t: jnp.sin(half_pi * t), t_min, t_max)


def zero_terminal_snr(num_train_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """scaled_linear, with sqrt(abar) shifted and scaled so that the last time is pure noise (arXiv 2305.08891)."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return from_alphas_cumprod(root**2)


def rectified_flow(t_min: float = 0.0, t_max: float = 1.0) -> NoiseSchedule:
    """alpha = 1 - t, sigma = t. The timestep shift of SD3 belongs to the grid: `sampling_grid(..., shift=3)`."""
    return NoiseSchedule(lambda t: 1 - t, lambda t: t, t_min, t_max, flow=True)


def discrete_times(n: int, num_steps: int, spacing: str, steps_offset: int = 0) -> np.ndarray:
    """The times [T] among the integers 0..n-1 at which the network is called, noisiest first (arXiv 2305.08891, table 2)."""
    if not 1 <= num_steps <= n:
        raise ValueError(f"num_steps must lie in 1..{n}; got {num_steps}")
    if spacing == "leading":
        return (np.arange(num_steps) * (n // num_steps))[::-1] + steps_offset
    if spacing == "trailing":
        return np.round(np.arange(n, 0, -n / num_steps)) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, n - 1, num_steps))[::-1]
    raise ValueError(f"spacing {spacing!r} is not known; choose one of leading, trailing, linspace")


class SamplingGrid(NamedTuple):
    """The T + 1 times of a sampler, noisiest first: step i goes from index i to index i + 1. Arrays [T+1], float32."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def num_steps(self) -> int:
        """T, the number of network calls."""
        return len(self.t) - 1


SPACINGS = ("leading", "trailing", "linspace", "uniform")


def sampling_grid(schedule: NoiseSchedule, num_steps: int, spacing: str = "uniform", *, steps_offset: int = 0,
                  shift: float = 1.0, t_start: float | None = None, set_alpha_to_one: bool = True) -> SamplingGrid:  # fmt: skip
    """The times [T+1] at which a sampler calls the network, and the end.

    leading | trailing | linspace: diffusers' choices of integer times (arXiv 2305.08891, table 2).
    uniform: t_start (default t_max) to t_min in equal steps, for continuous schedules.
    shift: t <- shift t / (1 + (shift - 1) t), flow only (SD3, arXiv 2403.03206). set_alpha_to_one: the chain ends at
    alpha = 1, sigma = 0; otherwise at the schedule's cleanest trained time (Stable Diffusion's setting: False).
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is not known; choose one of {', '.join(SPACINGS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    if (spacing == "uniform") == schedule.discrete:
        raise ValueError(f"spacing {spacing!r} does not fit a {'discrete' if schedule.discrete else 'continuous'} "
                         f"schedule; use {'leading, trailing or linspace' if schedule.discrete else 'uniform'}")  # fmt: skip
    if shift != 1.0 and not schedule.flow:
        raise ValueError(f"shift={shift} is for rectified flow; this schedule is variance preserving: use shift=1")
    if schedule.discrete:
        t = discrete_times(int(schedule.t_max) + 1, num_steps, spacing, steps_offset)
    else:
        start = schedule.t_max if t_start is None else t_start
        t = np.linspace(start, schedule.t_min, num_steps + 1)
        t = (shift * t / (1 + (shift - 1) * t))[:-1]
    t = np.append(t, schedule.t_min).astype(np.float32)
    alpha, sigma = np.array(schedule.alpha(jnp.asarray(t))), np.array(schedule.sigma(jnp.asarray(t)))
    if set_alpha_to_one:
        alpha[-1], sigma[-1] = 1.0, 0.0
    return SamplingGrid(t, alpha, sigma)
