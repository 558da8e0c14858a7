"""Alignment methods, each one file of pure functions in its paper's notation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .adjoint_matching import adjoint_matching
from .awm import awm
from .base import Algorithm, Needs
from .d3po import d3po
from .ddpo import ddpo
from .dpo import diffusion_dpo
from .dpok import dpok
from .draft import alignprop, draft
from .drtune import drtune
from .grpo import dance_grpo, flow_grpo, mix_grpo
from .guidance_distillation import guidance_distillation
from .inpo import inpo, smpo
from .kto import diffusion_kto
from .mapo import mapo
from .nft import diffusion_nft
from .online import online, semi_online
from .prdp import prdp
from .raft import raft
from .rankdpo import rank_dpo
from .refl import refl
from .rwr import lee, rwr
from .sft import sft
from .spin import spin
from .spo import lpo, spo
from .srpo import srpo


class Entry(NamedTuple):
    """A method that configs can name."""

    factory: Callable[..., Algorithm]
    family: str
    paper: str
    summary: str
    reward: str | None = None


ALGORITHMS = {
    "sft": Entry(sft, "denoise", "arXiv 2006.11239", "denoising regression on given pictures; trains the base model too"),
    "raft": Entry(raft, "denoise", "arXiv 2304.06767", "fine-tune on the best of n samples of each prompt, repeat", "value"),
    "rwr": Entry(rwr, "denoise", "arXiv 2305.13301", "fine-tune on own samples, weighed by the exponential of their reward", "value"),
    "lee": Entry(lee, "denoise", "arXiv 2302.12192", "fine-tune on the base's samples, weighed by rewards in [0, 1]", "value"),
    "ddpo": Entry(ddpo, "ppo", "arXiv 2305.13301", "PPO or REINFORCE on the likelihood of the sampling steps (DDPO-IS, -SF)", "value"),
    "dpok": Entry(dpok, "ppo", "arXiv 2305.16381", "DDPO with a learned baseline and the KL of each step to the base's", "value"),
    "flow_grpo": Entry(flow_grpo, "ppo", "arXiv 2505.05470", "PPO on the steps of a flow's SDE, samples held against their group", "value"),
    "dance_grpo": Entry(dance_grpo, "ppo", "arXiv 2505.07818", "the same on flows and diffusion, one starting noise a group", "value"),
    "mix_grpo": Entry(mix_grpo, "ppo", "arXiv 2507.21802", "the same with noise and gradient inside a moving window of steps", "value"),
    "diffusion_nft": Entry(diffusion_nft, "quadratic", "arXiv 2509.16117",
                           "contrast of implicit positive and negative policies on own re-noised samples", "value"),
    "awm": Entry(awm, "quadratic", "arXiv 2509.25050", "PPO with the denoising loss as minus the log-likelihood", "value"),
    "adjoint_matching": Entry(adjoint_matching, "quadratic", "arXiv 2409.08861",
                              "samples p_ref exp(lam r): the step regresses on the reward's adjoint", "gradient"),
    "prdp": Entry(prdp, "pair", "arXiv 2402.08714", "log-ratios that predict differences of rewards: samples p_ref exp(r / beta)",
                  "value"),
    "guidance_distillation": Entry(guidance_distillation, "quadratic", "arXiv 2210.03142",
                                   "one call that does what the guided teacher does in two"),
    "diffusion_dpo": Entry(diffusion_dpo, "pair", "arXiv 2311.12908",
                           "preference pairs; links logistic, rdpo, ipo, hinge, dmpo; Flow-DPO, SDPO's safeguard, NPO's training"),
    "diffusion_kto": Entry(diffusion_kto, "pair", "arXiv 2404.04465", "pictures that are good or bad, unpaired or from pairs"),
    "mapo": Entry(mapo, "pair", "arXiv 2406.06424", "preference pairs without a reference: half the memory"),
    "spin": Entry(spin, "pair", "arXiv 2402.10210", "self-play: given pictures win against the model's own samples"),
    "inpo": Entry(inpo, "pair", "arXiv 2503.18454", "preference pairs at states found by inverting each picture"),
    "smpo": Entry(smpo, "pair", "arXiv 2506.02698", "the same with ReNoise and labels smoothed by a reward"),
    "rank_dpo": Entry(rank_dpo, "list", "arXiv 2410.18013", "ranked lists of pictures, weighed by discounted gain"),
    "d3po": Entry(d3po, "pair", "arXiv 2311.13231", "DPO on every step of two trajectories of a prompt", "value"),
    "spo": Entry(spo, "pair", "arXiv 2406.04314", "DPO on candidates of one step, judged there by their clean predictions", "step"),
    "lpo": Entry(lpo, "pair", "arXiv 2502.01051", "the same with a latent scorer: no decoder in the loop", "state"),
    "online": Entry(online, "pair", "arXiv 2402.04792", "any pair loss on pairs of the policy's own samples; iterated in rounds", "value"),
    "semi_online": Entry(semi_online, "pair", "arXiv 2412.05095", "any pair loss, the winner from the data and the loser drawn"),
    "refl": Entry(refl, "two-phase", "arXiv 2304.05977", "reward gradient at the clean prediction of a late step", "gradient"),
    "drtune": Entry(drtune, "two-phase", "arXiv 2405.00760", "reward gradient at the end for a few steps of the whole chain", "gradient"),
    "srpo": Entry(srpo, "two-phase", "arXiv 2509.06942",
                  "reward gradient at any time by known noise; wanted against unwanted words", "gradient"),
    "draft": Entry(draft, "chained", "arXiv 2309.17400", "reward gradient through the last K sampling steps (DRaFT-1, -K, -LV)",
                   "gradient"),
    "alignprop": Entry(alignprop, "chained", "arXiv 2310.03739", "reward gradient through a random number of steps", "gradient"),
}  # fmt: skip

__all__ = ["ALGORITHMS", "Algorithm", "Entry", "Needs"]
