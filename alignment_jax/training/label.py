"""Preferences: pictures of a prompt from a model, and an annotator's word on which is better."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
from .names import call, named


def label(*, model: str, run: str | None, prompts: str, annotator: Any, out: str, seed: int, pairs: int,
          settings: dict[str, Any], size: int = 0, swap: bool = False,
          options: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """Writes an .npz and returns its counts; the annotators see the pictures as stored.

    Pairs: {"winner", "loser" uint8, "prompts", "preference", "annotator"}; a tie keeps its order and the preference 1/2. Of
    several annotators all answer all pairs: preference is their mean, "answers" [N, A] is each one's p(winner is better), and
    the agreement of every two is returned. size K: lists {"list" uint8 [N,K,H,W,C], "score" [N,K], "prompts", "annotator"}.
    annotator: one or several of: the name of an annotator or a reward, "module:factory" of either, or {"name": either, **its
    arguments}, also written as text. swap: each comparison is asked in both orders.
    options: temperature, soft, noise and tie of rewards as annotators.
    """
    if Path(out).suffix != ".npz":
        raise ValueError(f"--out must be an .npz file; got {out}")
    if size == 1 or size < 0:
        raise ValueError(f"a list is 2 pictures or more; got {size}")
    asked = [annotator] if isinstance(annotator, str | Mapping) else list(annotator)
    people = [_annotator(spec, options or {}) for spec in asked]
    names = [name for name, _, _ in people]
    if len(set(names)) != len(names) or (size and len(names) > 1):
        raise ValueError(f"annotators are told apart by name, and lists have one; got {', '.join(names)}")
    if options and all(reward is None for _, _, reward in people):
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
    compares = [both_orders(compare) if swap else compare for _, compare, _ in people]
    if size:
        reward = people[0][2]
        value = (scores(reward, views.swapaxes(0, 1).reshape(-1, *views.shape[2:]), np.repeat(texts, k).tolist()).reshape(pairs, k)
                 if reward is not None else ranked(compares[0], rng, views.swapaxes(0, 1), texts))  # fmt: skip
        np.savez_compressed(file, list=shown.swapaxes(0, 1), score=value, prompts=np.asarray(texts), annotator=np.full(pairs, names[0]))
        return {"lists": pairs, "size": k}
    each = np.stack([np.asarray(compare(rng, views[0], views[1], texts), np.float64) for compare in compares], 1)
    p = each.mean(1)
    first = (p >= 0.5)[:, None, None, None]
    np.savez_compressed(file, winner=np.where(first, *shown), loser=np.where(first, *shown[::-1]), prompts=np.asarray(texts),
                        preference=np.maximum(p, 1 - p), annotator=np.full(pairs, " + ".join(names)),
                        answers=np.where(p[:, None] >= 0.5, each, 1 - each), annotators=np.asarray(names))  # fmt: skip
    made: dict[str, Any] = {"pairs": pairs, "ties": int((p == 0.5).sum())}
    made |= {f"{names[i]} and {names[j]}": agreement(each[:, i], each[:, j]) for i, j in combinations(range(len(names)), 2)}
    return made


def _annotator(spec: Any, options: dict[str, Any]) -> tuple[str, Annotator, Reward | None]:
    """(name, annotator, the reward behind it, if it is one) of one of `label`'s annotators; a reward with arguments has its own."""
    spec = build.written(spec)
    if not isinstance(spec, str) and "name" not in spec:
        raise ValueError(f"an annotator with arguments needs a name beside them; got {', '.join(map(str, spec))}")
    name, kwargs = (spec, {}) if isinstance(spec, str) else (spec["name"], {k: v for k, v in spec.items() if k != "name"})
    if name in ANNOTATORS:
        return name, call(ANNOTATORS[name], kwargs, f"annotator {name!r}"), None
    found, made = named(name, {**ANNOTATORS, **REWARDS}, "annotator"), None
    of_rewards = {"reward", "rewards"} & kwargs.keys()
    if name not in REWARDS and not isinstance(found, Reward) and not of_rewards and (kwargs or not inspect.signature(found).parameters):
        made = call(found, kwargs, f"annotator {name!r}")
        if not isinstance(made, Reward):
            return name, made, None
    reward = made or build.one_reward(spec)
    return reward.name if kwargs else name, call(by_reward, options, "option", reward=reward), reward
