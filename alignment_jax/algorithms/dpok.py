"""DPOK: policy gradient with a learned baseline and the KL of every step to the pretrained model's (arXiv 2305.16381).

Departures: PPO's pessimistic maximum, where the official code clamps the ratio: a sample that drifted out of the clip range
the wrong way then has no gradient and never comes back. Rewards are standardised, so that their scale is harmless, and
kl_weight is beta / alpha of the paper. No replay buffer. Critic and policy learn from the same items.
"""

from __future__ import annotations

from ..diffusion import Sampler
from . import advantages
from .base import Algorithm
from .critic import critic
from .policy_gradient import policy_gradient


def dpok(sampler: Sampler, shape: tuple[int, ...], *, group: int = 1, clip_range: float = 1e-4, adv_clip: float = 5.0,
         advantage: str = "batch", num_prompts: int = 0, buffer: int = 32, min_count: int = 16, kl: str = "exact",
         kl_weight: float = 1e-3, timestep_fraction: float = 1.0, reduce: str = "mean", width: int = 256,
         critic_learning_rate: float = 1e-4) -> Algorithm:  # fmt: skip
    """L = E_k max(-A rho_k, -A clip(rho_k, 1 - e, 1 + e)) + kl_weight KL_k + (V - R)^2, A = R - V(x_k, k, c).

    R: the standardised reward, by `advantage` as in DDPO. V knows the state before the step's noise is drawn, so that it
    leaves the expected gradient as it is. kl "exact": KL(p_theta(. | x_k) | p_pre(. | x_k)), the paper's; "eps": the mean
    squared difference of the noise predictions, its code's. The code's .01 / 100 of the latter is about 1e-3 of the former
    at most steps. clip_range, width and the critic's learning rate are the code's. Raises as DDPO does.
    """
    rule = advantages.rule(advantage, group, num_prompts, buffer, min_count)
    value = critic(shape, sampler.num_steps, width=width, learning_rate=critic_learning_rate)
    return policy_gradient(sampler, shape, method="DPOK", advantage=rule, clip_range=clip_range, adv_clip=adv_clip, kl=kl,
                           kl_weight=kl_weight, timestep_fraction=timestep_fraction, reduce=reduce, critic=value)  # fmt: skip
