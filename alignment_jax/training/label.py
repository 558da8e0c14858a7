"""Preference pairs: two pictures a prompt from a model, and an annotator's word on which is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ..data import prompts as prompt_files
from ..rewards.annotators import ANNOTATORS
from ..rewards.check import to_uint8
from . import build
from .generate import load_run, pictures


def label(*, model: str, run: str | None, prompts: str, annotator: str, out: str, seed: int, pairs: int,
          settings: dict[str, Any]) -> dict[str, float]:  # fmt: skip
    """Writes an .npz {"winner", "loser" uint8, "prompts", "preference", "annotator"}; returns its counts.

    The annotator sees both pictures as stored. A tie keeps its order and the preference 1/2.
    """
    if Path(out).suffix != ".npz":
        raise ValueError(f"--out must be an .npz file; got {out}")
    compare = build.named(annotator, ANNOTATORS, "annotator")()
    if run:
        bundle, params, config = load_run(run)
        settings = {**dict(config.get("sampling", {})), **settings}
    else:
        bundle, params = build.model(ml_collections.ConfigDict({"model": model, "weights": "shipped", "seed": 0}))
    texts = prompt_files.load(prompts)
    rng = np.random.default_rng(seed)
    texts = [texts[i] for i in rng.permutation(np.resize(np.arange(len(texts)), pairs))]
    keys = jax.random.split(jax.random.key(seed), 2 * pairs)
    both = to_uint8(jnp.asarray(pictures(bundle, params, texts * 2, keys, settings)))
    a, b = both[:pairs], both[pairs:]
    p = np.asarray(compare(rng, a / np.float32(255), b / np.float32(255), texts))
    first = (p >= 0.5)[:, None, None, None]
    file = Path(out).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, winner=np.where(first, a, b), loser=np.where(first, b, a), prompts=np.asarray(texts),
                        preference=np.maximum(p, 1 - p), annotator=np.full(pairs, annotator))  # fmt: skip
    return {"pairs": pairs, "ties": int((p == 0.5).sum())}
