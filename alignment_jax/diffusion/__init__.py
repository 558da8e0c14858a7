"""The mathematics of the chain: schedules, parameterisations, transitions, guidance, sampling. Pure JAX."""

from .guidance import Denoise, blended, guided, guided_away
from .inversion import inverse, invert, inverted, renoise
from .parameterization import PREDICTIONS, predict, target
from .sample import State, Trajectory, draw, fold_in, gaussian_noise, initial, normal, recomputed, sample
from .schedule import (
    NoiseSchedule,
    SamplingGrid,
    cosine,
    expand,
    from_alphas_cumprod,
    linear,
    rectified_flow,
    sampling_grid,
    scaled_linear,
    zero_terminal_snr,
)
from .schedulers import SCHEDULERS, scheduler
from .transition import STD_FLOOR, Sampler, Transition, log_prob, log_ratio, reduce_entries, transition

__all__ = [
    "PREDICTIONS", "SCHEDULERS", "STD_FLOOR", "Denoise", "NoiseSchedule", "Sampler", "SamplingGrid", "State",
    "Trajectory", "Transition", "blended", "cosine", "draw", "expand", "fold_in", "from_alphas_cumprod", "gaussian_noise",
    "guided", "guided_away", "initial", "inverse", "invert", "inverted", "linear", "log_prob", "log_ratio", "normal",
    "predict", "recomputed", "rectified_flow", "reduce_entries", "renoise", "sample", "sampling_grid", "scaled_linear", "scheduler",
    "target", "transition", "zero_terminal_snr",
]  # fmt: skip
