"""Pictures as the towers of scorers want them: resized, cropped, normalised; with gradients, or bit for bit as the references do."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = ("diff", "exact", "tensor")


@lru_cache(maxsize=64)
def resize_matrix(size: int, source: int, antialias: bool = True) -> np.ndarray:
    """The bicubic resize of a line of `source` pixels as a matrix [size, source], float64.

    antialias: as Pillow and torch do with it, a cubic of Keys with a = -0.5 that widens when the line shrinks, weights
    renormalised at borders. Without: as torch does, a = -0.75, four taps, borders repeated: fine detail folds over.
    """
    scale = source / size
    a, width = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    reach = int(np.ceil(2 * width)) + 1
    taps = np.floor(centres).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs((taps + 0.5 - centres[:, None]) / width)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        # both drop taps whose rounded distance is past the support, and whatever lies outside
        low = np.maximum(np.floor(centres - 2 * width + 0.5), 0)[:, None]
        high = np.minimum(np.floor(centres + 2 * width + 0.5), source)[:, None]
        weights = np.where((taps >= low) & (taps < high), weights, 0.0)
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((size, source))
    np.add.at(matrix, (np.arange(size)[:, None], np.clip(taps, 0, source - 1)), weights)
    return matrix


def crop_matrices(n: int, height: int, width: int, antialias: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [n, height], [n, width]: the shorter side resized to n, the longer in proportion and cut to its middle n."""
    matrices = []
    for side in (height, width):
        size = n * side // min(height, width)
        start = (size - n) // 2
        matrices.append(resize_matrix(size, side, antialias)[start : start + n])
    return matrices[0], matrices[1]


def pixels(images: Array, n: int, *, mode: str = "diff", antialias: bool = True, mean: tuple[float, ...] = CLIP_MEAN,
           std: tuple[float, ...] = CLIP_STD) -> Array:  # fmt: skip
    """Images [B,H,W,3] in [0, 1] -> (x - mean) / std [B,n,n,3] float32 of the middle square, resized.

    mode: "diff", linear, and what lies outside [0, 1] is clipped with the gradient passed straight through; "exact", as
    Pillow does on uint8, rounded before, between and after its two passes; "tensor", as torchvision does on tensors of
    uint8 pictures: rounded before, not after. Only "diff" has a gradient. Raises ValueError for other shapes and modes.
    """
    check_mode(mode)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images {list(images.shape)}; wanted [B,H,W,3] in [0, 1]. `as_rgb` turns grey pictures and "
                         "transparent ones into that")  # fmt: skip
    rows, columns = crop_matrices(n, images.shape[1], images.shape[2], antialias)
    x = images.astype(jnp.float32)
    seen = jnp.clip(x, 0.0, 1.0)
    if mode == "diff":
        x = x + jax.lax.stop_gradient(seen - x)
        x = _product("ph,bhwc->bpwc", rows, _product("qw,bhwc->bhqc", columns, x))
    else:
        product = _pillow if mode == "exact" else _product
        x = product("ph,bhwc->bpwc", rows, product("qw,bhwc->bhqc", columns, jnp.round(255.0 * seen))) / 255.0
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def check_mode(mode: str) -> None:
    """Raises ValueError for a mode that `pixels` does not have."""
    if mode not in MODES:
        raise ValueError(f"preprocessing mode {mode!r}; choose from {', '.join(map(repr, MODES))}")


def as_rgb(array: Any) -> np.ndarray:
    """Any pictures as uint8 [N,H,W,3]: one or many, grey, RGB, or with alpha (put on white); floats are in [0, 1].

    Takes [H,W], [H,W,C], [N,H,W,C] with C of 1 to 4, or a list of these of one size. Raises ValueError for no pictures,
    empty ones, other shapes, and floats outside [0, 1].
    """
    if isinstance(array, list | tuple):
        shapes = {np.shape(a)[:2] for a in array}
        if len(shapes) > 1:
            raise ValueError(f"pictures of several sizes: {', '.join(map(str, sorted(shapes)))}; score them one by one, or resize them")
        array = np.concatenate([as_rgb(a) for a in array]) if len(array) else np.zeros((0, 0, 0, 3), np.uint8)
    x = np.asarray(array)
    x = x[..., None] if x.ndim == 2 else x
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(f"pictures of shape {list(np.shape(array))}; wanted [H,W], [H,W,C] or [N,H,W,C] with C of 1 (grey), "
                         "2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha): channels come last")  # fmt: skip
    if 0 in x.shape:
        raise ValueError(f"no pictures: the shape is {list(x.shape)}; at least one pixel of one picture is needed")
    if np.issubdtype(x.dtype, np.floating):
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"pictures of floats must lie in [0, 1]; got [{x.min():g}, {x.max():g}]. Divide by 255, or give uint8")
        x = np.round(255 * x)
    elif x.dtype == np.bool_:
        x = 255 * x.astype(np.uint8)
    elif x.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8, or floats in [0, 1]; got {x.dtype}")
    x = x.astype(np.float64)
    colour = x if x.shape[-1] % 2 else x[..., :-1]
    if x.shape[-1] % 2 == 0:
        alpha = x[..., -1:] / 255
        colour = alpha * colour + (1 - alpha) * 255
    return np.broadcast_to(np.round(colour), (*colour.shape[:3], 3)).astype(np.uint8)


def _product(indices: str, matrix: np.ndarray, x: Array) -> Array:
    return jnp.einsum(indices, jnp.asarray(matrix, jnp.float32), x, precision=jax.lax.Precision.HIGHEST)


def _pillow(indices: str, matrix: np.ndarray, x: Array) -> Array:
    """One pass as Pillow makes it, in fixed point of 22 bits: whole numbers of [0, 255] to such.

    The weights are split in two so that every sum of floats is a whole number below 2^24, which float32 holds exactly.
    """
    high, low = np.divmod(np.round(matrix * 2**22), 2**11)
    total = 2**11 * _product(indices, high, x).astype(jnp.int32) + _product(indices, low, x).astype(jnp.int32) + 2**21
    return jnp.clip(total >> 22, 0, 255).astype(jnp.float32)
