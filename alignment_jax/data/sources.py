"""Endless, seeded, resumable streams of host batches: prompts, labelled pictures, preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Batch = dict[str, Any]


class Source:
    """Batches in a shuffled order that get_state and set_state resume exactly (grain under it).

    make(indices [B], rng) -> batch: called on the host for every batch, with a generator of its own.
    Every process reads its own shard of the order.
    """

    def __init__(self, n: int, batch: int, seed: int, make: Callable[[np.ndarray, np.random.Generator], Batch],
                 shard: tuple[int, int] = (0, 1)):  # fmt: skip
        import grain

        if n < 1:
            raise ValueError("the data set is empty; nothing can be drawn from it")
        index, count = shard
        order = grain.MapDataset.range(n).seed(seed).shuffle().repeat()[index::count]
        self._iterator = iter(order.batch(batch).to_iter_dataset())
        self._make, self._seed, self._position = make, seed, 0
        self.prompts: Sequence[str] = ()  # what a prompt source draws from

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        indices = np.asarray(next(self._iterator))
        rng = np.random.default_rng((self._seed, self._position))
        self._position += 1
        return self._make(indices, rng)

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

    def make(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        rows = np.repeat(indices, group)
        names = [prompts[i] for i in rows]
        batch = {"prompts": names, "prompt_id": rows.astype(np.int32), "tokens": tokens[rows]}
        return batch | ({"condition": encode(names)} if encode else {})

    source = Source(len(prompts), prompts_per_batch, seed, make, shard)
    source.prompts = prompts
    return source


def label_source(images: np.ndarray, captions: Sequence[str], tokenize: Callable[[Sequence[str]], np.ndarray], *,
                 batch: int, seed: int, drop: float = 0.0, shard: tuple[int, int] = (0, 1)) -> Source:  # fmt: skip
    """Batches of pictures uint8 [B,H,W,C] with their captions; a share `drop` of the captions is made empty."""
    tokens, null = tokenize(captions), tokenize([""])[0]

    def make(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        dropped = rng.random(len(indices)) < drop
        return {"images": images[indices], "tokens": np.where(dropped[:, None], null, tokens[indices]),
                "prompt_id": indices.astype(np.int32)}  # fmt: skip

    return Source(len(images), batch, seed, make, shard)


def pair_source(pairs: dict[str, Any], tokenize: Callable[[Sequence[str]], np.ndarray], *, batch: int, seed: int,
                shard: tuple[int, int] = (0, 1)) -> Source:  # fmt: skip
    """Batches of preference pairs: winner and loser uint8 [B,H,W,C] of the same prompt, preference [B]."""
    tokens = tokenize(pairs["prompts"])

    def make(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        return {"winner": pairs["winner"][indices], "loser": pairs["loser"][indices], "tokens": tokens[indices],
                "preference": pairs["preference"][indices].astype(np.float32),
                "prompt_id": indices.astype(np.int32)}  # fmt: skip

    return Source(len(tokens), batch, seed, make, shard)
