"""What the network's output means: noise, velocity, clean sample or flow."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .schedule import expand

Array = jax.Array
PREDICTIONS = ("eps", "v", "x0", "flow")


def predict(kind: str, output: Array, x: Array, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """Clean sample and noise (x0, eps), each [B, ...] f32, that the network's output at x = alpha x0 + sigma eps means.

    eps: the noise.  x0: the clean sample.  v = alpha eps - sigma x0 (arXiv 2202.00512; alpha^2 + sigma^2 = 1).
    flow: eps - x0 (arXiv 2210.02747).  alpha, sigma: scalars or [B].
    Raises ValueError for another kind. At sigma = 0 (alpha = 0) the noise (the clean sample) of an x0 (eps) network is
    not determined by the equation; the division is kept finite and 0 is returned in its place.
    """
    output, x = jnp.asarray(output, jnp.float32), jnp.asarray(x, jnp.float32)
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    if kind == "eps":
        return _safe_divide(x - sigma * output, alpha), output
    if kind == "x0":
        return output, _safe_divide(x - alpha * output, sigma)
    if kind == "v":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if kind == "flow":
        return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    raise ValueError(f"prediction {kind!r} is not known; choose one of {', '.join(PREDICTIONS)}")


def target(kind: str, x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """What a network of this kind should put out [B, ...] for the pair (x0, eps); the inverse of `predict`."""
    alpha, sigma = expand(alpha, x0), expand(sigma, x0)
    targets = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    if kind not in targets:
        raise ValueError(f"prediction {kind!r} is not known; choose one of {', '.join(PREDICTIONS)}")
    return targets[kind]


def _safe_divide(a: Array, b: Array) -> Array:
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
