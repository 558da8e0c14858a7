"""GRPO for flows and diffusion: PPO on the steps of a group's samples, each held against its group's mean.

Three presets of one loss: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818) and MixGRPO (arXiv 2507.21802).
Departures: with guidance, gradients go through both of its halves (Flow-GRPO's code detaches the unconditional one). The last
step of a flow SDE has no noise here, so that it neither blurs the pictures nor is trained.
"""

from __future__ import annotations

from ..diffusion import Sampler
from . import advantages
from .base import Algorithm
from .policy_gradient import Window, policy_gradient


def flow_grpo(sampler: Sampler, shape: tuple[int, ...], *, group: int = 24, clip_range: float = 1e-4, adv_clip: float = 5.0,
              advantage: str = "group_batch_std", estimator: str = "is", kl: str = "exact",
              kl_weight: float = 0.004, timestep_fraction: float = 1.0, reduce: str = "mean") -> Algorithm:  # fmt: skip
    """L = E_k max(-A rho_k, -A clip(rho_k, 1 - e, 1 + e)) + kl_weight KL_k on the SDE that has the flow's marginals.

    A = (r - mean of the group) / std of the batch. kl "exact" is the KL of the step, |mu - mu_ref|^2 / (2 sigma_t^2 |dt|);
    the official code leaves the |dt| out (kl="no_dt"), so that its beta of 0.04 (GenEval, OCR; 0.01 for PickScore) is
    beta |dt| here: 0.004 at its 10 steps, the default. Its SDE is sampling.flow_sde = ('sqrt', 0.7). A few SDE steps leave
    noise in the pictures: judge with the ODE. estimator "ratio_norm": GRPO-Guard's ratio, with a clip range of its own.
    Raises ValueError for a sampler that is no flow SDE, and for groups of one.
    """
    if sampler.flow_sde is None:
        raise ValueError("Flow-GRPO draws from the SDE of a rectified flow: set sampling.flow_sde=('sqrt', 0.7); on a variance preserving "
                         f"schedule take dance_grpo or ddpo with eta=1. This sampler has eta={sampler.eta:g} and no flow_sde")  # fmt: skip
    rule = advantages.rule(advantage, group, 0, 0, 0)
    return policy_gradient(sampler, shape, method="Flow-GRPO", advantage=rule, clip_range=clip_range, adv_clip=adv_clip,
                           estimator=estimator, kl=kl, kl_weight=kl_weight, timestep_fraction=timestep_fraction,
                           reduce=reduce)  # fmt: skip


def dance_grpo(sampler: Sampler, shape: tuple[int, ...], *, group: int = 12, clip_range: float = 1e-4, adv_clip: float = 5.0,
               advantage: str = "group", estimator: str = "is", shared_start: bool = True,
               timestep_fraction: float = 0.6, reduce: str = "mean") -> Algorithm:  # fmt: skip
    """L = E_k max(-A rho_k, -A clip(rho_k, 1 - e, 1 + e)), A = (r - mean of the group) / std of the group.

    A group shares its initial noise (shared_start), a random 60 % of each sample's steps is trained, and there is no KL.
    The sampler: flow_sde = ('constant', 0.3), or DDIM with eta = 1 where the schedule is variance preserving. Several
    rewards count by their advantages: config.aggregate = {"how": "advantages"}. Raises ValueError for groups of one.
    """
    rule = advantages.rule(advantage, group, 0, 0, 0)
    return policy_gradient(sampler, shape, method="DanceGRPO", advantage=rule, clip_range=clip_range, adv_clip=adv_clip,
                           estimator=estimator, timestep_fraction=timestep_fraction, reduce=reduce,
                           shared_start=shared_start)  # fmt: skip


def mix_grpo(sampler: Sampler, shape: tuple[int, ...], *, group: int = 12, window: int = 4, stride: int = 1, every: int = 25,
             clip_range: float = 1e-4, adv_clip: float = 5.0, advantage: str = "group",
             estimator: str = "is", kl: str = "exact", kl_weight: float = 0.0, shared_start: bool = False,
             reduce: str = "mean") -> Algorithm:  # fmt: skip
    """GRPO's loss on the `window` steps that have noise; all the others are steps of the ODE, without gradient.

    The window starts at the noisiest steps, moves on by `stride` after `every` rollouts, and starts again after the cleanest.
    With all noisy steps inside, it is Flow-GRPO. The paper draws 25 steps with flow_sde = ('sqrt', 0.7). Raises ValueError
    for a window that does not fit, and for groups of one.
    """
    rule = advantages.rule(advantage, group, 0, 0, 0)
    return policy_gradient(sampler, shape, method="MixGRPO", advantage=rule, clip_range=clip_range, adv_clip=adv_clip,
                           estimator=estimator, kl=kl, kl_weight=kl_weight, reduce=reduce, shared_start=shared_start,
                           window=Window(window, stride, every))  # fmt: skip
