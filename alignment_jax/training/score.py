"""Scores of pictures from files, by any reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..data import prompts as prompt_files
from ..rewards.check import score_host
from ..rewards.preprocess import as_rgb
from . import build

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BATCH = 16


def score(*, reward: str, options: dict[str, Any], images: str, prompts: str | None, out: str) -> dict[str, Any]:
    """Writes {"reward", "mean", "std", "scores": [{"image", "prompt", "score"}]} and returns it.

    images: a folder of pictures, in the order of their names, or an .npy [N,H,W,C], uint8 or floats in [0, 1]. prompts: a
    file with one a picture, or one prompt for all. Raises ValueError when their numbers differ.
    """
    made = build.one_reward({"name": reward, **options} if options else reward)
    names, pictures, read = _read(Path(images).expanduser())
    texts = _prompts(prompts, len(names)) if prompts else [""] * len(names)
    if made.noisy:
        raise ValueError(f"reward {made.name!r} reads the noisy states of a model, not pictures")
    if not prompts and made.encode is not None:
        raise ValueError(f"reward {made.name!r} reads the prompt too; give --prompts, one a picture or one for all")
    values: list[float] = []
    for i in range(0, len(names), BATCH):
        # pictures of several sizes are scored one by one
        part, said = [read(p) for p in pictures[i : i + BATCH]], texts[i : i + BATCH]
        groups = [range(len(part))] if len({p.shape for p in part}) == 1 else [range(j, j + 1) for j in range(len(part))]
        for rows in groups:
            batch, words = as_rgb([part[j] for j in rows]), [said[j] for j in rows]
            if made.device:
                condition = made.encode(words) if made.encode else {}
                found = made.score(made.params, jnp.asarray(batch, jnp.float32) / 255.0, condition)
            else:
                found = score_host(made, batch, words, {}, batch_index=i)[0]
            values += np.asarray(found, np.float64).tolist()
    rows_out = [{"image": n, "prompt": t, "score": v} for n, t, v in zip(names, texts, values, strict=True)]
    result = {"reward": made.name, "mean": float(np.mean(values)), "std": float(np.std(values)), "scores": rows_out}
    file = Path(out).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _read(path: Path) -> tuple[list[str], Sequence[Any], Callable[[Any], np.ndarray]]:
    """(names, what stands for the pictures, a reader of one of these)."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        if array.ndim != 4 or not len(array):
            raise ValueError(f"{path} holds an array {list(array.shape)}; wanted [N,H,W,C] with at least one picture")
        return [f"{path.name}[{i}]" for i in range(len(array))], array, np.asarray
    if not path.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {path}; give one, or an .npy [N,H,W,C]")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    return [p.name for p in found], found, _open


def _open(file: Path) -> np.ndarray:
    """A picture as `as_rgb` takes it: what is neither grey nor RGB, with or without alpha, is converted."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{file} has more than 8 bits a channel ({image.mode}); convert it to 8 first")
            return np.asarray(image if image.mode in ("1", "L", "LA", "RGB", "RGBA") else image.convert("RGBA"))
    except OSError as error:
        raise ValueError(f"{file}, {file.stat().st_size} bytes, is no picture that can be read ({error})") from error


def _prompts(prompts: str, n: int) -> list[str]:
    is_file = Path(prompts).suffix in (".txt", ".jsonl", ".csv") or Path(prompts).is_file()
    texts = prompt_files.load(prompts) if is_file else [prompts] * n
    if len(texts) != n:
        raise ValueError(f"{prompts} holds {len(texts)} prompts for {n} pictures; one a picture is needed, in the pictures' order")
    return texts
