"""Model folders as diffusers and transformers write them: found, read tensor by tensor, and written back.

A component is a folder with config.json and STEM.safetensors, STEM.VARIANT.safetensors, or shards with an index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from . import check, layouts, torch_names

Tree = Any
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SHAPES_ONLY: ContextVar[bool] = ContextVar("shapes only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within it no weights are fetched or read: `load_component` gives shapes, and 0 for a scalar; configs and tokenizers are there."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def in_shapes() -> bool:
    """Whether this is within `shapes_only`."""
    return _SHAPES_ONLY.get()


def resolve(source: str | Path, *, allow: Sequence[str] = ()) -> Path:
    """A file or folder that exists, as it is; otherwise a hub id "owner/name", downloaded or from the cache.

    allow: patterns of the files that are wanted ("unet/*"; none: all). HF_HUB_OFFLINE and HF_HOME are respected. Raises
    FileNotFoundError when there is neither.
    """
    path = Path(source).expanduser()
    if path.exists() or (in_shapes() and path.suffix == ".safetensors"):
        return path
    if in_shapes():
        allow = [p for p in allow if "safetensors" not in p] or ["*.json"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(f"no file or folder at {path}, and that is no hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(allow) or None))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"no folder {str(source)!r} here, and the hub id {source} could not be downloaded, nor is it in the cache "
            f"({reason}). On a machine with network: hf download {source} --local-dir {path.name}; then name that folder."
        ) from error


class Tensors:
    """The tensors of a component by name, read one at a time from memory-mapped files."""

    def __init__(self, where: Path, files: dict[str, Path], handles: dict[Path, Any]) -> None:
        self.where, self._files, self._handles = where, files, handles

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        return tuple(self._handles[self._files[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor in the file's own type and shape. Raises ValueError when it holds NaN or infinity."""
        value = self._handles[self._files[name]].get_tensor(name)
        if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(value).all():
            bad = int(value.size - np.isfinite(value).sum())
            raise ValueError(f"{self._files[name]}: {name} has {bad} of {value.size} values that are NaN or infinite. "
                             "Is the checkpoint from a run that diverged? Take another.")  # fmt: skip
        return value


def open_component(folder_or_file: str | Path, *, stem: str = "model", variant: str | None = None) -> Tensors:
    """The tensors of STEM.safetensors, of STEM.VARIANT.safetensors, or of the shards that an index lists; or of a file.

    Raises FileNotFoundError for a component or shard that is not there, ValueError for a damaged file and for pickles.
    """
    where = Path(folder_or_file)
    if where.is_file():
        if where.suffix in PICKLES:
            raise ValueError(_no_pickle([where], where.with_suffix(".safetensors")))
        return _open(where, [where], None) if not where.name.endswith(".json") else _open_index(where)
    stems = f"{stem}.{variant}" if variant else stem
    single = where / f"{stems}.safetensors"
    if single.is_file():
        return _open(where, [single], None)
    # both ways of writing a variant into an index's name are in use
    for index in (where / f"{stems}.safetensors.index.json", where / f"{stem}.safetensors.index.{variant}.json"):
        if index.is_file():
            return _open_index(index)
    if not where.is_dir():
        raise FileNotFoundError(f"no file or folder at {where}; looked for {single.name} in it")
    found = sorted(p.name for p in where.iterdir())
    pickles = [where / n for n in found if n.endswith(PICKLES)]
    if pickles and not any(n.endswith(".safetensors") for n in found):
        raise ValueError(_no_pickle(pickles, single))
    others = [n for n in found if n.startswith(f"{stem}.") and ".safetensors" in n]
    hint = f" Another variant is there: {', '.join(others)}; set variant to its middle part, or to None." if others else ""
    raise FileNotFoundError(f"no {single.name} and no {single.name}.index.json in {where}; it has "
                            f"{', '.join(found[:20]) or 'nothing'}{', ...' if len(found) > 20 else ''}.{hint}")  # fmt: skip


def load_component(
    source: str | Path,
    like: Tree,
    *,
    stem: str = "model",
    variant: str | None = None,
    layout: str = "auto",
    dtype: Any = jnp.float32,
    sharding: Any = None,
) -> Tree:
    """A component's parameters as a tree shaped like `like` (arrays or shapes), strictly.

    layout: one of `layouts.LAYOUTS`, "auto": from the names. dtype: of floating parameters (None: the file's).
    sharding: where they are placed, one for all or a tree like `like`. One tensor at a time is read, turned, cast and
    placed, so that host memory holds little beyond the result. Raises ValueError for missing, unexpected and misshapen
    tensors: the first ten of each, with the nearest names.
    """
    if in_shapes():
        of = lambda x: dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, of(x)) if x.shape else np.zeros((), x.dtype), like)
    tensors = open_component(resolve(source, allow=[f"{stem}*.safetensors*"]), stem=stem, variant=variant)
    shapes = {k: tuple(v.shape) for k, v in flatten_dict(like, sep="/").items()}
    paths = torch_names.names(like)
    present = tensors.names()
    layout = layouts.detect(present) if layout == "auto" else layout
    where = layouts.places(list(paths), layout, present)
    _check(tensors, where, {n: torch_names.torch_shape(p, shapes[p]) for n, p in paths.items()}, layout)
    shardings = sharding if isinstance(sharding, dict) else None
    flat_shardings = flatten_dict(shardings, sep="/") if shardings is not None else {}
    by_file: dict[str, list[str]] = {}
    for name, place in where.items():
        by_file.setdefault(place.name, []).append(name)
    out = {}
    for stored, ours in by_file.items():
        value = tensors.read(stored)
        for name in ours:
            x = torch_names.from_torch(paths[name], layouts.take(where[name], value))
            wanted = dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
            # always a copy: a view would keep the whole of a packed tensor alive
            x = np.array(x, dtype=wanted, order="C")
            out[paths[name]] = jax.device_put(x, flat_shardings.get(paths[name], None if shardings else sharding))
    return unflatten_dict({p: out[p] for p in shapes}, sep="/")


