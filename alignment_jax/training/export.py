"""Models on their way out and between formats: diffusers folders, LoRA files, single files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import weights
from ..models import MODELS, stable_diffusion
from ..weights import files, layouts, lora_files, torch_names
from . import build
from .generate import load_run, read_run

Tree = Any
FORMATS = ("merged", "diffusers", "peft", "kohya")
LORA_FILE = "pytorch_lora_weights.safetensors"


def export(run: str | Path, out: str | Path, format: str = "merged", scale: float | None = None, dtype: Any = None) -> Path:
    """Writes what a run trained, and returns the path.

    merged: the whole model, adapters merged, as one .safetensors in our own names (`sample --weights`). diffusers: the
    same as a folder that diffusers loads. peft, kohya: the LoRA alone, as diffusers and as ComfyUI load it. scale: how much
    of the change is kept (None: as it was judged). Raises ValueError for what the run cannot be written as.
    """
    out = Path(out).expanduser()
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not known; choose one of {', '.join(FORMATS)}")
    if format == "merged":
        if out.suffix != ".safetensors":
            raise ValueError(f"--format=merged writes one file: --out must end in .safetensors; got {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
        weights.save(out, load_run(run, scale)[1], dtype=dtype)
        return out
    if format == "diffusers":
        _, params, config = load_run(run, scale)
        if config.model in MODELS:
            raise ValueError(f"{config.model} is no model of diffusers; use --format=merged")
        source = build.folder(config.model, (config.get("model_options") or {}).get("variant"))
        return write_folder(source, params, out, dtype)
    loaded = read_run(run, scale)
    lora = dict(loaded.config.get("lora") or {})
    if not lora:
        raise ValueError(f"{run} trained parameters themselves, not a LoRA; use --format=diffusers or --format=merged")
    rank = max(leaf.shape[-1] for path, leaf in jax.tree.leaves_with_path(loaded.trained) if path[-1].key == "a")
    # W + scale a b of the run, of whose change `keep` is kept: the files say it as alpha / rank
    alpha = rank * loaded.keep * float(lora["alpha"] / lora["rank"] if lora.get("alpha") else lora.get("scale", 1.0))
    out.mkdir(parents=True, exist_ok=True)
    write = lora_files.write_peft if format == "peft" else lora_files.write_kohya
    tops = {name: name for name in loaded.trained}
    write(out / LORA_FILE, loaded.trained, loaded.base, rank=rank, alpha=alpha, prefix=tops, dtype=dtype or np.float32)
    return out / LORA_FILE


def write_folder(source: Path, params: Tree, out: Path, dtype: Any = None) -> Path:
    """A folder as diffusers writes it: configs and tokenizers of `source`, these parameters. ValueError for out == source."""
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the folder that is read; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir() and path.name not in params and not path.name.startswith("."):
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
    for name, tree in params.items():
        (out / name).mkdir(exist_ok=True)
        shutil.copy(source / name / "config.json", out / name / "config.json")
        files.save_component(out / name, tree, stem=stable_diffusion.COMPONENTS[name], dtype=dtype)
    shutil.copy(source / "model_index.json", out / "model_index.json")
    index = json.loads((source / "model_index.json").read_text())
    absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None and not (out / k).is_dir()]
    if absent:  # what is not read, such as a safety checker, is not written either
        (out / "model_index.json").write_text(json.dumps(index | dict.fromkeys(absent, [None, None]), indent=2) + "\n")
    return out


def convert(source: str | Path, out: str | Path, like: str | Path | None = None, dtype: Any = None) -> Path:
    """A single LDM file into a diffusers folder, or a folder into such a file; returns `out`.

    like: for a single file, a folder of the same family, for what the file lacks (configs, tokenizers, scheduler). Raises
    ValueError when it is missing, and for files that do not hold the model.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if source.is_file():
        if like is None:
            raise ValueError(f"{source} holds weights alone; name a folder of the same family with --like, for its configs and "
                             "tokenizers (a download without weights is enough)")  # fmt: skip
        folder = build.folder(str(like))
        shapes = jax.eval_shape(stable_diffusion.stable_diffusion(folder).init, jax.random.key(0))
        tree = {name: files.load_component(source, shape, dtype=None) for name, shape in shapes.items()}
        return write_folder(folder, tree, out, dtype)
    if out.suffix != ".safetensors":
        raise ValueError(f"a folder is converted into one file: --out must end in .safetensors; got {out}")
    folder = build.folder(str(source))
    shapes = jax.eval_shape(stable_diffusion.stable_diffusion(folder).init, jax.random.key(0))
    params = {name: files.load_component(folder / name, shape, stem=stable_diffusion.COMPONENTS[name], dtype=None)
              for name, shape in shapes.items()}  # fmt: skip
    layout = "ldm_xl" if "text_encoder_2" in params else "ldm_2" if _open_clip_text(folder) else "ldm"
    flat: dict[str, np.ndarray] = {}
    for tree in params.values():
        flat |= layouts.put(torch_names.export_torch(tree), layout)
    from safetensors.numpy import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v if dtype is None else v.astype(dtype)) for k, v in flat.items()}, out)
    return out


def _open_clip_text(folder: Path) -> bool:
    """Stable Diffusion 2's text encoder is OpenCLIP's, which has gelu; 1's is OpenAI's, which has quick_gelu."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    return bool(config.get("hidden_act", "quick_gelu") == "gelu")
