"""One Gaussian step of a sampler, x_{k-1} = mean + std z, and its log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .parameterization import predict
from .schedule import NoiseSchedule, SamplingGrid, expand

Array = jax.Array
SOLVERS = ("ddim", "dpmsolver++", "lcm")
STD_FLOOR = 1e-4  # a step with less noise than this has no usable likelihood and is left out of ratios


@dataclass(frozen=True)
class Sampler:
    """A chain from noise to sample: where it calls the network, how it steps, how much noise it puts back.

    schedule, grid: see schedule.py. prediction: eps | v | x0 | flow.
    eta: DDIM's share of the ancestral noise, 0 deterministic, 1 DDPM-like (arXiv 2010.02502).
    solver: "ddim"; "dpmsolver++": second order, the clean prediction extrapolated from the last two calls (2M, arXiv
    2211.01095; with eta = 1 its SDE form); "lcm": the consistency function and all its noise anew (arXiv 2310.04378).
    initial_scale: what unit noise is multiplied by at the start (Euler's sigma_max on linspace and trailing grids).
    flow_sde: (rule, a), flow only: "sqrt": sigma_t = a sqrt(t / (1 - t)) (Flow-GRPO, arXiv 2505.05470);
    "constant": sigma_t = a (DanceGRPO, arXiv 2505.07818). Its marginals are those of the ODE.
    """

    schedule: NoiseSchedule
    grid: SamplingGrid
    prediction: str = "eps"
    eta: float = 0.0
    flow_sde: tuple[str, float] | None = None
    solver: str = "ddim"
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is not known; choose one of {', '.join(SOLVERS)}")
        if self.solver != "ddim" and (self.schedule.flow or (self.solver == "lcm" and self.eta)):
            raise ValueError(f"solver {self.solver!r} is for variance preserving schedules, and 'lcm' has no eta; "
                             f"got {'a flow schedule' if self.schedule.flow else f'eta={self.eta}'}")  # fmt: skip
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}")
        if self.flow_sde is not None and (not self.schedule.flow or self.flow_sde[0] not in ("sqrt", "constant")):
            raise ValueError(f"flow_sde={self.flow_sde!r} needs a flow schedule and a rule of 'sqrt' or 'constant'")
        if self.flow_sde is not None and self.eta:
            raise ValueError(f"eta={self.eta} and flow_sde={self.flow_sde!r} are two kinds of noise; give one")

    @property
    def num_steps(self) -> int:
        """T, the number of network calls of one sample."""
        return self.grid.num_steps

    @property
    def deterministic(self) -> bool:
        """No step has noise."""
        return self.eta == 0 and self.flow_sde is None and self.solver != "lcm"

    def stochastic(self) -> np.ndarray:
        """Which steps [T] have noise enough for a likelihood (std above its floor)."""
        zero = jnp.zeros((1, 1))
        std = [float(transition(self, i, zero, zero, previous=zero).std) for i in range(self.num_steps)]
        return np.asarray(std) > STD_FLOOR


class Transition(NamedTuple):
    """x_{k-1} ~ N(mean, std^2): mean [B, ...], std scalar or [B] (0: deterministic), x0 [B, ...] the prediction."""

    mean: Array
    std: Array
    x0: Array


def transition(sampler: Sampler, i: Array | int, x: Array, output: Array, *, previous: Array | None = None,
               noise_scale: Array | float = 1.0) -> Transition:  # fmt: skip
    """The Gaussian of step i given the state x [B, ...] and the network's output there [B, ...]; always float32.

    i: a step, or steps [B]. previous [B, ...]: the clean prediction of step i - 1 (anything at step 0), which only
    "dpmsolver++" asks for. noise_scale, a scalar or [B]: what eta or the SDE's a is multiplied by, 0 for the step of the ODE;
    "lcm" knows none. DDIM: mean = alpha' x0 + sqrt(sigma'^2 - s^2) eps with
    s = eta (sigma' / sigma) sqrt(1 - (alpha / alpha')^2)  (arXiv 2010.02502, eq. 12 and 16). DPM-Solver++(2M): the same
    with x0 + h_i / (2 h_{i-1}) (x0 - previous) for x0, h the step in log(alpha / sigma).
    Flow SDE, dt = t' - t < 0: mean = x (1 + g^2 dt / 2t) + v (1 + g^2 (1 - t) / 2t) dt, s = g sqrt(-dt).
    """
    t, alphas, sigmas = (jnp.asarray(a) for a in sampler.grid)
    a0, s0, a1, s1 = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
    x = jnp.asarray(x, jnp.float32)
    x0, eps = predict(sampler.prediction, output, x, a0, s0)
    if sampler.solver == "lcm":
        scaled = 10.0 * t[i]  # the boundary condition of the consistency function: c_out(0) = 0, c_skip(0) = 1
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / jnp.sqrt(scaled**2 + 0.25)
        return Transition(expand(a1, x) * (expand(c_out, x) * x0 + expand(c_skip, x) * x), s1, x0)
    if sampler.flow_sde is None:
        clean = x0
        if sampler.solver == "dpmsolver++":
            if previous is None:
                raise ValueError("this step of 'dpmsolver++' needs the clean prediction of the step before, which only sample() "
                                 "carries; for training choose solver 'ddim' (scheduler ddim, ddpm, euler or euler_ancestral)")  # fmt: skip
            x0 = x0 + expand(jnp.asarray(extrapolation(sampler.grid))[i], x) * (x0 - previous)
            eps = (x - expand(a0, x) * x0) / expand(s0, x)
        eta = sampler.eta * noise_scale
        std = eta * s1 / s0 * jnp.sqrt(jnp.clip(1 - (a0 / a1) ** 2, 0.0)) if sampler.eta else jnp.zeros_like(s1)
        direction = jnp.sqrt(jnp.clip(s1**2 - std**2, 0.0))
        return Transition(expand(a1, x) * x0 + expand(direction, x) * eps, std, clean)
    rule, a = sampler.flow_sde
    below = jnp.where(s0 < sigmas[0], s0, sigmas[1])  # sigma_t diverges at t = 1: first the next time stands in, as in Flow-GRPO
    g = a * jnp.sqrt(s0 / (1 - below)) if rule == "sqrt" else jnp.full_like(s0, a)
    g = jnp.where(s1 == 0, 0.0, noise_scale * g)  # noise put back by the last step would stay in the picture
    dt = s1 - s0
    drift_x, drift_v = 1 + g**2 / (2 * s0) * dt, (1 + g**2 * (1 - s0) / (2 * s0)) * dt
    return Transition(expand(drift_x, x) * x + expand(drift_v, x) * (eps - x0), g * jnp.sqrt(-dt), x0)


def extrapolation(grid: SamplingGrid) -> np.ndarray:
    """h_i / (2 h_{i-1}) of each step [T] for DPM-Solver++(2M); 0 where it is of first order.

    First order: the first step, and the last one where it ends at sigma = 0 or the chain has fewer than 15 steps.
    """
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(np.asarray(grid.alpha, np.float64)) - np.log(np.asarray(grid.sigma, np.float64)))
    weight = np.zeros(len(h))
    second = slice(1, len(h) - 1 if grid.sigma[-1] == 0 or len(h) < 15 else len(h))
    weight[second] = h[second] / (2 * np.roll(h, 1)[second])
    return weight.astype(np.float32)


def log_prob(step: Transition, x_prev: Array, *, reduce: str, mask: Array | None = None) -> Array:
    """log N(x_prev; mean, std^2) [B], float32; reduce "sum" over entries, or "mean" (DDPO's convention).

    mask [B, ...]: entries that exist, for sequences of unequal length. x_prev is held fixed (REINFORCE is wrong with a
    reparameterised one). A std at its floor gives huge finite numbers: leave these steps out (`Sampler.stochastic`).
    """
    x_prev = jax.lax.stop_gradient(jnp.asarray(x_prev, jnp.float32))
    std = expand(jnp.maximum(step.std, 1e-20), x_prev)
    values = -0.5 * jnp.square((x_prev - step.mean) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)
    return reduce_entries(values, reduce, mask)


def log_ratio(mean: Array, mean_old: Array, std: Array, x_prev: Array, *, reduce: str, mask: Array | None = None) -> Array:
    """log N(x_prev; mean, std^2) - log N(x_prev; mean_old, std^2) [B], exactly 0 where mean == mean_old.

    sum (mean - mean_old)(2 x_prev - mean - mean_old) / (2 std^2): no difference of two large sums, whose rounding is of
    the size of DDPO's clip range (4e-3 against 1e-4 when x_prev is far from the mean).
    """
    x_prev, mean_old = jax.lax.stop_gradient((x_prev, mean_old))
    values = (mean - mean_old) * (2 * x_prev - mean - mean_old) / (2 * jnp.square(expand(std, x_prev)))
    return reduce_entries(values, reduce, mask)


def reduce_entries(values: Array, reduce: str, mask: Array | None = None) -> Array:
    """Sum or mean of values [B, ...] over all but the first axis -> [B]; entries outside mask [B, ...] do not count."""
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce must be 'sum' or 'mean'; got {reduce!r}")
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return values.sum(axes) if reduce == "sum" else values.mean(axes)
    mask = jnp.broadcast_to(mask, values.shape).astype(values.dtype)
    total = jnp.where(mask > 0, values, 0.0).sum(axes)
    return total if reduce == "sum" else total / jnp.maximum(mask.sum(axes), 1.0)