def save_component(
    folder: str | Path,
    tree: Tree,
    *,
    stem: str = "model",
    config: dict[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes STEM.safetensors (shards and an index beyond max_shard_bytes) in the checkpoint's own names, and config.json.

    dtype: of floating parameters (None: as they are). Each file appears whole or not at all; what an earlier save left
    under the same stem goes last.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(tree, sep="/")
    wanted = {p: np.dtype(dtype if dtype is not None and jnp.issubdtype(v.dtype, jnp.floating) else v.dtype)
              for p, v in flat.items()}  # fmt: skip
    sizes = {p: int(np.prod(v.shape, dtype=np.int64)) * wanted[p].itemsize for p, v in flat.items()}
    shards = _shards(sizes, max_shard_bytes)
    written: list[str] = []
    weight_map: dict[str, str] = {}
    for i, paths in enumerate(shards):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {torch_names.torch_name(p): np.asarray(torch_names.to_torch(p, flat[p]), wanted[p], order="C")
                  for p in paths}  # fmt: skip
        atomic(folder / name, partial(save_file, arrays, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(arrays, name)
        written.append(name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
        written.append(f"{stem}.safetensors.index.json")
    if config is not None:
        _write_json(folder / "config.json", config)
    mine = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for path in folder.iterdir():
        if mine.fullmatch(path.name) and path.name not in written:
            path.unlink()


def _check(tensors: Tensors, where: dict[str, layouts.Place], shapes: dict[str, tuple[int, ...]], layout: str) -> None:
    """Names and shapes before anything is read; a file's own names where they differ from ours."""
    present = set(tensors.names())
    label = {n: n if n == p.name else f"{p.name} (ours: {n})" for n, p in where.items()}
    found: dict[str, Any] = {label[n]: jax.ShapeDtypeStruct(layouts.taken_shape(p, tensors.shape(p.name)), np.float32)
                             for n, p in where.items() if p.name in present}  # fmt: skip
    wanted = {label[n]: shapes[n] for n in where}
    for name in layouts.unused(list(where), where, layout, list(present)):
        found[name] = jax.ShapeDtypeStruct(tensors.shape(name), np.float32)
    check(found, wanted, f"{tensors.where} (names read as {layout})")


def _open(where: Path, files: Iterable[Path], only: dict[str, Path] | None) -> Tensors:
    from safetensors import SafetensorError, safe_open

    handles: dict[Path, Any] = {}
    names: dict[str, Path] = {}
    for path in files:
        try:
            handles[path] = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            with path.open("rb") as stream:
                pointer = stream.read(40).startswith(b"version https://git-lfs")
            what = "is a pointer of git-lfs, not the weights: run git lfs pull" if pointer else (
                f"is not a whole safetensors file ({error}). Was a download cut off? Fetch it again")  # fmt: skip
            raise ValueError(f"{path}, {path.stat().st_size} bytes, {what}.") from error
        names |= dict.fromkeys(handles[path].keys(), path)
    if only is not None:
        if absent := sorted(n for n, path in only.items() if n not in handles[path].keys()):
            raise ValueError(f"{where}: the index places {len(absent)} tensors in shards that do not hold them, first "
                             f"{absent[0]} in {only[absent[0]].name}. Shards and index are of different saves.")  # fmt: skip
        names = only
    return Tensors(where, names, handles)


def _open_index(index: Path) -> Tensors:
    try:
        weight_map = {str(k): index.parent / str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {error}); wanted JSON with "
                         "weight_map, {tensor: file}. Fetch it again.") from error  # fmt: skip
    files = sorted(set(weight_map.values()))
    if absent := [p.name for p in files if not p.is_file()]:
        raise FileNotFoundError(f"{index} lists {len(files)} files, and {len(absent)} of them are not there: "
                                f"{', '.join(absent[:10])}. Fetch them into {index.parent}.")  # fmt: skip
    return _open(index.parent, files, weight_map)


def _no_pickle(found: Sequence[Path], to: Path) -> str:
    return (f"{', '.join(str(p) for p in found[:3])}: only a pickle, which can run code when it is read, and is not read "
            f"here. Where torch is installed: python -c \"import torch, safetensors.torch as s; w = torch.load("
            f"'{found[0].name}', map_location='cpu', weights_only=True); w = w.get('state_dict', w); s.save_file("
            f"{{k: v.contiguous().clone() for k, v in w.items() if hasattr(v, 'shape')}}, '{to.name}')\"")  # fmt: skip


def _shards(sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for path, size in sizes.items():
        if limit is not None and room is not None:
            if size > room and shards[-1]:
                shards.append([])
                room = limit
            room -= size
        shards[-1].append(path)
    return shards


def _write_json(path: Path, value: Any) -> None:
    atomic(path, lambda to: to.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))


def atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """write(to) to a name beside `path`, then renamed: the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
