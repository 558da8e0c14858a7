"""Preferences: pictures of a prompt from a model, and an annotator's word on which is better."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ..data import prompts as prompt_files
from ..rewards import REWARDS
from ..rewards.annotators import ANNOTATORS, Annotator, agreement, both_orders, by_reward, ranked, scores
from ..rewards.base import Reward
from ..rewards.check import to_uint8
from . import build
from .generate import load_run, pictures


def label(*, model: str, run: str | None, prompts: str, annotator: str | Sequence[str], out: str, seed: int, pairs: int,
          settings: dict[str, Any], size: int = 0, swap: bool = False,
          options: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """Writes an .npz and returns its counts; the annotators see the pictures as stored.

    Pairs: {"winner", "loser" uint8, "prompts", "preference", "annotator"}; a tie keeps its order and the preference 1/2. Of
    several annotators all answer all pairs: preference is their mean, "answers" [N, A] is each one's p(winner is better), and
    the agreement of every two is returned. size K: lists {"list" uint8 [N,K,H,W,C], "score" [N,K], "prompts", "annotator"}.
    annotator: names of annotators or rewards, or "module:factory" of either. swap: each comparison is asked in both orders.
    options: temperature, soft, noise and tie of rewards as annotators.
    """
    if Path(out).suffix != ".npz":
        raise ValueError(f"--out must be an .npz file; got {out}")
    names = [annotator] if isinstance(annotator, str) else list(annotator)
    if len(set(names)) != len(names) or (size and len(names) > 1):
        raise ValueError(f"annotators are told apart by name, and lists have one; got {', '.join(names)}")
    if size == 1 or size < 0:
        raise ValueError(f"a list is 2 pictures or more; got {size}")
    people = [_annotator(name, options or {}) for name in names]
    if options and all(reward is None for _, reward in people):
        raise ValueError(f"{', '.join(names)} has its own law of answers; {', '.join(options)} are for rewards as annotators")
    if run:
        bundle, params, config = load_run(run)
        settings = {**dict(config.get("sampling", {})), **settings}
    else:
        bundle, params = build.model(ml_collections.ConfigDict({"model": model, "weights": "shipped", "seed": 0}))
    texts = prompt_files.load(prompts)
    rng = np.random.default_rng(seed)
    texts = [texts[i] for i in rng.permutation(np.resize(np.arange(len(texts)), pairs))]
    k = size or 2
    keys = jax.random.split(jax.random.key(seed), k * pairs)
    drawn = to_uint8(jnp.asarray(pictures(bundle, params, texts * k, keys, settings)[0]))
    shown = drawn.reshape(k, pairs, *drawn.shape[1:])
    file = Path(out).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    views = shown.astype(np.float32) / 255
    asked = [both_orders(compare) if swap else compare for compare, _ in people]
    if size:
        reward = people[0][1]
        value = (scores(reward, views.swapaxes(0, 1).reshape(-1, *views.shape[2:]), np.repeat(texts, k).tolist()).reshape(pairs, k)
                 if reward is not None else ranked(asked[0], rng, views.swapaxes(0, 1), texts))  # fmt: skip
        np.savez_compressed(file, list=shown.swapaxes(0, 1), score=value, prompts=np.asarray(texts), annotator=np.full(pairs, names[0]))
        return {"lists": pairs, "size": k}
    each = np.stack([np.asarray(compare(rng, views[0], views[1], texts), np.float64) for compare in asked], 1)
    p = each.mean(1)
    first = (p >= 0.5)[:, None, None, None]
    np.savez_compressed(file, winner=np.where(first, *shown), loser=np.where(first, *shown[::-1]), prompts=np.asarray(texts),
                        preference=np.maximum(p, 1 - p), annotator=np.full(pairs, " + ".join(names)),
                        answers=np.where(p[:, None] >= 0.5, each, 1 - each), annotators=np.asarray(names))  # fmt: skip
    made: dict[str, Any] = {"pairs": pairs, "ties": int((p == 0.5).sum())}
    made |= {f"{names[i]} and {names[j]}": agreement(each[:, i], each[:, j]) for i, j in combinations(range(len(names)), 2)}
    return made


def _annotator(name: str, options: dict[str, Any]) -> tuple[Annotator, Reward | None]:
    """(annotator, the reward behind it, if it is one) of a name, or of "module:factory"."""
    if name in ANNOTATORS:
        return ANNOTATORS[name](), None
    found = build.named(name, {**ANNOTATORS, **REWARDS}, "annotator")
    made = None
    if name not in REWARDS and not isinstance(found, Reward) and not inspect.signature(found).parameters:
        made = found()
        if not isinstance(made, Reward):
            return made, None
    reward = made or build.one_reward(name)
    return build.call(by_reward, options, "option", reward=reward), reward
