"""Preference pairs as a tensorflow-datasets builder in array_record form, made on demand; TensorFlow is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .pairs import PairRecord, locate, pair_records

ROWS_A_FILE = 1024


class StoredPairs:
    """Random access to prepared pairs, one PairRecord with encoded pictures at a time."""

    def __init__(self, stored: Any):
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, row: int) -> PairRecord:
        values = self._stored[row]
        texts = {k: values[k].decode() for k in ("prompt", "annotator", "source", "split")}
        return PairRecord(**texts, image_a=values["image_a"], image_b=values["image_b"], p_a=float(values["p_a"]),
                          weight=float(values["weight"]))  # fmt: skip


def pair_data(source: str, data_dir: str | Path = "data_cache") -> StoredPairs:
    """The pairs of a source (see pair_records), copied into data_dir on first use, only read afterwards.

    The order is the source's. A source whose table files have changed (path, size or time) is prepared anew, in a folder
    of its own; pictures that change under an unchanged table are not noticed.
    """
    make = partial(tfds_builder(source), data_dir=str(Path(data_dir).expanduser()), file_format="array_record")
    builder = make()
    if not builder.data_path.exists():
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()  # its bars know no total
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
            try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP))  # fmt: skip
        builder = make()  # the one that wrote still names the temporary folder
    return StoredPairs(builder.as_data_source("pairs"))


def digest(source: str) -> str:
    """Tells sources apart: the adapter and the path, size and time of every table file."""
    kind, files = locate(source)
    facts = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((kind, facts)).encode()).hexdigest()[:16]


def tfds_builder(source: str) -> Any:
    """The builder class of one source; made on demand, since importing that package takes seconds."""
    name = digest(source)  # an absent file is said before the slow import
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    class PreferencePairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Pairs of pictures of one prompt with the probability that the first is the better one."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, description=source)]

        def _info(self) -> Any:
            texts = ("prompt", "image_a", "image_b", "annotator", "source", "split")  # Text keeps any bytes as they are
            features = {name: tfds.features.Text() for name in texts} | {name: np.float32 for name in ("p_a", "weight")}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features),
                                                  description=PreferencePairs.__doc__, disable_shuffling=True)  # fmt: skip

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"pairs": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for row, record in enumerate(tqdm(pair_records(source), f"storing {source}", unit="pair")):
                yield row, record._asdict()

        def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
            # one row after the other: the usual writer sorts, in memory up to 1 GB and by TensorFlow's files beyond
            info = self._info()  # a new one: it names the folder that is temporary until all is there
            writer = tfds.core.SequentialWriter(info, ROWS_A_FILE, file_format="array_record")
            for split, rows in self._split_generators(dl_manager).items():
                writer.initialize_splits([split])
                while chunk := [example for _, example in islice(rows, 32)]:
                    writer.add_examples({split: chunk})
            writer.close_all()
            self.info.set_splits(info.splits)

    return PreferencePairs
