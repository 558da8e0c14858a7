"""Wrappers that turn a denoiser into another one with the same signature denoise(x, t, cond) -> output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .schedule import expand

Array = jax.Array
Denoise = Callable[[Array, Array, Any], Array]
Interval = tuple[float, float] | None


def guided(denoise: Denoise, null_cond: Any, scale: float, *, rescale: float = 0.0, detach_null: bool = False,
           interval: Interval = None) -> Denoise:  # fmt: skip
    """Classifier-free guidance: out = out_null + scale (out_cond - out_null) (arXiv 2207.12598), both in one batch of 2B.

    null_cond: the empty or negative prompt's condition, a tree like cond with leading axis 1 or B. scale = 1 is the network
    itself. rescale: the share of the guided output that is brought back to the conditional one's spread (arXiv 2305.08891,
    section 3.4). detach_null: no gradient through the unconditional half (Flow-GRPO); by default both halves have one.
    interval: (low, high), the network's times between which there is guidance (arXiv 2404.07724); None: at all of them.
    """
    if scale == 1.0:
        return denoise

    def both(x: Array, t: Array, cond: Any) -> tuple[Array, Array]:
        pair = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape)]), cond, null_cond)
        with_cond, without = jnp.split(denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), pair), 2)
        return with_cond, jax.lax.stop_gradient(without) if detach_null else without

    return _guidance(both, denoise, scale, rescale, interval)


def guided_away(positive: Denoise, negative: Denoise, null_cond: Any, scale: float, *, rescale: float = 0.0,
                interval: Interval = None) -> Denoise:  # fmt: skip
    """Guidance away from another network: out = out_neg + scale (out_pos - out_neg).

    null_cond, the empty or negative prompt's condition (leading axis 1 or B), is what negative sees: then it is a network
    trained on the swapped labels (NPO, arXiv 2505.11245), and with negative = positive this is `guided`. None: both see the
    same condition, and negative is a smaller or less trained version of positive (autoguidance, arXiv 2406.02507). At scale 1
    it is positive alone. A negative network that has drifted far gives large differences: lower the scale, or draw with one
    mixed with the positive's parameters. rescale, interval: as in `guided`.
    """
    if scale == 1.0:
        return positive

    def both(x: Array, t: Array, cond: Any) -> tuple[Array, Array]:
        seen = cond if null_cond is None else jax.tree.map(lambda c, n: jnp.broadcast_to(n, c.shape), cond, null_cond)
        return positive(x, t, cond), negative(x, t, seen)

    return _guidance(both, positive, scale, rescale, interval)


def _guidance(both: Callable[..., tuple[Array, Array]], alone: Denoise, scale: float, rescale: float, interval: Interval) -> Denoise:
    """Guidance between the outputs of both(x, t, cond); a call with no time in the interval is one of alone(x, t, cond)."""

    def whole(x: Array, t: Array, cond: Any) -> tuple[Array, Array]:
        with_cond, without = both(x, t, cond)
        out = without + scale * (with_cond - without)
        if rescale:
            axes = tuple(range(1, out.ndim))
            out = out * (1 - rescale + rescale * with_cond.std(axes, keepdims=True) / out.std(axes, keepdims=True))
        return out, with_cond

    if interval is None:
        return lambda x, t, cond: whole(x, t, cond)[0]
    low, high = interval

    def within(x: Array, t: Array, cond: Any) -> Array:
        inside = (low <= t) & (t <= high)
        some = lambda: jnp.where(expand(inside, x), *whole(x, t, cond))  # noqa: E731
        return jax.lax.cond(inside.any(), some, lambda: alone(x, t, cond))

    return within


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
