"""Random changes of pictures that do not change what they show; differentiable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def augment(key: Array, images: Array, strength: float = 1.0) -> Array:
    """Shift, blur, colour, contrast, noise, low-frequency noise and quantisation of images [B,H,W,C] in [0, 1].

    A scorer that is only ever differentiated through random changes cannot be satisfied by a pattern of single pixels.
    Gradients pass the clamp and the rounding straight through.
    """
    b, height, width, channels = images.shape
    k = jax.random.split(key, 8)
    uniform = lambda key, shape, low, high: jax.random.uniform(key, shape, minval=low, maxval=high)  # noqa: E731
    per_image = (b, 1, 1, 1)

    shift = jax.random.randint(k[0], (b, 2), -2, 3)
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    x = jax.vmap(lambda im, s: jax.lax.dynamic_slice(im, (2 + s[0], 2 + s[1], 0), (height, width, channels)))(padded, shift)

    # a 3-tap blur in both directions, of a random width between none and a full box
    side = uniform(k[1], per_image, 0.0, 0.28) * strength * (uniform(k[2], per_image, 0.0, 1.0) < 0.5)
    for axis in (1, 2):
        edge = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
        before, after = (jax.lax.slice_in_dim(edge, i, i + x.shape[axis], axis=axis) for i in (0, 2))
        x = (1 - 2 * side) * x + side * (before + after)

    gain = 1 + strength * uniform(k[3], (b, 1, 1, channels), -0.12, 0.12)
    offset = strength * uniform(k[4], (b, 1, 1, channels), -0.06, 0.06)
    contrast = 1 + strength * uniform(k[5], per_image, -0.2, 0.2)
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * contrast * gain + mean + offset

    noise_key, low_key, size_key = jax.random.split(k[6], 3)
    sizes = strength * jnp.array([0.08, 0.05]).reshape(2, 1, 1, 1, 1) * uniform(size_key, (2, *per_image), 0.0, 1.0)
    coarse = jax.random.normal(low_key, (b, height // 8, width // 8, channels))
    low = jnp.repeat(jnp.repeat(coarse, 8, 1), 8, 2)
    x = x + sizes[0] * jax.random.normal(noise_key, x.shape) + sizes[1] * low

    levels = 2.0 ** uniform(k[7], per_image, 4.0, 8.0) - 1.0
    seen = jnp.clip(jnp.round(x * levels) / levels, 0.0, 1.0)
    return x + jax.lax.stop_gradient(seen - x)
