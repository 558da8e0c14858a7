"""Alignment methods, each one file of pure functions in its paper's notation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .base import Algorithm, Needs
from .ddpo import ddpo
from .dpo import diffusion_dpo
from .draft import alignprop, draft
from .guidance_distillation import guidance_distillation
from .nft import diffusion_nft
from .raft import raft
from .refl import refl
from .sft import sft


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
    "ddpo": Entry(ddpo, "ppo", "arXiv 2305.13301", "PPO on the likelihood of the sampling steps (DDPO-IS)", "value"),
    "diffusion_nft": Entry(diffusion_nft, "quadratic", "arXiv 2509.16117",
                           "contrast of implicit positive and negative policies on own re-noised samples", "value"),
    "guidance_distillation": Entry(guidance_distillation, "quadratic", "arXiv 2210.03142",
                                   "one call that does what the guided teacher does in two"),
    "diffusion_dpo": Entry(diffusion_dpo, "pair", "arXiv 2311.12908", "preference pairs; links logistic, ipo, hinge"),
    "refl": Entry(refl, "two-phase", "arXiv 2304.05977", "reward gradient at the clean prediction of a late step", "gradient"),
    "draft": Entry(draft, "chained", "arXiv 2309.17400", "reward gradient through the last K sampling steps (DRaFT-1, -K, -LV)",
                   "gradient"),
    "alignprop": Entry(alignprop, "chained", "arXiv 2310.03739", "reward gradient through a random number of steps", "gradient"),
}  # fmt: skip

__all__ = ["ALGORITHMS", "Algorithm", "Entry", "Needs"]
