"""Training of recognisers: cross-entropy on augmented pictures, with a class for what cannot be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from .augment import augment

Array = jax.Array
BLENDS, RUBBISH = 0.10, 0.05  # shares of a batch whose label is "unclear": two pictures at once; shuffled patches or noise


class RecogniserState(NamedTuple):
    """Parameters, their average and the optimiser's state."""

    params: Any
    average: Any
    opt_state: Any


def spoil(key: Array, images: Array) -> tuple[Array, Array]:
    """Turns the first tenth of a batch into blends of two pictures and the next twentieth into rubbish.

    Returns (images [B,H,W,C], unclear [B] bool).
    """
    b, height, width, channels = images.shape
    blends, rubbish = round(BLENDS * b), round(RUBBISH * b)
    k = jax.random.split(key, 4)
    weight = jax.random.uniform(k[0], (blends, 1, 1, 1), minval=0.35, maxval=0.65)
    mixed = weight * images[:blends] + (1 - weight) * images[-blends:]
    patches = images[blends : blends + rubbish].reshape(rubbish, height // 8, 8, width // 8, 8, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(rubbish, -1, 8, 8, channels)
    patches = jax.vmap(jax.random.permutation)(jax.random.split(k[1], rubbish), patches)
    shuffled = patches.reshape(rubbish, height // 8, width // 8, 8, 8, channels).transpose(0, 1, 3, 2, 4, 5)
    noise = jax.random.uniform(k[2], (rubbish, height, width, channels))
    noisy = jax.random.uniform(k[3], (rubbish, 1, 1, 1)) < 0.3
    waste = jnp.where(noisy, noise, shuffled.reshape(rubbish, height, width, channels))
    unclear = jnp.arange(b) < blends + rubbish
    return jnp.concatenate([mixed, waste, images[blends + rubbish :]]), unclear


def loss(model: nn.Module, params: Any, key: Array, images: Array, labels: Mapping[str, Array], robust: bool) -> Array:
    """Mean cross-entropy over heads of images [B,H,W,C] in [0, 1] and labels {head: [B]}.

    robust: with augmentation and the class "unclear" (the last one of every head); otherwise clean pictures only.
    """
    unclear = jnp.zeros(len(images), bool)
    if robust:
        key_spoil, key_augment = jax.random.split(key)
        images, unclear = spoil(key_spoil, images)
        images = augment(key_augment, images)
    logits, _ = model.apply({"params": params}, images)
    losses = [optax.softmax_cross_entropy_with_integer_labels(logits[name], jnp.where(unclear, logits[name].shape[-1] - 1, y))
              for name, y in labels.items()]  # fmt: skip
    return jnp.stack(losses).mean()


def train_step(model: nn.Module, optimizer: optax.GradientTransformation, robust: bool, state: RecogniserState,
               key: Array, images: Array, labels: Mapping[str, Array]) -> tuple[RecogniserState, Array]:  # fmt: skip
    """One step; the average of the parameters follows with decay .99."""
    value, grads = jax.value_and_grad(lambda p: loss(model, p, key, images, labels, robust))(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, state.average, params)
    return RecogniserState(params, average, opt_state), value


def accuracy(logits: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Array]:
    """Share of right answers a head, and "all": of pictures with every one right."""
    right = {name: logits[name].argmax(-1) == y for name, y in labels.items()}
    return {name: r.mean() for name, r in right.items()} | {"all": jnp.stack(list(right.values())).all(0).mean()}
