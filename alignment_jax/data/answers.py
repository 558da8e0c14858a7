"""What people answered about pairs and lists of pictures, as a reward model is trained on it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .pairs import ArrayPairs
from .pairs_dataset import pair_data
from .prompts import load_lists, load_pairs
from .sources import pair_reader


class Lists(NamedTuple):
    """Ranked pictures [N,K,H,W,C] uint8 of prompts: ranks int [N,K], 1 is best, equal ones are ties, 0 is not ranked."""

    pictures: np.ndarray
    ranks: np.ndarray
    prompts: list[str]

    def sides(self, rows: np.ndarray) -> dict[str, Any]:
        """{"list" [B,K,H,W,C], "ranks" [B,K]} of the lists `rows`."""
        return {"list": self.pictures[rows], "ranks": self.ranks[rows]}


class Answers(NamedTuple):
    """Answers about pairs: p [N] that a is the better one, weight [N], annotator [N], an index into people.

    row [N]: the pair that was asked about, as `read` counts them, whose winner is a where `first` [N]. ordered: a was shown first.
    lists: what is trained on where the pairs are those within ranked lists.
    """

    read: Callable[[np.ndarray], dict[str, Any]]
    row: np.ndarray
    first: np.ndarray
    prompts: list[str]
    p: np.ndarray
    weight: np.ndarray
    annotator: np.ndarray
    people: tuple[str, ...]
    ordered: bool
    lists: Lists | None = None

    def sides(self, rows: np.ndarray) -> dict[str, Any]:
        """{"a", "b" uint8 [B,H,W,C], "p", "weight", "annotator" [B]} of the answers `rows`."""
        found, first = self.read(self.row[rows]), self.first[rows, None, None, None]
        a, b = (np.where(first, found[x], found[y]) for x, y in (("winner", "loser"), ("loser", "winner")))
        return {"a": a, "b": b, "p": self.p[rows].astype(np.float32), "weight": self.weight[rows], "annotator": self.annotator[rows]}


def load(source: str, data_dir: str, size: tuple[int, int]) -> Answers:
    """The pairs of an .npz of `label`, each annotator's answer apart, or of any source that `data.pairs` reads.

    Pictures are brought to size = (H, W). An .npz of lists gives all pairs within them, for measuring, and `lists` to train on.
    """
    if source.endswith(".npz") and _holds_lists(source):
        return _listed(source, size)
    if source.endswith(".npz"):
        arrays = load_pairs(source)
        n = len(arrays["prompts"])
        with np.load(Path(source).expanduser()) as stored:
            several = "answers" in stored and "annotators" in stored
            p = stored["answers"] if several else arrays["preference"][:, None]
            names = stored["annotators"] if several else stored["annotator"][:1] if "annotator" in stored else [""]
            apart = None if several or "annotator" not in stored else [str(name) for name in stored["annotator"]]
        who = apart or [str(name) for name in names] * n
        return _answers(pair_reader(ArrayPairs(arrays), size), np.repeat(np.arange(n), p.shape[1]), arrays["prompts"], p.reshape(-1),
                        np.full(p.size, 1 / p.shape[1]), who, first=np.ones(p.size, bool), ordered=False)  # fmt: skip
    records = pair_data(source, data_dir)
    facts = [(r.prompt, r.p_a, r.weight, r.annotator) for r in (records[i] for i in range(len(records)))]
    prompts, p_a, weight, who = (list(column) for column in zip(*facts, strict=True))
    p = np.array(p_a)
    return _answers(pair_reader(records, size), np.arange(len(p)), prompts, p, np.array(weight), who, first=p >= 0.5,
                    ordered=bool((p < 0.5).any()))  # fmt: skip


def _holds_lists(source: str) -> bool:
    file = Path(source).expanduser()
    if not file.is_file():
        return False
    with np.load(file) as stored:
        return "list" in stored


def _listed(source: str, size: tuple[int, int]) -> Answers:
    lists = load_lists(source)
    pictures, score = lists["list"], lists["score"]
    if score.ndim != 2:
        raise ValueError(f"{source} ranks each picture by {score.shape[2]} scores, and a reward model learns one order; store score [N, K]")
    if pictures.shape[2:4] != size:
        raise ValueError(f"{source}: lists must hold pictures of {size[0]} x {size[1]}; got {pictures.shape[2]} x {pictures.shape[3]}")
    known = np.isfinite(score)
    filled = np.where(known, score, -np.inf)
    ranks = np.where(known, 1 + (filled[:, None, :] > filled[:, :, None]).sum(2), 0)
    n, i, j = (x.ravel() for x in np.meshgrid(np.arange(len(score)), *[np.arange(score.shape[1])] * 2, indexing="ij"))
    n, i, j = (x[(known[n, i] & known[n, j]) & ((score[n, i] > score[n, j]) | ((score[n, i] == score[n, j]) & (i < j)))] for x in (n, i, j))

    def read(rows: np.ndarray) -> dict[str, Any]:
        return {"winner": pictures[n[rows], i[rows]], "loser": pictures[n[rows], j[rows]]}

    p = np.where(score[n, i] > score[n, j], 1.0, 0.5)
    made = _answers(read, np.arange(len(n)), [lists["prompts"][k] for k in n], p, 1 / np.bincount(n)[n], [""] * len(n),
                    first=np.ones(len(n), bool), ordered=False)  # fmt: skip
    return made._replace(lists=Lists(pictures, ranks, lists["prompts"]))


def _answers(read: Callable[[np.ndarray], dict[str, Any]], row: np.ndarray, prompts: list[str], p: np.ndarray, weight: np.ndarray,
             who: list[str], *, first: np.ndarray, ordered: bool) -> Answers:  # fmt: skip
    people = tuple(sorted(set(who)))
    annotator = np.array([people.index(name) for name in who])
    return Answers(read, row, first, [prompts[i] for i in row], p, weight.astype(np.float32), annotator, people, ordered)


def split(prompts: list[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: a share of the prompts, by a hash, so that no prompt is on both sides."""
    held = np.array([zlib.crc32(text.encode()) % 10_000 < share * 10_000 for text in prompts])
    if not 0 < held.sum() < len(held):
        raise ValueError(f"held_out={share} of the prompts leaves {held.sum()} of {len(held)} pairs for measuring and "
                         f"{(~held).sum()} for training; there are {len(set(prompts))} different prompts")  # fmt: skip
    return np.flatnonzero(~held), np.flatnonzero(held)
