"""What scores a picture, or a noisy state, for a prompt: features of the one beside features of the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Scorer(nn.Module):
    """exp(logit_scale) cos(picture, prompt), the form of PickScore (arXiv 2305.01569); a direction a person on the prompt's side."""

    people: int = 1
    width: int = 128

    @nn.compact
    def __call__(self, features: Array, text: Array) -> Array:
        """features [B,E], text [B,D] -> log-odds [B, people]."""
        unit = lambda x: x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)  # noqa: E731
        picture = nn.Dense(self.width, name="picture")(nn.LayerNorm(name="norm")(features.astype(jnp.float32)))
        h = nn.silu(nn.Dense(2 * self.width, name="text_in")(text.astype(jnp.float32)))
        prompt = nn.Dense(self.people * self.width, name="text_out")(h).reshape(-1, self.people, self.width)
        scale = self.param("logit_scale", nn.initializers.constant(2.0), ())
        return jnp.exp(scale) * jnp.einsum("bw,bpw->bp", unit(picture), unit(prompt))


def activations(denoise: Callable[..., Array], layers: str) -> Callable[..., Array]:
    """features(params, x, t, cond) -> [B,E]: means over positions of what the network's named layers compute, side by side.

    denoise(params, x, t, cond) made of flax layers. layers: a regular expression over the names of its outermost layers whose
    outputs [B,h,w,c] are taken. What comes after the last of them is never computed, once compiled. Raises ValueError where
    no layer matches.
    """

    def features(params: Any, x: Array, t: Array, cond: Any) -> Array:
        found: dict[str, Array] = {}

        def watch(inner: Callable[..., Any], inputs: Any, more: Any, context: Any) -> Any:
            y, path = inner(*inputs, **more), context.module.path
            if context.method_name == "__call__" and len(path) == 1 and re.search(layers, path[0]) and getattr(y, "ndim", 0) == 4:
                found[path[0]] = y.astype(jnp.float32).mean((1, 2))
            return y

        with nn.intercept_methods(watch):
            denoise(params, x, t, cond)
        if not found:
            raise ValueError(f"layers {layers!r} match no layer of the network whose output is [B,h,w,c]")
        return jnp.concatenate([found[name] for name in sorted(found)], -1)

    return features


def text_features(cond: Any) -> Array:
    """[B,D] of a bundle's condition: its pooled vector, or the mean of its states [B,L,D]."""
    if "pooled" in cond:
        pooled: Array = cond["pooled"]
        return pooled
    states = cond["states"]
    weight = jnp.asarray(cond.get("mask", jnp.ones(states.shape[:2])), jnp.float32)[..., None]
    return (states * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
