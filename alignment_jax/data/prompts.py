"""Prompts, labelled pictures, preference pairs and ranked lists from names and files."""

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


def folder(path: str) -> tuple[Any, ...]:
    """(pictures, captions) of a folder with pictures of one size and a captions.jsonl of {"file", "prompt"}.

    With a "desirable" in every row, a probability, 0 or 1: (pictures, captions, desirable [N]).
    """
    root = Path(path).expanduser()
    table = root / "captions.jsonl"
    if not table.is_file():
        raise FileNotFoundError(f"no captions.jsonl in {root}; one object a line: {{\"file\": ..., \"prompt\": ...}}")
    images, captions, desirable = list[np.ndarray](), list[str](), list[Any]()
    for number, row in json_lines(table):
        where = f"{table}, row {number}"
        require(row, ("file", "prompt"), where)
        images.append(picture(image_bytes(row["file"], [root], where), None, where))
        captions.append(str(row["prompt"]))
        if "desirable" in row:
            desirable.append(row["desirable"])
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{where}: the pictures must be of one size; got {images[-1].shape} after {images[0].shape}")
    if not images:
        raise ValueError(f"{table} holds no rows; one object a line: {{\"file\": ..., \"prompt\": ...}}")
    if not desirable:
        return np.stack(images), captions
    if len(desirable) != len(images):
        raise ValueError(f"{table}: {len(desirable)} of its {len(images)} rows have \"desirable\"; give it in all of them, or in none")
    return np.stack(images), captions, _probabilities(desirable, f"{table}: desirable")


def labelled(path: str) -> tuple[Any, ...]:
    """(pictures, captions) of an .npz {"images" uint8 [N,H,W,C], "prompts" [N]}; with "desirable" [N] also these."""
    file, stored = _stored(path, ("images", "prompts"), "labelled pictures", ("desirable",))
    _uint8(file, stored, "images", 4)
    labels = (_probabilities(stored["desirable"], f"{file}: desirable"),) if "desirable" in stored else ()
    return (stored["images"], stored["prompts"], *labels)


def both_kinds(desirable: Any) -> np.ndarray:
    """desirable [N] as float32; raises ValueError where labels are missing, or all of one kind."""
    if desirable is None:
        raise ValueError("this method learns from pictures that are marked good or bad, and config.data.labels has no \"desirable\": "
                         "a number in [0, 1] for each picture, beside \"prompt\" in captions.jsonl or as an array of the .npz")  # fmt: skip
    labels = np.asarray(desirable, np.float32)
    if labels.min() >= 0.5 or labels.max() <= 0.5:
        kind = "bad" if labels.max() <= 0.5 else "good"
        raise ValueError(f"all {len(labels)} pictures of config.data.labels are marked {kind} (desirable from {labels.min():g} to "
                         f"{labels.max():g}); this method learns from the difference: give both kinds, or use the method sft")  # fmt: skip
    return labels


LABELS: dict[str, Callable[..., tuple[Any, ...]]] = {"critters": critters_renders, "folder": folder, "npz": labelled}


def load_pairs(path: str) -> dict[str, Any]:
    """Pairs from an .npz {"winner", "loser" uint8 [N,H,W,C], "prompts", "preference" [N]}, as `label` writes them.

    preference: the annotator's probability that the winner is the better one; 1 where it is not given. Raises ValueError
    where no pair has a preference: all are ties, or pictures of themselves.
    """
    file, pairs = _stored(path, ("winner", "loser", "prompts"), "preference pairs", ("preference",),
                          "To make them: python -m alignment_jax label --out={}")  # fmt: skip
    for name in ("winner", "loser"):
        _uint8(file, pairs, name, 4)
    pairs["preference"] = _probabilities(pairs.get("preference", np.ones(len(pairs["prompts"]))), f"{file}: preference")
    if np.all(pairs["preference"] == 0.5) or np.array_equal(pairs["winner"], pairs["loser"]):
        raise ValueError(f"{file}: none of its {len(pairs['prompts'])} pairs prefers one picture to another: each is a tie "
                         "(preference 0.5) or holds one picture twice")  # fmt: skip
    return pairs


def load_lists(path: str) -> dict[str, Any]:
    """Ranked lists from an .npz {"list" uint8 [N,K,H,W,C], "score" [N,K] or [N,K,M], "prompts" [N]}.

    Higher is better; M rewards each rank on their own. NaN: that picture is not scored. Raises ValueError where K < 2, or no
    list holds two pictures of different score.
    """
    file, lists = _stored(path, ("list", "score", "prompts"), "ranked lists",
                          hint="To make them: python -m alignment_jax label --list=4 --out={}")  # fmt: skip
    _uint8(file, lists, "list", 5)
    score = lists["score"] = np.asarray(lists["score"], np.float32)
    n, k = lists["list"].shape[:2]
    if score.ndim not in (2, 3) or score.shape[1] != k or k < 2:
        raise ValueError(f"{file}: score must be [N, K] or [N, K, M] for lists of K >= 2 pictures; got {list(score.shape)} for "
                         f"{n} lists of {k}")  # fmt: skip
    known = np.where(np.isfinite(score), score, np.nan).reshape(n, k, -1)
    if not np.any(known[:, :, None] > known[:, None]):
        raise ValueError(f"{file}: none of its {n} lists ranks anything: the scores of each are equal, or missing")
    return lists


def _stored(path: str, needed: tuple[str, ...], what: str, optional: tuple[str, ...] = (), hint: str = "") -> tuple[Path, dict[str, Any]]:
    """(file, arrays) of an .npz, prompts as strings; raises where it is missing, lacks an array or they differ in length."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no {what} at {file}: an .npz with {', '.join(needed)}. {hint.format(file)}".rstrip())
    with np.load(file) as stored:
        missing = [k for k in needed if k not in stored]
        if missing:
            raise ValueError(f"{file} lacks {', '.join(missing)}; it has {', '.join(stored.files)}")
        arrays = {k: stored[k] for k in (*needed, *optional) if k in stored}
    arrays["prompts"] = [str(p) for p in arrays["prompts"]]
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1 or not lengths["prompts"]:
        raise ValueError(f"{file}: its arrays must be equally long, and not empty; got {lengths}")
    return file, arrays


def _uint8(file: Path, arrays: dict[str, Any], name: str, rank: int) -> None:
    array, axes = arrays[name], "N,K,H,W,C" if rank == 5 else "N,H,W,C"
    if array.dtype != np.uint8 or array.ndim != rank:
        raise ValueError(f"{file}: {name} must be uint8 [{axes}]; got {array.dtype} {array.shape}")


def _probabilities(values: Any, where: str) -> np.ndarray:
    """values [N] in [0, 1]; raises ValueError with the first row that is not."""
    file, _, name = where.rpartition(": ")
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must be numbers in [0, 1]; {error}") from error
    wrong = np.flatnonzero(~((array >= 0) & (array <= 1)))
    if len(wrong):
        raise ValueError(f"{file}, row {wrong[0] + 1}: {name} must be in [0, 1]; got {array[wrong[0]]}")
    return array
