"""The samplers of diffusers by their names, as settings of one `Sampler`: a grid, a solver, eta.

In the variables of the VP chain Euler is DDIM, Euler ancestral and DDPM are DDIM with eta = 1, and DPM-Solver++ is DDIM
whose clean prediction is extrapolated; what differs is where the grid lies, how it ends and how the noise starts.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from .schedule import NoiseSchedule, SamplingGrid, discrete_times
from .transition import Sampler

SCHEDULERS = ("ddim", "ddpm", "euler", "euler_ancestral", "dpmsolver++", "sde-dpmsolver++", "lcm")


def scheduler(name: str, schedule: NoiseSchedule, num_steps: int, *, prediction: str = "eps", spacing: str = "leading",
              steps_offset: int = 0, eta: float = 0.0, set_alpha_to_one: bool = True, original_steps: int = 50) -> Sampler:  # fmt: skip
    """The Sampler that walks as diffusers' scheduler `name` with these settings, from the same noise to the same end.

    spacing: leading | trailing | linspace (arXiv 2305.08891, table 2). set_alpha_to_one: ddim alone; all others end at
    alpha = 1. original_steps: lcm's distillation grid. Departure: ddim and ddpm on linspace grids step to the grid's next
    time, where diffusers takes a constant stride that misses it. Raises ValueError for unknown names and for what does
    not go together.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is not known; choose one of {', '.join(SCHEDULERS)}")
    if not schedule.discrete:
        raise ValueError(f"scheduler {name!r} walks integer times, and this schedule is continuous; use sampling_grid")
    if eta and name != "ddim":
        raise ValueError(f"eta={eta} is a setting of the scheduler ddim; {name} has its own noise")
    t = _times(name, int(schedule.t_max) + 1, num_steps, spacing, steps_offset, original_steps)
    alpha, sigma = (np.asarray(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma))
    if name in ("euler", "euler_ancestral"):
        alpha, sigma = _euler(schedule, t)
    end = (1.0, 0.0)
    if name == "ddim" and not set_alpha_to_one:
        end = (float(schedule.alpha(jnp.float32(0))), float(schedule.sigma(jnp.float32(0))))
    grid = SamplingGrid(*(np.append(a, e).astype(np.float32) for a, e in ((t, 0.0), (alpha, end[0]), (sigma, end[1]))))
    solver = {"dpmsolver++": "dpmsolver++", "sde-dpmsolver++": "dpmsolver++", "lcm": "lcm"}.get(name, "ddim")
    noise = 1.0 if name in ("ddpm", "euler_ancestral", "sde-dpmsolver++") else eta
    # diffusers starts Euler's states at sigma_max, not at sqrt(sigma_max^2 + 1), on these grids
    scale = float(grid.sigma[0]) if name.startswith("euler") and spacing in ("linspace", "trailing") else 1.0
    return Sampler(schedule, grid, prediction, noise, solver=solver, initial_scale=scale)


def _times(name: str, n: int, num_steps: int, spacing: str, steps_offset: int, original_steps: int) -> np.ndarray:
    """The times [T] of the network calls, noisiest first."""
    if name == "lcm":
        if num_steps > original_steps:
            raise ValueError(f"lcm takes its steps from the {original_steps} of its distillation; got num_steps={num_steps}")
        distilled = (np.arange(1, original_steps + 1) * (n // original_steps) - 1)[::-1]
        return distilled[np.floor(np.linspace(0, original_steps, num_steps, endpoint=False)).astype(int)]
    if name.startswith("euler") and spacing == "linspace":
        return np.linspace(0, n - 1, num_steps)[::-1]
    more = 1 if name.endswith("dpmsolver++") and spacing != "trailing" else 0  # there the last time is left to the end
    return discrete_times(n, num_steps + more, spacing, steps_offset)[:num_steps]


def _euler(schedule: NoiseSchedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) [T] at times between the integers: Euler interpolates sigma / alpha, not alpha."""
    integers = np.arange(int(schedule.t_max) + 1, dtype=np.float32)
    # 2^-12: a schedule of zero terminal SNR starts at a finite ratio
    alpha, sigma = (np.asarray(f(jnp.asarray(integers)), np.float64) for f in (schedule.alpha, schedule.sigma))
    alpha = np.maximum(alpha, 2.0**-12)
    ratio = np.interp(t, integers, sigma / alpha)
    return 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)
