"""Convolutions whose gradients are convolutions and products too, which XLA on CPU runs as fast inside a loop as outside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Pairs = tuple[tuple[int, int], ...]
NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(x: Array, kernel: Array, strides: tuple[int, ...], padding: Any, **more: Any) -> Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`, with gradients of its own on CPU where dilation and groups are 1.

    XLA's transposed convolutions, reversed or over the batch, are 10 to 40 times slower in the body of a `while` on CPU than
    outside it, so that a chain's backward had to be unrolled; these are not (docs/benchmarks.md).
    """
    dilated = any(n != 1 for name in ("lhs_dilation", "rhs_dilation") for n in more.get(name) or ())
    if jax.default_backend() != "cpu" or x.ndim != 4 or dilated or more.get("feature_group_count", 1) != 1:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    strides, padding = tuple(strides), tuple((int(a), int(b)) for a, b in padding)
    if strides == kernel.shape[:2] and padding == ((0, 0), (0, 0)):
        return _patches(x, kernel)
    return _convolution(x, kernel, strides, padding)


Conv = partial(nn.Conv, conv_general_dilated=convolution)


def _patches(x: Array, kernel: Array) -> Array:
    """The convolution whose windows lie side by side, as one product; what fills no window is left out."""
    (b, height, width, c), (p, q) = x.shape, kernel.shape[:2]
    windows = x[:, : height // p * p, : width // q * q].reshape(b, height // p, p, width // q, q, c)
    return jnp.einsum("bhpwqi,pqio->bhwo", windows, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(x: Array, kernel: Array, strides: tuple[int, ...], padding: Pairs) -> Array:
    """y[b,h,w,o] = sum x[b, s h + a - p, s w + c - q, i] kernel[a,c,i,o]; x [B,H,W,I], kernel [A,C,I,O]."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def _forward(x: Array, kernel: Array, strides: tuple[int, ...], padding: Pairs) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _backward(strides: tuple[int, ...], padding: Pairs, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    # by x: dy, with zeros where a stride left out, convolved with the kernel turned round
    zero = jnp.zeros((), dy.dtype)
    apart = jax.lax.pad(dy, zero, [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    pads = [(k - 1 - low, n + low - wide) for k, n, (low, _), wide in zip(kernel.shape, x.shape[1:3], padding, apart.shape[1:3])]
    dx = jax.lax.conv_general_dilated(apart, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), (1, 1), pads, dimension_numbers=NHWC)
    # by the kernel: one product for each of its places
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (height, width), (s, r) = dy.shape[1:3], strides

    def place(a: int, c: int) -> Array:
        part = padded[:, a : a + (height - 1) * s + 1 : s, c : c + (width - 1) * r + 1 : r]
        return jnp.einsum("bhwi,bhwo->io", part, dy, preferred_element_type=jnp.float32)

    dk = jnp.stack([jnp.stack([place(a, c) for c in range(kernel.shape[1])]) for a in range(kernel.shape[0])])
    return dx, dk.astype(kernel.dtype)


_convolution.defvjp(_forward, _backward)
