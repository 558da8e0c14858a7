"""Wrappers that turn a denoiser into another one with the same signature denoise(x, t, cond) -> output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Denoise = Callable[[Array, Array, Any], Array]


def guided(denoise: Denoise, null_cond: Any, scale: float, *, rescale: float = 0.0, detach_null: bool = False) -> Denoise:
    """Classifier-free guidance: out = out_null + scale (out_cond - out_null) (arXiv 2207.12598), both in one batch of 2B.

    null_cond: the empty or negative prompt's condition, a tree like cond with leading axis 1 or B. scale = 1 is the network
    itself. rescale: the share of the guided output that is brought back to the conditional one's spread (arXiv 2305.08891,
    section 3.4). detach_null: no gradient through the unconditional half (Flow-GRPO); by default both halves have one.
    """
    if scale == 1.0:
        return denoise

    def apply(x: Array, t: Array, cond: Any) -> Array:
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape)]), cond, null_cond)
        with_cond, without = jnp.split(denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
        without = jax.lax.stop_gradient(without) if detach_null else without
        return _guidance(with_cond, without, scale, rescale)

    return apply


def guided_away(positive: Denoise, negative: Denoise, null_cond: Any, scale: float, *, rescale: float = 0.0) -> Denoise:
    """Guidance away from another network: out = neg(x, null) + scale (pos(x, cond) - neg(x, null)) (NPO, arXiv 2505.11245).

    negative: a network trained on the swapped labels, with the empty or negative prompt's condition (leading axis 1 or B).
    With negative = positive this is `guided`, at scale 1 it is positive alone. A negative network that has drifted far gives
    large differences: lower the scale, or draw with one mixed with the positive's parameters. rescale: as in `guided`.
    """
    if scale == 1.0:
        return positive

    def apply(x: Array, t: Array, cond: Any) -> Array:
        null = jax.tree.map(lambda c, n: jnp.broadcast_to(n, c.shape), cond, null_cond)
        return _guidance(positive(x, t, cond), negative(x, t, null), scale, rescale)

    return apply


def _guidance(with_cond: Array, without: Array, scale: float, rescale: float) -> Array:
    out = without + scale * (with_cond - without)
    if rescale:
        axes = tuple(range(1, out.ndim))
        out = out * (1 - rescale + rescale * with_cond.std(axes, keepdims=True) / out.std(axes, keepdims=True))
    return out


def blended(policy: Denoise, reference: Denoise, lam: Array | float) -> Denoise:
    """Decode-time realignment: out = out_ref + lam (out_policy - out_ref) (DeRa, arXiv 2402.02992, for diffusion).

    lam 0: the reference; 1: the policy; above 1 extrapolates. The target is p_ref^{1-lam} p_policy^{lam}, so one tuned
    model draws the whole reward-KL curve. lam is a scalar or [B].
    """

    def apply(x: Array, t: Array, cond: Any) -> Array:
        ref, tuned = reference(x, t, cond), policy(x, t, cond)
        weight = jnp.asarray(lam).reshape(jnp.shape(lam) + (1,) * (x.ndim - jnp.ndim(lam)))
        # written around the nearer end, so that lam = 0 and lam = 1 are bitwise the two networks
        return jnp.where(weight == 1, tuned, ref + weight * (tuned - ref))

    return apply
