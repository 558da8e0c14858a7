"""The batches of a run: how large they are, and the stream of data that a config names."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..data import prompts as prompt_files
from ..data.pairs import FORMS, ArrayPairs
from ..data.pairs_dataset import pair_data
from ..data.sources import Source, label_source, list_source, pair_source, prompt_source
from ..models.bundle import ModelBundle
from ..rewards.base import Reward
from . import sharding
from .names import named
from .precompute import latent_source


def batch_sizes(config: Any, shards: int | None = None) -> tuple[int, int, int]:
    """(prompts, group, microbatch) of config.batch; the product of the first two is cut into microbatches, these over `shards`.

    shards: default those of config.sharding on the devices at hand.
    """
    prompts, group = int(config.batch.prompts), int(config.batch.get("group", 1))
    micro = int(config.batch.get("microbatch", 0)) or prompts * group
    shards = sharding.shards(sharding.layout(config.get("sharding", {})).mesh) if shards is None else shards
    if min(prompts, group, micro) < 1:
        raise ValueError(f"batch sizes must be at least 1; got prompts {prompts}, group {group}, microbatch {micro}")
    if (prompts * group) % shards or micro % shards:
        up = -(-micro // shards) * shards
        raise ValueError(f"batch of {prompts} prompts x {group} samples in microbatches of {micro} does not divide over "
                         f"{shards} parts (devices but for those of `tensor`); the nearest microbatch is {up}, the nearest number of "
                         f"prompts {-(-prompts * group // shards) * shards // group or 1}")  # fmt: skip
    return prompts, group, micro


def source(config: Any, needs: str, bundle: ModelBundle, reward: Reward | None, shape: tuple[int, ...]) -> Source:
    """The stream of batches of config.data that the algorithm needs; pictures must be of the model's shape.

    data: prompts; or labels and its factory's arguments; or pairs and data_dir; or lists (and length, their K); drop, the share
    of empty prompts. latents, a folder of `precompute`, stands in for labels and pairs. reward: what scores the rollout, if
    anything does.
    """
    prompts, group, _ = batch_sizes(config)
    data = dict(config.get("data", {}))
    seed, shard = int(config.seed), (jax.process_index(), jax.process_count())
    per_process = prompts // jax.process_count()
    latents = data.pop("latents", "")
    if latents and needs == "lists":
        raise ValueError("ranked lists have no precomputed latents yet; leave data.latents empty and set config.data.lists")
    if latents and needs != "prompts" and reward is not None:
        raise ValueError(f"this method's reward {reward.name!r} scores new pictures of the captions, which data.latents does not hold; "
                         "leave it empty and set config.data.labels")  # fmt: skip
    if latents and needs != "prompts":
        holds = ("winner", "loser") if needs == "pairs" else ("x0",)
        return latent_source(latents, batch=per_process * group, seed=seed, drop=float(data.get("drop", 0.0)), shard=shard,
                             holds=holds, shape=bundle.sample_shape)  # fmt: skip
    if needs == "prompts":
        texts = prompt_files.load(data.pop("prompts", "critters:train"))
        _no_more(data)
        encode = reward.encode if reward else None
        return prompt_source(texts, bundle.tokenize, encode, prompts_per_batch=per_process, group=group, seed=seed,
                             shard=shard)  # fmt: skip
    if needs in ("labels", "desirable"):
        arrays = named(data.pop("labels"), prompt_files.LABELS, "data.labels")
        images, captions, *marks = arrays(**{k: data.pop(k) for k in list(data) if k not in ("drop",)})
        _check_pictures(images, shape, "data.labels")
        return label_source(images, captions, bundle.tokenize, batch=per_process * group, seed=seed,
                            drop=float(data.pop("drop", 0.0)), shard=shard, encode=reward.encode if reward else None,
                            desirable=prompt_files.both_kinds(*marks or [None]) if needs == "desirable" else None)  # fmt: skip
    if needs == "lists":
        lists, drop = _lists(data, shape), float(data.pop("drop", 0.0))
        _no_more(data)
        return list_source(lists, bundle.tokenize, batch=per_process * group, seed=seed, drop=drop, shard=shard)
    pairs, drop = _pairs(data, shape), float(data.pop("drop", 0.0))
    _no_more(data)
    return pair_source(pairs, bundle.tokenize, (shape[0], shape[1]), batch=per_process * group, seed=seed, drop=drop,
                       shard=shard)  # fmt: skip


def _lists(data: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """The arrays of data.lists, taken out of data; data.length, if given, is their K."""
    if "lists" not in data:
        raise ValueError("this method learns from ranked lists; set config.data.lists to an .npz with list, score and prompts")
    lists, length = prompt_files.load_lists(str(data.pop("lists"))), data.pop("length", None)
    n, k = lists["list"].shape[:2]
    if length not in (None, k):
        raise ValueError(f"config.data.length is {length}, and the lists of config.data.lists hold {k} pictures each")
    _check_pictures(lists["list"].reshape(n * k, *lists["list"].shape[2:]), shape, "data.lists")
    return lists


def _pairs(data: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """The records of data.pairs, taken out of data: an .npz in memory, anything else prepared in data.data_dir."""
    if "pairs" not in data:
        raise ValueError(f"this method learns from preference pairs; set config.data.pairs to {FORMS}")
    name = str(data.pop("pairs"))
    if not name.endswith(".npz"):
        return pair_data(name, data.pop("data_dir", "data_cache"))
    arrays = prompt_files.load_pairs(name)
    for side in ("winner", "loser"):
        _check_pictures(arrays[side], shape, f"data.pairs, {side}")
    return ArrayPairs(arrays)


def _check_pictures(images: np.ndarray, shape: tuple[int, ...], where: str) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise ValueError(f"{where}: pictures must be uint8 [N, {', '.join(map(str, shape))}] for this model; "
                         f"got {images.dtype} {list(images.shape)}. Resize or convert them first.")  # fmt: skip


def _no_more(data: dict[str, Any]) -> None:
    if data:
        raise ValueError(f"config.data has fields that this method does not read: {', '.join(data)}")
