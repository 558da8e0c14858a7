"""Preference pairs as one kind of record, from the public data sets and from a user's own files, one row at a time."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
FORMS = ("an .npz, .jsonl, .csv or .parquet file, a folder with pairs.jsonl, or pick_a_pic:, hpdv2: or image_reward_db: "
         "with a folder or file behind it")  # fmt: skip


class PairRecord(NamedTuple):
    """Two pictures of one prompt and how they compare.

    image_a, image_b: a picture file's bytes, or uint8 [H,W,C]. p_a: the probability that a is the better one; 1/2 is
    a tie. annotator: "" where it is not known. Weights of the public sets let every prompt count as one.
    """

    prompt: str
    image_a: Any
    image_b: Any
    p_a: float
    weight: float = 1.0
    annotator: str = ""
    source: str = ""
    split: str = ""


class ArrayPairs:
    """The arrays of `prompts.load_pairs` as records."""

    def __init__(self, arrays: dict[str, Any]):
        self.arrays, self.prompts = arrays, arrays["prompts"]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> PairRecord:
        a = self.arrays
        return PairRecord(self.prompts[row], a["winner"][row], a["loser"][row], float(a["preference"][row]), source="npz")


def pair_records(source: str) -> Iterator[PairRecord]:
    """The records of a source, streamed: FORMS names the forms (all but .npz).

    A folder of pick_a_pic or image_reward_db means its training files where the names tell splits apart; name others
    with a pattern: "pick_a_pic:DIR/validation-*.parquet". Your own columns: prompt, image_a, image_b (paths from the
    file's folder, or bytes in parquet), p_a or preferred ("a", "b", "tie"), and if you like weight and annotator.
    Raises FileNotFoundError for a missing file or picture, ValueError for whatever does not fit, with file and row.
    """
    kind, files = locate(source)
    records = chain.from_iterable(ADAPTERS[kind](file) for file in files)
    first = next(records, None)
    if first is None:
        raise ValueError(f"{source} holds no labelled pairs; it has no rows, or none with a label")
    yield first
    yield from records


def locate(source: str) -> tuple[str, list[Path]]:
    """(adapter's name, the table files) of a source; raises FileNotFoundError where there are none."""
    name, _, rest = source.partition(":")
    kind = name if name in PUBLIC else "own"
    path = Path(source if kind == "own" else rest).expanduser()
    if any(c in path.name for c in "*?["):
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = FOLDERS[kind](path)
    else:
        files = [path] if path.is_file() else []
    if not files:
        wanted = {"own": "pairs.jsonl, pairs.csv or pairs.parquet", "hpdv2": "train.json",
                  "image_reward_db": "train_*.json or .parquet files"}.get(kind, ".parquet files")  # fmt: skip
        raise FileNotFoundError(f"no preference pairs at {source}" + (f": the folder has no {wanted}" if path.is_dir() else "")
                                + f"; give {FORMS}")  # fmt: skip
    endings = {"own": (".jsonl", ".csv", ".parquet"), "pick_a_pic": (".parquet",), "hpdv2": (".json",)}
    for file in files:
        if file.suffix not in endings.get(kind, (".json", ".parquet")):
            raise ValueError(f"{file} is of no kind that {source} can mean; give {FORMS}")
    return kind, files


def pick_a_pic(file: Path) -> Iterator[PairRecord]:
    """Pick-a-Pic v1 and v2 with pictures (arXiv 2305.01569): rows with a label, ties kept, weight 1 / pairs of the prompt."""
    columns = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
    optional = ("has_label", "user_id", "num_example_per_prompt", "ranking_id")
    for number, row in _parquet(file, columns, optional):
        if not row.get("has_label", True):
            continue
        where = f"{file}, row {number}" + (f" (ranking_id {row['ranking_id']})" if "ranking_id" in row else "")
        p_a = _opposites([row["label_0"], row["label_1"]], where, "label_0 and label_1")
        a, b = (image_bytes(row[name], [file.parent], f"{where}, {name}") for name in ("jpg_0", "jpg_1"))
        user = row.get("user_id")
        yield PairRecord(_text(row["caption"], where, "caption"), a, b, p_a, 1 / max(row.get("num_example_per_prompt") or 1, 1),
                         "" if user is None else str(user), "pick_a_pic", _split(file))  # fmt: skip


def hpdv2(file: Path) -> Iterator[PairRecord]:
    """HPDv2 (arXiv 2306.09341): train.json's pairs, or test.json's ranks as all pairs of each annotator, ties kept.

    The released files and their description differ in names: file_path or image_path, and in raw_annotations rank or
    annotation. Weights: 1 / pairs of the prompt.
    """
    rows = list(_json(file))
    pairs = Counter(str(row.get("prompt")) for _, row in rows if isinstance(row, dict) and "human_preference" in row)
    for number, row in rows:
        where = f"{file}, row {number}"
        if isinstance(row, dict) and "human_preference" in row:
            paths = "image_path" if "image_path" in row else "file_path"
            require(row, ("prompt", paths), where)
            p_a = _opposites(row["human_preference"], where, "human_preference")
            if len(row[paths]) != 2:
                raise ValueError(f"{where}: {paths} must name 2 images; got {len(row[paths])}")
            a, b = (image_bytes(path, _folders(file), where) for path in row[paths])
            yield PairRecord(_text(row["prompt"], where), a, b, p_a, 1 / pairs[row["prompt"]], str(row.get("user_hash", "")),
                             "hpdv2", _split(file))  # fmt: skip
            continue
        require(row, ("prompt", "image_path", "rank"), where, "human_preference and file_path, or prompt, image_path and rank")
        images = [image_bytes(path, _folders(file), where) for path in row["image_path"]]
        raters = [(str(r.get("user_hash", "")), r["annotation"] if "annotation" in r else r.get("rank"))
                  for r in row.get("raw_annotations") or ()] or [("", row["rank"])]  # fmt: skip
        for rater, ranks in raters:
            yield from _ranked(_text(row["prompt"], where), images, ranks, where, source="hpdv2", split=_split(file),
                               annotator=rater, share=1 / len(raters))  # fmt: skip


def image_reward_db(file: Path) -> Iterator[PairRecord]:
    """ImageRewardDB (arXiv 2304.05977): all pairs of a prompt, ties kept; rank 1 is the best.

    Read are GitHub's test.json, with a row a prompt; the hub's images/SPLIT/SPLIT_1/SPLIT_1.json beside its pictures, and
    metadata-SPLIT.parquet beside images, with a row a picture; and what its loading script makes, as parquet with pictures
    inside, a row a picture or a row a prompt. Pictures of one prompt must follow each other.
    """
    source, split, folders = "image_reward_db", _split(file), _folders(file)
    rows = _json(file) if file.suffix == ".json" else _parquet(file, ("prompt_id", "prompt", "rank"), ("image", "image_path"))
    seen = set()
    for prompt_id, group in groupby(rows, lambda numbered: _prompt_id(numbered[1], f"{file}, row {numbered[0]}")):
        numbers, members = zip(*group, strict=True)
        where, first = f"{file}, row {numbers[0]}", members[0]
        if "generations" in first:
            require(first, ("prompt", "generations", "ranking"), where)
            stored, ranks = first["generations"], first["ranking"]
        else:
            where = f"{where} (prompt_id {prompt_id})"
            if prompt_id in seen:
                raise ValueError(f"{where}: the rows of this prompt do not follow each other; sort the file by prompt_id")
            seen.add(prompt_id)
            name = "image" if "image" in first else "image_path"
            require(first, ("prompt", name, "rank"), where)
            as_lists = isinstance(first["rank"], list)
            stored, ranks = (first[key] if as_lists else [m[key] for m in members] for key in (name, "rank"))
        images = [image_bytes(_beside(image, file), folders, where) for image in stored]
        yield from _ranked(_text(first["prompt"], where), images, ranks, where, source=source, split=split)


def _prompt_id(row: Any, where: str) -> Any:
    """What tells the prompts of ImageRewardDB apart."""
    require(row, (), where, "prompt and generations, or prompt_id, prompt, image_path and rank")
    if "generations" in row:
        return where  # such a row is a whole prompt
    require(row, ("prompt_id",), where, "prompt and generations, or prompt_id, prompt, image_path and rank")
    return row["prompt_id"]


def _beside(image: Any, file: Path) -> Any:
    """A picture of the hub's parts, whose paths are written from the data set's root, lies beside the part's JSON."""
    return Path(image).name if isinstance(image, str) and (file.parent / Path(image).name).is_file() else image


def own(file: Path) -> Iterator[PairRecord]:
    """A user's own table, .jsonl, .csv or .parquet; pair_records names its columns."""
    columns, labels, optional = ("prompt", "image_a", "image_b"), ("p_a", "preferred"), ("weight", "annotator", "split")
    read = {".jsonl": json_lines, ".csv": _csv, ".parquet": lambda f: _parquet(f, columns, (*labels, *optional))}[file.suffix]
    for number, row in read(file):
        where = f"{file}, row {number}"
        require(row, columns, where)
        if not set(labels) & set(row):
            raise ValueError(f"{where} lacks p_a or preferred; it has {', '.join(map(str, row))}")
        if row.get("p_a") not in (None, ""):
            p_a = _number(row["p_a"], where, "p_a", 1.0)
        elif row.get("preferred") in ("a", "b", "tie"):
            p_a = {"a": 1.0, "b": 0.0, "tie": 0.5}[row["preferred"]]
        else:
            raise ValueError(f"{where}: preferred must be a, b or tie; got {row.get('preferred')!r}")
        weight = 1.0 if row.get("weight") in (None, "") else _number(row["weight"], where, "weight", math.inf)
        a, b = (image_bytes(row[name], [file.parent], f"{where}, {name}") for name in ("image_a", "image_b"))
        annotator, split = ("" if row.get(k) is None else str(row[k]) for k in ("annotator", "split"))
        yield PairRecord(_text(row["prompt"], where), a, b, p_a, weight, annotator, str(file), split)


def picture(encoded: Any, size: tuple[int, int] | None, where: str = "the image") -> np.ndarray:
    """uint8 [H,W,3] of a picture file's bytes: upright, RGB, transparent parts white, centre-cropped to the shape of
    size = (H, W) and resized (bicubic); None keeps the size. An array is returned as it is."""  # fmt: skip
    if isinstance(encoded, np.ndarray):
        return encoded
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    except (OSError, SyntaxError) as error:  # PIL raises both for broken files
        raise ValueError(f"{where} is not a picture that can be read ({error}); PNG, JPEG and WebP can") from error
    if image.mode.startswith("I"):  # 16 bits a pixel: convert would clip, not scale
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if size is None:
        return np.asarray(image)
    (width, height), (h, w) = image.size, size
    scale = min(width / w, height / h)
    left, top = (width - w * scale) / 2, (height - h * scale) / 2
    box = (left, top, min(left + w * scale, width), min(top + h * scale, height))
    return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC, box))


