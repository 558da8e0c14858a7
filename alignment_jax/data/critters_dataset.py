"""Rendered critters with noisy captions as a tensorflow-datasets builder, read by grain; TensorFlow is not needed.

Splits: `train` (22 000 pictures) and `held_out` (2 000, of combinations that training never shows); the config "tiny"
has 48 and 16. Attributes are balanced, everything is seeded: the data are the same wherever they are drawn.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from . import critters
from .sources import Chance, Source

SIZES = {"full": {"train": 22_000, "held_out": 2_000}, "tiny": {"train": 48, "held_out": 16}}
SEED = 0
_INTEGERS = (*critters.NUISANCES, "details")
_POSE = ("scale", "shift_x", "shift_y", "rotation")


def load_arrays(split: str, data_dir: str | Path = "data_cache", config: str = "full") -> dict[str, Any]:
    """A split in memory: "images" uint8 [N,32,32,3], "captions" (noisy, list of N), "attributes" int32 [N,6] (true),
    "nuisances" {name: [N]}; drawn on first use (minutes), read from data_dir (seconds) afterwards.

    Raises ValueError for an unknown split or config.
    """  # fmt: skip
    import grain

    return _collect(list(grain.MapDataset.source(data_source(split, data_dir, config)).to_iter_dataset()))


def _collect(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": np.stack([r["image"] for r in rows]),
        "captions": [r["caption"].decode() for r in rows],
        "attributes": np.array([[r["attributes"][name] for name in critters.ATTRIBUTES] for r in rows], np.int32),
        "nuisances": {name: np.array([r["nuisances"][name] for r in rows], np.float32 if name in _POSE else np.int64)
                      for name in (*_INTEGERS, *_POSE)},
    }  # fmt: skip


def data_source(split: str, data_dir: str | Path = "data_cache", config: str = "full") -> Any:
    """A random-access source of examples {"image", "caption", "attributes", "nuisances"}; prepared on first use."""
    if config not in SIZES or split not in SIZES[config]:
        raise ValueError(f"no critters split {split!r} of config {config!r}; choose a split of train, held_out and a "
                         f"config of {', '.join(SIZES)}")  # fmt: skip
    import tensorflow_datasets as tfds

    builder = builder_class()(data_dir=str(Path(data_dir).expanduser()), config=config, file_format="array_record")
    if not builder.data_path.exists():
        print(f"drawing {sum(SIZES[config].values())} critters into {data_dir}: once, about 9 ms each on one core")
        settings = tfds.download.DownloadConfig(
            try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP)  # fmt: skip
        tfds.disable_progress_bar()  # its bars know no total; draw_all has one
        builder.download_and_prepare(download_config=settings)
    return builder.as_data_source(split)


def batches(data: Any, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)) -> Source:
    """Endless shuffled batches of load_arrays(...) or data_source(...); get_state and set_state resume exactly.

    A batch: "images" uint8 [B,32,32,3], "captions" (list of B), "attributes" int32 [B,6], "nuisances" {name: [B]}.
    """

    def make(indices: np.ndarray, chance: Chance) -> dict[str, Any]:
        if not isinstance(data, dict):
            return _collect([data[int(i)] for i in indices])
        return {"images": data["images"][indices], "captions": [data["captions"][i] for i in indices],
                "attributes": data["attributes"][indices],
                "nuisances": {name: values[indices] for name, values in data["nuisances"].items()}}  # fmt: skip

    return Source(len(data["images"]) if isinstance(data, dict) else len(data), batch_size, seed, make, shard)


def draw_all(split: str, n: int, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """The first n critters of a split, in order, drawn by all cores."""
    from tqdm import tqdm

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = partial(critters.draw, split, seed=seed)
    if n < 256 or cores == 1:  # starting processes takes longer than that
        yield from tqdm(map(job, range(n)), f"drawing {split}", n, unit="critter")
        return
    # spawned, not forked: the caller's threads (XLA's) do not survive a fork
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        yield from tqdm(pool.map(job, range(n), chunksize=64), f"drawing {split}", n, unit="critter")


@cache
def builder_class() -> Any:
    """The tensorflow-datasets builder; made on demand, since importing that package takes seconds."""
    import tensorflow_datasets as tfds
    from PIL import Image

    class CritterRenders(tfds.core.GeneratorBasedBuilder):
        """Monsters of named parts with captions as noisy as the web's."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, description=f"{sum(sizes.values())} pictures")
                           for name, sizes in SIZES.items()]  # fmt: skip

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "attributes": {name: tfds.features.ClassLabel(names=list(values))
                               for name, values in critters.ATTRIBUTES.items()},
                "nuisances": {name: np.int64 for name in _INTEGERS} | {name: np.float32 for name in _POSE},
            })  # fmt: skip
            # the order is the order of drawing, so that halves and prefixes of the data mean the same everywhere
            return self.dataset_info_from_configs(
                features=features, disable_shuffling=True, homepage="https://www.dicebear.com",
                description=CritterRenders.__doc__, license="CC0 1.0 (art: DiceBear, style critters)")  # fmt: skip

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split, n) for split, n in SIZES[self.builder_config.name].items()}

        def _generate_examples(self, split: str, n: int) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, critter in enumerate(draw_all(split, n)):
                buffer = io.BytesIO()
                Image.fromarray(critter["image"]).save(buffer, format="PNG")
                yield i, {
                    "image": buffer.getvalue(), "caption": critter["caption"], "nuisances": critter["nuisances"],
                    "attributes": dict(zip(critters.ATTRIBUTES, critter["attributes"].tolist(), strict=True)),
                }  # fmt: skip

    return CritterRenders
