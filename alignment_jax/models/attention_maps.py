"""How much each position of a picture looks at each token: a network's attention over text as maps."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def attention_maps(net: nn.Module, params: Any, size: tuple[int, int], *inputs: Any, **more: Any) -> Array:
    """net(*inputs, **more)'s maps [B,h,w,L] at the resolution `size`, float32; over tokens they sum to 1.

    softmax(q k^T / sqrt(D)) over the text's keys, mean over heads and over all layers with h w positions. Where positions
    attend to positions and text together, this is the text's share divided by its sum, so that maps of a network that
    looks at its text rarely read like the others. Queries and keys are collected while the network runs (`layers.show`):
    its own attention stays as it is, only these layers' probabilities are formed, and under jit what comes after the last
    of them is not computed, nor does it have a gradient. Raises ValueError where no layer has this resolution.
    """
    _, state = net.apply({"params": params}, *inputs, mutable=["intermediates"], **more)
    layers = jax.tree.leaves(state["intermediates"], is_leaf=lambda x: isinstance(x, dict) and "q" in x)
    height, width = size
    chosen = [layer for layer in layers if layer["q"].shape[1] == height * width]
    if not chosen:
        there = sorted({layer["q"].shape[1] for layer in layers})
        raise ValueError(f"no attention over text at {height} x {width} positions; layers of this network have {there}")
    maps = jnp.stack([_probabilities(**layer) for layer in chosen]).mean(0)
    return maps.reshape(len(maps), height, width, -1)


def _probabilities(q: Array, k: Array, mask: Array | None = None) -> Array:
    """Mean over heads of softmax(q k^T / sqrt(D)) [B,N,L]; mask [B,L] of keys that exist."""
    scores = jnp.einsum("bnhd,blhd->bhnl", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(jnp.float32(q.shape[-1]))
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -1e9)
    return jax.nn.softmax(scores, -1).mean(1)
