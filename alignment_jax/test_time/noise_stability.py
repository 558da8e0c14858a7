"""Noise selection: of several noises the one that the chain and its inversion lead back to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..diffusion import Sampler, draw, fold_in, initial, inverted
from .base import Info, Method, Needs, Networks, Tree, grouped, pick, repeat, spread

Array = jax.Array


def noise_stability(sampler: Sampler, shape: tuple[int, ...], *, n: int = 4) -> Method:
    """Of n noises the one with the highest cos(x_T, invert(denoise(x_T))): near a fixed point of both (arXiv 2407.14041).

    No reward. Both ways are the sampler's own steps, under its own guidance; the paper takes n = 100 and tells of better
    pictures from stable noises. Where the chain were its inversion exactly, all would score 1. Costs 2 n T network calls.
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")

    def draw_(keys: Array, networks: Networks, data: Tree) -> tuple[Array, Info]:
        keys, cond = spread(keys, n), repeat(data["cond"], n)
        x_T = initial(fold_in(keys, 0), sampler, (len(keys), *shape))  # as draw has it
        x0, _ = draw(keys, networks["policy"], cond, sampler, shape)
        scores = cosine(x_T, inverted(networks["policy"], x0, cond, sampler))
        x0, stability = pick(grouped(x0, n), grouped(scores, n))
        return x0, {"stability": stability}

    return Method(Needs(still=True), draw_)


def cosine(a: Array, b: Array) -> Array:
    """The cosine [B] between a and b [B, ...]."""
    a, b = (v.reshape(len(v), -1) for v in (a, b))
    return (a * b).sum(1) / jnp.maximum(jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1), 1e-12)
