"""Prompts, labelled pictures and preference pairs from names and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import critters
from .pairs import image_bytes, json_lines, picture, require


def load(source: str | Sequence[str]) -> list[str]:
    """Prompts from "critters:train[:N]" or "critters:held_out[:N]", a txt, jsonl or csv file, or a list.

    txt: one prompt a line; jsonl: objects with "prompt"; csv: a column "prompt". Raises FileNotFoundError, and
    ValueError for a file that is empty, binary or without that field.
    """
    if not isinstance(source, str):
        texts = [str(s) for s in source]
        return _some(texts, "the list of prompts")
    if source.startswith("critters:"):
        _, split, *count = source.split(":")
        return critters.prompts(split, int(count[0]) if count else 4096, seed=0)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}; give a txt, jsonl or csv file, or critters:train")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text (byte {error.start} is not UTF-8); give a txt, jsonl or csv file") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text (it holds zero bytes); give a txt, jsonl or csv file")
    try:
        if path.suffix == ".jsonl":
            texts = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
        elif path.suffix == ".csv":
            texts = [row["prompt"] for row in csv.DictReader(text.splitlines())]
        else:
            texts = [line.strip() for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path}: every entry needs a field \"prompt\" ({type(error).__name__}: {error})") from error
    return _some(texts, str(path))


def _some(texts: list[str], where: str) -> list[str]:
    if not texts:
        raise ValueError(f"{where} holds no prompts; one a line is expected")
    return texts


def critters_renders(split: str = "train", data_dir: str = "data_cache") -> tuple[np.ndarray, list[str]]:
    """(pictures, noisy captions) of the rendered critters; they are drawn on first use, in a few minutes."""
    from .critters_dataset import load_arrays

    arrays = load_arrays(split, data_dir)
    return arrays["images"], arrays["captions"]


def folder(path: str) -> tuple[np.ndarray, list[str]]:
    """(pictures, captions) of a folder with pictures of one size and a captions.jsonl of {"file", "prompt"}."""
    root = Path(path).expanduser()
    table = root / "captions.jsonl"
    if not table.is_file():
        raise FileNotFoundError(f"no captions.jsonl in {root}; one object a line: {{\"file\": ..., \"prompt\": ...}}")
    images, captions = list[np.ndarray](), list[str]()
    for number, row in json_lines(table):
        where = f"{table}, row {number}"
        require(row, ("file", "prompt"), where)
        images.append(picture(image_bytes(row["file"], [root], where), None, where))
        captions.append(str(row["prompt"]))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{where}: the pictures must be of one size; got {images[-1].shape} after {images[0].shape}")
    if not images:
        raise ValueError(f"{table} holds no rows; one object a line: {{\"file\": ..., \"prompt\": ...}}")
    return np.stack(images), captions


LABELS: dict[str, Callable[..., tuple[np.ndarray, list[str]]]] = {"critters": critters_renders, "folder": folder}


def load_pairs(path: str) -> dict[str, Any]:
    """Pairs from an .npz {"winner", "loser" uint8 [N,H,W,C], "prompts", "preference" [N]}, as `label` writes them.

    preference: the annotator's probability that the winner is the better one; 1 where it is not given.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no preference pairs at {file}: an .npz with winner, loser and prompts. To make them: "
                                f"python -m alignment_jax label --out={file}")  # fmt: skip
    with np.load(file) as stored:
        missing = [k for k in ("winner", "loser", "prompts") if k not in stored]
        if missing:
            raise ValueError(f"{file} lacks {', '.join(missing)}; it has {', '.join(stored.files)}")
        pairs = {k: stored[k] for k in ("winner", "loser")}
        pairs["prompts"] = [str(p) for p in stored["prompts"]]
        pairs["preference"] = stored["preference"] if "preference" in stored else np.ones(len(pairs["prompts"]))
    for name in ("winner", "loser"):
        if pairs[name].dtype != np.uint8 or pairs[name].ndim != 4:
            raise ValueError(f"{file}: {name} must be uint8 [N,H,W,C]; got {pairs[name].dtype} {pairs[name].shape}")
    lengths = {name: len(values) for name, values in pairs.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{file}: its arrays must be equally long; got {lengths}")
    wrong = np.flatnonzero(~((pairs["preference"] >= 0) & (pairs["preference"] <= 1)))
    if len(wrong):
        raise ValueError(f"{file}, row {wrong[0] + 1}: preference must be in [0, 1]; got {pairs['preference'][wrong[0]]}")
    return pairs
