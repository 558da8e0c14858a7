"""Annotators: who says which of two pictures is the better one. Synthetic ones stand in for people, and say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import jax.numpy as jnp
import numpy as np

from .base import Reward
from .check import score_host
from .critters import Judge, critters_gold

# compare(rng, a [B,H,W,C] in [0, 1], b, prompts) -> p(a is better) [B]: 1, 0, or 1/2 for a tie; between them if unsure
Annotator = Callable[[np.random.Generator, np.ndarray, np.ndarray, Sequence[str]], np.ndarray]


def answers(rng: np.random.Generator, gap: np.ndarray, *, temperature: float, noise: float = 0.0, tie: float = 0.0,
            soft: bool = False) -> np.ndarray:  # fmt: skip
    """p [B] = (1 - noise) sigma(gap / temperature) + noise / 2 if soft, else one answer drawn with it; 1/2 where |gap| < tie."""
    if temperature <= 0 or not 0 <= noise < 1:
        raise ValueError(f"temperature must be above 0 and noise in [0, 1); got {temperature} and {noise}")
    p = (1 - noise) * (0.5 + 0.5 * np.tanh(gap / temperature / 2)) + noise / 2
    return np.where(np.abs(gap) < tie, 0.5, p if soft else (rng.random(len(p)) < p).astype(np.float64))


def bradley_terry(judge: Judge, *, temperature: float = 0.5, noise: float = 0.0, tie: float = 0.0, soft: bool = False,
                  taste: float = 0.0, drift: float = 0.0, person: int = 0) -> Annotator:  # fmt: skip
    """A synthetic person: prefers a with p = (1 - noise) sigma((s_a - s_b) / temperature) + noise / 2.

    s = sum_i w_i right_i: how many of the asked attributes the judge finds right. noise: the share of answers given at random
    (AlpacaFarm, arXiv 2305.14387). Scores that differ by less than `tie` are a tie, 1/2. soft: p itself instead of one answer.
    taste: log w ~ N(0, taste^2), drawn for the `person` and scaled to mean w = 1; drift: each call moves log w by N(0, drift^2),
    so the n-th call of a person is always the same one.
    """
    if min(taste, drift) < 0:
        raise ValueError(f"taste and drift are spreads, 0 or more; got {taste} and {drift}")
    answers(np.random.default_rng(0), np.zeros(0), temperature=temperature, noise=noise)  # refused now, not at the first picture
    own, log_w = np.random.default_rng((person, 1)), np.zeros(0)

    def compare(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        nonlocal log_w
        targets = judge.targets(prompts)
        asked = targets >= 0
        if not log_w.size:
            log_w = taste * own.standard_normal(targets.shape[1])
        elif drift:
            log_w = log_w + drift * own.standard_normal(len(log_w))
        w = np.exp(log_w) / np.exp(log_w).mean()
        score = [((judge.look(x, targets)["attributes"] & asked) * w).sum(1) for x in (a, b)]
        return answers(rng, score[0] - score[1], temperature=temperature, noise=noise, tie=tie, soft=soft)

    return compare


def by_reward(reward: Reward, *, temperature: float = 1.0, noise: float = 0.0, tie: float = 0.0, soft: bool = False) -> Annotator:
    """A reward as an annotator: Bradley-Terry on its scores, p(a is better) = sigma((r_a - r_b) / temperature).

    A picture whose score is not finite cannot be compared: 1/2. Raises ValueError for a reward of latents.
    """
    if reward.noisy:
        raise ValueError(f"reward {reward.name!r} reads latents in the middle of a chain; an annotator is shown pictures")
    answers(np.random.default_rng(0), np.zeros(0), temperature=temperature, noise=noise)

    def compare(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        r = [scores(reward, x, prompts) for x in (a, b)]
        known = np.isfinite(r[0]) & np.isfinite(r[1])
        gap = np.where(known, r[0], 0.0) - np.where(known, r[1], 0.0)
        return np.where(known, answers(rng, gap, temperature=temperature, noise=noise, tie=tie, soft=soft), 0.5)

    return compare


def scores(reward: Reward, pictures: np.ndarray, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
    """Scores [N] of pictures [N,H,W,C] in [0, 1] by a reward on the device or on the host."""
    parts = []
    for i in range(0, len(pictures), batch):
        part, words = pictures[i : i + batch], list(prompts[i : i + batch])
        if reward.device:
            condition = reward.encode(words) if reward.encode else {}
            parts.append(np.asarray(reward.score(reward.params, jnp.asarray(part, jnp.float32), condition), np.float64))
        else:
            bytes_ = np.round(255 * np.clip(part, 0, 1)).astype(np.uint8)
            parts.append(np.asarray(score_host(reward, bytes_, words, {}, batch_index=i)[0], np.float64))
    return np.concatenate(parts) if parts else np.zeros(0)


def both_orders(compare: Annotator) -> Annotator:
    """p = (p(a, b) + 1 - p(b, a)) / 2: asked twice, with the pictures swapped, so that a liking for one side cancels (RLAIF,
    arXiv 2309.00267). A judge that always takes the first gives 1/2."""  # fmt: skip

    def twice(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return (np.asarray(compare(rng, a, b, prompts)) + 1 - np.asarray(compare(rng, b, a, prompts))) / 2

    return twice


def agreement(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """How far two annotators [N] agree: {"agreement", "kappa", "n"}, over the pairs that neither calls a tie.

    kappa: Cohen's, (agreement - chance) / (1 - chance), 0 for answers that know nothing of each other; NaN where undefined.
    """
    clear = (p != 0.5) & (q != 0.5)
    x, y = p[clear] > 0.5, q[clear] > 0.5
    if not len(x):
        return {"agreement": float("nan"), "kappa": float("nan"), "n": 0}
    same, chance = float((x == y).mean()), float(x.mean() * y.mean() + (1 - x.mean()) * (1 - y.mean()))
    return {"agreement": same, "kappa": (same - chance) / (1 - chance) if chance < 1 else float("nan"), "n": int(clear.sum())}


def ranked(compare: Annotator, rng: np.random.Generator, lists: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Scores [N,K] of lists [N,K,H,W,C] by comparing all pairs: s_i = 1/K sum_j logit p(i beats j), p held in [.01, .99].

    The least-squares fit of Bradley-Terry to the answers: an annotator whose odds have scores gets these back, but for a
    constant; with K = 2 the difference is logit p.
    """
    n, k = lists.shape[:2]
    total = np.zeros((n, k))
    for i, j in combinations(range(k), 2):
        p = np.clip(np.asarray(compare(rng, lists[:, i], lists[:, j], prompts)), 0.01, 0.99)
        total[:, i] += np.log(p / (1 - p))
        total[:, j] -= np.log(p / (1 - p))
    return total / k


