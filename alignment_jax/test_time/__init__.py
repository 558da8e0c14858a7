"""Alignment without training: each method one file, from noise and a condition to a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .attend_and_excite import attend_and_excite
from .base import Method, Needs
from .beam import beam
from .best_of_n import best_of_n
from .das import das
from .dno import dno
from .embedding import date, prompt_embedding, reneg
from .fk import fk
from .guidance import classifier_guidance, dps, freedom, universal_guidance
from .noise_stability import noise_stability
from .path_search import path_search
from .prompts import Search, prompt_bandit, prompt_evolution, prompt_rewriter
from .reno import reno
from .svdd import svdd
from .zero_order import zero_order
from .zigzag import zigzag


class Entry(NamedTuple):
    """A method that `sample --method` can name; budget: the whole number that more network calls go into."""

    factory: Callable[..., Method] | Callable[..., Search]
    family: str
    paper: str
    summary: str
    reward: str | None = None
    budget: str | None = None


TEST_TIME = {
    "attend_and_excite": Entry(attend_and_excite, "attention", "arXiv 2301.13826", "no subject is left unlooked at; no reward"),
    "best_of_n": Entry(best_of_n, "search", "arXiv 2112.00861", "the best of n samples; random search", "value", "n"),
    "zero_order": Entry(zero_order, "search", "arXiv 2501.09732", "hill climbing on the first noise", "value", "iterations"),
    "path_search": Entry(path_search, "search", "arXiv 2501.09732", "the best paths, noised and denoised again", "value", "n"),
    "beam": Entry(beam, "search", "arXiv 2501.19252", "at every step the best of several children, by where they lead", "value", "beams"),
    "fk": Entry(fk, "particles", "arXiv 2501.06848", "particles resampled by what their predictions promise", "value", "particles"),
    "das": Entry(das, "particles", "arXiv 2501.05803", "weighted particles that move along the gradient", "gradient", "particles"),
    "svdd": Entry(svdd, "particles", "arXiv 2408.08252", "of several next states one by a softmax of rewards", "value", "children"),
    "classifier_guidance": Entry(classifier_guidance, "guidance", "arXiv 2105.05233", "the reward's gradient on the score", "gradient",
                                 "repeats"),
    "dps": Entry(dps, "guidance", "arXiv 2209.14687", "the reward's gradient on the state, by the distance to its ceiling", "gradient",
                 "repeats"),
    "universal_guidance": Entry(universal_guidance, "guidance", "arXiv 2302.07121", "gradients on score and prediction, recurrences",
                                "gradient", "recurrences"),
    "freedom": Entry(freedom, "guidance", "arXiv 2303.09833", "gradients as large as a share of classifier-free guidance, time travel",
                     "gradient", "repeats"),
    "noise_stability": Entry(noise_stability, "noise", "arXiv 2407.14041", "the noise that inversion leads back to; no reward", None, "n"),
    "zigzag": Entry(zigzag, "guidance", "arXiv 2412.10891", "steps undone with less guidance and taken again; no reward", None, "zigzags"),
    "reno": Entry(reno, "noise", "arXiv 2406.04312", "the first noise climbs the reward on the shell where noise lies", "gradient",
                  "iterations"),
    "dno": Entry(dno, "noise", "arXiv 2405.18881", "all noises climb the reward while they pass for noise", "gradient", "iterations"),
    "prompt_embedding": Entry(prompt_embedding, "embedding", "arXiv 2412.19637", "the prompt's embedding climbs the reward", "gradient",
                              "iterations"),
    "reneg": Entry(reneg, "embedding", "arXiv 2412.19637", "the negative prompt's embedding climbs the reward", "gradient", "iterations"),
    "date": Entry(date, "embedding", "arXiv 2510.23974", "the prompt's embedding moves along the reward's gradient on the way", "gradient",
                  "updates"),
}
# searches over texts on the host, which draw through `score`: see prompts.py
PROMPT_METHODS = {
    "prompt_bandit": Entry(prompt_bandit, "prompt", "arXiv 1209.3353", "the best of several suffixes; UCB1 or Thompson sampling",
                           "value", "budget"),
    "prompt_evolution": Entry(prompt_evolution, "prompt", "arXiv 2404.04095", "suffixes, words and token weights, by evolution",
                              "value", "budget"),
    "prompt_rewriter": Entry(prompt_rewriter, "prompt", "arXiv 2403.17804", "OPT2I: a language model or any function rewrites the prompt",
                             "value", "budget"),
}  # fmt: skip

__all__ = ["PROMPT_METHODS", "TEST_TIME", "Entry", "Method", "Needs"]
