"""Annotators: who says which of two pictures is the better one. Synthetic ones stand in for people, and say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .critters import Judge, critters_gold

# compare(rng, a [B,H,W,C] in [0, 1], b, prompts) -> p(a is better) [B]: 1, 0, or 1/2 for a tie; between them if unsure
Annotator = Callable[[np.random.Generator, np.ndarray, np.ndarray, Sequence[str]], np.ndarray]


def bradley_terry(judge: Judge, *, temperature: float = 0.5, noise: float = 0.0, tie: float = 0.0, soft: bool = False) -> Annotator:
    """A synthetic person: prefers a with p = (1 - noise) sigma((s_a - s_b) / temperature) + noise / 2.

    s: how many of the asked attributes the judge finds right. noise: the share of answers given at random (AlpacaFarm,
    arXiv 2305.14387). Scores that differ by less than `tie` are a tie, 1/2. soft: p itself instead of one answer.
    """
    if temperature <= 0 or not 0 <= noise < 1:
        raise ValueError(f"temperature must be above 0 and noise in [0, 1); got {temperature} and {noise}")

    def compare(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        targets = judge.targets(prompts)
        asked = targets >= 0
        score = [(judge.look(x, targets)["attributes"] & asked).sum(1) for x in (a, b)]
        gap = (score[0] - score[1]).astype(np.float64)
        p = (1 - noise) / (1 + np.exp(-gap / temperature)) + noise / 2
        answer = p if soft else (rng.random(len(p)) < p).astype(np.float64)
        return np.where(np.abs(gap) < tie, 0.5, answer)

    return compare


def critters_annotator() -> Annotator:
    """The gold judge's taste with human noise: 5 % random answers, one attribute more wins nine times in ten."""
    return bradley_terry(critters_gold(), temperature=0.5, noise=0.05)


ANNOTATORS: dict[str, Callable[[], Annotator]] = {"critters_annotator": critters_annotator}
