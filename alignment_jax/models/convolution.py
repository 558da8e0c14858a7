"""Convolutions whose gradients are convolutions and products too, which XLA on CPU runs as fast inside a loop as outside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..platform import platform

Array = jax.Array
Pairs = tuple[tuple[int, int], ...]
NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(x: Array, kernel: Array, strides: tuple[int, ...], padding: Any, **more: Any) -> Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv`, with gradients of its own on CPU where dilation and groups are 1.

    XLA's transposed convolutions, reversed or over the batch, are 10 to 40 times slower in the body of a `while` on CPU than
    outside it, so that a chain's backward had to be unrolled; these are not (docs/benchmarks.md).
    """
    dilated = any(n != 1 for name in ("lhs_dilation", "rhs_dilation") for n in more.get(name) or ())
    if platform() != "cpu" or x.ndim != 4 or dilated or more.get("feature_group_count", 1) != 1:
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
    (height, width), (rows, columns) = x.shape[1:3], kernel.shape[:2]
    # zeros where a stride left out and round the border: every place of the kernel sees a window [height, width] of this
    edges = [(k - 1 - low, n + low - (m - 1) * s - 1, s - 1)
             for k, n, (low, _), m, s in zip(kernel.shape, x.shape[1:3], padding, dy.shape[1:3], strides)]  # fmt: skip
    around = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    dx = jax.lax.conv_general_dilated(around, turned, (1, 1), "VALID", dimension_numbers=NHWC)

    def place(a: int, c: int) -> Array:
        window = around[:, rows - 1 - a : rows - 1 - a + height, columns - 1 - c : columns - 1 - c + width]
        return jnp.einsum("bhwi,bhwo->io", x, window, preferred_element_type=jnp.float32)

    dk = jnp.stack([jnp.stack([place(a, c) for c in range(columns)]) for a in range(rows)])
    return dx, dk.astype(kernel.dtype)


_convolution.defvjp(_forward, _backward)
