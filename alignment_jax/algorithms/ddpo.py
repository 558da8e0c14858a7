"""DDPO: denoising as a decision process, trained by policy gradients on the likelihood of its steps (arXiv 2305.13301)."""

from __future__ import annotations

from ..diffusion import Sampler
from . import advantages
from .base import Algorithm
from .policy_gradient import policy_gradient


def ddpo(sampler: Sampler, shape: tuple[int, ...], *, group: int = 1, clip_range: float = 1e-4, adv_clip: float = 5.0,
         advantage: str = "batch", num_prompts: int = 0, buffer: int = 32, min_count: int = 16, estimator: str = "is",
         kl: str = "exact", kl_weight: float = 0.0, timestep_fraction: float = 1.0, reduce: str = "mean") -> Algorithm:  # fmt: skip
    """DDPO-IS: L = E_k max(-A rho_k, -A clip(rho_k, 1 - e, 1 + e)), rho_k = p_theta(x_{k-1} | x_k, c) / p_old.

    estimator "sf": DDPO-SF, L = -A log p_theta, for one update a rollout; there both have one gradient. kl, kl_weight:
    DPOK's penalty (arXiv 2305.16381), see kl.py. clip_range belongs to the log-ratio's `reduce`: 1e-4 of a mean over
    entries is the papers' choice. advantage: prompt (running statistics a prompt), batch, group, group_batch_std, rloo.
    timestep_fraction: a random subset of the steps. Raises ValueError for a sampler without noise.
    """
    rule = advantages.rule(advantage, group, num_prompts, buffer, min_count)
    return policy_gradient(sampler, shape, method="DDPO", advantage=rule, clip_range=clip_range, adv_clip=adv_clip,
                           estimator=estimator, kl=kl, kl_weight=kl_weight, timestep_fraction=timestep_fraction,
                           reduce=reduce)  # fmt: skip
