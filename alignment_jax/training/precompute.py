"""Latents and text states of a data set, computed once, kept in a folder of array_record parts and read back at random."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..data.sources import Batch, Chance, Source
from ..models.bundle import ModelBundle

Tree = Any
SAMPLES = {"images": "x0", "winner": "winner", "loser": "loser"}  # pictures, and what algorithms call their latents


def precompute(bundle: ModelBundle, params: Tree, read: Callable[[np.ndarray], Batch], n: int, out: str | Path, *,
               encode_moments: Callable[[Tree, Any], tuple[Any, Any]] | None = None,
               encode_text: Callable[[Tree, Any], Tree] | None = None, batch: int = 32, part: int = 1024,
               dtype: str = "float16", shard: tuple[int, int] = (0, 1)) -> None:  # fmt: skip
    """Encodes the rows 0..n-1 of a set into the folder `out`, part by part; a second call goes on after the whole parts.

    read(rows) -> {"images", or "winner" and "loser": uint8 [B,H,W,C], "prompts", any arrays [B] to keep}; for pairs it is
    sources.pair_reader. encode_moments(params, pictures [B,H,W,C] in [0, 1]) -> (mean, logvar), logvar None or -inf where
    there is no spread (default: bundle.encode). encode_text(params, tokens) -> a dict of arrays. shard: (index, count) of
    the process. Raises ValueError where `out` holds another set, model or dtype, or dtype cannot hold a value.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tqdm import tqdm

    moments = encode_moments or (lambda params, pictures: (bundle.encode(params, pictures), None))
    text = jax.jit(encode_text or bundle.encode_text)
    latents = jax.jit(lambda params, pictures: dict(zip(("mean", "logvar"), moments(params, pictures / 255.0))))

    def encoded(start: int, stop: int) -> list[dict[str, Any]]:
        data = read(np.minimum(np.arange(start, start + batch), stop - 1))  # one shape, one program
        tree = {"cond": text(params, bundle.tokenize(data.pop("prompts")))}
        tree |= {new: latents(params, data.pop(name).astype(np.float32)) for name, new in SAMPLES.items() if name in data}
        rows = _flat(tree, dtype) | data
        return [{k: v[i] for k, v in rows.items()} for i in range(min(stop - start, batch))]

    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    parts, head = _parts(folder, n, part), encoded(0, n)
    about = json.dumps({"model": bundle.name, "n": n, "part": part, "dtype": dtype,
                        "shapes": {k: v.shape for k, v in head[0].items()}})  # fmt: skip
    if (folder / "about.json").exists() and (found := (folder / "about.json").read_text()) != about:
        raise ValueError(f"{folder} holds another set: {found}; wanted {about}. Give another folder")
    if parts[0].exists() and any(not np.allclose(v, head[0][k], 2e-2, 2e-2) for k, v in _read(parts[:1])(0).items()):
        raise ValueError(f"{folder} was written with other data or weights: its first row differs. Give another folder")
    (folder / "about.json").write_text(about)
    np.savez(folder / "null.npz", **_flat({"cond": text(params, bundle.tokenize([""]))}, dtype))
    todo = [i for i in range(shard[0], len(parts), shard[1]) if not parts[i].exists()]
    with tqdm(total=sum(min(part, n - i * part) for i in todo), desc=f"encoding into {folder}", unit="row") as bar:
        for number in todo:
            unfinished, stop = parts[number].with_suffix(".unfinished"), min(n, (number + 1) * part)
            writer = ArrayRecordWriter(str(unfinished), "group_size:1")
            for row in (row for start in range(number * part, stop, batch) for row in encoded(start, stop)):
                np.savez(buffer := io.BytesIO(), **row)
                writer.write(buffer.getvalue())
                bar.update()
            writer.close()
            unfinished.rename(parts[number])


def latent_source(folder: str | Path, *, batch: int, seed: int, drop: float = 0.0, shard: tuple[int, int] = (0, 1),
                  holds: tuple[str, ...] = (), shape: tuple[int, ...] = ()) -> Source:  # fmt: skip
    """Batches of what `precompute` wrote: "x0" (or "winner" and "loser") float32, drawn from N(mean, exp(logvar)), "cond",
    "prompt_id" and what was kept; a share `drop` of the conditions is the empty prompt's. Raises where parts are missing,
    and where the folder does not hold the samples named in `holds`, of this shape."""
    root = Path(folder).expanduser()
    if not (root / "about.json").is_file():
        raise FileNotFoundError(f"no precomputed latents at {root}; training.precompute.precompute writes them")
    about = json.loads((root / "about.json").read_text())
    for name in holds:
        found = tuple(about["shapes"].get(f"{name}/mean", ()))
        if found != tuple(shape):
            raise ValueError(f"{root}, latents of {about['model']}: {name} is {list(found) if found else 'not there'}; wanted "
                             f"{list(shape)}. It was written for another model or another kind of data")  # fmt: skip
    parts = _parts(root, about["n"], about["part"])
    if absent := [p.name for p in parts if not p.exists()]:
        raise ValueError(f"{root} lacks {len(absent)} of {len(parts)} parts, first {absent[0]}; run precompute again")
    row, null = _read(parts), dict(np.load(root / "null.npz"))

    def make(indices: np.ndarray, chance: Chance) -> Batch:
        rows, dropped = [row(int(i)) for i in indices], chance.random(len(indices)) < drop
        batch: Batch = {"prompt_id": indices.astype(np.int32)}
        for path in rows[0]:
            value = np.stack([r[path] for r in rows])
            if path in null:
                value[dropped] = null[path][0]
            *above, last = path.split("/")
            node = reduce(lambda node, name: node.setdefault(name, {}), above, batch)
            node[last] = value.astype(np.float32) if value.dtype.kind == "f" else value
        for name in [s for s in SAMPLES.values() if s in batch]:
            mean, logvar = batch[name]["mean"], batch[name].get("logvar")
            batch[name] = mean if logvar is None else mean + np.exp(0.5 * logvar) * chance.standard_normal(mean.shape, np.float32)
        return batch

    return Source(about["n"], batch, seed, make, shard)


def _flat(tree: Tree, dtype: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in (("/".join(str(k.key) for k in path), v) for path, v in jax.tree_util.tree_flatten_with_path(tree)[0]):
        with np.errstate(over="ignore"):  # said below, by name
            flat[name] = np.asarray(value).astype(dtype if jax.dtypes.issubdtype(value.dtype, np.floating) else value.dtype)
        if not (np.isfinite(flat[name]) | (name.endswith("/logvar") & np.isneginf(flat[name]))).all():
            raise ValueError(f"{name} has values that {dtype} cannot hold; use dtype=\"float32\"")
    return flat


def _parts(folder: Path, n: int, part: int) -> list[Path]:
    return [folder / f"part_{i:05d}.array_record" for i in range(-(-n // part))]


def _read(parts: list[Path]) -> Callable[[int], dict[str, np.ndarray]]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    records = ArrayRecordDataSource([str(p) for p in parts])
    return lambda i: dict(np.load(io.BytesIO(records[i])))
