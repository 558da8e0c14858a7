"""Parameters in safetensors files: flat names "a/b/kernel", read strictly."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any


def save(path: str | Path, params: Tree, *, dtype: Any = None, metadata: dict[str, str] | None = None) -> None:
    """Writes a tree of parameters; dtype: what floating arrays are stored as (np.float16 for shipped weights)."""
    from safetensors.numpy import save_file

    def stored(x: Any) -> np.ndarray:
        x = np.asarray(x)
        # not ascontiguousarray, which makes a vector of a scalar
        return np.asarray(x, dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype, order="C")

    flat = {k: stored(v) for k, v in flatten_dict(jax.device_get(params), sep="/").items()}
    temporary = Path(path).with_suffix(".tmp")
    save_file(flat, temporary, metadata=metadata)
    temporary.replace(path)


def load(path: str | Path, like: Tree = None) -> Tree:
    """Reads a tree of parameters as float32; with `like` (arrays or shapes), strictly.

    Raises FileNotFoundError, and ValueError for a damaged file or for missing, unexpected or misshapen entries: the
    first ten of each, with the nearest names.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a .safetensors file")
    try:
        flat = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {path.stat().st_size} bytes. "
                         "Copy it again.") from error  # fmt: skip
    flat = {k: v.astype(np.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in flat.items()}
    if like is not None:
        check(flat, {k: tuple(v.shape) for k, v in flatten_dict(like, sep="/").items()}, str(path))
    return unflatten_dict(flat, sep="/")


def check(flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ValueError when names or shapes of `flat` (arrays or shapes) differ from what the model wants."""
    missing, unexpected = sorted(shapes.keys() - flat.keys()), sorted(flat.keys() - shapes.keys())
    wrong = [f"{k}: {flat[k].shape}, wanted {shapes[k]}" for k in sorted(shapes.keys() & flat.keys())
             if tuple(flat[k].shape) != shapes[k]]  # fmt: skip
    if not (missing or unexpected or wrong):
        return

    def near(name: str, names: list[str]) -> str:
        found = difflib.get_close_matches(name, names, 1)
        return f"{name} (nearest: {found[0]})" if found else name

    lines = [f"{where} does not fit the model."]
    lines += [f"  missing {len(missing)}: " + ", ".join(near(m, unexpected) for m in missing[:10])] if missing else []
    lines += [f"  unexpected {len(unexpected)}: " + ", ".join(unexpected[:10])] if unexpected else []
    lines += [f"  wrong shape {len(wrong)}: " + ", ".join(wrong[:10])] if wrong else []
    raise ValueError("\n".join(lines))
