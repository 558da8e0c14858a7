"""Endless, seeded, resumable streams of host batches: prompts, labelled pictures, preference pairs, ranked lists."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .pairs import picture

Batch = dict[str, Any]


class Chance:
    """numpy's generator for the rows of one process: it draws what one process would draw for all rows, and gives its own."""

    def __init__(self, seed: tuple[int, int], shard: tuple[int, int]):
        self._rng, (self._index, self._count) = np.random.default_rng(seed), shard

    def _own(self, drawn: np.ndarray) -> np.ndarray:
        n = len(drawn) // self._count
        return drawn[self._index * n : (self._index + 1) * n]

    def random(self, n: int) -> np.ndarray:
        """Uniform numbers [n]."""
        return self._own(self._rng.random(n * self._count))

    def standard_normal(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """Normal numbers [n, ...]."""
        return self._own(self._rng.standard_normal((shape[0] * self._count, *shape[1:]), dtype))


class Source:
    """Batches in a shuffled order that get_state and set_state resume exactly (grain under it).

    make(indices [B], chance) -> batch: called on the host for every batch. shard: (process, processes); each makes its own rows
    of the same batches, so that a run is the same with any number of them, and goes on with another.
    """

    def __init__(self, n: int, batch: int, seed: int, make: Callable[[np.ndarray, Chance], Batch],
                 shard: tuple[int, int] = (0, 1)):  # fmt: skip
        import grain

        if n < 1:
            raise ValueError("the data set is empty; nothing can be drawn from it")
        order = grain.MapDataset.range(n).seed(seed).shuffle().repeat()
        # the order has no end, so nothing is dropped; rounding its length up would overflow at batches of 1
        # by this thread, when asked: numbers cost nothing, and threads that draw hundreds ahead hold the interpreter for seconds
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(order.batch(batch * shard[1], drop_remainder=True).to_iter_dataset(read_options=alone))
        self._rows = slice(shard[0] * batch, (shard[0] + 1) * batch)
        self._make, self._seed, self._shard, self._position = make, seed, shard, 0
        self.prompts: Sequence[str] = ()  # what a prompt source draws from

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        indices = np.asarray(next(self._iterator))[self._rows]
        chance = Chance((self._seed, self._position), self._shard)
        self._position += 1
        return self._make(indices, chance)

    def get_state(self) -> dict[str, Any]:
        """What set_state needs to go on with the batch after the last one."""
        return {"iterator": self._iterator.get_state(), "position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where get_state was called."""
        self._iterator.set_state(state["iterator"])
        self._position = state["position"]


def prompt_source(prompts: Sequence[str], tokenize: Callable[[Sequence[str]], np.ndarray],
                  encode: Callable[[Sequence[str]], Any] | None, *, prompts_per_batch: int, group: int, seed: int,
                  shard: tuple[int, int] = (0, 1)) -> Source:  # fmt: skip
    """Batches of prompts_per_batch x group samples, the samples of one prompt side by side."""
    tokens = tokenize(prompts)

    def make(indices: np.ndarray, chance: Chance) -> Batch:
        rows = np.repeat(indices, group)
        names = [prompts[i] for i in rows]
        batch = {"prompts": names, "prompt_id": rows.astype(np.int32), "tokens": tokens[rows]}
        return batch | ({"condition": encode(names)} if encode else {})

    source = Source(len(prompts), prompts_per_batch, seed, make, shard)
    source.prompts = prompts
    return source


def label_source(images: np.ndarray, captions: Sequence[str], tokenize: Callable[[Sequence[str]], np.ndarray], *,
                 batch: int, seed: int, drop: float = 0.0, shard: tuple[int, int] = (0, 1),
                 desirable: np.ndarray | None = None, encode: Callable[[Sequence[str]], Any] | None = None) -> Source:  # fmt: skip
    """Batches of pictures uint8 [B,H,W,C] with their captions, and desirable [B] where it is given; a share `drop` of the
    captions is made empty.

    encode: a reward's, for methods that score what the policy draws for a caption; the reward reads it dropped or not.
    """
    return _array_source({"images": images} | ({} if desirable is None else {"desirable": desirable}), captions, tokenize,
                         batch=batch, seed=seed, drop=drop, shard=shard, encode=encode)  # fmt: skip


def list_source(lists: dict[str, Any], tokenize: Callable[[Sequence[str]], np.ndarray], *, batch: int, seed: int,
                drop: float = 0.0, shard: tuple[int, int] = (0, 1)) -> Source:  # fmt: skip
    """Batches of ranked lists of `prompts.load_lists`: list uint8 [B,K,H,W,C], score [B,K] or [B,K,M], one prompt a list; a
    share `drop` of the prompts is made empty."""
    return _array_source({k: lists[k] for k in ("list", "score")}, lists["prompts"], tokenize, batch=batch, seed=seed, drop=drop,
                         shard=shard)  # fmt: skip


def _array_source(arrays: dict[str, np.ndarray], texts: Sequence[str], tokenize: Callable[[Sequence[str]], np.ndarray], *,
                  batch: int, seed: int, drop: float, shard: tuple[int, int],
                  encode: Callable[[Sequence[str]], Any] | None = None) -> Source:  # fmt: skip
    tokens, null = tokenize(texts), tokenize([""])[0]

    def make(indices: np.ndarray, chance: Chance) -> Batch:
        dropped, names = chance.random(len(indices)) < drop, [texts[i] for i in indices]
        batch = {**{k: v[indices] for k, v in arrays.items()}, "prompts": names, "prompt_id": indices.astype(np.int32),
                 "tokens": _emptied(tokens[indices], dropped, null)}  # fmt: skip
        return batch | ({"condition": encode(names)} if encode else {})

    if encode:
        encode(texts)  # a caption that the reward cannot read is said now, not in the middle of a run
    source = Source(len(texts), batch, seed, make, shard)
    source.prompts = texts
    return source


def pair_reader(pairs: Any, size: tuple[int, int]) -> Callable[[np.ndarray], Batch]:
    """read(rows) of pairs[row] -> PairRecord: winner and loser uint8 [B,H,W,C], prompts, preference [B] in [.5, 1], weight
    [B]. A tie keeps its order and the preference 1/2.

    Encoded pictures are read and brought to size = (H, W), arrays stay as they are.
    """  # fmt: skip
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # decoding leaves Python's lock

    def read(rows: np.ndarray) -> Batch:
        records = [pairs[int(row)] for row in rows]
        p = np.array([r.p_a for r in records])
        where = [f"pair {row} ({r.source}, prompt {r.prompt!r})" for row, r in zip(rows, records)]
        a = np.stack(list(pool.map(lambda r, w: picture(r.image_a, size, f"{w}, image_a"), records, where)))
        b = np.stack(list(pool.map(lambda r, w: picture(r.image_b, size, f"{w}, image_b"), records, where)))
        first = (p >= 0.5)[:, None, None, None]
        return {"winner": np.where(first, a, b), "loser": np.where(first, b, a), "prompts": [r.prompt for r in records],
                "preference": np.maximum(p, 1 - p).astype(np.float32),
                "weight": np.array([r.weight for r in records], np.float32)}  # fmt: skip

    return read


def pair_source(pairs: Any, tokenize: Callable[[Sequence[str]], np.ndarray], size: tuple[int, int], *, batch: int,
                seed: int, drop: float = 0.0, shard: tuple[int, int] = (0, 1)) -> Source:  # fmt: skip
    """Batches of preference pairs as pair_reader reads them, with tokens; the pictures are decoded batch by batch. A share
    `drop` of the prompts is made empty."""
    read, null = pair_reader(pairs, size), tokenize([""])[0]
    tokens = tokenize(pairs.prompts) if hasattr(pairs, "prompts") else None  # in memory: what is too long is said now

    def make(indices: np.ndarray, chance: Chance) -> Batch:
        rows = read(indices)
        texts = rows.pop("prompts")
        found = tokenize(texts) if tokens is None else tokens[indices]
        return {**rows, "tokens": _emptied(found, chance.random(len(indices)) < drop, null), "prompt_id": indices.astype(np.int32)}

    return Source(len(pairs), batch, seed, make, shard)


def _emptied(tokens: np.ndarray, dropped: np.ndarray, null: np.ndarray) -> np.ndarray:
    """tokens [B, ...] with those of the empty prompt where dropped [B]."""
    return np.where(dropped.reshape(-1, *[1] * null.ndim), null, tokens)
