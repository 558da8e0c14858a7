"""Trains a recogniser, the proxy or the judge of the critters world, from nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import weights
from ..data import critters as world
from ..data.critters_dataset import load_arrays
from ..data.sources import Source
from ..models.recogniser import PatchResNet, StridedCNN
from ..rewards.augment import augment
from ..rewards.recognise import RecogniserState, accuracy, train_step
from .logging import MetricLog
from .workdir import folder

NETWORKS = {"strided_cnn": StridedCNN, "patch_resnet": PatchResNet}


def network(config: Any) -> Any:
    """The network of a config, with a head an attribute and, for the judge, a head a nuisance."""
    heads = {name: len(values) for name, values in world.ATTRIBUTES.items()}
    return NETWORKS[config.network](heads | (world.NUISANCES if config.nuisances else {}))


def labels_of(arrays: dict[str, Any], heads: Any) -> dict[str, np.ndarray]:
    """{head: int [N]} of rendered critters."""
    named = {name: arrays["attributes"][:, i] for i, name in enumerate(world.ATTRIBUTES)}
    return {name: named[name] if name in named else arrays["nuisances"][name] for name in heads}


def train(config: Any, workdir: str | Path) -> dict[str, float]:
    """Trains on one half of the renders, measures on held-out ones, writes recogniser.safetensors (float16).

    config: seed, steps, batch, learning_rate, network (strided_cnn | patch_resnet), nuisances, robust (augmentation and
    the class "unclear"), half (0 | 1: which half of the training renders), data_dir.
    """
    from tqdm import tqdm

    workdir = folder(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    model = network(config)
    arrays = load_arrays("train", config.data_dir)
    rows = np.flatnonzero(np.arange(len(arrays["images"])) % 2 == config.half)
    labels = {name: y[rows] for name, y in labels_of(arrays, model.heads).items()}
    images = arrays["images"][rows]
    tx = optax.chain(optax.clip_by_global_norm(1.0),
                     optax.adamw(optax.cosine_onecycle_schedule(config.steps, config.learning_rate), weight_decay=1e-2))  # fmt: skip
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 32, 32, 3)))["params"]
    state = RecogniserState(params, jax.tree.map(jnp.copy, params), tx.init(params))
    step = jax.jit(partial(train_step, model, tx, config.robust), donate_argnums=0)
    source = Source(len(rows), config.batch, config.seed,
                    lambda i, rng: {"images": images[i], "labels": {k: y[i] for k, y in labels.items()}})  # fmt: skip
    log = MetricLog(workdir)
    for number in tqdm(range(config.steps), desc=config.name, unit="step"):
        batch = next(source)
        pictures = jnp.asarray(batch["images"], jnp.float32) / 255.0
        state, value = step(state, jax.random.fold_in(jax.random.key(config.seed), number), pictures, batch["labels"])
        if (number + 1) % 100 == 0:
            log.write(number + 1, {"loss": value})
    weights.save(workdir / "recogniser.safetensors", state.average, dtype=np.float16)
    stored = weights.load(workdir / "recogniser.safetensors", state.average)
    held_out = load_arrays("held_out", config.data_dir)
    result = measure(model, stored, held_out)
    full = measure(model, state.average, held_out)
    result["all/float32"] = full["all/clean"]
    log.write(config.steps, result)
    log.close()
    print({k: round(v, 4) for k, v in result.items()})
    return result


def measure(model: Any, params: Any, arrays: dict[str, Any]) -> dict[str, float]:
    """Accuracy on renders, clean and augmented: {"all/clean", "all/augmented", head/clean, head/augmented}."""
    attributes = {name: arrays["attributes"][:, i] for i, name in enumerate(world.ATTRIBUTES)}
    apply = jax.jit(lambda p, x: model.apply({"params": p}, x)[0])
    changed = jax.jit(augment)
    out: dict[str, float] = {}
    for kind in ("clean", "augmented"):
        parts = []
        for i in range(0, len(arrays["images"]), 250):
            x = jnp.asarray(arrays["images"][i : i + 250], jnp.float32) / 255.0
            parts.append(apply(params, changed(jax.random.key(i), x) if kind == "augmented" else x))
        logits = {k: np.concatenate([np.asarray(p[k]) for p in parts]) for k in parts[0]}
        out |= {f"{k}/{kind}": float(v) for k, v in accuracy(logits, attributes).items()}
        for name in [k for k in logits if k in world.NUISANCES]:
            out[f"{name}/{kind}"] = float((logits[name].argmax(-1) == arrays["nuisances"][name]).mean())
    return out