def annotator_reward(annotator: str | Annotator, *, group: int, seed: int = 0) -> Reward:
    """An annotator as a reward on the host, so that it can lead any method that draws groups: the scores of `ranked` within each
    prompt's `group`. A picture is only compared with the others of its group; scores of different prompts do not compare.

    In a config: {"name": "alignment_jax.rewards.annotators:annotator_reward", "annotator": "critters_annotator", "group": 4}.
    """
    if isinstance(annotator, str) and annotator not in ANNOTATORS:
        raise ValueError(f"annotator {annotator!r} is not known; choose one of {', '.join(ANNOTATORS)}")
    if group < 2:
        raise ValueError(f"an annotator compares the pictures of a group: group must be 2 or more; got {group}")
    compare = ANNOTATORS[annotator]() if isinstance(annotator, str) else annotator
    rng = np.random.default_rng(seed)

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict[str, Any]]:
        whole = len(images) // group * group  # the probe's and a last incomplete group cannot be compared
        lists = images[:whole].reshape(-1, group, *images.shape[1:]) / np.float32(255)
        out = np.zeros(len(images))
        out[:whole] = ranked(compare, rng, lists, list(prompts[:whole:group])).reshape(-1)
        return out, {}

    name = annotator if isinstance(annotator, str) else getattr(annotator, "__name__", "annotator")
    return Reward(name, score, device=False, differentiable=False, summary="log-odds of being preferred within the group")


def critters_annotator() -> Annotator:
    """The gold judge's taste with human noise: 5 % random answers, one attribute more wins nine times in ten."""
    return bradley_terry(critters_gold(), temperature=0.5, noise=0.05)


ANNOTATORS: dict[str, Callable[[], Annotator]] = {"critters_annotator": critters_annotator}