def _parquet(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{file} needs pyarrow to be read: pip install pyarrow") from error
    try:
        stored = ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file} is not a whole parquet file ({error})") from error
    with stored:
        names = stored.schema_arrow.names
        require(dict.fromkeys(names), columns, str(file))
        number = 0
        for batch in stored.iter_batches(batch_size=32, columns=[n for n in names if n in (*columns, *optional)]):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _json(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list of objects; got {type(rows).__name__}")
    yield from enumerate(rows, 1)


def json_lines(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, row {number} is not a JSON object ({error})") from error


def _csv(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from enumerate(csv.DictReader(lines), 1)


def require(row: Row, columns: Sequence[str], where: str, wanted: str = "") -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with {wanted or ', '.join(columns)}; got {type(row).__name__}")
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}"
                         + (f". Wanted: {wanted}" if wanted else ""))  # fmt: skip


def _text(value: Any, where: str, name: str = "prompt") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text; got {value!r}")
    return value


def _number(value: Any, where: str, name: str, largest: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number <= largest and math.isfinite(number)):
        raise ValueError(f"{where}: {name} must be a number in [0, {largest:g}]; got {value!r}")
    return number


def _opposites(labels: Any, where: str, name: str) -> float:
    """p_a of two labels, the first's, which must be 1 and 0, 0 and 1, or 1/2 twice."""
    if not isinstance(labels, list) or labels not in ([1, 0], [0, 1], [0.5, 0.5]):
        raise ValueError(f"{where}: {name} must be 1 and 0, 0 and 1, or 0.5 and 0.5; got {labels!r}")
    return float(labels[0])


def _ranked(prompt: str, images: list[bytes], ranks: Any, where: str, share: float = 1.0, **fields: str) -> Iterator[PairRecord]:
    """All pairs of ranked images, 1 the best, equal ranks a tie; the weights of a call sum to share."""
    if not isinstance(ranks, list) or len(ranks) != len(images) or len(images) < 2:
        raise ValueError(f"{where}: as many ranks as images are needed, 2 or more; got {len(images)} images, ranks {ranks!r}")
    values = [_number(rank, where, "rank", math.inf) for rank in ranks]
    weight = share / math.comb(len(images), 2)
    for i, j in combinations(range(len(images)), 2):
        p_a = 0.5 if values[i] == values[j] else float(values[i] < values[j])
        yield PairRecord(prompt, images[i], images[j], p_a, weight, **fields)


def image_bytes(value: Any, folders: Sequence[Path], where: str) -> bytes:
    if isinstance(value, dict):  # the datasets library stores {"bytes", "path"}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: an image must be a path or the bytes of a picture file; got {value!r}")
    for folder in folders:
        if (folder / value).is_file():
            return (folder / value).read_bytes()
    raise FileNotFoundError(f"{where}: no image at {folders[0] / value}"
                            + (f" nor in {', '.join(str(f) for f in folders[1:])}" if folders[1:] else ""))  # fmt: skip


def _folders(file: Path) -> list[Path]:
    """Where the pictures of a public set lie: beside the table, in a folder of the table's name, or in images."""
    return [file.parent, file.parent / file.stem, file.parent / "images"]


def _split(file: Path) -> str:
    """train of train-00000-of-00645, of metadata-train and of train_1."""
    return re.sub(r"_\d+$", "", file.stem.removeprefix("metadata-").split("-")[0])


def _parquet_folder(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.parquet"))
    return [f for f in files if _split(f) == "train"] or files


def _image_reward_folder(path: Path) -> list[Path]:
    return sorted(path.rglob("train_*.json")) or _parquet_folder(path)


def _first_of(*names: str) -> Callable[[Path], list[Path]]:
    return lambda path: [path / n for n in names if (path / n).is_file()][:1]


PUBLIC: dict[str, Callable[[Path], Iterator[PairRecord]]] = {
    "pick_a_pic": pick_a_pic, "hpdv2": hpdv2, "image_reward_db": image_reward_db}  # fmt: skip
ADAPTERS = {**PUBLIC, "own": own}
FOLDERS = {"pick_a_pic": _parquet_folder, "image_reward_db": _image_reward_folder, "hpdv2": _first_of("train.json"),
           "own": _first_of("pairs.jsonl", "pairs.csv", "pairs.parquet")}  # fmt: skip
