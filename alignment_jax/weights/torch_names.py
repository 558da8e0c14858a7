"""Names and layouts of PyTorch checkpoints: one rule, both ways, derived from the tree of parameters itself.

Modules carry the checkpoint's own names, dots included ("down_blocks.0/resnets.1/conv1/kernel"), so that a flat path
becomes a checkpoint's name by "/" -> "." and a new ending, and nothing has to be guessed on the way back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any
ENDINGS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str) -> str:
    """A flat path "a.0/conv/kernel" as the checkpoint's name "a.0.conv.weight"; other endings stay as they are."""
    stem, _, last = path.rpartition("/")
    return f"{stem}/{ENDINGS.get(last, last)}".lstrip("/").replace("/", ".")


def to_torch(path: str, value: Any) -> np.ndarray:
    """A parameter in PyTorch's layout: kernels HWIO -> OIHW and [in, out] -> [out, in]; everything else as it is."""
    value = np.asarray(value)
    if path.rpartition("/")[2] != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def from_torch(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`; a view, not a copy."""
    if path.rpartition("/")[2] != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter in PyTorch's layout."""
    if path.rpartition("/")[2] != "kernel":
        return tuple(shape)
    return tuple(shape[::-1]) if len(shape) == 2 else tuple(shape[i] for i in (3, 2, 0, 1))


def names(tree: Tree) -> dict[str, str]:
    """{checkpoint's name: flat path} of every parameter of a tree (arrays or shapes)."""
    return {torch_name(path): path for path in flatten_dict(tree, sep="/")}


def export_torch(tree: Tree) -> dict[str, np.ndarray]:
    """A tree of parameters as {checkpoint's name: array in PyTorch's layout}."""
    return {torch_name(path): to_torch(path, value) for path, value in flatten_dict(tree, sep="/").items()}


def import_torch(tensors: dict[str, np.ndarray], like: Tree) -> Tree:
    """The inverse of `export_torch`, shaped like `like` (arrays or shapes); names must be those of `names(like)`."""
    return unflatten_dict({path: from_torch(path, tensors[name]) for name, path in names(like).items()}, sep="/")
